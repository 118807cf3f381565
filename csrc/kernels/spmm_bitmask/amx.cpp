// y = act(x W^T + b), one bit a weight and the non-zeros: bf16 for more than two tokens and integers
// (amx_integers.h) on the matrix unit, the rest as on AVX-512.
//
// buffer   type   shape                            alignment
// panel    u8     [tokens], padded to 64           64: was there an Inf or NaN?
//          bf16   [tokens/16][k/32][16][16][2]     64: x by pairs of inputs, zero-padded: the tiles B
// scratch  fp32   4 tiles of sums
//          bf16   [k/32][2][16][32]                64: 32 rows of weights, expanded: the tiles A
//
// Load sparse, compute dense. The weights are the operand A: 32 inputs of a row are one line of a tile, exactly what
// one 16-bit expansion gives, so nothing of the weights is transposed; x is, once a pass, and so are the sums of each
// 16 x 16 tile on their way out. (With the weights as B, each 16 x 32 of them would need a transpose of 64 shuffles on
// the port that expands.) A unit is 32 rows.
//
// Up to 32 tokens: the expanded weights live in L1, some hundred columns at a time, while the sums stay in the tiles.
// More: all columns are expanded once into L2 and reused by each 32 tokens of the pass.
//
// Floor: m k / 8 + 2 nnz bytes read once a pass. Expanding costs 1 mask move, 2 expansions and a store for 32 weights,
// 3 to 4 cycles: 8 to 11 weights a cycle, 25 GB/s and more at 50 % and 2.8 GHz, above what memory gives one core. The
// tiles add 16 cycles for 512 weights and 16 tokens. So up to some 64 tokens the kernel is bound by reading 9/16 of
// the bytes of dense; far above, by the tiles, where dense does the same work without expanding.
#include "panel/amx.h"

#include "kernels/spmm_bitmask/amx_integers.h"
#include "kernels/spmm_bitmask/vector.h"
#include "panel/table.h"
#include "panel/transpose.h"

namespace {

constexpr int64_t kFewOnTiles = 2;   // up to here the loop of few.h serves
constexpr int64_t kRows = 32;        // rows of a unit: two tiles A
constexpr int64_t kBlockTiles = 16;  // 512 inputs of 32 rows: 32 KB, an L1

int64_t tiles_of(const zs::Weight& weight) { return bitmask::words(weight.header); }

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const int64_t tiles = tiles_of(weight), limit = panel::pass_tokens_amx(tiles);
  const int64_t pass = tokens < limit ? (tokens + 15) / 16 * 16 : limit;
  const int64_t few = bitmask::few_bytes(weight.header, kFewOnTiles);
  const int64_t many = bitmask::flags_bytes(limit) + pass * tiles * 64;
  const int64_t held = tokens > panel::kTokensAtOnce || tiles < kBlockTiles ? tiles : kBlockTiles;
  const int64_t scratch = panel::kSumsBytes + held * 2 * panel::kTileBytes;
  constexpr int64_t kFewScratch = sizeof(vector::Scratch);
  return {limit,
          panel::kTileTokens,
          (weight.header.m + kRows - 1) / kRows,
          many > few ? many : few,
          scratch > kFewScratch ? scratch : kFewScratch,
          true};
}

uint8_t* tiles_x(const zs::Call& call, zs::Pass pass) { return call.panel + bitmask::flags_bytes(pass.tokens); }

// One token tile of the pass.
void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  if (pass.tokens <= kFewOnTiles) return bitmask::pack_few<uint16_t>(call, pass, first, tokens);
  const int64_t k = call.weight->header.k, tiles = tiles_of(*call.weight);
  __m512i* dst = reinterpret_cast<__m512i*>(tiles_x(call, pass) + first * tiles * 64);
  __mmask16 poisoned[panel::kTileTokens] = {};
  const auto load = [&](int64_t t, int64_t c) __attribute__((always_inline)) {
    const int64_t at = (pass.first + first + t) * k + c;
    simd::f32 x = simd::zero();
    if (c + simd::kLanes <= k)
      x = panel::load_as(call.x, at, call.type);
    else if (c < k)
      x = panel::load_tail(call.x, at, k - c, call.type);
    const __m512i size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 finite = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(bitmask::kPoisonBf16));
    poisoned[t] |= static_cast<__mmask16>(~finite);
    return _mm512_maskz_mov_ps(finite, x);
  };
  for (int64_t j = 0; j < tiles; ++j) {
    __m512i lines[16];
    for (int64_t t = 0; t < 16; ++t) {
      lines[t] = _mm512_setzero_si512();
      if (t < tokens) lines[t] = (__m512i)_mm512_cvtne2ps_pbh(load(t, j * 32 + 16), load(t, j * 32));
    }
    panel::transpose16(lines);
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(dst + j * 16 + i, lines[i]);
  }
  for (int64_t t = 0; t < tokens; ++t) call.panel[first + t] = poisoned[t] != 0;
}

// Expands `count` tiles from tile `first` on of the unit's rows to out[tile][2][16][32].
void expand(const zs::Weight& weight, int64_t row, int64_t rows, int64_t first, int64_t count,
            const uint16_t* (&values)[kRows], uint8_t* out) {
  for (int64_t r = 0; r < kRows; ++r) {
    uint8_t* line = out + r * 64;
    if (r >= rows) {
      for (int64_t j = 0; j < count; ++j) _mm512_store_si512(line + j * 2 * panel::kTileBytes, _mm512_setzero_si512());
      continue;
    }
    const uint32_t* bits = bitmask::bits_of(weight, row + r) + first;
    const uint16_t* at = values[r];
    for (int64_t j = 0; j < count; ++j) {
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(at) + bitmask::kPrefetchBytes);
      _mm512_store_si512(line + j * 2 * panel::kTileBytes, simd::expand16(at, bits[j]));
      at += __builtin_popcount(bits[j]);
    }
    values[r] = at;
  }
}

// Adds `count` tiles to the sums: 32 rows times 16 or 32 tokens.
template <int kTokenTiles>
inline void add_tiles(const uint8_t* weights, const uint8_t* x, int64_t next, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    ZS_TILE_LOAD(6, x + j * panel::kTileBytes, 64);
    ZS_TILE_LOAD(4, weights + j * 2 * panel::kTileBytes, 64);
    ZS_TILE_DOT(0, 4, 6);
    ZS_TILE_LOAD(5, weights + (j * 2 + 1) * panel::kTileBytes, 64);
    ZS_TILE_DOT(1, 5, 6);
    if constexpr (kTokenTiles == 2) {
      ZS_TILE_LOAD(7, x + next + j * panel::kTileBytes, 64);
      ZS_TILE_DOT(2, 4, 7);
      ZS_TILE_DOT(3, 5, 7);
    }
  }
}

void add(const uint8_t* weights, const uint8_t* x, int64_t next, int64_t count, int64_t tokens) {
  if (tokens > panel::kTileTokens)
    add_tiles<2>(weights, x, next, count);
  else
    add_tiles<1>(weights, x, next, count);
}

void clear() {
  ZS_TILE_ZERO(0);
  ZS_TILE_ZERO(1);
  ZS_TILE_ZERO(2);
  ZS_TILE_ZERO(3);
}

// The sums [token tile][2][16 rows][16 tokens] leave in rows of y. `token` counts in the pass.
void finish(const zs::Call& call, zs::Pass pass, int64_t token, int64_t tokens, int64_t row, int64_t rows,
            float* sums) {
  ZS_TILE_STORE(0, sums, 64);
  ZS_TILE_STORE(1, sums + 256, 64);
  ZS_TILE_STORE(2, sums + 512, 64);
  ZS_TILE_STORE(3, sums + 768, 64);
  const uint16_t* stored = reinterpret_cast<const uint16_t*>(call.weight->section[bitmask::kValuesSection]);
  for (int64_t first = 0; first < tokens; first += 16)
    for (int64_t p = 0; p < rows; p += zs::kPanel) {
      float* tile = sums + (first * 2 + p) * 16;
      const int64_t count = tokens - first < 16 ? tokens - first : 16, left = rows - p;
      for (int64_t t = 0; t < count; ++t)
        if (call.panel[token + first + t])
          bitmask::add_poison(call, pass.first + token + first + t, row + p, left < 16 ? left : 16, tile + t, 16,
                              bitmask::kPoisonBf16, [&](int64_t i, int64_t c) {
                                const uint64_t start = bitmask::row_offsets(*call.weight)[i];
                                return bitmask::as_float(stored[start + bitmask::rank(*call.weight, i, c)]);
                              });
      panel::finish_tile(call, pass.first + token + first, count, row + p, left, tile);
    }
}

void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const zs::Weight& weight = *call.weight;
  const int64_t row = unit * kRows, left = weight.header.m - row, rows = left < kRows ? left : kRows;
  if (pass.tokens <= kFewOnTiles)
    return bitmask::multiply_few<uint16_t>(call, pass, row, rows, reinterpret_cast<vector::Scratch*>(scratch)->few);
  const amx::Tiles configured;
  const int64_t tiles = tiles_of(weight), next = tiles * panel::kTileBytes;
  float* sums = reinterpret_cast<float*>(scratch);
  uint8_t* weights = scratch + panel::kSumsBytes;
  const uint8_t* x = tiles_x(call, pass);
  const uint16_t* values[kRows];
  for (int64_t r = 0; r < rows; ++r)
    values[r] = reinterpret_cast<const uint16_t*>(weight.section[bitmask::kValuesSection]) +
                bitmask::row_offsets(weight)[row + r];

  const bool once = pass.tokens <= panel::kTokensAtOnce;
  clear();
  for (int64_t j = 0; j < tiles; j += kBlockTiles) {
    const int64_t count = tiles - j < kBlockTiles ? tiles - j : kBlockTiles;
    uint8_t* out = weights + (once ? 0 : j * 2 * panel::kTileBytes);
    expand(weight, row, rows, j, count, values, out);
    if (once) add(out, x + j * panel::kTileBytes, next, count, pass.tokens);
  }
  if (once) return finish(call, pass, 0, pass.tokens, row, rows, sums);
  for (int64_t t = 0; t < pass.tokens; t += panel::kTokensAtOnce) {
    const int64_t tokens = pass.tokens - t < panel::kTokensAtOnce ? pass.tokens - t : panel::kTokensAtOnce;
    clear();
    add(weights, x + t / 16 * next, next, tiles, tokens);
    finish(call, pass, t, tokens, row, rows, sums);
  }
}

}  // namespace

using zs::Values;

ZS_KERNELS(ZS_ENTRY(bitmask, fp32, vector::geometry, vector::pack<float>, vector::run<float>),
           ZS_ENTRY(bitmask, bf16, geometry, pack, run),
           ZS_ENTRY(bitmask, int8, integer_tiles::geometry, integer_tiles::pack<Values::int8>,
                    integer_tiles::run<Values::int8>),
           ZS_ENTRY(bitmask, int4, integer_tiles::geometry, integer_tiles::pack<Values::int4>,
                    integer_tiles::run<Values::int4>),
           ZS_END_OF_TABLE)
