// y = act(x W^T + b) for W [m, k] stored as one bit a weight and the codes of those that are not zero, int8 or int4.
//
// buffer       type          shape                     alignment
// x            fp32/bf16/16  [tokens, k]               any
// bits         u32           [m][4 k/128]              64 (the section); k padded to 128
// row_offsets  u64           [m + 1], bytes            64
// values       u8            see docs/format.md        64; then 64 zero bytes
// scales       fp16/fp32     [m][k/group]              64
// panel        u8            [tokens], padded to 64    64: was there an Inf or NaN?
//                            [tokens] of: i8 [k] the q of panel/quantize.h, i32 [k/group][lanes] where its
//                            sums start, fp32 [k/group] its scales; from token to token 8 cache lines more than a
//                            multiple of 64
// scratch      fp32          sums and products of scales of 32 rows
// y            as x          [tokens, m]               any
//
// Codes are expanded 128 columns at a time over a register that holds the code of zero, so that a column without a
// weight adds (zero code) q, which the start of the sum, -(zero code) sum q, takes away again: exact in integers, no
// mask on either operand, and one expansion serves up to kAtOnce tokens. Each lane starts by itself: a lane is scaled
// before lanes are added, and what it adds must have gone by then. A group's sum becomes fp32 times the product
// of its two scales, which is made once for a row and a step of columns.
//
// Floor for one token: m k / 8 + codes + scales. int4 at 50 % with groups of 64 and fp16 scales: 1 + 2 + 0.25 bits a
// weight, and 0.14 for the shorter chunk of each pair: 3.4 against 4.25 of dense int4, so at most 1.25 times as fast;
// int8 5.25 against 8.25 bits, 1.57.
//
// 128 columns of one token take 7.8 cycles for int4 (groups of 32, 64, 128: 8.8, 7.8, 7.2) and 7.2 to 7.9 for int8, as
// llvm-mca says (Xeon with AVX-512, no AMX, 3.07 GHz, weights in L1 or L2): 50 and 52 billion weights a second, or 21
// and 34 GB/s. What 7.8 cycles took: the high nibbles stay where they are, 16 times the code against a sixteenth of the
// scale, instead of a shift (half a cycle more); expanding over the code of zero instead of into zeros and subtracting
// under the mask, one operation a chunk. A second product that subtracts (zero code) q under the mask would need a
// masked move and a product more a chunk. 8 tokens take 36 cycles. The rest of a row costs as much again as a third of
// it: of 256 rows of 4096 in L2, everything included, 28 billion weights a second became 33 by products of scales
// without a loop over tokens inside (12 %), four pairs a turn (3 to 10 %) and starts added up by lanes, not by columns
// (5 %, of the packing of x). Products of 4 to 32 rows at a time gain nothing in L2 and lose 2 to 8 % from memory.
//
// Codes 4096 bytes and bits and scales 512 bytes ahead are fetched, which is 1.10 to 1.13 times as fast as codes alone
// 1024 bytes ahead, with one thread and with two (4096 x 4096, 50 %, from memory). What did not pay: two rows in turns
// (slower), loading the shared bytes of int4 once for both nibbles (the same).
//
// AVX2 has no expansion; shuffles from a table stand for it, 10 operations for 16 columns, and the loop is bound by
// them, not by memory. What was tried (Zen 4 without AVX-512, 2048 x 2048, 50 %, one token, one thread, cold, medians
// of processor time; billion weights a second, dense int4 38):
//                                                                        int4   int8
//   two entries of 16 bytes added, the count of the first in its upper half  14.4   14.2
//   one table of 8 bytes, the count added from another                       10.5   10.9
//   two halves loaded and shuffled apart                                     12.8
//   BMI2: pdep under a table of byte masks, 8 columns at a time               8.8    9.0
//   the same, the masks made by a pdep as well                                6
//   ranks by a prefix sum of the mask, no table                              10.2
// pdep moves 8 columns in 3 operations besides those for the rank and the nibbles, a shuffle 16, and only one port has
// it (on Zen 1 and 2 it is microcode). So dense integers stay the better choice there, and what is measured when a
// model is compiled.
#pragma once
#include "kernels/spmm_bitmask/bytes.h"
#include "panel/epilogue.h"

namespace {
namespace integers {

constexpr int64_t kUnitRows = 32;
constexpr int64_t kStepBytes = 8192;           // q of one step; the starts may take as much again
constexpr bool kFar = simd::kRegisters == 32;  // how far ahead to fetch: measured on each kind of row
constexpr int64_t kPrefetchBytes = kFar ? 4096 : 1024, kPrefetchBits = 512, kPrefetchScales = 512;
constexpr int64_t kPair = 128;

struct alignas(64) Scratch {
  f32 sums[kUnitRows][kAtOnce];
  float products[kStepBytes / 32];
};

inline zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const zs::Header& header = weight.header;
  const int64_t limit = pass_tokens(header), pass = tokens < limit ? tokens : limit;
  return {
      limit,           kAtOnce, (header.m + kUnitRows - 1) / kUnitRows, flags_bytes(limit) + pass * token_bytes(header),
      sizeof(Scratch), true};
}

// products[t][g] = scale of the row's group `first` + g times that of the token's; groups past the last have 0.
inline void multiply_scales(const zs::Weight& weight, int64_t row, int64_t first, int64_t count, int64_t tokens,
                            const Token& x, int64_t stride, float* products) {
  const int64_t all = panel::groups(weight.header), left = all - first;
  const int64_t full = (count < left ? count : left) / simd::kLanes * simd::kLanes;
  const auto type = static_cast<zs::Type>(weight.header.scales);
  const int64_t size = type == zs::Type::fp32 ? 4 : 2;
  const uint8_t* scales = weight.section[bitmask::kScalesSection] + (row * all + first) * size;
  if (kFar)
    for (int64_t at = 0; at < full * size; at += 64) __builtin_prefetch(scales + at + kPrefetchScales);
  const auto of_token = [&](int64_t t) __attribute__((always_inline)) {
    return reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(x.scales) + t * stride) + first;
  };
  // One token apart: with a loop over tokens inside, this took 12 % of the time of a row of 4096.
  const auto fill = [&](auto load) __attribute__((always_inline)) {
    if (tokens == 1) {
      const float* xs = of_token(0);
      for (int64_t g = 0; g < full; g += simd::kLanes)
        simd::store(products + g, simd::mul(load(g), simd::load(xs + g)));
      return;
    }
    for (int64_t g = 0; g < full; g += simd::kLanes) {
      const f32 w = load(g);
      for (int64_t t = 0; t < tokens; ++t)
        simd::store(products + t * count + g, simd::mul(w, simd::load(of_token(t) + g)));
    }
  };
  if (type == zs::Type::fp32)
    fill([=](int64_t g) __attribute__((always_inline)) { return panel::load_as(scales, g, zs::Type::fp32); });
  else
    fill([=](int64_t g) __attribute__((always_inline)) { return panel::load_as(scales, g, zs::Type::fp16); });
  alignas(64) float part[simd::kLanes];
  for (int64_t g = full; g < count; g += simd::kLanes) {
    simd::store(part, g < left ? panel::load_tail(scales, g, left - g < simd::kLanes ? left - g : simd::kLanes, type)
                               : simd::zero());
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < simd::kLanes && g + i < count; ++i)
        products[t * count + g + i] = part[i] * of_token(t)[g + i];
  }
}

// Pairs [first, first + count) of one row; returns where the next step's codes are.
template <Values kValues, int kGroup, int kTokens>
const uint8_t* multiply_pairs(const uint32_t* bits, int64_t first, int64_t count, const uint8_t* codes, const Token& x,
                              int64_t stride, const float* products, f32* sums) {
  constexpr int64_t kGroups = kPair / kGroup, kStarts = kGroups * simd::start_lanes<kValues>(kGroup);
  // As many chains of additions for any number of tokens: a row gets the same bits in every batch.
  constexpr int kSums = simd::kRegisters == 32 ? 2 : 1;
  f32 acc[kTokens][kSums] = {};
  for (int t = 0; t < kTokens; ++t) acc[t][0] = simd::load(reinterpret_cast<const float*>(sums + t));
  const int8_t* q = x.q + first * kPair;
  const uint8_t* starts = reinterpret_cast<const uint8_t*>(x.starts + first * kStarts);
  const auto pair = [&](int64_t p) __attribute__((always_inline)) {
    __builtin_prefetch(codes + kPrefetchBytes);
    if (kFar) __builtin_prefetch(reinterpret_cast<const uint8_t*>(bits + (first + p) * 4) + kPrefetchBits);
    simd::Chunk chunks[2];
    simd::expand_pair<kValues, kGroup>(bits + (first + p) * 4, codes, chunks);
    for (int t = 0; t < kTokens; ++t)
      simd::add_pair<kValues, kGroup>(acc[t], chunks, q + p * kPair + t * stride,
                                      reinterpret_cast<const int32_t*>(starts + t * stride) + p * kStarts,
                                      products + (t * count + p) * kGroups);
  };
  int64_t p = 0;
  if constexpr (kFar && kTokens == 1)
    for (; p + 4 <= count; p += 4) {
      pair(p);
      pair(p + 1);
      pair(p + 2);
      pair(p + 3);
    }
  for (; p < count; ++p) pair(p);
  for (int t = 0; t < kTokens; ++t) {
    if constexpr (kSums == 2) acc[t][0] = simd::add(acc[t][0], acc[t][1]);
    simd::store(reinterpret_cast<float*>(sums + t), acc[t][0]);
  }
  return codes;
}

// A stored weight, for add_poison.
template <Values kValues>
float weight_at(const zs::Weight& weight, int64_t row, int64_t c) {
  const zs::Header& header = weight.header;
  const uint32_t* bits = bitmask::bits_of(weight, row);
  const uint8_t* codes = weight.section[bitmask::kValuesSection] + bitmask::row_offsets(weight)[row];
  int32_t code = 0;
  for (int64_t p = 0; p <= c / kPair; ++p) {
    alignas(64) uint8_t chunk[2][64];
    const uint8_t* before = codes;
    int64_t taken[2] = {0, 0};
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 64; ++i) {
        const bool set = bits[p * 4 + half * 2 + i / 32] >> i % 32 & 1;
        const int64_t at = taken[half] + (kValues == Values::int8 && half ? taken[0] : 0);
        chunk[half][i] = kValues == Values::int8 ? before[at] : before[at] >> 4 * half & 15;
        taken[half] += set;
      }
    codes += kValues == Values::int8 ? taken[0] + taken[1] : taken[0] > taken[1] ? taken[0] : taken[1];
    code = chunk[c % kPair / 64][c % 64] - simd::kZeroCode<kValues>;
  }
  const int64_t all = panel::groups(header);
  alignas(64) float scale[simd::kLanes];
  simd::store(scale, panel::load_tail(weight.section[bitmask::kScalesSection], row * all + c / header.group_size, 1,
                                      static_cast<zs::Type>(header.scales)));
  return static_cast<float>(code) * scale[0];
}

typedef const uint8_t* (*Multiply)(const uint32_t* bits, int64_t first, int64_t count, const uint8_t* codes,
                                   const Token& x, int64_t stride, const float* products, f32* sums);

// multiply_pairs for `tokens` tokens; the compile-time numbers are found by descent.
template <Values kValues, int kGroup, int kTokens = kAtOnce>
Multiply multiply_for(int64_t tokens) {
  if constexpr (kTokens > 1)
    if (tokens < kTokens) return multiply_for<kValues, kGroup, kTokens - 1>(tokens);
  return multiply_pairs<kValues, kGroup, kTokens>;
}
template <Values kValues>
Multiply multiply_for(int64_t tokens, int64_t group) {
  if (group == 128) return multiply_for<kValues, 128>(tokens);
  return group == 64 ? multiply_for<kValues, 64>(tokens) : multiply_for<kValues, 32>(tokens);
}

// Rows [row, row + rows) for `tokens` (<= kAtOnce) tokens, the first of which is `token` of the pass.
template <Values kValues>
void multiply_tokens(const zs::Call& call, zs::Pass pass, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                     Scratch& scratch) {
  const zs::Weight& weight = *call.weight;
  const int64_t pairs = bitmask::words(weight.header) / 4, step = kStepBytes / kPair / tokens;
  const int64_t stride = token_bytes(weight.header), in_pair = kPair / weight.header.group_size;
  const Multiply multiply = multiply_for<kValues>(tokens, weight.header.group_size);
  const uint8_t* codes[kUnitRows];
  for (int64_t r = 0; r < rows; ++r) {
    codes[r] = weight.section[bitmask::kValuesSection] + bitmask::row_offsets(weight)[row + r];
    for (int64_t t = 0; t < tokens; ++t) scratch.sums[r][t] = simd::zero();
  }
  const Token x = token_at(call, pass, token);
  for (int64_t p = 0; p < pairs; p += step) {
    const int64_t count = pairs - p < step ? pairs - p : step;
    for (int64_t r = 0; r < rows; ++r) {
      multiply_scales(weight, row + r, p * in_pair, count * in_pair, tokens, x, stride, scratch.products);
      codes[r] =
          multiply(bitmask::bits_of(weight, row + r), p, count, codes[r], x, stride, scratch.products, scratch.sums[r]);
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t p = 0; p < rows; p += zs::kPanel) {
      const int64_t count = rows - p < zs::kPanel ? rows - p : zs::kPanel;
      alignas(64) float sums[zs::kPanel] = {};
      for (int64_t r = 0; r < count; ++r) sums[r] = simd::sum(scratch.sums[p + r][t]);
      if (call.panel[token + t])
        bitmask::add_poison(call, pass.first + token + t, row + p, count, sums, 1, bitmask::kPoison,
                            [&](int64_t i, int64_t c) { return weight_at<kValues>(weight, i, c); });
      f32 vectors[zs::kPanel / simd::kLanes];
      for (int v = 0; v < zs::kPanel / simd::kLanes; ++v) vectors[v] = simd::load(sums + v * simd::kLanes);
      panel::finish(call, pass.first + token + t, row + p, count, vectors);
    }
}

template <Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* memory) {
  const zs::Header& header = call.weight->header;
  const int64_t row = unit * kUnitRows, rows = header.m - row < kUnitRows ? header.m - row : kUnitRows;
  for (int64_t t = 0; t < pass.tokens; t += kAtOnce)
    multiply_tokens<kValues>(call, pass, t, pass.tokens - t < kAtOnce ? pass.tokens - t : kAtOnce, row, rows,
                             *reinterpret_cast<Scratch*>(memory));
}

}  // namespace integers
}  // namespace
