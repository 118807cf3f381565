// Panels of 16 output rows of integer codes times tiles of 16 tokens of signed bytes on the matrix unit.
//
// One tile instruction adds the products of A (16 tokens x 64 inputs) and B (64 inputs x 16 outputs) in 16 cycles. A
// group of inputs ends after one such step (32 inputs: half a one; 128: two), and then its sums have to be scaled: C
// goes through memory into 16 vectors of fp32 sums, one a token, three operations each. That is 48 operations or 24
// cycles a group, and with the loads of tiles, sums and scales about 32: for groups of 64 as many products a cycle as
// bf16 tiles reach that are taken apart and scaled beforehand, without that work (a hundred operations a tile, as
// much as eight tiles of tokens) and without rounding the weights. The sums are those of panel/integers.h, to the bit.
//
// The codes are taken apart in blocks of kTileBlock inputs, 16 KB of signed bytes that stay in L1 while the tokens of
// the pass go by; sums wait in memory from block to block. Four C tiles and two sets of buffers let the tile unit run
// ahead of the scaling.
//
// x is packed by token tiles, [groups x steps][16][step] i8, then [groups][16] fp32 scales, missing tokens 0.
#pragma once
#include "panel/epilogue.h"
#include "panel/quantize.h"
#include "simd/amx.h"

namespace {
namespace panel {

constexpr int64_t kIntegerTokens = 16;    // of a tile
constexpr int64_t kTileBlock = 1024;      // inputs of a panel that are taken apart at once
constexpr int kTilesAhead = 4;            // groups whose products are on their way
constexpr int64_t kMostTileTokens = 512;  // of a pass

struct IntegerScratch {
  alignas(64) int8_t codes[kTileBlock * zs::kPanel];
  alignas(64) int32_t products[2][kTilesAhead][kIntegerTokens * zs::kPanel];
  alignas(64) float sums[kMostTileTokens * zs::kPanel];
};

inline int64_t tile_step(const zs::Header& header) { return header.group_size < 64 ? header.group_size : 64; }

inline int64_t integer_tile_bytes(const zs::Header& header) {  // of a packed token tile
  return groups(header) * kIntegerTokens * (header.group_size + 4);
}

inline int64_t integer_tile_tokens(const zs::Header& header) {
  const int64_t fit = (1 << 20) / integer_tile_bytes(header) * kIntegerTokens;
  return fit < kIntegerTokens ? kIntegerTokens : fit > kMostTileTokens ? kMostTileTokens : fit;
}

// Packs one token tile of the pass (tokens <= 16).
inline void pack_integer_tile(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  const zs::Header& header = call.weight->header;
  const int64_t k = header.k, size = header.group_size, all = groups(header), step = tile_step(header);
  uint8_t* tile = call.panel + first / kIntegerTokens * integer_tile_bytes(header);
  float* scales = reinterpret_cast<float*>(tile + all * size * kIntegerTokens);
  for (int64_t t = 0; t < kIntegerTokens; ++t)
    for (int64_t g = 0; g < all; ++g) {
      alignas(64) int8_t q[kLargestGroup] = {};
      const int64_t left = k - g * size;
      float scale = 0.0f;
      if (t < tokens)
        scale = quantize_group(call.x, (pass.first + first + t) * k + g * size, left < size ? left : size, size,
                               call.type, q)
                    .scale;
      scales[g * kIntegerTokens + t] = scale;
      for (int64_t i = 0; i < size; i += step)
        __builtin_memcpy(tile + (g * size + i) * kIntegerTokens + t * step, q + i, step);
    }
}

// products = the C tile of one group. Tile numbers are immediate operands, hence a macro.
#define ZS_GROUP_PRODUCTS(c, a, b, x, w, products)     \
  do {                                                 \
    ZS_TILE_ZERO(c);                                   \
    for (int64_t i = 0; i < size; i += step) {         \
      ZS_TILE_LOAD(a, (x) + i * kIntegerTokens, step); \
      ZS_TILE_LOAD(b, (w) + i * zs::kPanel, 64);       \
      ZS_TILE_DOT_INT8(c, a, b);                       \
    }                                                  \
    ZS_TILE_STORE(c, products, 64);                    \
  } while (0)

// sums[t] += the groups [first, last) of a panel times one token tile; `w` holds their codes.
inline void add_groups(const zs::Header& header, const uint8_t* tile, const uint8_t* scales, int64_t first,
                       int64_t last, IntegerScratch& scratch, f32 (&sums)[kIntegerTokens]) {
  const int64_t size = header.group_size, step = tile_step(header), bytes = size * kIntegerTokens;
  const float* x_scales = reinterpret_cast<const float*>(tile + groups(header) * bytes);
  const auto type = static_cast<zs::Type>(header.scales);
  // Groups [g, end) were multiplied into products[set]: scale them.
  const auto scale = [&](int set, int64_t g, int64_t end) __attribute__((always_inline)) {
    for (int i = 0; g + i < end; ++i) {
      const f32 weights = load_as(scales, (g + i) * zs::kPanel, type);
      const float* x = x_scales + (g + i) * kIntegerTokens;
      for (int t = 0; t < kIntegerTokens; ++t) {
        const f32 sum = simd::to_f32(_mm512_load_si512(scratch.products[set][i] + t * zs::kPanel));
        sums[t] = simd::fma(simd::mul(sum, weights), simd::set(x[t]), sums[t]);
      }
    }
  };
  int set = 0;
  int64_t scaled = first;
  for (int64_t g = first; g < last; g += kTilesAhead, set ^= 1) {
    const uint8_t* x = tile + g * bytes;
    const int8_t* w = scratch.codes + (g - first) * bytes;
    int32_t (*products)[kIntegerTokens * zs::kPanel] = scratch.products[set];
    ZS_GROUP_PRODUCTS(0, 4, 6, x, w, products[0]);
    if (g + 1 < last) ZS_GROUP_PRODUCTS(1, 5, 7, x + bytes, w + bytes, products[1]);
    if (g + 2 < last) ZS_GROUP_PRODUCTS(2, 4, 6, x + 2 * bytes, w + 2 * bytes, products[2]);
    if (g + 3 < last) ZS_GROUP_PRODUCTS(3, 5, 7, x + 3 * bytes, w + 3 * bytes, products[3]);
    if (scaled < g) scale(set ^ 1, scaled, g);
    scaled = g;
  }
  scale(set ^ 1, scaled, last);
}

// One panel (`rows` of its rows exist) for every token of the pass. `take_apart(g, end, dst)` writes the signed codes
// of groups [g, end) to dst, [inputs/4][16][4]. Needs amx::Tiles(tile_step).
template <typename TakeApart>
inline void multiply_integer_tiles(const zs::Call& call, zs::Pass pass, const uint8_t* scales, int64_t row,
                                   int64_t rows, IntegerScratch& scratch, TakeApart take_apart) {
  const zs::Header& header = call.weight->header;
  const int64_t all = groups(header), block = kTileBlock / header.group_size;
  for (int64_t g = 0; g < all; g += block) {
    const int64_t end = g + block < all ? g + block : all;
    take_apart(g, end, scratch.codes);
    for (int64_t first = 0; first < pass.tokens; first += kIntegerTokens) {
      const uint8_t* tile = call.panel + first / kIntegerTokens * integer_tile_bytes(header);
      float* waiting = scratch.sums + first * zs::kPanel;
      f32 sums[kIntegerTokens];
      for (int t = 0; t < kIntegerTokens; ++t) sums[t] = g ? simd::load(waiting + t * zs::kPanel) : simd::zero();
      add_groups(header, tile, scales, g, end, scratch, sums);
      if (end < all) {
        for (int t = 0; t < kIntegerTokens; ++t) simd::store(waiting + t * zs::kPanel, sums[t]);
        continue;
      }
      const int64_t tokens = pass.tokens - first < kIntegerTokens ? pass.tokens - first : kIntegerTokens;
      for (int64_t t = 0; t < tokens; ++t) {
        const f32 sum[1] = {sums[t]};
        finish(call, pass.first + first + t, row, rows, sum);
      }
    }
  }
}

}  // namespace panel
}  // namespace
