#include "kernels/spmm_bitmask/layout.h"

namespace zs {

const char* check_bitmask(const Weight& weight) {
  const Header& header = weight.header;
  if (header.group_size) return "stores no integers";
  if (header.sections != 3) return "expected three sections: bits, row_offsets, values";
  if (header.nnz > header.nbytes) return "the header promises more non-zeros than the blob has bytes";
  const uint64_t m = header.m, words = bitmask::words(header);
  const uint64_t size = static_cast<Values>(header.values) == Values::bf16 ? 2 : 4;
  if (weight.nbytes[bitmask::kBitsSection] != m * words * sizeof(uint32_t))
    return "the bits section does not have the length that the shape asks for";
  if (weight.nbytes[bitmask::kOffsetsSection] != (m + 1) * sizeof(uint64_t))
    return "the row_offsets section does not have the length that the shape asks for";
  const uint64_t values = header.nnz * size;
  if (weight.nbytes[bitmask::kValuesSection] != values + bitmask::kTailBytes)
    return "the values section does not have the length that nnz asks for";
  for (int64_t i = 0; i < bitmask::kTailBytes; ++i)
    if (weight.section[bitmask::kValuesSection][values + i]) return "the values do not end in 64 bytes of zeros";

  const uint64_t* offsets = bitmask::row_offsets(weight);
  if (offsets[0] != 0 || offsets[m] != header.nnz) return "row_offsets do not run from 0 to nnz";
  const uint32_t beyond = header.k % 32 ? ~0u << header.k % 32 : 0;
  for (uint64_t row = 0; row < m; ++row) {
    const uint32_t* bits = bitmask::bits_of(weight, static_cast<int64_t>(row));
    uint64_t count = 0;
    for (uint64_t i = 0; i < words; ++i) count += __builtin_popcount(bits[i]);
    if (bits[words - 1] & beyond) return "a bit beyond the last column is set";
    if (offsets[row] > header.nnz || offsets[row + 1] - offsets[row] != count)
      return "row_offsets do not follow from the bits";
  }
  return nullptr;
}

}  // namespace zs
