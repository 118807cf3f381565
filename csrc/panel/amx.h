// Panels of 16 output rows times tiles of 16 tokens on the matrix unit: bf16 products, fp32 sums.
//
// One tile instruction multiplies A (16 tokens x 32 inputs, row-major) by B (16 pairs of inputs x 16 outputs) and adds
// into C (16 tokens x 16 outputs) in 16 cycles, if two loads fed it. Two token tiles by two panels need 4 loads for 4
// products and keep 4 chains alive (the latency is 52 cycles); a single token tile takes four panels instead. B is
// the weight as it is stored, 1 KB a tile. x is packed into tiles once a pass, [tokens/16][inputs/32][16][32] bf16,
// zero-padded, so that no tile row strides over a power of two.
#pragma once
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "simd/amx.h"

namespace {
namespace panel {

constexpr int64_t kTileTokens = 16, kTileInputs = 32, kTileBytes = 1024;
constexpr int64_t kPassBytesAmx = 1 << 20;      // packed x of one pass: half of a 2 MB L2
constexpr int64_t kSumsBytes = 4 * kTileBytes;  // C of one call of multiply_tiles
constexpr int64_t kTokensAtOnce = 2 * kTileTokens;

// Where a kernel finds A: tile j of token tile i starts at base + i * next + j * step, its rows `stride` bytes apart.
struct Tokens {
  const uint8_t* base;
  int64_t next, step, stride;
};

inline int64_t input_tiles(int64_t k, int64_t multiple) {
  return (k + multiple - 1) / multiple * multiple / kTileInputs;
}

inline int64_t pass_tokens_amx(int64_t tiles) {
  const int64_t fit = kPassBytesAmx / (tiles * 64) / kTokensAtOnce * kTokensAtOnce;
  return fit < kTokensAtOnce ? kTokensAtOnce : fit > 512 ? 512 : fit;
}

// Packs one token tile of the pass (tokens <= 16) into `tiles` tiles; missing tokens and inputs become 0.
inline void pack_tiles(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens, int64_t tiles) {
  const int64_t k = call.weight->header.k;
  uint8_t* dst = call.panel + first * tiles * 64;
  for (int64_t t = 0; t < kTileTokens; ++t)
    for (int64_t j = 0; j < tiles * 2; ++j) {  // 16 inputs a step
      const int64_t c = j * simd::kLanes, row = (pass.first + first + t) * k;
      f32 v = simd::zero();
      if (t < tokens && c + simd::kLanes <= k)
        v = load_as(call.x, row + c, call.type);
      else if (t < tokens && c < k)
        v = load_tail(call.x, row + c, k - c, call.type);
      simd::store_bf16(reinterpret_cast<uint16_t*>(dst + j / 2 * kTileBytes + t * 64 + j % 2 * 32), v);
    }
}

// sums[panel][token tile][16][16] for two token tiles and one or two panels.
template <int kPanels>
inline void two_by(const Tokens& x, const uint8_t* values, int64_t panel_bytes, int64_t tiles, float* sums) {
  const uint8_t *x0 = x.base, *x1 = x.base + x.next, *w0 = values, *w1 = values + panel_bytes;
  ZS_TILE_ZERO(0);
  ZS_TILE_ZERO(1);
  if constexpr (kPanels == 2) {
    ZS_TILE_ZERO(2);
    ZS_TILE_ZERO(3);
  }
  for (int64_t j = 0; j < tiles; ++j) {
    ZS_TILE_LOAD(6, w0 + j * kTileBytes, 64);
    ZS_TILE_LOAD(4, x0 + j * x.step, x.stride);
    ZS_TILE_DOT(0, 4, 6);
    ZS_TILE_LOAD(5, x1 + j * x.step, x.stride);
    ZS_TILE_DOT(1, 5, 6);
    if constexpr (kPanels == 2) {
      ZS_TILE_LOAD(7, w1 + j * kTileBytes, 64);
      ZS_TILE_DOT(2, 4, 7);
      ZS_TILE_DOT(3, 5, 7);
    }
  }
  ZS_TILE_STORE(0, sums, 64);
  ZS_TILE_STORE(1, sums + 256, 64);
  if constexpr (kPanels == 2) {
    ZS_TILE_STORE(2, sums + 512, 64);
    ZS_TILE_STORE(3, sums + 768, 64);
  }
}

// sums[panel][16][16] for one token tile and one, two or four panels.
template <int kPanels>
inline void one_by(const Tokens& x, const uint8_t* values, int64_t panel_bytes, int64_t tiles, float* sums) {
  ZS_TILE_ZERO(0);
  if constexpr (kPanels > 1) ZS_TILE_ZERO(1);
  if constexpr (kPanels > 2) {
    ZS_TILE_ZERO(2);
    ZS_TILE_ZERO(3);
  }
  for (int64_t j = 0; j < tiles; ++j) {
    const uint8_t* w = values + j * kTileBytes;
    ZS_TILE_LOAD(4, x.base + j * x.step, x.stride);
    ZS_TILE_LOAD(5, w, 64);
    ZS_TILE_DOT(0, 4, 5);
    if constexpr (kPanels > 1) {
      ZS_TILE_LOAD(6, w + panel_bytes, 64);
      ZS_TILE_DOT(1, 4, 6);
    }
    if constexpr (kPanels > 2) {
      ZS_TILE_LOAD(5, w + 2 * panel_bytes, 64);
      ZS_TILE_DOT(2, 4, 5);
      ZS_TILE_LOAD(6, w + 3 * panel_bytes, 64);
      ZS_TILE_DOT(3, 4, 6);
    }
  }
  ZS_TILE_STORE(0, sums, 64);
  if constexpr (kPanels > 1) ZS_TILE_STORE(1, sums + 256, 64);
  if constexpr (kPanels > 2) {
    ZS_TILE_STORE(2, sums + 512, 64);
    ZS_TILE_STORE(3, sums + 768, 64);
  }
}

// `tokens` (<= 32) tokens times `rows` rows whose panels share the inputs in `x`: the sums go to y.
inline void multiply_tiles(const zs::Call& call, const Tokens& x, int64_t token, int64_t tokens, const uint8_t* values,
                           int64_t panel_bytes, int64_t first_row, int64_t rows, float* sums) {
  const int64_t tiles = panel_bytes / kTileBytes, panels = (rows + zs::kPanel - 1) / zs::kPanel;
  const int token_tiles = tokens > kTileTokens ? 2 : 1;
  for (int64_t p = 0; p < panels;) {
    const uint8_t* w = values + p * panel_bytes;
    const int64_t left = panels - p;
    int64_t done = 1;
    if (token_tiles == 2 && left >= 2)
      two_by<2>(x, w, panel_bytes, tiles, sums), done = 2;
    else if (token_tiles == 2)
      two_by<1>(x, w, panel_bytes, tiles, sums);
    else if (left >= 4)
      one_by<4>(x, w, panel_bytes, tiles, sums), done = 4;
    else if (left >= 2)
      one_by<2>(x, w, panel_bytes, tiles, sums), done = 2;
    else
      one_by<1>(x, w, panel_bytes, tiles, sums);
    for (int64_t i = 0; i < done; ++i, ++p)
      for (int64_t t = 0; t < tokens; ++t) {
        const f32 sum[1] = {simd::load(sums + i * token_tiles * 256 + t * 16)};
        finish(call, token + t, first_row + p * zs::kPanel, rows - p * zs::kPanel, sum);
      }
  }
}

}  // namespace panel
}  // namespace
