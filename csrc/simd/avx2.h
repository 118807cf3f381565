// The vector ops on AVX2 + FMA + F16C (x86-64-v3): eight lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {
namespace simd {

typedef __m256 f32;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

inline f32 zero() { return _mm256_setzero_ps(); }
inline f32 set(float a) { return _mm256_set1_ps(a); }
inline f32 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, f32 v) { _mm256_storeu_ps(p, v); }
inline f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
inline f32 sub(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
inline f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
inline f32 div(f32 a, f32 b) { return _mm256_div_ps(a, b); }
inline f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
inline f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
inline f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
inline f32 abs(f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline f32 copysign(f32 a, f32 sign) { return _mm256_or_ps(abs(a), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign)); }
inline f32 round(f32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline f32 scale2(f32 a, f32 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

inline f32 load_even(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
inline f32 load_odd(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline f32 load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store_bf16(uint16_t* p, f32 v) {  // round to nearest even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i bias = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
  const __m256i result = _mm256_blendv_epi8(quiet, rounded, ordered);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
inline f32 load_fp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_fp16(uint16_t* p, f32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline f32 set_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<short>(*p)), 16));
}
// For each byte of mask and each lane: its rank among the chosen, with the sign bit set; 0 in the lanes not chosen.
struct Ranks {
  int8_t of[256][8];
};
constexpr Ranks make_ranks() {
  Ranks ranks{};
  for (int bits = 0; bits < 256; ++bits)
    for (int lane = 0, rank = 0; lane < 8; ++lane)
      if (bits >> lane & 1) ranks.of[bits][lane] = static_cast<int8_t>(rank++ - 128);
  return ranks;
}
constexpr Ranks kRanks = make_ranks();
struct Lanes {
  __m256i ranks;
  int count;
};
inline Lanes choose(uint32_t bits) {
  const uint32_t low = bits & 0xFF;
  const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks.of[low]));
  return {_mm256_cvtepi8_epi32(ranks), _mm_popcnt_u32(low)};
}
inline f32 expand(f32 v, const Lanes& chosen) { return _mm256_permutevar8x32_ps(v, chosen.ranks); }
inline f32 load_chosen(const float* p, const Lanes& chosen) { return _mm256_maskload_ps(p, chosen.ranks); }
inline float largest(f32 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float sum(f32 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace simd
}  // namespace
