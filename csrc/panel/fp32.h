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
// Of many tokens a strip is multiplied one stretch of columns at a time, the sums wait in scratch meanwhile: so one
// pass takes many tokens, a large weight is read from memory once, and what meets stays in L2. Against whole rows and
// shorter passes (AVX2, units of 64 rows, weights from memory): 1.05 to 1.3 times as fast from 64 tokens on where k is
// 2048 or more, 1.0 to 1.1 at 32, the same where k is short; up to 24 tokens 0.75 to 0.95, as short runs of a panel
// hinder prefetching. So few tokens take whole rows. Stretches of 56, 100 and 200 KB are alike, those of 24 KB 0.9
// times as fast. A last block of up to three tokens that takes all panels gains 1.05 to 1.18 at 8 tokens. While the
// blocks of a panel go by, the weights that come next are fetched, a share by each block, for else the first block
// waits for memory: at 32 tokens 1.1 to 1.15 times as fast, of strips 1.15 to 1.25 (2048 x 2048), from 128 tokens on
// the same. None of this depends on more than token count and k, and none changes a bit of the result: rules, not
// choices to be measured.
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
constexpr int64_t kPassTokens = 42 * kBlock;                   // most tokens of one pass
constexpr int64_t kPassBytes = 512 << 10;                      // packed x of one pass where the weight fits in L2
constexpr int64_t kNearBytes = 1 << 20;                        // such a weight
constexpr int64_t kStretchBytes = 100 << 10;                   // weights of a panel and x of a block in a stretch
constexpr int64_t kLine = 64;                                  // bytes that are fetched at once
constexpr int64_t kWholeTokens = 4 * kBlock;                   // up to so many tokens a stretch is all of k

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

// Tokens of a pass: a large weight is read once for many, a small one stays in L2, and so should x.
inline int64_t pass_tokens(int64_t k, int64_t weight_bytes) {
  const int64_t fit = weight_bytes > kNearBytes ? kPassTokens : kPassBytes / (k * 4) / kBlock * kBlock;
  return fit < 4 * kBlock ? 4 * kBlock : fit > kPassTokens ? kPassTokens : fit;
}

// Kept columns of a strip that are multiplied at once, a multiple of 32; everything where the strip is used only once.
struct Stretch {
  int64_t begin, end;
  float* sums;           // [panels][tokens of the pass][kPanel]
  int64_t tokens;        // of the pass
  const uint8_t* ahead;  // where a full block begins to fetch what comes next, its step for each line of weights
  int64_t ahead_step;
};

inline int64_t sums_bytes(int64_t rows, int64_t tokens) {
  const int64_t pass = tokens < kPassTokens ? tokens : kPassTokens;
  return pass <= kWholeTokens ? 0 : (rows + kPanel - 1) / kPanel * kPanel * pass * 4;
}

template <zs::Values kValues>
inline int64_t stretch_columns(const Strip& strip, int64_t k) {
  constexpr int64_t kWeights = panels_at_once(kBlock) * kPanel * (kValues == zs::Values::bf16 ? 2 : 4);
  const int64_t fit = kStretchBytes / (kWeights + kBlock * 4 * k / (strip.kept > 0 ? strip.kept : 1)) / 32 * 32;
  return fit < 32 ? 32 : fit;
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
inline void multiply(const zs::Call& call, const Strip& strip, const Stretch& stretch, int64_t first_panel,
                     const float* x, zs::Pass pass, int64_t token) {
  f32 sums[kPanels][kTokens][kVectors];
  const auto waiting = [&](int p, int t, int v) __attribute__((always_inline)) {
    return stretch.sums + ((first_panel + p) * stretch.tokens + token + t) * kPanel + v * simd::kLanes;
  };
  for (int p = 0; p < kPanels; ++p)
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) sums[p][t][v] = stretch.begin ? simd::load(waiting(p, t, v)) : simd::zero();
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
  const uint8_t* ahead = stretch.ahead;
  const auto fetch = [&]() __attribute__((always_inline)) {
    if constexpr (kTokens == kBlock) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * strip.panel_bytes);
      ahead += stretch.ahead_step;
    }
  };
  if constexpr (kValues == zs::Values::fp32) {
    const auto column = [&](int64_t j) __attribute__((always_inline)) {
      step(j, [=](const uint8_t* panel, int lane) __attribute__((always_inline)) {
        return simd::load(reinterpret_cast<const float*>(panel) + j * kPanel + lane);
      });
    };
    int64_t j = stretch.begin;
    if constexpr (kTokens == kBlock)
      for (; j + 2 <= stretch.end; j += 2) {
        fetch();
        column(j);
        column(j + 1);
      }
    for (; j < stretch.end; ++j) column(j);
  } else {
    // The halves of a pair are loaded apart: with both in registers one sum would live in memory (AVX2: half the
    // speed).
    for (int64_t j = stretch.begin; j < stretch.end; j += 2) {
      fetch();
      step(j, [=](const uint8_t* panel, int lane) __attribute__((always_inline)) {
        return simd::load_even(reinterpret_cast<const uint16_t*>(panel) + j * kPanel + lane * 2);
      });
      if (j + 1 < stretch.end)
        step(j + 1, [=](const uint8_t* panel, int lane) __attribute__((always_inline)) {
          asm("" : "+r"(panel));  // another address, as far as the compiler can tell
          return simd::load_odd(reinterpret_cast<const uint16_t*>(panel) + j * kPanel + lane * 2);
        });
    }
  }

  for (int p = 0; p < kPanels; ++p) {
    const int64_t row = (first_panel + p) * kPanel;
    for (int t = 0; t < kTokens; ++t) {
      if (stretch.end < strip.kept)
        for (int v = 0; v < kVectors; ++v) simd::store(waiting(p, t, v), sums[p][t][v]);
      else
        finish(call, pass.first + token + t, strip.first_row + row, strip.rows - row, sums[p][t]);
    }
  }
}

template <int kTokens, int kPanels, zs::Values kValues, bool kSkip>
inline void multiply_panels(const zs::Call& call, const Strip& strip, const Stretch& stretch, int64_t first_panel,
                            int64_t last_panel, const float* x, zs::Pass pass, int64_t token) {
  for (; first_panel + kPanels <= last_panel; first_panel += kPanels)
    multiply<kTokens, kPanels, kValues, kSkip>(call, strip, stretch, first_panel, x, pass, token);
  if constexpr (kPanels > 1)
    if (first_panel < last_panel)
      multiply_panels<kTokens, kPanels / 2, kValues, kSkip>(call, strip, stretch, first_panel, last_panel, x, pass,
                                                            token);
}

// `count` (<= kTokens) tokens: the compile-time number is found by descent.
template <int kTokens, zs::Values kValues, bool kSkip>
inline void multiply_block(const zs::Call& call, const Strip& strip, const Stretch& stretch, int64_t first_panel,
                           int64_t last_panel, const float* x, zs::Pass pass, int64_t token, int64_t count) {
  if (count == kTokens)
    multiply_panels<kTokens, panels_at_once(kTokens), kValues, kSkip>(call, strip, stretch, first_panel, last_panel, x,
                                                                      pass, token);
  else if constexpr (kTokens > 1)
    multiply_block<kTokens - 1, kValues, kSkip>(call, strip, stretch, first_panel, last_panel, x, pass, token, count);
}

// The whole strip for every token of the pass; `sums` has sums_bytes.
template <zs::Values kValues, bool kSkip>
inline void multiply_strip(const zs::Call& call, zs::Pass pass, const Strip& strip, uint8_t* sums) {
  const int64_t k = call.weight->header.k, panels = (strip.rows + kPanel - 1) / kPanel;
  const float* x = reinterpret_cast<const float*>(call.panel);
  const bool whole = pass.tokens <= kWholeTokens;
  const int64_t step = whole ? strip.kept : stretch_columns<kValues>(strip, k), group = panels_at_once(kBlock);
  // A last block of few tokens takes more panels at once, for the chains, and so comes after the others: once the
  // weights of all panels lie in L2.
  const int64_t full = pass.tokens / kBlock * kBlock, rest = pass.tokens - full;
  const bool late = full == 0 || (rest <= kBlock / 2 && (!whole || kValues == zs::Values::bf16));
  constexpr int64_t kColumn = kPanel * (kValues == zs::Values::bf16 ? 2 : 4);
  const int64_t blocks = full / kBlock;
  int64_t begin = 0;
  do {  // also of a strip that keeps nothing
    const int64_t end = strip.kept - begin < step + step / 2 ? strip.kept : begin + step;
    Stretch stretch{begin, end, reinterpret_cast<float*>(sums), pass.tokens, strip.values, 0};
    if (blocks > 1) stretch.ahead_step = (kColumn * 2 + blocks - 1) / blocks;
    for (int64_t p = 0; p < panels; p += group) {
      const int64_t last = p + group < panels ? p + group : panels;
      const int64_t next = last < panels      ? last * strip.panel_bytes + begin * kColumn
                           : end < strip.kept ? end * kColumn
                                              : panels * strip.panel_bytes;  // as a rule the next strip's
      for (int64_t t = 0; t < full; t += kBlock) {
        if (blocks > 1) stretch.ahead = strip.values + next + t / kBlock * (end - begin) * kColumn / blocks;
        multiply_block<kBlock, kValues, kSkip>(call, strip, stretch, p, last, x + t * k, pass, t, kBlock);
      }
      if (rest && !late)
        multiply_block<kBlock, kValues, kSkip>(call, strip, stretch, p, last, x + full * k, pass, full, rest);
    }
    if (rest && late)
      multiply_block<kBlock, kValues, kSkip>(call, strip, stretch, 0, panels, x + full * k, pass, full, rest);
    begin = end;
  } while (begin < strip.kept);
}

}  // namespace panel
}  // namespace
