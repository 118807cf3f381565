// Where things are in a `bitmask` blob (docs/format.md).
#pragma once
#include "core.h"

namespace {
namespace bitmask {

constexpr int kBitsSection = 0, kOffsetsSection = 1, kValuesSection = 2, kScalesSection = 3;
constexpr int64_t kTailBytes = 64;  // zeros after the last value, so that a vector load past it stays inside

// Words of bits of a row. Integers come in pairs of chunks of 64 columns.
inline int64_t words(const zs::Header& header) {
  const int64_t k = header.k;
  return header.group_size ? (k + 127) / 128 * 4 : (k + 31) / 32;
}
inline const uint32_t* bits_of(const zs::Weight& weight, int64_t row) {
  return reinterpret_cast<const uint32_t*>(weight.section[kBitsSection]) + row * words(weight.header);
}
inline const uint64_t* row_offsets(const zs::Weight& weight) {
  return reinterpret_cast<const uint64_t*>(weight.section[kOffsetsSection]);
}

inline float as_float(float value) { return value; }
inline float as_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace bitmask
}  // namespace
