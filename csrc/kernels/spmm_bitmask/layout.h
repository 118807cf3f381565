// Where things are in a `bitmask` blob (docs/format.md).
#pragma once
#include "core.h"

namespace {
namespace bitmask {

constexpr int kBitsSection = 0, kOffsetsSection = 1, kValuesSection = 2;
constexpr int64_t kTailBytes = 64;  // zeros after the last value, so that a vector load past it stays inside

inline int64_t words(const zs::Header& header) { return (static_cast<int64_t>(header.k) + 31) / 32; }
inline const uint32_t* bits_of(const zs::Weight& weight, int64_t row) {
  return reinterpret_cast<const uint32_t*>(weight.section[kBitsSection]) + row * words(weight.header);
}
inline const uint64_t* row_offsets(const zs::Weight& weight) {
  return reinterpret_cast<const uint64_t*>(weight.section[kOffsetsSection]);
}

}  // namespace bitmask
}  // namespace
