// What happens to a sum before it is stored: + bias, activation, conversion to y's type.
//
// exp is a degree-6 polynomial on [-ln2/2, ln2/2] (relative error below 2e-7); erf is Abramowitz and Stegun 7.1.26
// (absolute error below 2e-7), so gelu is exact to 2e-7 |x|.
#pragma once
#include "core.h"
#include "simd/simd.h"

namespace {
namespace panel {

using simd::f32;

inline f32 exp(f32 x) {
  x = simd::min(simd::set(88.0f), simd::max(simd::set(-87.0f), x));
  const f32 n = simd::round(simd::mul(x, simd::set(1.44269504f)));
  f32 r = simd::fma(n, simd::set(-0.693359375f), x);
  r = simd::fma(n, simd::set(2.12194440e-4f), r);
  f32 p = simd::set(1.9875691500e-4f);
  p = simd::fma(p, r, simd::set(1.3981999507e-3f));
  p = simd::fma(p, r, simd::set(8.3334519073e-3f));
  p = simd::fma(p, r, simd::set(4.1665795894e-2f));
  p = simd::fma(p, r, simd::set(1.6666665459e-1f));
  p = simd::fma(p, r, simd::set(5.0000001201e-1f));
  p = simd::fma(simd::mul(r, r), p, simd::add(r, simd::set(1.0f)));
  return simd::scale2(p, n);
}

inline f32 erf(f32 x) {
  const f32 a = simd::abs(x), one = simd::set(1.0f);
  const f32 t = simd::div(one, simd::fma(a, simd::set(0.3275911f), one));
  f32 p = simd::set(1.061405429f);
  p = simd::fma(p, t, simd::set(-1.453152027f));
  p = simd::fma(p, t, simd::set(1.421413741f));
  p = simd::fma(p, t, simd::set(-0.284496736f));
  p = simd::fma(p, t, simd::set(0.254829592f));
  const f32 tail = simd::mul(simd::mul(p, t), exp(simd::mul(simd::sub(simd::zero(), a), a)));
  return simd::copysign(simd::sub(one, tail), x);
}

inline f32 activate(f32 x, zs::Activation activation) {
  const f32 one = simd::set(1.0f);
  switch (activation) {
    case zs::Activation::none:
      return x;
    case zs::Activation::relu:
      return simd::max(simd::zero(), x);
    case zs::Activation::relu2: {
      const f32 positive = simd::max(simd::zero(), x);
      return simd::mul(positive, positive);
    }
    case zs::Activation::silu:
      return simd::div(x, simd::add(one, exp(simd::sub(simd::zero(), x))));
    case zs::Activation::gelu:
      return simd::mul(simd::mul(simd::set(0.5f), x), simd::add(one, erf(simd::mul(x, simd::set(0.70710678f)))));
    case zs::Activation::gelu_tanh: {  // 0.5 x (1 + tanh u) = x / (1 + exp(-2u))
      const f32 u =
          simd::mul(simd::mul(x, simd::set(-1.59576912f)), simd::fma(simd::mul(x, x), simd::set(0.044715f), one));
      return simd::div(x, simd::add(one, exp(u)));
    }
  }
  return x;
}

inline void store_as(void* y, int64_t at, f32 value, zs::Type type) {
  if (type == zs::Type::fp32)
    simd::store(static_cast<float*>(y) + at, value);
  else if (type == zs::Type::bf16)
    simd::store_bf16(static_cast<uint16_t*>(y) + at, value);
  else
    simd::store_fp16(static_cast<uint16_t*>(y) + at, value);
}

// One panel of one token: kPanel sums, of which `rows` exist, go to y[token, row ...].
inline void finish(const zs::Call& call, int64_t token, int64_t row, int64_t rows,
                   const f32 (&sums)[zs::kPanel / simd::kLanes]) {
  const int64_t at = token * call.weight->header.m + row;
  constexpr int kVectors = zs::kPanel / simd::kLanes;
  if (rows >= zs::kPanel) {
    for (int v = 0; v < kVectors; ++v) {
      f32 sum = sums[v];
      if (call.bias) sum = simd::add(sum, simd::load(call.bias + row + v * simd::kLanes));
      store_as(call.y, at + v * simd::kLanes, activate(sum, call.activation), call.type);
    }
    return;
  }
  alignas(64) float bias[zs::kPanel] = {};
  alignas(64) uint8_t full[zs::kPanel * sizeof(float)];
  if (call.bias) __builtin_memcpy(bias, call.bias + row, rows * sizeof(float));
  for (int v = 0; v < kVectors; ++v)
    store_as(full, v * simd::kLanes, activate(simd::add(sums[v], simd::load(bias + v * simd::kLanes)), call.activation),
             call.type);
  const int64_t size = call.type == zs::Type::fp32 ? 4 : 2;
  __builtin_memcpy(static_cast<uint8_t*>(call.y) + at * size, full, rows * size);
}

// The same of `count` tokens: sums [count][kPanel]. Not inlined into the loops: they would lose their registers.
__attribute__((noinline)) void finish_tokens(const zs::Call& call, int64_t token, int64_t count, int64_t row,
                                             int64_t rows, const float* sums) {
  for (int64_t t = 0; t < count; ++t) {
    f32 one[zs::kPanel / simd::kLanes];
    for (int v = 0; v < zs::kPanel / simd::kLanes; ++v) one[v] = simd::load(sums + t * zs::kPanel + v * simd::kLanes);
    finish(call, token + t, row, rows, one);
  }
}

}  // namespace panel
}  // namespace
