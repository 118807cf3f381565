// Where things are in a `csr` blob (docs/format.md).
#pragma once
#include "core.h"

namespace {
namespace csr {

constexpr int kOffsetsSection = 0, kColumnsSection = 1, kValuesSection = 2;

inline bool narrow(const zs::Header& header) { return header.k <= 65536; }  // columns are u16, else u32
inline const uint64_t* row_offsets(const zs::Weight& weight) {
  return reinterpret_cast<const uint64_t*>(weight.section[kOffsetsSection]);
}
template <typename Index>
inline const Index* columns(const zs::Weight& weight) {
  return reinterpret_cast<const Index*>(weight.section[kColumnsSection]);
}

}  // namespace csr
}  // namespace
