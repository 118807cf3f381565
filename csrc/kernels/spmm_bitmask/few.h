// Few tokens: the weights are expanded where they stand and multiplied with x, a vector of columns at a time, each
// expansion serving up to kAtOnce tokens. x is never rounded: the products are fp32, or bf16 pairs where weights and x
// are both bf16 and the row has `vdpbf16ps`.
//
// panel: one byte a token (was there an Inf or NaN?), then x as fp32 [tokens/8][step][token][columns of the step], k
// padded to 32: what a step needs is one run of bytes, which no other step competes with for sets of L1. Against bf16
// weights each run of 2 kLanes columns holds its even columns first and then its odd ones: a 16-bit expansion leaves
// pairs, and as 32-bit lanes a shift makes the even one a float, an `and` the odd one. For bf16 pairs x stays bf16, in
// its order.
//
// A unit's rows pass over a step of columns whose x fits L1 before the next step begins; the sums wait in scratch, one
// vector each, and their lanes are added at the end.
//
// How far ahead to fetch (Xeon with AVX-512, no AMX; 4096 x 4096, 50 %, bf16, one token, from memory): values 4096
// bytes and bits 512 bytes ahead are 1.06 to 1.07 times as fast as values alone 1024 bytes ahead with one thread, 1.12
// with two; 2048 bytes a little less, fetching into L2 only the same. That is about two rows, so memory goes on
// while a row ends.
#pragma once
#include "kernels/spmm_bitmask/poison.h"
#include "panel/epilogue.h"
#include "simd/expand.h"

namespace {
namespace bitmask {

using simd::f32;
constexpr int64_t kUnitRows = 32;
constexpr int64_t kAtOnce = 8;                 // tokens of one expansion
constexpr int64_t kStepFloats = 4096;          // x of one step: 16 KB
constexpr bool kFar = simd::kRegisters == 32;  // how far ahead to fetch: measured on each kind of row
constexpr int64_t kPrefetchBytes = kFar ? 4096 : 1024, kPrefetchBits = 512;

inline int64_t flags_bytes(int64_t tokens) { return (tokens + 63) / 64 * 64; }
template <typename X>
inline X* few_panel(const zs::Call& call, zs::Pass pass) {
  return reinterpret_cast<X*>(call.panel + flags_bytes(pass.tokens));
}
inline int64_t few_bytes(const zs::Header& header, int64_t tokens) {
  return flags_bytes(tokens) + tokens * words(header) * 32 * 4;
}
// Words of one step when `tokens` tokens share an expansion.
inline int64_t step_words(int64_t tokens) { return kStepFloats / 32 / tokens; }

// Tokens [first, first + tokens) of the pass.
template <typename Value, typename X>
inline void pack_few(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  constexpr int64_t kRun = 2 * simd::kLanes;
  const int64_t k = call.weight->header.k, columns = words(call.weight->header) * 32;
  for (int64_t t = first; t < first + tokens; ++t) {
    const int64_t at = (pass.first + t) * k, block = t / kAtOnce * kAtOnce;
    const int64_t shared = pass.tokens - block < kAtOnce ? pass.tokens - block : kAtOnce;
    const int64_t step = step_words(shared) * 32;
    bool poisoned = false;
    for (int64_t s = 0; s < columns; s += step) {
      const int64_t length = columns - s < step ? columns - s : step;
      X* dst = few_panel<X>(call, pass) + block * columns + s * shared + (t - block) * length - s;
      for (int64_t c = s; c < s + length; c += kRun) {
        alignas(64) float run[kRun];
        for (int64_t i = 0; i < kRun; i += simd::kLanes) {
          f32 x = simd::zero();
          if (c + i + simd::kLanes <= k)
            x = panel::load_as(call.x, at + c + i, call.type);
          else if (c + i < k)
            x = panel::load_tail(call.x, at + c + i, k - c - i, call.type);
          simd::store(run + i, x);
        }
        poisoned |= make_finite(run, kRun);
        if constexpr (sizeof(X) == 2) {
          for (int64_t i = 0; i < kRun; i += simd::kLanes) simd::store_bf16(dst + c + i, simd::load(run + i));
        } else {
          for (int64_t i = 0; i < simd::kLanes; ++i) {
            dst[c + i] = run[sizeof(Value) == 2 ? 2 * i : i];
            dst[c + simd::kLanes + i] = run[sizeof(Value) == 2 ? 2 * i + 1 : simd::kLanes + i];
          }
        }
      }
    }
    call.panel[t] = poisoned;
  }
}

// One run of 2 kLanes columns times kTokens tokens.
template <int kTokens, int kSets>
inline void multiply_run(const float* values, uint32_t bits, const float* x, int64_t stride,
                         f32 (&acc)[kSets][kTokens]) {
  constexpr uint32_t kLaneBits = (1u << simd::kLanes) - 1;
  const f32 low = simd::expand_fp32(values, bits & kLaneBits);
  for (int t = 0; t < kTokens; ++t) acc[0][t] = simd::fma(low, simd::load(x + t * stride), acc[0][t]);
  const f32 high = simd::expand_fp32(values + __builtin_popcount(bits & kLaneBits), bits >> simd::kLanes);
  for (int t = 0; t < kTokens; ++t)
    acc[kSets - 1][t] = simd::fma(high, simd::load(x + t * stride + simd::kLanes), acc[kSets - 1][t]);
}
template <int kTokens, int kSets>
inline void multiply_run(const uint16_t* values, uint32_t bits, const float* x, int64_t stride,
                         f32 (&acc)[kSets][kTokens]) {
  const simd::Pair w = simd::expand_bf16(values, bits);
  for (int t = 0; t < kTokens; ++t) acc[0][t] = simd::fma(w.even, simd::load(x + t * stride), acc[0][t]);
  for (int t = 0; t < kTokens; ++t)
    acc[kSets - 1][t] = simd::fma(w.odd, simd::load(x + t * stride + simd::kLanes), acc[kSets - 1][t]);
}
#if defined(ZS_DOT_BF16)
constexpr bool kDots = true;
template <int kTokens, int kSets>
inline void multiply_run(const uint16_t* values, uint32_t bits, const uint16_t* x, int64_t stride,
                         f32 (&acc)[kSets][kTokens]) {
  const __m512i w = simd::expand16(values, bits);
  for (int t = 0; t < kTokens; ++t) acc[0][t] = simd::dot_bf16(acc[0][t], w, x + t * stride);
}
#else
constexpr bool kDots = false;
#endif

// `words` words of one row; returns where the next step's values are.
template <int kTokens, typename Value, typename X>
const Value* multiply_words(const uint32_t* bits, int64_t words, const Value* values, const X* x, int64_t stride,
                            f32* sums) {
  constexpr int kRun = 2 * simd::kLanes, kRuns = 32 / kRun;
  constexpr uint32_t kRunBits = kRun == 32 ? ~0u : (1u << kRun % 32) - 1;
  // Enough chains of additions to hide their latency: even and odd columns apart, words in turns.
  constexpr bool kPairs = sizeof(X) == 2;
  constexpr int kSets = !kPairs && kTokens <= 4 ? 2 : 1, kTurns = kTokens == 1 || (kPairs && kTokens <= 3) ? 2 : 1;
  f32 acc[kTurns][kSets][kTokens] = {};
  for (int t = 0; t < kTokens; ++t) acc[0][0][t] = simd::load(reinterpret_cast<float*>(sums + t));
  const auto step = [&](int64_t w, f32(&into)[kSets][kTokens]) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const uint8_t*>(values) + kPrefetchBytes);
    if (kFar && w % 4 == 0) __builtin_prefetch(reinterpret_cast<const uint8_t*>(bits + w) + kPrefetchBits);
    for (int i = 0; i < kRuns; ++i) {
      const uint32_t run = bits[w] >> i * (kRun % 32) & kRunBits;
      multiply_run<kTokens, kSets>(values, run, x + w * 32 + i * kRun, stride, into);
      values += __builtin_popcount(run);
    }
  };
  int64_t w = 0;
  for (; w + kTurns <= words; w += kTurns)
    for (int i = 0; i < kTurns; ++i) step(w + i, acc[i]);
  if constexpr (kTurns > 1)
    for (; w < words; ++w) step(w, acc[0]);
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kTurns; ++i)
      for (int s = 0; s < kSets; ++s)
        if (i + s > 0) acc[0][0][t] = simd::add(acc[0][0][t], acc[i][s][t]);
    simd::store(reinterpret_cast<float*>(sums + t), acc[0][0][t]);
  }
  return values;
}

struct FewScratch {
  f32 sums[kUnitRows][kAtOnce];
};

template <typename Value, typename X>
using Multiply = const Value* (*)(const uint32_t* bits, int64_t words, const Value* values, const X* x, int64_t stride,
                                  f32* sums);

// multiply_words for `tokens` tokens; the compile-time number is found by descent.
template <typename Value, typename X, int kTokens = kAtOnce>
Multiply<Value, X> multiply_for(int64_t tokens) {
  if constexpr (kTokens > 1)
    if (tokens < kTokens) return multiply_for<Value, X, kTokens - 1>(tokens);
  return multiply_words<kTokens, Value, X>;
}

// Rows [row, row + rows) for `tokens` (<= kAtOnce) tokens, the first of which is `token` of the pass.
template <typename Value, typename X>
void multiply_tokens(const zs::Call& call, zs::Pass pass, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                     FewScratch& scratch) {
  const zs::Weight& weight = *call.weight;
  const int64_t all = words(weight.header), step = step_words(tokens);
  const Multiply<Value, X> multiply = multiply_for<Value, X>(tokens);
  const Value* stored = reinterpret_cast<const Value*>(weight.section[kValuesSection]);
  const Value* values[kUnitRows];
  for (int64_t r = 0; r < rows; ++r) {
    values[r] = stored + row_offsets(weight)[row + r];
    for (int64_t t = 0; t < tokens; ++t) scratch.sums[r][t] = simd::zero();
  }
  const X* x = few_panel<X>(call, pass) + token * all * 32;
  for (int64_t w = 0; w < all; w += step) {
    const int64_t count = all - w < step ? all - w : step;
    for (int64_t r = 0; r < rows; ++r)
      values[r] =
          multiply(bits_of(weight, row + r) + w, count, values[r], x + w * 32 * tokens, count * 32, scratch.sums[r]);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t p = 0; p < rows; p += zs::kPanel) {
      const int64_t count = rows - p < zs::kPanel ? rows - p : zs::kPanel;
      alignas(64) float sums[zs::kPanel] = {};
      for (int64_t r = 0; r < count; ++r) sums[r] = simd::sum(scratch.sums[p + r][t]);
      if (call.panel[token + t])
        add_poison(call, pass.first + token + t, row + p, count, sums, 1, kPoison,
                   [&](int64_t i, int64_t c) { return as_float(stored[row_offsets(weight)[i] + rank(weight, i, c)]); });
      f32 vectors[zs::kPanel / simd::kLanes];
      for (int v = 0; v < zs::kPanel / simd::kLanes; ++v) vectors[v] = simd::load(sums + v * simd::kLanes);
      panel::finish(call, pass.first + token + t, row + p, count, vectors);
    }
}

template <typename Value, typename X>
void multiply_blocks(const zs::Call& call, zs::Pass pass, int64_t row, int64_t rows, FewScratch& scratch) {
  for (int64_t t = 0; t < pass.tokens; t += kAtOnce)
    multiply_tokens<Value, X>(call, pass, t, pass.tokens - t < kAtOnce ? pass.tokens - t : kAtOnce, row, rows, scratch);
}

// Tokens [first, first + tokens) of the pass.
template <typename Value>
inline void pack_few(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  if constexpr (kDots && sizeof(Value) == 2)
    if (call.type == zs::Type::bf16) return pack_few<Value, uint16_t>(call, pass, first, tokens);
  pack_few<Value, float>(call, pass, first, tokens);
}

// Rows [row, row + rows) for every token of the pass.
template <typename Value>
inline void multiply_few(const zs::Call& call, zs::Pass pass, int64_t row, int64_t rows, FewScratch& scratch) {
  if constexpr (kDots && sizeof(Value) == 2)
    if (call.type == zs::Type::bf16) return multiply_blocks<Value, uint16_t>(call, pass, row, rows, scratch);
  multiply_blocks<Value, float>(call, pass, row, rows, scratch);
}

}  // namespace bitmask
}  // namespace
