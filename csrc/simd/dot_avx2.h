// AVX2. The byte product adds pairs in 16 bits and saturates: of nibbles sixteen products of at most 15 x 128 fit, so
// 32 inputs are added up there before they are widened; of bytes not even two do, so those are multiplied as 16-bit
// numbers, the even and the odd ones apart. `simd/dot.h` says what the names mean.
#pragma once

namespace {
namespace simd {

typedef __m256i i32;
template <zs::Values kValues>
constexpr bool kPairs = kValues == zs::Values::int8;

inline i32 set_i32(int32_t a) { return _mm256_set1_epi32(a); }
inline f32 to_f32(i32 v) { return _mm256_cvtepi32_ps(v); }
inline void store_i8(int8_t* p, f32 v) {
  const i32 wide = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline i32 load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline i32 broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

template <int kTokens>
inline void dot_int8(i32 (&acc)[kTokens][2], const uint8_t* codes, const uint8_t* x) {
  const i32 low = _mm256_set1_epi16(255);
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const i32 first = load_codes(codes + q * 64), second = load_codes(codes + q * 64 + 32);
    const i32 even[2] = {_mm256_and_si256(first, low), _mm256_and_si256(second, low)};
    const i32 odd[2] = {_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8)};
    for (int t = 0; t < kTokens; ++t) {
      const i32 x_even = broadcast(x + (q * kTokens + t) * 8), x_odd = broadcast(x + (q * kTokens + t) * 8 + 4);
      for (int v = 0; v < 2; ++v)
        acc[t][v] = _mm256_add_epi32(
            acc[t][v], _mm256_add_epi32(_mm256_madd_epi16(even[v], x_even), _mm256_madd_epi16(odd[v], x_odd)));
    }
  }
}

template <int kTokens>
inline void dot_int4(i32 (&acc)[kTokens][2], const uint8_t* codes, const uint8_t* x) {
  const i32 nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  i32 part[kTokens][2];
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const i32 first = load_codes(codes + p * 64), second = load_codes(codes + p * 64 + 32);
    const i32 low[2] = {_mm256_and_si256(first, nibble), _mm256_and_si256(second, nibble)};
    for (int t = 0; t < kTokens; ++t) {
      const i32 four = broadcast(x + (2 * p * kTokens + t) * 4);
      for (int v = 0; v < 2; ++v) {
        const i32 sum = _mm256_maddubs_epi16(low[v], four);
        part[t][v] = p ? _mm256_add_epi16(part[t][v], sum) : sum;
      }
    }
    const i32 high[2] = {_mm256_and_si256(_mm256_srli_epi16(first, 4), nibble),
                         _mm256_and_si256(_mm256_srli_epi16(second, 4), nibble)};
    for (int t = 0; t < kTokens; ++t) {
      const i32 four = broadcast(x + (2 * p * kTokens + kTokens + t) * 4);
      for (int v = 0; v < 2; ++v) part[t][v] = _mm256_add_epi16(part[t][v], _mm256_maddubs_epi16(high[v], four));
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < 2; ++v) acc[t][v] = _mm256_add_epi32(acc[t][v], _mm256_madd_epi16(part[t][v], ones));
}

}  // namespace simd
}  // namespace
