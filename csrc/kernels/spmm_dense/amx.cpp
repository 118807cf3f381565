// y = act(x W^T + b), dense: bf16 and integers on the matrix unit, fp32 as on AVX-512.
//
// buffer   type          shape                           alignment
// values   bf16          [m/16][k/32][16][16][2]         64: the stored panels, read as tiles
// panel    bf16          [tokens/16][k/32][16][32]       64: x, zero-padded
// scratch  fp32          4 tiles of sums
//
// A unit is 64 rows: its weights (64 k bf16, 512 KB at k = 4096) stay in L2 while the tokens of the pass go by.
#include "panel/amx.h"

#include "kernels/spmm_dense/integers_amx.h"
#include "kernels/spmm_dense/vector.h"
#include "panel/table.h"

namespace {

int64_t tiles_of(const zs::Weight& weight) { return panel::input_tiles(weight.header.k, panel::kTileInputs); }

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const int64_t tiles = tiles_of(weight), limit = panel::pass_tokens_amx(tiles);
  const int64_t pass = tokens < limit ? (tokens + 15) / 16 * 16 : limit;
  return {limit, panel::kTileTokens, dense::units(weight.header), pass * tiles * 64, panel::kSumsBytes};
}

void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  panel::pack_tiles(call, pass, first, tokens, tiles_of(*call.weight));
}

void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const amx::Tiles configured;
  const zs::Header& header = call.weight->header;
  const int64_t tiles = tiles_of(*call.weight), bytes = tiles * panel::kTileBytes;
  const int64_t row = unit * dense::kUnitRows, left = header.m - row;
  const uint8_t* values = call.weight->section[dense::kValuesSection] + row / zs::kPanel * bytes;
  for (int64_t t = 0; t < pass.tokens; t += panel::kTokensAtOnce) {
    const int64_t tokens = pass.tokens - t < panel::kTokensAtOnce ? pass.tokens - t : panel::kTokensAtOnce;
    const panel::Tokens x{call.panel + t * tiles * 64, bytes, panel::kTileBytes, 64};
    panel::multiply_tiles(call, x, pass.first + t, tokens, values, bytes, row,
                          left < dense::kUnitRows ? left : dense::kUnitRows, reinterpret_cast<float*>(scratch));
  }
}

}  // namespace

ZS_KERNELS(ZS_ENTRY(dense, fp32, vector::geometry, vector::pack, vector::run<zs::Values::fp32>),
           ZS_ENTRY(dense, bf16, geometry, pack, run),
           ZS_ENTRY(dense, int8, integer_tiles::geometry, integer_tiles::pack, integer_tiles::run<zs::Values::int8>),
           ZS_ENTRY(dense, int4, integer_tiles::geometry, integer_tiles::pack, integer_tiles::run<zs::Values::int4>),
           ZS_END_OF_TABLE)
