// The vector ops on AVX-512 F/BW/DQ/VL: sixteen lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {
namespace simd {

typedef __m512 f32;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

inline f32 zero() { return _mm512_setzero_ps(); }
inline f32 set(float a) { return _mm512_set1_ps(a); }
inline f32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, f32 v) { _mm512_storeu_ps(p, v); }
inline f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
inline f32 sub(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
inline f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
inline f32 div(f32 a, f32 b) { return _mm512_div_ps(a, b); }
inline f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
inline f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
inline f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
inline f32 abs(f32 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
inline f32 copysign(f32 a, f32 sign) { return _mm512_or_ps(abs(a), _mm512_and_ps(_mm512_set1_ps(-0.0f), sign)); }
inline f32 round(f32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline f32 scale2(f32 a, f32 n) { return _mm512_scalef_ps(a, n); }

inline f32 load_even(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline f32 load_odd(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline f32 load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_bf16(uint16_t* p, f32 v) {  // round to nearest even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i bias = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 unordered = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, unordered, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
inline f32 load_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_fp16(uint16_t* p, f32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline f32 set_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<short>(*p)), 16));
}
struct Lanes {
  __mmask16 mask;
  int count;
};
inline Lanes choose(uint32_t bits) { return {static_cast<__mmask16>(bits), _mm_popcnt_u32(bits & 0xFFFF)}; }
inline f32 expand(f32 v, const Lanes& chosen) { return _mm512_maskz_expand_ps(chosen.mask, v); }
inline f32 load_chosen(const float* p, const Lanes& chosen) { return _mm512_maskz_loadu_ps(chosen.mask, p); }
inline float largest(f32 v) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xFF, v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float sum(f32 v) {
  // With a full mask, since GCC 12 warns of its own plain extract and of _mm512_reduce_add_ps.
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xFF, v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace simd
}  // namespace
