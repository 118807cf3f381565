// Panels of 16 output rows times blocks of tokens, accumulated in fp32: the core of `dense` and `strip_nm` on every
// row that has no matrix unit for the value type.
//
//   y[t, i] = sum_j w[i, j] x[t, column(j)]        column(j) = j for dense, the strip's kept columns for strip_nm
//
// The outputs lie in the vector lanes, so a weight is loaded once as it is stored and nothing is transposed on the way
// out. x is packed into blocks of kBlock tokens, [block][k][kBlock] fp32; one step loads the panel's weights of one
// column and broadcasts kBlock activations of that column. Skipping columns therefore costs one index per step and no
// copy of x: the strip's 16 to V rows all take the same kBlock consecutive floats. A block of 6 tokens by two vectors
// (AVX2) or 12 by two (AVX-512) gives 12 and 24 independent sums, enough to hide the FMA latency (4 cycles x 2 ports)
// within the registers there are. Fewer tokens take more panels at once, for the same reason.
//
// Every output is one chain of additions in column order, whatever the block, so results depend neither on the number
// of threads nor on what else is in the batch.
#pragma once
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "panel/transpose4.h"

namespace {
namespace panel {

using zs::kPanel;
constexpr int kVectors = kPanel / simd::kLanes;                // vectors of one panel
constexpr int kSums = simd::kRegisters == 32 ? 24 : 12;        // accumulators that fit beside weights and broadcast
constexpr int kBlock = kVectors == 1 ? 12 : kSums / kVectors;  // tokens of a full block
constexpr int64_t kPassBytes = 512 << 10;                      // packed x of one pass: half of a 1 MB L2

// How many panels a block of `tokens` takes at once.
constexpr int panels_at_once(int tokens) {
  int panels = 1;
  while (panels < 8 && tokens * panels * 2 * kVectors <= kSums) panels *= 2;
  return panels;
}

// The rows of a weight as a kernel sees them: panels that share the kept columns.
struct Strip {
  const uint8_t* values;    // first panel
  int64_t panel_bytes;      // from one panel to the next
  const uint32_t* columns;  // [kept]; with kSkip false they are 0, 1, 2, ...
  int64_t kept;             // columns kept
  int64_t first_row, rows;  // output rows of the strip
};

inline int64_t pass_tokens(int64_t k) {
  const int64_t fit = kPassBytes / (k * 4) / kBlock * kBlock;
  return fit < 4 * kBlock ? 4 * kBlock : fit > 42 * kBlock ? 42 * kBlock : fit;
}

// Packs tokens [first, first + count) of the pass, one block (count <= kBlock): dst[c * count + t] = x[t, c]. Sixteen
// columns at a time, four tokens by four columns in registers: storing single floats took half the time of a
// convolution of 64 channels.
inline void pack_block(const zs::Call& call, zs::Pass pass, int64_t first, int64_t count) {
  constexpr int64_t kColumns = 16;
  const int64_t k = call.weight->header.k, at = (pass.first + first) * k;
  float* dst = reinterpret_cast<float*>(call.panel) + first * k;
  alignas(64) float lines[kBlock * kColumns];
  for (int64_t c = 0; c < k; c += kColumns) {
    const int64_t columns = k - c < kColumns ? k - c : kColumns;
    const float* src = lines;
    int64_t step = kColumns;
    if (call.type == zs::Type::fp32 && columns == kColumns) {
      src = static_cast<const float*>(call.x) + at + c;
      step = k;
    } else {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t v = 0; v < columns; v += simd::kLanes)
          simd::store(lines + t * kColumns + v, columns - v >= simd::kLanes
                                                    ? load_as(call.x, at + t * k + c + v, call.type)
                                                    : load_tail(call.x, at + t * k + c + v, columns - v, call.type));
    }
    int64_t t = 0;
    if (columns == kColumns) {
      for (; t + 4 <= count; t += 4)
        for (int64_t j = 0; j < kColumns; j += 4)
          transpose4(src + t * step + j, step, dst + (c + j) * count + t, count);
      for (; t + 2 <= count; t += 2)
        for (int64_t j = 0; j < kColumns; j += 4)
          transpose2(src + t * step + j, step, dst + (c + j) * count + t, count);
    }
    for (; t < count; ++t)
      for (int64_t j = 0; j < columns; ++j) dst[(c + j) * count + t] = src[t * step + j];
  }
}

template <int kTokens, int kPanels, zs::Values kValues, bool kSkip>
inline void multiply(const zs::Call& call, const Strip& strip, int64_t first_panel, const float* x, int64_t token) {
  f32 sums[kPanels][kTokens][kVectors];
  for (auto& panel : sums)
    for (auto& row : panel)
      for (f32& sum : row) sum = simd::zero();
  const uint8_t* base = strip.values + first_panel * strip.panel_bytes;

  // One column: kPanels x kVectors weights, made by `weights(p, v)`, times kTokens activations.
  const auto step = [&](int64_t j, auto&& weights) __attribute__((always_inline)) {
    const float* at = x + (kSkip ? static_cast<int64_t>(strip.columns[j]) : j) * kTokens;
    f32 w[kPanels][kVectors];
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVectors; ++v) w[p][v] = weights(base + p * strip.panel_bytes, v * simd::kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const f32 broadcast = simd::set(at[t]);
      for (int p = 0; p < kPanels; ++p)
        for (int v = 0; v < kVectors; ++v) sums[p][t][v] = simd::fma(broadcast, w[p][v], sums[p][t][v]);
    }
  };
  if constexpr (kValues == zs::Values::fp32) {
    for (int64_t j = 0; j < strip.kept; ++j)
      step(j, [=](const uint8_t* panel, int lane) __attribute__((always_inline)) {
        return simd::load(reinterpret_cast<const float*>(panel) + j * kPanel + lane);
      });
  } else {
    // The halves of a pair are loaded apart: with both in registers one sum would live in memory (AVX2: half the
    // speed).
    for (int64_t j = 0; j < strip.kept; j += 2) {
      step(j, [=](const uint8_t* panel, int lane) __attribute__((always_inline)) {
        return simd::load_even(reinterpret_cast<const uint16_t*>(panel) + j * kPanel + lane * 2);
      });
      if (j + 1 < strip.kept)
        step(j + 1, [=](const uint8_t* panel, int lane) __attribute__((always_inline)) {
          asm("" : "+r"(panel));  // another address, as far as the compiler can tell
          return simd::load_odd(reinterpret_cast<const uint16_t*>(panel) + j * kPanel + lane * 2);
        });
    }
  }

  for (int p = 0; p < kPanels; ++p) {
    const int64_t row = (first_panel + p) * kPanel;
    for (int t = 0; t < kTokens; ++t) finish(call, token + t, strip.first_row + row, strip.rows - row, sums[p][t]);
  }
}

template <int kTokens, int kPanels, zs::Values kValues, bool kSkip>
inline void multiply_panels(const zs::Call& call, const Strip& strip, int64_t first_panel, int64_t last_panel,
                            const float* x, int64_t token) {
  for (; first_panel + kPanels <= last_panel; first_panel += kPanels)
    multiply<kTokens, kPanels, kValues, kSkip>(call, strip, first_panel, x, token);
  if constexpr (kPanels > 1)
    if (first_panel < last_panel)
      multiply_panels<kTokens, kPanels / 2, kValues, kSkip>(call, strip, first_panel, last_panel, x, token);
}

// `count` (<= kTokens) tokens: the compile-time number is found by descent.
template <int kTokens, zs::Values kValues, bool kSkip>
inline void multiply_block(const zs::Call& call, const Strip& strip, int64_t first_panel, int64_t last_panel,
                           const float* x, int64_t token, int64_t count) {
  if (count == kTokens)
    multiply_panels<kTokens, panels_at_once(kTokens), kValues, kSkip>(call, strip, first_panel, last_panel, x, token);
  else if constexpr (kTokens > 1)
    multiply_block<kTokens - 1, kValues, kSkip>(call, strip, first_panel, last_panel, x, token, count);
}

// The whole strip for every token of the pass. The panels of one group stay in L1/L2 while the blocks go by.
template <zs::Values kValues, bool kSkip>
inline void multiply_strip(const zs::Call& call, zs::Pass pass, const Strip& strip) {
  const int64_t k = call.weight->header.k, panels = (strip.rows + kPanel - 1) / kPanel;
  const float* x = reinterpret_cast<const float*>(call.panel);
  const int64_t group = pass.tokens >= kBlock ? panels_at_once(kBlock) : panels;
  for (int64_t p = 0; p < panels; p += group) {
    const int64_t last = p + group < panels ? p + group : panels;
    for (int64_t t = 0; t < pass.tokens; t += kBlock) {
      const int64_t count = pass.tokens - t < kBlock ? pass.tokens - t : kBlock;
      multiply_block<kBlock, kValues, kSkip>(call, strip, p, last, x + t * k, pass.first + t, count);
    }
  }
}

}  // namespace panel
}  // namespace
