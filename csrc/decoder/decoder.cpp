#include "decoder/decoder.h"

#include <chrono>

#include "threads.h"

namespace zs {
namespace {

constexpr int64_t kLine = 64;  // bytes: every part of the memory begins on a line of the cache

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What all calls of a step have in common.
struct Step {
  Type type;
  int64_t batch;
  int threads;
  Spent spent{};

  void multiply(const Product& product, const void* x, void* y) {
    const int64_t start = now();
    run(*product.kernel, Call{product.weight, x, product.bias, y, type, product.activation, batch, nullptr}, threads);
    spent.products += now() - start;
  }

  // Returns where the result is: in y, or x itself where there is no such norm.
  const void* normalised(const LayerNorm& norm, const void* x, void* y, int64_t count) const {
    if (!norm.weight) return x;
    normalise(Norm{x, norm.weight, y, type, norm.type, count / norm.width, norm.width, norm.eps, norm.offset}, threads);
    return y;
  }
};

}  // namespace

Spent decode(const Decoder& layer, int threads) {
  const Type type = layer.attention.type;
  const int64_t batch = layer.attention.batch, depth = layer.attention.depth, size = type == Type::fp32 ? 4 : 2;
  const int64_t of_q = layer.attention.heads * depth, of_k = layer.attention.groups * depth;
  const int64_t of_v = layer.attention.groups * layer.attention.width,
                seen = layer.attention.heads * layer.attention.width;
  const int64_t lengths[] = {layer.hidden, of_q,         of_k,        of_v,       seen,
                             layer.hidden, layer.hidden, layer.inner, layer.inner};
  constexpr int kParts = sizeof lengths / sizeof *lengths;
  int64_t ends[kParts], end = 0;
  for (int i = 0; i < kParts; ++i) {
    ends[i] = end;
    end += (lengths[i] * batch * size + kLine - 1) / kLine * kLine;
  }
  thread_local Buffer memory;
  uint8_t* const base = memory.at_least(end);
  uint8_t *const normed = base, *const q = base + ends[1], *const k = base + ends[2], *const v = base + ends[3];
  uint8_t *const attended = base + ends[4], *const out = base + ends[5], *const rest = base + ends[6];
  uint8_t *const gate = base + ends[7], *const up = base + ends[8];
  const int64_t count = batch * layer.hidden;
  Step step{type, batch, threads};

  const void* from = step.normalised(layer.before, layer.x, normed, count);
  step.multiply(layer.q, from, q);
  step.multiply(layer.k, from, k);
  step.multiply(layer.v, from, v);
  step.normalised(layer.of_q, q, q, batch * of_q);
  step.normalised(layer.of_k, k, k, batch * of_k);
  Rotary rotary = layer.rotary;
  rotary.q = q, rotary.k = k, rotary.v = v;
  rotate(rotary);
  Attention attention = layer.attention;
  attention.q = q, attention.y = attended;
  const int64_t start = now();
  attend(attention, threads);
  step.spent.attention = now() - start;
  step.multiply(layer.o, attended, out);
  combine(Pair::add, layer.x, step.normalised(layer.after, out, out, count), rest, type, count, threads);
  from = step.normalised(layer.then, rest, normed, count);
  step.multiply(layer.gate, from, gate);
  step.multiply(layer.up, from, up);
  combine(Pair::multiply, gate, up, gate, type, batch * layer.inner, threads);
  step.multiply(layer.down, gate, out);
  combine(Pair::add, rest, step.normalised(layer.last, out, out, count), layer.y, type, count, threads);
  return step.spent;
}

}  // namespace zs
