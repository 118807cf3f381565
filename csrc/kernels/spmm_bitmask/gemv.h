// A handful of tokens: x stays as it is, [token][k] in fp32, and the weights are expanded against it a vector at a
// time. One mask gives both the shuffle that puts the next values into their columns and the mask under which x is
// loaded, so that a skipped column is 0 whatever x holds there. One expansion serves all tokens.
//
// Sums: kSets vectors per token in turn, their lanes added at the end of the row.
#pragma once
#include "kernels/spmm_bitmask/layout.h"
#include "panel/activations.h"
#include "panel/epilogue.h"

namespace {
namespace bitmask {

using simd::f32;
constexpr int64_t kFewTokens = 4;
constexpr uint32_t kLaneBits = simd::kLanes == 32 ? ~0u : (1u << simd::kLanes) - 1;

inline int64_t stride(int64_t k) { return (k + 31) / 32 * 32; }  // floats from one token of the panel to the next

inline void pack_few(const zs::Call& call, zs::Pass pass) {
  const int64_t k = call.weight->header.k;
  for (int64_t t = 0; t < pass.tokens; ++t) {
    const int64_t at = (pass.first + t) * k;
    float* dst = reinterpret_cast<float*>(call.panel) + t * stride(k);
    int64_t c = 0;
    for (; c + simd::kLanes <= k; c += simd::kLanes) simd::store(dst + c, panel::load_as(call.x, at + c, call.type));
    if (c < k) simd::store(dst + c, panel::load_tail(call.x, at + c, k - c, call.type)), c += simd::kLanes;
    for (; c < stride(k); c += simd::kLanes) simd::store(dst + c, simd::zero());
  }
}

inline f32 load_values(const float* p) { return simd::load(p); }
inline f32 load_values(const uint16_t* p) { return simd::load_bf16(p); }

// sums[t] = one row times token t.
template <int kTokens, typename Value>
inline void multiply_row(const uint32_t* bits, int64_t words, const Value* values, const float* x, int64_t stride,
                         float (&sums)[kTokens]) {
  constexpr int kSets = kTokens == 1 ? 4 : 2;
  f32 acc[kTokens][kSets] = {};
  for (int64_t w = 0; w < words; ++w)
    for (int i = 0; i < 32 / simd::kLanes; ++i) {
      const simd::Lanes chosen = simd::choose(bits[w] >> i * simd::kLanes & kLaneBits);
      const f32 weights = simd::expand(load_values(values), chosen);
      for (int t = 0; t < kTokens; ++t) {
        f32& sum = acc[t][i % kSets];
        sum = simd::fma(weights, simd::load_chosen(x + t * stride + w * 32 + i * simd::kLanes, chosen), sum);
      }
      values += chosen.count;
    }
  for (int t = 0; t < kTokens; ++t) {
    for (int s = 1; s < kSets; ++s) acc[t][0] = simd::add(acc[t][0], acc[t][s]);
    sums[t] = simd::sum(acc[t][0]);
  }
}

// Rows [row, row + rows) for the kTokens tokens of the pass.
template <int kTokens, typename Value>
inline void multiply_few(const zs::Call& call, zs::Pass pass, int64_t row, int64_t rows) {
  const zs::Weight& weight = *call.weight;
  const Value* values = reinterpret_cast<const Value*>(weight.section[kValuesSection]);
  for (int64_t p = row; p < row + rows; p += zs::kPanel) {
    const int64_t count = row + rows - p < zs::kPanel ? row + rows - p : zs::kPanel;
    alignas(64) float sums[kTokens][zs::kPanel] = {};
    for (int64_t r = 0; r < count; ++r) {
      float one[kTokens];
      multiply_row<kTokens>(bits_of(weight, p + r), words(weight.header), values + row_offsets(weight)[p + r],
                            reinterpret_cast<const float*>(call.panel), stride(weight.header.k), one);
      for (int t = 0; t < kTokens; ++t) sums[t][r] = one[t];
    }
    for (int t = 0; t < kTokens; ++t) {
      f32 vectors[zs::kPanel / simd::kLanes];
      for (int v = 0; v < zs::kPanel / simd::kLanes; ++v) vectors[v] = simd::load(sums[t] + v * simd::kLanes);
      panel::finish(call, pass.first + t, p, count, vectors);
    }
  }
}

}  // namespace bitmask
}  // namespace
