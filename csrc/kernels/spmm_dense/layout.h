// Where things are in a `dense` blob (docs/format.md).
#pragma once
#include "core.h"

namespace {
namespace dense {

constexpr int kValuesSection = 0;
constexpr int64_t kUnitRows = 64;  // rows of one unit of work

inline int64_t padded(int64_t columns, zs::Values values) {
  return values == zs::Values::bf16 ? (columns + 31) / 32 * 32 : columns;
}
// Bytes of a panel of `columns` columns.
inline int64_t panel_bytes(int64_t columns, zs::Values values) {
  return padded(columns, values) * zs::kPanel * (values == zs::Values::bf16 ? 2 : 4);
}
inline int64_t panels(int64_t rows) { return (rows + zs::kPanel - 1) / zs::kPanel; }
inline int64_t units(const zs::Header& header) { return (header.m + kUnitRows - 1) / kUnitRows; }

}  // namespace dense
}  // namespace
