// Attention of one query a head: what a decode step computes. Keys and values are read where they lie.
#pragma once
#include "core.h"

namespace zs {

// y[b, h] = sum_t p[t] v[b, h / per, t], p = softmax over t of scale q[b, h] . k[b, h / per, t]; per = heads / groups.
// Elements of a row are neighbours; strides are in elements.
struct Attention {
  const void *q, *k, *v;
  const uint8_t* mask;  // null, or a byte a token: 0 is not looked at; where none is left, y is 0
  void* y;              // [batch, heads, width]
  Type type;            // of q, k, v and y
  float scale;
  int64_t batch, heads, groups, tokens, depth, width;
  int64_t q_batch, q_head;
  int64_t k_batch, k_head, k_token;
  int64_t v_batch, v_head, v_token;
  int64_t mask_batch;
};

constexpr int64_t kAttentionPad = 16;  // floats: no row's vectors are longer
static constexpr int64_t padded(int64_t count) { return (count + kAttentionPad - 1) / kAttentionPad * kAttentionPad; }
static inline int64_t scratch_floats(const Attention& a) {
  return a.heads / a.groups * (padded(a.depth) + padded(a.tokens) + padded(a.width));
}

// One ISA row's loop: all queries of one group of one sequence.
struct AttentionLoop {
  void (*group)(const Attention& a, int64_t batch, int64_t group, float* scratch);
};

// Each group is computed by one thread in one order, so the result depends neither on the threads nor on the batch.
void attend(const Attention& a, int threads);

}  // namespace zs
