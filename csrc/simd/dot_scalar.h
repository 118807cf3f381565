// Any CPU: the compiler's own vectors of 16-bit products. A code of int4 times an activation is at most 15 x 128, so
// sixteen fit; one of int8 fits alone (255 x 128). `simd/dot.h` says what the names mean.
#pragma once

namespace {
namespace simd {

typedef int32_t i32 __attribute__((vector_size(16)));
typedef int16_t i16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
template <zs::Values>
constexpr bool kPairs = true;

inline i32 set_i32(int32_t a) { return i32{a, a, a, a}; }
inline f32 to_f32(i32 v) { return __builtin_convertvector(v, f32); }
inline void store_i8(int8_t* p, f32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v[i] >= -128.0f && v[i] <= 127.0f ? static_cast<int8_t>(v[i]) : 0;
}

inline u16x8 load_codes(const uint8_t* p) {
  u16x8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline i16 broadcast(const uint8_t* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return (i16)set_i32(pair);
}
inline i32 add_pairs(i16 v) { return ((i32)((u32)v << 16) >> 16) + ((i32)v >> 16); }

template <int kTokens>
inline void dot_int8(i32 (&acc)[kTokens][4], const uint8_t* codes, const uint8_t* x) {
  for (int q = 0; q < 8; ++q)
    for (int v = 0; v < 4; ++v) {
      const u16x8 four = load_codes(codes + q * 64 + v * 16);
      const i16 even = (i16)(four & 255), odd = (i16)(four >> 8);
      for (int t = 0; t < kTokens; ++t) {
        const uint8_t* at = x + (q * kTokens + t) * 8;
        acc[t][v] += add_pairs(even * broadcast(at)) + add_pairs(odd * broadcast(at + 4));
      }
    }
}

template <int kTokens>
inline void dot_int4(i32 (&acc)[kTokens][4], const uint8_t* codes, const uint8_t* x) {
  for (int v = 0; v < 4; ++v) {
    i16 part[kTokens] = {};
    for (int p = 0; p < 4; ++p) {
      const u16x8 eight = load_codes(codes + p * 64 + v * 16);
      const i16 low_even = (i16)(eight & 15), low_odd = (i16)(eight >> 8 & 15);
      const i16 high_even = (i16)(eight >> 4 & 15), high_odd = (i16)(eight >> 12);
      for (int t = 0; t < kTokens; ++t) {
        const uint8_t *low = x + (2 * p * kTokens + t) * 8, *high = low + kTokens * 8;
        part[t] += low_even * broadcast(low) + low_odd * broadcast(low + 4) + high_even * broadcast(high) +
                   high_odd * broadcast(high + 4);
      }
    }
    for (int t = 0; t < kTokens; ++t) acc[t][v] += add_pairs(part[t]);
  }
}

}  // namespace simd
}  // namespace
