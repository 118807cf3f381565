// Where things are in a `dense` blob (docs/format.md).
#pragma once
#include "core.h"

namespace {
namespace dense {

constexpr int kValuesSection = 0, kScalesSection = 1;
constexpr int64_t kUnitRows = 64;  // rows of one unit of work

inline int64_t padded(int64_t columns, zs::Values values) {
  return values == zs::Values::bf16 ? (columns + 31) / 32 * 32 : columns;
}
// Bytes of a panel of `columns` columns of fp32 or bf16.
inline int64_t panel_bytes(int64_t columns, zs::Values values) {
  return padded(columns, values) * zs::kPanel * (values == zs::Values::bf16 ? 2 : 4);
}
inline int64_t panels(int64_t rows) { return (rows + zs::kPanel - 1) / zs::kPanel; }
inline int64_t units(const zs::Header& header) { return (header.m + kUnitRows - 1) / kUnitRows; }

// Integers: the codes of a panel, k padded to whole groups, and its scales.
inline int64_t groups(const zs::Header& header) { return (header.k + header.group_size - 1) / header.group_size; }
inline int64_t code_bytes(const zs::Header& header) {
  const bool two_a_byte = static_cast<zs::Values>(header.values) == zs::Values::int4;
  return groups(header) * header.group_size * zs::kPanel / (two_a_byte ? 2 : 1);
}
inline int64_t scale_bytes(const zs::Header& header) {
  return groups(header) * zs::kPanel * (static_cast<zs::Type>(header.scales) == zs::Type::fp16 ? 2 : 4);
}
inline const uint8_t* codes(const zs::Weight& weight, int64_t panel) {
  return weight.section[kValuesSection] + panel * code_bytes(weight.header);
}
inline const uint8_t* scales(const zs::Weight& weight, int64_t panel) {
  return weight.section[kScalesSection] + panel * scale_bytes(weight.header);
}

}  // namespace dense
}  // namespace
