#include "kernels/spmm_csr/layout.h"

namespace zs {
namespace {

// Columns of each row ascend and stay below k. The offsets must have been checked.
template <typename Index>
const char* check_columns(const Weight& weight) {
  const uint64_t* offsets = csr::row_offsets(weight);
  const Index* columns = csr::columns<Index>(weight);
  for (uint32_t row = 0; row < weight.header.m; ++row) {
    if (offsets[row] == offsets[row + 1]) continue;
    bool ascend = true;
    for (uint64_t i = offsets[row] + 1; i < offsets[row + 1]; ++i) ascend &= columns[i - 1] < columns[i];
    if (!ascend) return "column indices do not ascend";
    if (columns[offsets[row + 1] - 1] >= weight.header.k) return "a column index is out of range";
  }
  return nullptr;
}

}  // namespace

const char* check_csr(const Weight& weight) {
  const Header& header = weight.header;
  if (header.group_size) return "stores no integers";
  if (header.sections != 3) return "expected three sections: row_offsets, columns, values";
  if (header.nnz > header.nbytes) return "the header promises more non-zeros than the blob has bytes";
  const bool narrow = csr::narrow(header);
  const uint64_t m = header.m, size = static_cast<Values>(header.values) == Values::bf16 ? 2 : 4;
  if (weight.nbytes[csr::kOffsetsSection] != (m + 1) * sizeof(uint64_t))
    return "the row_offsets section does not have the length that the shape asks for";
  if (weight.nbytes[csr::kColumnsSection] != header.nnz * (narrow ? 2 : 4))
    return "the columns section does not have the length that nnz asks for";
  if (weight.nbytes[csr::kValuesSection] != header.nnz * size)
    return "the values section does not have the length that nnz asks for";

  const uint64_t* offsets = csr::row_offsets(weight);
  if (offsets[0] != 0 || offsets[m] != header.nnz) return "row_offsets do not run from 0 to nnz";
  for (uint64_t row = 0; row < m; ++row)
    if (offsets[row] > offsets[row + 1]) return "row_offsets descend";
  return narrow ? check_columns<uint16_t>(weight) : check_columns<uint32_t>(weight);
}

}  // namespace zs
