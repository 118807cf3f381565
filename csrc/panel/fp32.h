// Panels of 16 output rows times blocks of tokens, accumulated in fp32: the core of `dense` and `strip_nm` on every
// row that has no matrix unit for the value type.
//
//   y[t, i] = sum_j w[i, j] x[t, column(j)]        column(j) = j for dense, the strip's kept columns for strip_nm
//
// The outputs lie in the vector lanes, so a weight is loaded once as it is stored and nothing is transposed on the way
// out. x is packed into blocks of kBlock tokens, [block][k][kBlock] fp32; one step loads the panel's weights of one
// column and broadcasts kBlock activations of that column. Skipping columns therefore costs one index per step and no
// copy of x: the strip's 16 to V rows all take the same kBlock consecutive floats. A block of 6 tokens by two vectors
// (AVX2) or 14 by two (AVX-512) gives 12 and 28 independent sums, enough to hide the FMA latency (4 cycles x 2 ports)
// within the registers there are. Fewer tokens take more panels at once, for the same reason.
//
// Of many tokens a strip is multiplied one stretch of columns at a time, the sums wait in scratch meanwhile: so one
// pass takes many tokens, a large weight is read from memory once, and what meets stays in L2. Against whole rows and
// shorter passes (AVX2, units of 64 rows, weights from memory): 1.05 to 1.3 times as fast from 64 tokens on where k is
// 2048 or more, 1.0 to 1.1 at 32, the same where k is short; up to 24 tokens 0.75 to 0.95, as short runs of a panel
// hinder prefetching. So few tokens take whole rows. Stretches of 56, 100 and 200 KB are alike, those of 24 KB 0.9
// times as fast. A single block fetches its own weights, 2 KB ahead in each panel: bf16 from memory 1.17 times as fast
// at one token, 1.37 at 8, fp32 1.0 and 1.28 (AVX-512, 4096 x 4096). A last block of up to three tokens that takes all
// panels gains 1.05 to 1.18 at 8 tokens. While the blocks of a panel go by, the weights that come next are fetched, a
// share by each block, for else the first block waits for memory: at 32 tokens 1.1 to 1.15 times as fast, of
// strips 1.15 to 1.25 (2048 x 2048), from 128 tokens on the same. None of this depends on more than token count and k,
// and none changes a bit of the result: rules, not choices to be measured.
//
// AVX-512 without bf16 instructions (two cores of an Intel Xeon, one thread, weights from memory, share of the measured
// peak): two multiply-adds a cycle leave no port free to widen bf16, one operation for 12 or 14. So of more than
// kWholeTokens tokens a stretch of bf16 weights is widened once and then serves all blocks as fp32 does; a block of 14,
// not 12; passes whose x stays in L2 (14 blocks, not 42); and sums that leave their registers in one run, not one call
// a token. Together `dense` bf16 at 32, 128, 512 tokens, 2048 x 2048: 73, 72, 70 % before, 78, 80 to 87, 84 to 88 %
// now; `strip_nm` 2:4@64 69, 67, 60 % before, 76, 79, 75 % now; 1:4@64 65, 63, 44 % before, 72, 69, 65 % now; fp32 75,
// 87, 79 % before and 75, 87, 88 % now. Stretches of 384 and 512 columns are alike, 256 takes 0.95 times and 160 0.9
// times the speed. Six or seven tokens by four panels without widening reach 1.05 to 1.2 of before at 512 tokens, so
// less than this, and fp32 loses a fifth with seven; 24 and 28 tokens by one panel are half as fast.
//
// Every output is one chain of additions in column order, whatever the block, so results depend neither on the number
// of threads nor on what else is in the batch.
#pragma once
#include "panel/blocks.h"
#include "panel/epilogue.h"

namespace {
namespace panel {

constexpr int64_t kStretchBytes = 100 << 10;  // weights of a panel and x of a block in a stretch
constexpr int64_t kAlone = 2048;              // bytes that a single block fetches ahead
constexpr int64_t kWholeTokens = 4 * kBlock;  // up to so many tokens a stretch is all of k
constexpr int64_t kWidenedColumns = 512;      // of a stretch whose bf16 weights are widened first

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

// Kept columns of a strip that are multiplied at once, a multiple of 32; everything where the strip is used only once.
struct Stretch {
  int64_t begin, end;
  float* sums;           // [panels][tokens of the pass][kPanel]
  int64_t tokens;        // of the pass
  const uint8_t* ahead;  // where a full block begins to fetch what comes next, its step for each line of weights
  int64_t ahead_step, ahead_panel;  // and from one panel to the next
  bool alone = false;               // whether the block fetches its own weights, as nobody has before it
};

inline bool whole(int64_t tokens) { return tokens <= kWholeTokens; }
template <zs::Values kValues>
constexpr bool kWidens = kWide && kValues == zs::Values::bf16;

// Scratch for the sums that wait, and behind them the widened weights of a stretch.
inline int64_t waiting_bytes(int64_t rows, int64_t tokens) {
  const int64_t pass = tokens < kPassTokens ? tokens : kPassTokens;
  return whole(pass) ? 0 : (rows + kPanel - 1) / kPanel * kPanel * pass * 4;
}
inline int64_t sums_bytes(int64_t rows, int64_t tokens) {
  const int64_t waiting = waiting_bytes(rows, tokens);
  const int64_t widened = kWide && waiting ? kWidenedColumns * 3 / 2 : 0;
  return waiting + (rows + kPanel - 1) / kPanel * kPanel * widened * 4;
}

template <zs::Values kValues>
inline int64_t stretch_columns(const Strip& strip, int64_t k) {
  constexpr int64_t kWeights = panels_at_once(kBlock) * kPanel * (kValues == zs::Values::bf16 ? 2 : 4);
  const int64_t fit = kStretchBytes / (kWeights + kBlock * 4 * k / (strip.kept > 0 ? strip.kept : 1)) / 32 * 32;
  return fit < 32 ? 32 : fit;
}

template <int kTokens, int kPanels, zs::Values kValues, bool kSkip>
inline void multiply(const zs::Call& call, const Strip& strip, const Stretch& stretch, int64_t first_panel,
                     const float* x, zs::Pass pass, int64_t token) {
  f32 sums[kPanels][kTokens][kVectors];
  float* waiting = stretch.sums + (first_panel * stretch.tokens + token) * kPanel;
  if (stretch.begin) {
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kVectors; ++v)
          sums[p][t][v] = simd::load(waiting + (p * stretch.tokens + t) * kPanel + v * simd::kLanes);
  } else {
    for (auto& panel : sums)
      for (auto& row : panel)
        for (f32& sum : row) sum = simd::zero();
  }
  const uint8_t* base = strip.values + first_panel * strip.panel_bytes;
  constexpr int64_t kColumn = kPanel * (kValues == zs::Values::bf16 ? 2 : 4);

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
  const auto fetch = [&](int64_t j) __attribute__((always_inline)) {
    if (stretch.alone) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(base + p * strip.panel_bytes + j * kColumn + kAlone);
    } else if constexpr (kTokens == kBlock) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * stretch.ahead_panel);
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
    for (; j + 2 <= stretch.end; j += 2) {
      fetch(j);
      if (stretch.alone) fetch(j + 1);
      column(j);
      column(j + 1);
    }
    for (; j < stretch.end; ++j) column(j);
  } else {
    // The halves of a pair are loaded apart: with both in registers one sum would live in memory (AVX2: half the
    // speed).
    for (int64_t j = stretch.begin; j < stretch.end; j += 2) {
      fetch(j);
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

  // One way or the other, each with its own stores: the sums never leave their registers for a loop over them.
  if (stretch.end < strip.kept) {
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kVectors; ++v)
          simd::store(waiting + (p * stretch.tokens + t) * kPanel + v * simd::kLanes, sums[p][t][v]);
    return;
  }
  alignas(64) float tile[kPanels][kTokens][kPanel];
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) simd::store(tile[p][t] + v * simd::kLanes, sums[p][t][v]);
  for (int p = 0; p < kPanels; ++p) {
    const int64_t row = (first_panel + p) * kPanel;
    finish_tokens(call, pass.first + token, kTokens, strip.first_row + row, strip.rows - row, tile[p][0]);
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

// The bf16 weights of columns [begin, end) as fp32: [panels][end - begin][kPanel].
inline void widen(const Strip& strip, int64_t panels, int64_t begin, int64_t end, float* out) {
  for (int64_t p = 0; p < panels; ++p) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(strip.values + p * strip.panel_bytes) + begin * kPanel;
    for (int64_t j = begin; j < end; ++j, out += kPanel) {
      const bool odd = (j - begin) % 2;
      for (int v = 0; v < kVectors; ++v)
        simd::store(out + v * simd::kLanes,
                    odd ? simd::load_odd(pairs + v * simd::kLanes * 2) : simd::load_even(pairs + v * simd::kLanes * 2));
      if (odd) pairs += 2 * kPanel;
    }
  }
}

// The whole strip for every token of the pass; `sums` has sums_bytes.
template <zs::Values kValues, bool kSkip>
inline void multiply_strip(const zs::Call& call, zs::Pass pass, const Strip& strip, uint8_t* sums) {
  const int64_t k = call.weight->header.k, panels = (strip.rows + kPanel - 1) / kPanel;
  const float* x = reinterpret_cast<const float*>(call.panel);
  const bool all = whole(pass.tokens), widens = kWidens<kValues> && !all;
  const int64_t step = all ? strip.kept : widens ? kWidenedColumns : stretch_columns<kValues>(strip, k);
  const int64_t group = panels_at_once(kBlock);
  float* widened = reinterpret_cast<float*>(sums + waiting_bytes(strip.rows, pass.tokens));
  // A last block of few tokens takes more panels at once, for the chains, and so comes after the others: once the
  // weights of all panels lie in L2.
  const int64_t full = pass.tokens / kBlock * kBlock, rest = pass.tokens - full;
  const bool late = full == 0 || (rest <= kBlock / 2 && (!all || kValues == zs::Values::bf16));
  constexpr int64_t kColumn = kPanel * (kValues == zs::Values::bf16 ? 2 : 4);
  const int64_t blocks = full / kBlock;
  int64_t begin = 0;
  do {  // also of a strip that keeps nothing
    const int64_t end = strip.kept - begin < step + step / 2 ? strip.kept : begin + step;
    Stretch stretch{begin, end, reinterpret_cast<float*>(sums), pass.tokens, strip.values, 0, strip.panel_bytes};
    Strip fp32 = strip;
    if (widens) {
      widen(strip, panels, begin, end, widened);
      fp32.panel_bytes = (end - begin) * kPanel * 4;
      fp32.values = reinterpret_cast<const uint8_t*>(widened) - begin * kPanel * 4;
    }
    const auto multiply = [&](int64_t first, int64_t last, int64_t token, int64_t count) {
      if constexpr (kWidens<kValues>)
        if (widens)
          return multiply_block<kBlock, zs::Values::fp32, kSkip>(call, fp32, stretch, first, last, x + token * k, pass,
                                                                 token, count);
      multiply_block<kBlock, kValues, kSkip>(call, strip, stretch, first, last, x + token * k, pass, token, count);
    };
    if (blocks > 1) stretch.ahead_step = (kColumn * 2 + blocks - 1) / blocks;
    for (int64_t p = 0; p < panels; p += group) {
      const int64_t last = p + group < panels ? p + group : panels;
      const int64_t from = widens ? p : last < panels ? last : 0;  // the panel; widened ones are here already
      const int64_t next = !widens && last < panels ? from * strip.panel_bytes + begin * kColumn
                           : end < strip.kept ? from * strip.panel_bytes + end * kColumn
                                              : (panels + from) * strip.panel_bytes;  // as a rule the next strip's
      for (int64_t t = 0; t < full; t += kBlock) {
        stretch.alone = blocks == 1;
        if (blocks > 1) stretch.ahead = strip.values + next + t / kBlock * (end - begin) * kColumn / blocks;
        multiply(p, last, t, kBlock);
      }
      stretch.alone = blocks == 0;
      if (rest && !late) multiply(p, last, full, rest);
    }
    if (rest && late) multiply(0, panels, full, rest);
    begin = end;
  } while (begin < strip.kept);
}

}  // namespace panel
}  // namespace
