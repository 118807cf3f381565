// Packed non-zeros back to their columns. Each op reads a whole vector at `values`, at least as many elements as bits
// are set, and puts the i-th of them where the i-th set bit is; the other lanes become 0.
#pragma once
#include "simd/simd.h"

namespace {
namespace simd {

// 2 kLanes columns: the even ones in one vector, the odd ones in the other.
struct Pair {
  f32 even, odd;
};

#if defined(__AVX512VBMI2__)

// A load that the compiler may not fold into the expansion: expanding from memory is microcode.
inline __m512i load_apart(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}
inline __m512i expand16(const uint16_t* values, uint32_t bits) {
  return _mm512_maskz_expand_epi16(bits, load_apart(values));
}
inline Pair expand_bf16(const uint16_t* values, uint32_t bits) {
  const __m512i v = expand16(values, bits);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
#if defined(__AVX512BF16__)
#define ZS_DOT_BF16
inline f32 dot_bf16(f32 sum, __m512i a, const uint16_t* b) {  // sum + a x b, pairs added
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
}
#endif
inline f32 expand_fp32(const float* values, uint32_t bits) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_castsi512_ps(load_apart(values)));
}

#elif defined(__AVX2__)

// For each byte of bits: the shuffle that moves packed 16-bit elements to the set ones, zero elsewhere.
struct Shuffles {
  alignas(16) uint8_t of[256][16];
};
constexpr Shuffles make_shuffles() {
  Shuffles shuffles{};
  for (int bits = 0; bits < 256; ++bits)
    for (int lane = 0, rank = 0; lane < 8; ++lane) {
      const bool set = bits >> lane & 1;
      shuffles.of[bits][2 * lane] = static_cast<uint8_t>(set ? 2 * rank : 0x80);
      shuffles.of[bits][2 * lane + 1] = static_cast<uint8_t>(set ? 2 * rank + 1 : 0x80);
      rank += set;
    }
  return shuffles;
}
constexpr Shuffles kShuffles = make_shuffles();

inline __m128i expand16_of_8(const uint16_t* values, uint32_t byte) {
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.of[byte])));
}
inline Pair expand_bf16(const uint16_t* values, uint32_t bits) {
  const __m128i low = expand16_of_8(values, bits & 0xFF);
  const __m128i high = expand16_of_8(values + _mm_popcnt_u32(bits & 0xFF), bits >> 8 & 0xFF);
  const __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
inline f32 expand_fp32(const float* values, uint32_t bits) {
  const Lanes chosen = choose(bits);
  return _mm256_blendv_ps(zero(), expand(load(values), chosen), _mm256_castsi256_ps(chosen.ranks));
}

#else

inline Pair expand_bf16(const uint16_t* values, uint32_t bits) {
  u32 even{}, odd{};
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t low = bits >> 2 * i & 1, high = bits >> (2 * i + 1) & 1;
    even[i] = static_cast<uint32_t>(*values) << 16 & (0u - low);
    values += low;
    odd[i] = static_cast<uint32_t>(*values) << 16 & (0u - high);
    values += high;
  }
  return {(f32)even, (f32)odd};
}
inline f32 expand_fp32(const float* values, uint32_t bits) {
  const Lanes chosen = choose(bits);
  return (f32)((u32)expand(load(values), chosen) & chosen.mask);
}

#endif

}  // namespace simd
}  // namespace
