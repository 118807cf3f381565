// VNNI: four products and their sum in a lane at once, 64 a step. `simd/dot.h` says what the names mean.
#pragma once

namespace {
namespace simd {

typedef __m512i i32;
template <zs::Values>
constexpr bool kPairs = false;

inline i32 set_i32(int32_t a) { return _mm512_set1_epi32(a); }
inline f32 to_f32(i32 v) { return _mm512_cvtepi32_ps(v); }
inline void store_i8(int8_t* p, f32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

// acc[t] += weights times the t-th activation at x.
template <int kTokens>
inline void add_quads(i32 (&acc)[kTokens][1], i32 weights, const uint8_t* x) {
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    int32_t quad;
    __builtin_memcpy(&quad, x + t * 4, 4);
    acc[t][0] = _mm512_dpbusd_epi32(acc[t][0], weights, _mm512_set1_epi32(quad));
  }
}

template <int kTokens>
inline void dot_int8(i32 (&acc)[kTokens][1], const uint8_t* codes, const uint8_t* x) {
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) add_quads(acc, _mm512_loadu_si512(codes + q * 64), x + q * kTokens * 4);
}

template <int kTokens>
inline void dot_int4(i32 (&acc)[kTokens][1], const uint8_t* codes, const uint8_t* x) {
  const i32 nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const i32 both = _mm512_loadu_si512(codes + p * 64);
    add_quads(acc, _mm512_and_si512(both, nibble), x + p * kTokens * 8);
    add_quads(acc, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble), x + p * kTokens * 8 + kTokens * 4);
  }
}

}  // namespace simd
}  // namespace
