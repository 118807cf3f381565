// What a decode step does to single numbers: rotary positions, the product of gate and up, sums of residuals.
//
// Every operation is rounded to the tensors' type before the next one, as torch's calls for it are, so that a step
// computed here has the bits of one computed there. No product is contracted with a sum.
#pragma once
#include "core.h"

namespace zs {

// Of each head of q and k, the first `turned` numbers are turned, half of them apart: y[i] = x[i] cos[i] - x[i + half]
// sin[i] and y[i + half] = x[i + half] cos[i + half] + x[i] sin[i + half]; the rest, and v, is copied.
// q [batch, heads, depth], k [batch, groups, depth] and v [batch, groups, width] are dense; q is turned in place, k and
// v go to where the cache has the token. Strides are in elements.
struct Rotary {
  void* q;
  const void *k, *v, *cos, *sin;
  void *to_k, *to_v;
  Type type;
  int64_t batch, heads, groups, depth, width, turned;
  int64_t angle_batch;  // from one sequence's cos and sin to the next one's, 0 if they share them
  int64_t k_batch, k_head, v_batch, v_head;
};

enum class Pair : int32_t { add, multiply };

struct PointwiseLoop {
  void (*rotate)(const Rotary& rotary);
  void (*combine)(Pair what, const void* a, const void* b, void* y, Type type, int64_t first, int64_t last);
};

void rotate(const Rotary& rotary);

// y[i] = a[i] + b[i] or a[i] b[i], `count` numbers; y may be a or b.
void combine(Pair what, const void* a, const void* b, void* y, Type type, int64_t count, int threads);

}  // namespace zs
