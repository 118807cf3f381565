// Reading x: one row of [tokens, k] in any type, as fp32.
#pragma once
#include "core.h"
#include "simd/simd.h"

namespace {
namespace panel {

inline simd::f32 load_as(const void* x, int64_t at, zs::Type type) {
  if (type == zs::Type::fp32) return simd::load(static_cast<const float*>(x) + at);
  if (type == zs::Type::bf16) return simd::load_bf16(static_cast<const uint16_t*>(x) + at);
  return simd::load_fp16(static_cast<const uint16_t*>(x) + at);
}

// The last `count` < kLanes elements of a row, the other lanes 0.
inline simd::f32 load_tail(const void* x, int64_t at, int64_t count, zs::Type type) {
  alignas(64) uint8_t buffer[simd::kLanes * sizeof(float)] = {};
  const int64_t size = type == zs::Type::fp32 ? 4 : 2;
  __builtin_memcpy(buffer, static_cast<const uint8_t*>(x) + at * size, count * size);
  return load_as(buffer, 0, type);
}

}  // namespace panel
}  // namespace
