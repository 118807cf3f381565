// Where things are in a `strip_nm` blob (docs/format.md).
#pragma once
#include "kernels/spmm_dense/layout.h"

namespace {
namespace strip_nm {

constexpr int kColumnsSection = 0, kValuesSection = 1;

inline int64_t kept(const zs::Header& header) { return static_cast<int64_t>(header.k / header.group) * header.n; }
inline int64_t kept_in_chunk(const zs::Header& header) { return zs::kChunk / header.group * header.n; }
inline int64_t strips(const zs::Header& header) { return (header.m + header.strip - 1) / header.strip; }
inline int64_t rows_of(const zs::Header& header, int64_t strip) {
  const int64_t left = header.m - strip * header.strip;
  return left < header.strip ? left : header.strip;
}
inline const uint8_t* columns_of(const zs::Weight& weight, int64_t strip) {
  return weight.section[kColumnsSection] + strip * kept(weight.header);
}
inline const uint8_t* values_of(const zs::Weight& weight, int64_t strip, zs::Values values) {
  const int64_t panels = strip * weight.header.strip / zs::kPanel;
  return weight.section[kValuesSection] + panels * dense::panel_bytes(kept(weight.header), values);
}

}  // namespace strip_nm
}  // namespace
