// One token of each sequence through a decoder layer of a language model: norms, products, rotary positions, attention
// and residuals, one after another in one piece of memory.
#pragma once
#include "attention/attention.h"
#include "core.h"
#include "norm/norm.h"
#include "pointwise/pointwise.h"

namespace zs {

struct Product {
  const Kernel* kernel;
  const Weight* weight;
  const float* bias;  // or null
  Activation activation;
};

struct LayerNorm {
  const void* weight;  // [width], or null where the layer has no such norm
  Type type;           // of the weight
  int64_t width;
  float eps, offset;
};

// r = x + after(o(attend(turn(q(n), k(n)), v(n)))) with n = before(x), and y = r + last(down(gate(n) up(n))) with
// n = then(r). Each result is rounded to the type of x, as the layer's own calls round it.
struct Decoder {
  const void* x;  // [batch, hidden]
  void* y;        // [batch, hidden]
  Product q, k, v, o, gate, up, down;
  LayerNorm before, after, then, last, of_q, of_k;
  Rotary rotary;        // all but q, k and v
  Attention attention;  // all but q and y
  int64_t hidden, inner;
};

struct Spent {
  int64_t products, attention;  // nanoseconds
};

Spent decode(const Decoder& layer, int threads);

}  // namespace zs
