// Integers behind a mask on the matrix unit, for any number of tokens, so that a row gets the same bits in every batch:
// the sums of integers.h, so the same rounding of x and the same bound.
//
// buffer   type   shape                             alignment
// panel    u8     [tokens], padded to 64            64: was there an Inf or NaN?
//          of each 16 tokens
//          i8     [tiles][16 quads][16][4]          64: q by fours of inputs, the tiles B; a tile is 64 inputs, or a
//                                                   group of 32 in its half of one
//          i32    [groups][16]                      64: where the sums of a group start
//          fp32   [groups][16]                      64: its scales
// scratch  fp32   [2][2][16][16] sums, i32 as many from the tiles, fp32 [groups][32] scales of the rows
//          u8     [k/64][2][16][64]                 64: 32 rows of codes, expanded: the tiles A
//
// As in amx.cpp the weights are the operand A, and 64 codes of a row are one line of a tile. A sum starts where x says,
// loaded into all rows of C by a tile load of stride 0. A tile C then is worth one group: 16 x 16 sums become fp32,
// times the two scales, and are added up in memory, 3 operations for 16 sums: some 25 cycles beside the 16 of the
// product, and 5 for 128 weights of a row to expand them.
#pragma once
#include "kernels/spmm_bitmask/integers.h"
#include "panel/amx.h"
#include "panel/transpose.h"

namespace {
namespace integer_tiles {

using simd::f32;
using zs::Values;
constexpr int64_t kRows = 32;       // of a unit: two tiles A
constexpr int64_t kBlockPairs = 4;  // 512 inputs of 32 rows at a time: 16 KB
constexpr int64_t kLines = 256;     // numbers of 32 bits in a tile

inline int64_t chunks(const zs::Header& header) { return bitmask::words(header) / 2; }
inline int64_t tile_bytes(const zs::Header& header) {  // of 16 tokens
  const int64_t groups = integers::groups(header), tiles = header.group_size == 32 ? groups : chunks(header);
  return tiles * panel::kTileBytes + groups * 128;
}
inline int64_t pass_tokens(const zs::Header& header) {
  const int64_t fit = panel::kPassBytesAmx / tile_bytes(header) * 16 / panel::kTokensAtOnce * panel::kTokensAtOnce;
  return fit < panel::kTokensAtOnce ? panel::kTokensAtOnce : fit > 256 ? 256 : fit;
}

struct Tile {
  const uint8_t* q;
  const int32_t* starts;
  const float* scales;
};
inline Tile tile_at(const zs::Call& call, zs::Pass pass, int64_t token) {
  const zs::Header& header = call.weight->header;
  const uint8_t* at = call.panel + integers::flags_bytes(pass.tokens) + token / 16 * tile_bytes(header);
  const int64_t groups = integers::groups(header);
  const uint8_t* starts = at + tile_bytes(header) - groups * 128;
  return {at, reinterpret_cast<const int32_t*>(starts), reinterpret_cast<const float*>(starts + groups * 64)};
}

struct alignas(64) Scratch {
  float sums[4][kLines];  // [token tile][panel]
  int32_t tiles[4][kLines];
};
inline int64_t scales_bytes(const zs::Header& header) { return integers::groups(header) * kRows * 4; }

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const zs::Header& header = weight.header;
  const int64_t limit = pass_tokens(header), pass = tokens < limit ? (tokens + 15) / 16 * 16 : limit;
  const int64_t many = integers::flags_bytes(limit) + pass / 16 * tile_bytes(header);
  const int64_t pairs = chunks(header) / 2, held = tokens > panel::kTokensAtOnce ? pairs : kBlockPairs;
  const int64_t scratch = sizeof(Scratch) + scales_bytes(header) + held * 4 * panel::kTileBytes;
  return {limit, panel::kTileTokens, (header.m + kRows - 1) / kRows, many, scratch, true};
}

template <Values kValues>
void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  const zs::Header& header = call.weight->header;
  const int64_t k = header.k, size = header.group_size, groups = integers::groups(header);
  const Tile tile = tile_at(call, pass, first);
  uint8_t* out = const_cast<uint8_t*>(tile.q);
  int32_t* starts = const_cast<int32_t*>(tile.starts);
  float* scales = const_cast<float*>(tile.scales);
  __builtin_memset(out, 0, static_cast<size_t>(tile_bytes(header)));
  for (int64_t t = 0; t < tokens; ++t) {
    bool poisoned = false;
    for (int64_t g = 0; g < groups; ++g) {
      alignas(64) int8_t q[panel::kLargestGroup];
      const int64_t at = g * size, left = k - at;
      panel::Quantized made;
      poisoned |= integers::quantize_finite(call, (pass.first + first + t) * k + at,
                                            left < 0      ? 0
                                            : left < size ? left
                                                          : size,
                                            size, q, made);
      const bool high = simd::is_sixteenfold<kValues>(size) && at / 64 % 2;
      starts[g * 16 + t] = (high ? -16 : -1) * static_cast<int32_t>(simd::kZeroCode<kValues>) * made.sum;
      scales[g * 16 + t] = high ? made.scale / 16 : made.scale;
      for (int64_t i = 0; i < size; i += 4) {
        const int64_t line = size == 32 ? g * 16 + (at % 64 + i) / 4 : (at + i) / 4;
        __builtin_memcpy(out + line * 64 + t * 4, q + i, 4);
      }
    }
    call.panel[first + t] = poisoned;
  }
}

// Expands `count` pairs from pair `first` on of the unit's rows to out[chunk][2][16][64].
template <Values kValues, int kGroup>
inline void expand(const zs::Weight& weight, int64_t row, int64_t rows, int64_t first, int64_t count,
                   const uint8_t* (&codes)[kRows], uint8_t* out) {
  for (int64_t r = 0; r < kRows; ++r) {
    uint8_t* line = out + r * 64;
    const uint32_t* bits = r < rows ? bitmask::bits_of(weight, row + r) + first * 4 : nullptr;
    for (int64_t p = 0; p < count; ++p, line += 4 * panel::kTileBytes) {
      simd::Chunk chunks[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      if (bits) {
        __builtin_prefetch(codes[r] + integers::kPrefetchBytes);
        simd::expand_pair<kValues, kGroup>(bits + p * 4, codes[r], chunks);
      }
      _mm512_store_si512(line, chunks[0]);
      _mm512_store_si512(line + 2 * panel::kTileBytes, chunks[1]);
    }
  }
}

// 16 x 16 sums of a group become fp32: sums[row][token] += tile[row][token] * of the row * of the token.
inline void scale_tile(const int32_t* tile, const float* rows, const float* tokens, float* sums) {
  const f32 x = simd::load(tokens);
  for (int64_t r = 0; r < 16; ++r) {
    const f32 sum = _mm512_cvtepi32_ps(_mm512_load_si512(tile + r * 16));
    simd::store(sums + r * 16, simd::fma(sum, simd::mul(x, simd::set(rows[r])), simd::load(sums + r * 16)));
  }
}

// Adds groups [first, first + count), whose tiles A start at `weights`, to the sums of one or two token tiles.
template <int kGroup, int kTokenTiles>
inline void add_groups(const uint8_t* weights, const Tile (&x)[2], int64_t first, int64_t count,
                       const float* row_scales, Scratch& scratch) {
  for (int64_t g = first; g < first + count; ++g) {
    ZS_TILE_LOAD(0, x[0].starts + g * 16, 0);
    ZS_TILE_LOAD(1, x[0].starts + g * 16, 0);
    if constexpr (kTokenTiles == 2) {
      ZS_TILE_LOAD(2, x[1].starts + g * 16, 0);
      ZS_TILE_LOAD(3, x[1].starts + g * 16, 0);
    }
    for (int i = 0; i < (kGroup == 128 ? 2 : 1); ++i) {
      const int64_t chunk = (g - first) * kGroup / 64 + i;  // of the block
      const int64_t tile = kGroup == 32 ? g : g * kGroup / 64 + i;
      ZS_TILE_LOAD(6, x[0].q + tile * panel::kTileBytes, 64);
      ZS_TILE_LOAD(4, weights + chunk * 2 * panel::kTileBytes, 64);
      ZS_TILE_DOT_BYTES(0, 4, 6);
      ZS_TILE_LOAD(5, weights + (chunk * 2 + 1) * panel::kTileBytes, 64);
      ZS_TILE_DOT_BYTES(1, 5, 6);
      if constexpr (kTokenTiles == 2) {
        ZS_TILE_LOAD(7, x[1].q + tile * panel::kTileBytes, 64);
        ZS_TILE_DOT_BYTES(2, 4, 7);
        ZS_TILE_DOT_BYTES(3, 5, 7);
      }
    }
    ZS_TILE_STORE(0, scratch.tiles[0], 64);
    ZS_TILE_STORE(1, scratch.tiles[1], 64);
    if constexpr (kTokenTiles == 2) {
      ZS_TILE_STORE(2, scratch.tiles[2], 64);
      ZS_TILE_STORE(3, scratch.tiles[3], 64);
    }
    for (int i = 0; i < 2 * kTokenTiles; ++i)
      scale_tile(scratch.tiles[i], row_scales + g * kRows + i % 2 * 16, x[i / 2].scales + g * 16, scratch.sums[i]);
  }
}

template <Values kValues>
inline void finish(const zs::Call& call, zs::Pass pass, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                   Scratch& scratch) {
  for (int64_t first = 0; first < tokens; first += 16)
    for (int64_t p = 0; p < rows; p += zs::kPanel) {
      float* tile = scratch.sums[(first * 2 + p) / 16];
      const int64_t count = tokens - first < 16 ? tokens - first : 16, left = rows - p;
      for (int64_t t = 0; t < count; ++t)
        if (call.panel[token + first + t])
          bitmask::add_poison(call, pass.first + token + first + t, row + p, left < 16 ? left : 16, tile + t, 16,
                              bitmask::kPoison,
                              [&](int64_t i, int64_t c) { return integers::weight_at<kValues>(*call.weight, i, c); });
      panel::finish_tile(call, pass.first + token + first, count, row + p, left, tile);
    }
}

template <Values kValues, int kGroup>
inline void multiply(const zs::Call& call, zs::Pass pass, int64_t row, int64_t rows, uint8_t* memory) {
  const amx::Tiles configured;
  const zs::Weight& weight = *call.weight;
  const int64_t pairs = chunks(weight.header) / 2, all = panel::groups(weight.header);
  constexpr int64_t kGroups = integers::kPair / kGroup;  // of a pair
  Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
  float* scales = reinterpret_cast<float*>(memory + sizeof(Scratch));
  uint8_t* weights = memory + sizeof(Scratch) + scales_bytes(weight.header);
  const auto type = static_cast<zs::Type>(weight.header.scales);
  const uint8_t* codes[kRows] = {};
  for (int64_t r = 0; r < kRows; ++r) {
    if (r < rows) codes[r] = weight.section[bitmask::kValuesSection] + bitmask::row_offsets(weight)[row + r];
    for (int64_t g = 0; g < integers::groups(weight.header); ++g) {
      alignas(64) float one[simd::kLanes] = {};
      if (r < rows && g < all)
        simd::store(one, panel::load_tail(weight.section[bitmask::kScalesSection], (row + r) * all + g, 1, type));
      scales[g * kRows + r] = one[0];
    }
  }

  const auto add = [&](const uint8_t* from, int64_t token, int64_t first, int64_t count)
                       __attribute__((always_inline)) {
                         const bool two = pass.tokens - token > panel::kTileTokens;
                         const Tile x[2] = {tile_at(call, pass, token), tile_at(call, pass, two ? token + 16 : token)};
                         if (two)
                           add_groups<kGroup, 2>(from, x, first * kGroups, count * kGroups, scales, scratch);
                         else
                           add_groups<kGroup, 1>(from, x, first * kGroups, count * kGroups, scales, scratch);
                       };
  const auto clear = [&] { __builtin_memset(scratch.sums, 0, sizeof scratch.sums); };
  const bool once = pass.tokens <= panel::kTokensAtOnce;
  clear();
  for (int64_t p = 0; p < pairs; p += kBlockPairs) {
    const int64_t count = pairs - p < kBlockPairs ? pairs - p : kBlockPairs;
    uint8_t* out = weights + (once ? 0 : p * 4 * panel::kTileBytes);
    expand<kValues, kGroup>(weight, row, rows, p, count, codes, out);
    if (once) add(out, 0, p, count);
  }
  if (once) return finish<kValues>(call, pass, 0, pass.tokens, row, rows, scratch);
  for (int64_t t = 0; t < pass.tokens; t += panel::kTokensAtOnce) {
    clear();
    add(weights, t, 0, pairs);
    const int64_t tokens = pass.tokens - t < panel::kTokensAtOnce ? pass.tokens - t : panel::kTokensAtOnce;
    finish<kValues>(call, pass, t, tokens, row, rows, scratch);
  }
}

template <Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const zs::Header& header = call.weight->header;
  const int64_t row = unit * kRows, rows = header.m - row < kRows ? header.m - row : kRows;
  if (header.group_size == 128)
    multiply<kValues, 128>(call, pass, row, rows, scratch);
  else if (header.group_size == 64)
    multiply<kValues, 64>(call, pass, row, rows, scratch);
  else
    multiply<kValues, 32>(call, pass, row, rows, scratch);
}

}  // namespace integer_tiles
}  // namespace
