// Panels of 16 output rows, stored as integer codes, times blocks of tokens whose activations are signed bytes.
//
//   y[t, i] = sum_g scale_w[i, g] scale_x[t, g] sum_(j in g) (code[i, j] - offset) q[t, j]
//
// The inner sum is exact in 32 bits. Codes are stored from 0 up, as the byte products want one unsigned operand; the
// sum starts at -offset sum q, which costs nothing. x is packed into blocks of at most kIntegerBlock tokens:
//   [groups][tokens] i32, -offset sum q;  [groups][tokens] fp32, scale_x;  [inputs/4][tokens][4] i8 (or i16, see
//   simd/dot.h), k padded to whole groups
// A block's codes are taken apart once for all its tokens, and the panel stays in L1/L2 while the blocks go by. Of one
// token the panels are one stream after the other: two or four streams side by side came out at 60 to 80 % of the read
// bandwidth (AVX2, 8 MB matrices from memory), one at 80 to 90 %. Fetching into L2 alone is 1.07 to 1.09 times as fast
// with AVX-512 (Xeon without AMX, int4; int8 1.06) as into L1, whose few buffers wait for memory; 2, 4 and 8 KB ahead
// are alike.
//
// Many tokens fall into blocks of equal size, for a block of few has too few chains of sums: 16 tokens are 16, not 12
// and 4, 20 are two times 10. AVX-512 keeps 16 integer sums in registers and adds the groups up in L1; 20 and 24 tokens
// no longer fit, at half the speed. With that, and with each block fetching ahead, whose first one would wait for
// memory, int4 is 1.49 times as fast at 16 tokens, 1.24 at 32, 1.10 at 128, int8 1.39, 1.24 and 1.08 (2048 x 2048 from
// memory, one thread of that Xeon), fetching being 1.17 and 1.2 of the second.
//
// Every output is one chain of additions over the groups, the same on every row, for any number of threads and
// whatever else is in the batch.
#pragma once
#include "panel/epilogue.h"
#include "panel/quantize.h"

namespace {
namespace panel {

using simd::i32;
// Most tokens of a block: as many integer sums as there are registers for.
constexpr int kIntegerBlock = simd::kLanes == 16 ? 16 : simd::kLanes == 8 ? 4 : 2;
constexpr int64_t kIntegerPassBytes = 512 << 10;   // packed x of one pass: half of a 1 MB L2
constexpr int64_t kAhead = 4096;                   // bytes that a stream of codes is fetched ahead
constexpr int kNear = simd::kLanes == 16 ? 2 : 3;  // and how near: 2 is L2, 3 is L1

template <zs::Values kValues>
constexpr int kOffset = kValues == zs::Values::int4 ? 8 : 128;
template <zs::Values kValues>
constexpr int64_t kQuadBytes = simd::kPairs<kValues> ? 8 : 4;  // four inputs of a token, packed
// Bytes of `inputs` inputs of a panel.
template <zs::Values kValues>
constexpr int64_t code_bytes(int64_t inputs) {
  return inputs * zs::kPanel / (kValues == zs::Values::int4 ? 2 : 1);
}

template <zs::Values kValues>
inline int64_t token_bytes(const zs::Header& header) {
  return groups(header) * (8 + header.group_size / 4 * kQuadBytes<kValues>);
}

// Tokens of a block, so that the last of all has about as many.
inline int64_t integer_block(int64_t tokens) {
  const int64_t blocks = (tokens + kIntegerBlock - 1) / kIntegerBlock;
  return (tokens + blocks - 1) / blocks;
}

template <zs::Values kValues>
inline int64_t integer_pass_tokens(const zs::Header& header, int64_t block) {
  const int64_t fit = kIntegerPassBytes / token_bytes<kValues>(header) / block * block;
  const int64_t least = 4 * block, most = 512 / block * block;
  return fit < least ? least : fit > most ? most : fit;
}

// Packs tokens [first, first + count) of the pass, one block. quantize(t, at, count, q) makes the `count` activations
// at x[at] of token t of the block a group of bytes.
template <zs::Values kValues, typename Quantize>
inline void pack_integers(const zs::Call& call, zs::Pass pass, int64_t first, int64_t count, Quantize quantize) {
  const zs::Header& header = call.weight->header;
  const int64_t k = header.k, size = header.group_size, all = groups(header);
  uint8_t* block = call.panel + first * token_bytes<kValues>(header);
  int32_t* starts = reinterpret_cast<int32_t*>(block);
  float* scales = reinterpret_cast<float*>(block) + all * count;
  uint8_t* quads = block + all * count * 8;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t g = 0; g < all; ++g) {
      alignas(64) int8_t q[kLargestGroup];
      const int64_t at = (pass.first + first + t) * k + g * size, left = k - g * size;
      const Quantized made = quantize(t, at, left < size ? left : size, q);
      starts[g * count + t] = -kOffset<kValues> * made.sum;
      scales[g * count + t] = made.scale;
      uint8_t* dst = quads + (g * size / 4 * count + t) * kQuadBytes<kValues>;
      for (int64_t i = 0; i < size; i += 4, dst += count * kQuadBytes<kValues>) {
        if constexpr (simd::kPairs<kValues>) {
          const int16_t pairs[4] = {q[i], q[i + 2], q[i + 1], q[i + 3]};
          __builtin_memcpy(dst, pairs, 8);
        } else {
          __builtin_memcpy(dst, q + i, 4);
        }
      }
    }
}

// One panel as a kernel sees it.
struct Codes {
  const uint8_t* codes;   // [inputs/4][16][4] of int8, [inputs/8][16][4] of int4
  const uint8_t* scales;  // [groups][16]
  zs::Type type;          // of the scales
};

// finish(token, tokens, sums [tokens][16]) gets the sums, the token counted in the pass.
template <zs::Values kValues, int kTokens, typename Finish>
inline void multiply_codes(const zs::Header& header, const Codes& panel, const uint8_t* block, int64_t token,
                           Finish finish) {
  const int64_t all = groups(header), steps = header.group_size / 32;
  const int32_t* starts = reinterpret_cast<const int32_t*>(block);
  const float* x_scales = reinterpret_cast<const float*>(block) + all * kTokens;
  const uint8_t *x = block + all * kTokens * 8, *codes = panel.codes;
  constexpr int kVectors = simd::kPanelVectors;
  f32 sums[kTokens][kVectors];
  for (auto& row : sums)
    for (f32& sum : row) sum = simd::zero();
  for (int64_t g = 0; g < all; ++g) {
    i32 acc[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) acc[t][v] = simd::set_i32(starts[g * kTokens + t]);
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t line = 0; line < code_bytes<kValues>(32); line += 64)
        __builtin_prefetch(codes + kAhead + line, 0, kNear);
      if constexpr (kValues == zs::Values::int4)
        simd::dot_int4<kTokens>(acc, codes, x);
      else
        simd::dot_int8<kTokens>(acc, codes, x);
      codes += code_bytes<kValues>(32);
      x += 8 * kTokens * kQuadBytes<kValues>;
    }
    for (int v = 0; v < kVectors; ++v) {
      const f32 scale = load_as(panel.scales, g * zs::kPanel + v * simd::kLanes, panel.type);
      for (int t = 0; t < kTokens; ++t)
        sums[t][v] =
            simd::fma(simd::mul(simd::to_f32(acc[t][v]), scale), simd::set(x_scales[g * kTokens + t]), sums[t][v]);
    }
  }
  alignas(64) float tile[kTokens][zs::kPanel];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) simd::store(tile[t] + v * simd::kLanes, sums[t][v]);
  finish(token, kTokens, tile[0]);
}

// `count` (<= kTokens) tokens: the compile-time number is found by descent.
template <zs::Values kValues, int kTokens, typename Finish>
inline void multiply_code_block(const zs::Header& header, const Codes& panel, const uint8_t* block, int64_t token,
                                int64_t count, Finish finish) {
  if (count == kTokens)
    multiply_codes<kValues, kTokens>(header, panel, block, token, finish);
  else if constexpr (kTokens > 1)
    multiply_code_block<kValues, kTokens - 1>(header, panel, block, token, count, finish);
}

// One panel for every token of the pass.
template <zs::Values kValues, typename Finish>
inline void multiply_code_panel(const zs::Call& call, zs::Pass pass, const Codes& panel, Finish finish) {
  const zs::Header& header = call.weight->header;
  const int64_t bytes = token_bytes<kValues>(header), block = pass.packed;
  for (int64_t t = 0; t < pass.tokens; t += block) {
    const int64_t count = pass.tokens - t < block ? pass.tokens - t : block;
    multiply_code_block<kValues, kIntegerBlock>(header, panel, call.panel + t * bytes, t, count, finish);
  }
}

}  // namespace panel
}  // namespace
