#include "kernels/spmm_strip_nm/layout.h"

namespace zs {

const char* check_strip_nm(const Weight& weight) {
  const Header& header = weight.header;
  const auto values = static_cast<Values>(header.values);
  if (header.group_size) return "stores no integers";
  if (header.sections != 2) return "expected two sections: columns, values";
  if (header.group == 0 || kChunk % header.group) return "M does not divide 64";
  if (header.n == 0 || header.n > header.group) return "N is not between 1 and M";
  if (header.k % header.group) return "the inputs are not a multiple of M";
  if (header.strip == 0 || header.strip % kPanel || header.strip > (1u << 30)) return "V is not a multiple of 16";
  const int64_t kept = strip_nm::kept(header), strips = strip_nm::strips(header);
  if (weight.nbytes[strip_nm::kColumnsSection] != static_cast<uint64_t>(strips * kept))
    return "the columns section does not have the length that the shape asks for";
  if (weight.nbytes[strip_nm::kValuesSection] !=
      static_cast<uint64_t>(dense::panels(header.m) * dense::panel_bytes(kept, values)))
    return "the values section does not have the length that the shape asks for";

  const int64_t in_chunk = strip_nm::kept_in_chunk(header);
  for (int64_t strip = 0; strip < strips; ++strip) {
    const uint8_t* columns = strip_nm::columns_of(weight, strip);
    for (int64_t j = 0; j < kept; ++j) {
      const int64_t chunk = j / in_chunk;
      if (columns[j] >= kChunk || chunk * kChunk + columns[j] >= header.k) return "a column index is out of range";
      if (j % in_chunk && columns[j] <= columns[j - 1]) return "column indices do not ascend";
    }
  }
  return nullptr;
}

}  // namespace zs
