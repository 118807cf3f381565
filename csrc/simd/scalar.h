// The vector ops for any CPU: four lanes of the compiler's own vector type (SSE2 on x86-64, NEON on Arm, else loops).
// Every simd/<isa>.h offers these names. min(a, b) and max(a, b) return b where a lane is NaN, as x86 does.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
namespace simd {

typedef float f32 __attribute__((vector_size(16)));
typedef uint32_t u32 __attribute__((vector_size(16)));
typedef uint16_t u16 __attribute__((vector_size(8)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

inline f32 zero() { return f32{}; }
inline f32 set(float a) { return f32{a, a, a, a}; }
inline f32 load(const float* p) {
  f32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, f32 v) { memcpy(p, &v, sizeof v); }
inline f32 add(f32 a, f32 b) { return a + b; }
inline f32 sub(f32 a, f32 b) { return a - b; }
inline f32 mul(f32 a, f32 b) { return a * b; }
inline f32 div(f32 a, f32 b) { return a / b; }
inline f32 fma(f32 a, f32 b, f32 c) { return a * b + c; }
inline f32 min(f32 a, f32 b) { return a < b ? a : b; }
inline f32 max(f32 a, f32 b) { return a > b ? a : b; }
inline f32 abs(f32 a) { return (f32)((u32)a & 0x7FFFFFFFu); }
inline f32 copysign(f32 a, f32 sign) { return (f32)(((u32)a & 0x7FFFFFFFu) | ((u32)sign & 0x80000000u)); }
inline f32 round(f32 a) {
  for (int i = 0; i < kLanes; ++i) a[i] = nearbyintf(a[i]);
  return a;
}
// a * 2^n for integral n in [-126, 127].
inline f32 scale2(f32 a, f32 n) {
  u32 bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint32_t>(static_cast<int32_t>(n[i]) + 127) << 23;
  return a * (f32)bits;
}

// kLanes pairs of bf16: the even, or the odd, element of each.
inline f32 load_even(const uint16_t* p) {
  u32 bits;
  memcpy(&bits, p, sizeof bits);
  return (f32)(bits << 16);
}
inline f32 load_odd(const uint16_t* p) {
  u32 bits;
  memcpy(&bits, p, sizeof bits);
  return (f32)(bits & 0xFFFF0000u);
}
inline f32 load_bf16(const uint16_t* p) {
  u16 bits;
  memcpy(&bits, p, sizeof bits);
  return (f32)(__builtin_convertvector(bits, u32) << 16);
}
inline void store_bf16(uint16_t* p, f32 v) {  // round to nearest even; NaN stays NaN
  const u32 bits = (u32)v;
  const u32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const u32 quiet = (bits >> 16) | 0x40u;
  const u32 result = v == v ? rounded : quiet;
  const u16 narrow = __builtin_convertvector(result, u16);
  memcpy(p, &narrow, sizeof narrow);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112u) << 23) | (mantissa << 13);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {                                               // subnormal: let the FPU round at 2^-24
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(absolute * 16777216.0f)));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline f32 load_fp16(const uint16_t* p) {
  f32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
}
inline void store_fp16(uint16_t* p, f32 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
}

// One bf16 in every lane.
inline f32 set_bf16(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return set(value);
}
// Lanes chosen by the low kLanes bits of a word. expand(v, chosen): the k-th chosen lane gets lane k of v, the others
// any lane of v. load_chosen: what lies at p, and 0 in the other lanes whatever lies there.
struct Lanes {
  u32 from, mask;
  int count;
};
inline Lanes choose(uint32_t bits) {
  Lanes chosen{};
  for (uint32_t i = 0; i < kLanes; ++i) {
    const uint32_t bit = bits >> i & 1;
    chosen.from[i] = static_cast<uint32_t>(chosen.count) & (kLanes - 1);
    chosen.mask[i] = 0u - bit;
    chosen.count += static_cast<int>(bit);
  }
  return chosen;
}
inline f32 expand(f32 v, const Lanes& chosen) { return __builtin_shuffle(v, chosen.from); }
inline f32 load_chosen(const float* p, const Lanes& chosen) { return (f32)((u32)load(p) & chosen.mask); }
inline float largest(f32 v) {
  const float low = v[0] > v[2] ? v[0] : v[2], high = v[1] > v[3] ? v[1] : v[3];
  return low > high ? low : high;
}
inline float sum(f32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

}  // namespace simd
}  // namespace
