// Inf and NaN in x. The fast loops multiply the zeros too, and 0 times Inf would be NaN; so packing replaces such an x
// by 0 and marks its token, and what it does to the rows that do have a weight there is added to their finished sums.
// Where x is packed as bf16, the few finite numbers that would round to Inf are treated alike.
#pragma once
#include "kernels/spmm_bitmask/layout.h"
#include "panel/activations.h"

namespace {
namespace bitmask {

// The smallest magnitudes, as bits, that are no finite number: in fp32, and after rounding to bf16.
constexpr uint32_t kPoison = 0x7F800000u, kPoisonBf16 = 0x7F7F8000u;

inline bool is_poison(float x, uint32_t limit) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7FFFFFFFu) >= limit;
}

// Replaces poison among `count` floats by 0; true if there was some.
inline bool make_finite(float* x, int64_t count, uint32_t limit = kPoison) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    const uint32_t bad = (bits & 0x7FFFFFFFu) >= limit ? ~0u : 0u;
    found |= bad;
    bits &= ~bad;
    __builtin_memcpy(x + i, &bits, sizeof bits);
  }
  return found != 0;
}

// Adds to sums[r * step], the sums of token `token` (counted in the call) and rows [row, row + rows), what the poison
// among its inputs contributes. `weight_at(row, column)` is a stored weight.
template <typename WeightAt>
__attribute__((noinline, cold)) void add_poison(const zs::Call& call, int64_t token, int64_t row, int64_t rows,
                                                float* sums, int64_t step, uint32_t limit, WeightAt weight_at) {
  const zs::Weight& weight = *call.weight;
  const int64_t k = weight.header.k;
  for (int64_t c = 0; c < k; ++c) {
    alignas(64) float x[simd::kLanes];
    simd::store(x, panel::load_tail(call.x, token * k + c, 1, call.type));
    if (!is_poison(x[0], limit)) continue;
    for (int64_t r = 0; r < rows; ++r)
      if (bits_of(weight, row + r)[c / 32] >> c % 32 & 1) sums[r * step] += weight_at(row + r, c) * x[0];
  }
}

// How many weights of the row are stored before column c.
inline int64_t rank(const zs::Weight& weight, int64_t row, int64_t c) {
  const uint32_t* bits = bits_of(weight, row);
  int64_t count = __builtin_popcount(bits[c / 32] & ((1u << c % 32) - 1));
  for (int64_t w = 0; w < c / 32; ++w) count += __builtin_popcount(bits[w]);
  return count;
}

}  // namespace bitmask
}  // namespace
