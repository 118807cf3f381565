// Transposes of four rows or two, on every instruction set.
#pragma once
#include <cstdint>

namespace {
namespace panel {

typedef float f32x4 __attribute__((vector_size(16), aligned(4), may_alias));

inline f32x4 load4(const float* p) { return *reinterpret_cast<const f32x4*>(p); }
inline void store4(float* p, f32x4 v) { *reinterpret_cast<f32x4*>(p) = v; }

// dst[j * stride + i] = src[i * step + j] for i, j < 4.
inline void transpose4(const float* src, int64_t step, float* dst, int64_t stride) {
  const f32x4 a = load4(src), b = load4(src + step), c = load4(src + 2 * step), d = load4(src + 3 * step);
  const f32x4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const f32x4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store4(dst, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store4(dst + stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store4(dst + 2 * stride, __builtin_shufflevector(AB, CD, 0, 1, 4, 5));
  store4(dst + 3 * stride, __builtin_shufflevector(AB, CD, 2, 3, 6, 7));
}

// The same for i < 2, j < 4.
inline void transpose2(const float* src, int64_t step, float* dst, int64_t stride) {
  const f32x4 a = load4(src), b = load4(src + step);
  const f32x4 low = __builtin_shufflevector(a, b, 0, 4, 1, 5), high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const float* const halves[2] = {reinterpret_cast<const float*>(&low), reinterpret_cast<const float*>(&high)};
  for (int j = 0; j < 4; ++j) __builtin_memcpy(dst + j * stride, halves[j / 2] + j % 2 * 2, 8);
}

}  // namespace panel
}  // namespace
