// Activations as signed bytes: x = q * scale, a scale for each token and group of inputs, scale = max |x| / 127.
//
// Rounding moves each activation by at most scale / 2. So y is off by at most
//   sum over groups (max |x| of the group / 254) (sum |w| of the group)
// beside the fp32 rounding of the sums; the integer products and their sums over a group are exact. A group with an
// Inf or NaN gets the scale NaN: every output of that token is NaN. A group below 1e-36 counts as zero.
#pragma once
#include "panel/activations.h"
#include "simd/dot.h"

namespace {
namespace panel {

constexpr int64_t kLargestGroup = 128;

struct Quantized {
  float scale;
  int32_t sum;  // of the q
};

inline int64_t groups(const zs::Header& header) { return (header.k + header.group_size - 1) / header.group_size; }

// q[0 .. size) from the `count` (1 to size) activations at x[at]; the rest becomes 0.
inline Quantized quantize_group(const void* x, int64_t at, int64_t count, int64_t size, zs::Type type, int8_t* q) {
  alignas(64) float values[kLargestGroup];
  simd::f32 most = simd::zero(), poison = simd::zero();
  for (int64_t i = 0; i < size; i += simd::kLanes) {
    simd::f32 v = simd::zero();
    if (i + simd::kLanes <= count)
      v = load_as(x, at + i, type);
    else if (i < count)
      v = load_tail(x, at + i, count - i, type);
    simd::store(values + i, v);
    most = simd::max(most, simd::abs(v));
    poison = simd::fma(v, simd::zero(), poison);  // 0, or NaN from Inf and NaN
  }
  const float largest = simd::largest(most);
  const bool any = largest > 1e-36f;
  const simd::f32 inverse = simd::set(any ? 127.0f / largest : 0.0f);
  simd::f32 total = simd::zero();
  for (int64_t i = 0; i < size; i += simd::kLanes) {
    const simd::f32 rounded = simd::round(simd::mul(simd::load(values + i), inverse));
    simd::store_i8(q + i, rounded);
    total = simd::add(total, rounded);  // whole numbers: exact
  }
  const float broken = simd::sum(poison);
  return {(any ? largest / 127.0f : 0.0f) + broken, broken == 0.0f ? static_cast<int32_t>(simd::sum(total)) : 0};
}

}  // namespace panel
}  // namespace
