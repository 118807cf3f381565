// The codes of integers.h on the matrix unit.
//
// panel    [tokens/16]: i8 [k/step][16][step], fp32 [k/group][16]    x quantised, k padded to whole groups
// scratch  panel::IntegerScratch
#pragma once
#include "kernels/spmm_dense/layout.h"
#include "panel/integers_amx.h"

namespace {
namespace integer_tiles {

inline zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const zs::Header& header = weight.header;
  const int64_t limit = panel::integer_tile_tokens(header), tile = panel::kIntegerTokens;
  const int64_t tiles = ((tokens < limit ? tokens : limit) + tile - 1) / tile;
  return {limit, tile, dense::units(header), tiles * panel::integer_tile_bytes(header),
          static_cast<int64_t>(sizeof(panel::IntegerScratch))};
}

inline void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  panel::pack_integer_tile(call, pass, first, tokens);
}

// Signed codes from stored ones, 64 at a time (int4: 128).
template <zs::Values kValues>
inline void take_apart(const uint8_t* stored, int64_t inputs, int8_t* signed_codes) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), sign = _mm512_set1_epi8(-128);
  const uint8_t* end = stored + inputs * zs::kPanel / (kValues == zs::Values::int4 ? 2 : 1);
  for (; stored < end; stored += 64) {
    __builtin_prefetch(stored + 4096);
    const __m512i line = _mm512_load_si512(stored);
    if constexpr (kValues == zs::Values::int4) {
      _mm512_store_si512(signed_codes, _mm512_sub_epi8(_mm512_and_si512(line, nibble), eight));
      _mm512_store_si512(signed_codes + 64,
                         _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(line, 4), nibble), eight));
      signed_codes += 128;
    } else {
      _mm512_store_si512(signed_codes, _mm512_xor_si512(line, sign));
      signed_codes += 64;
    }
  }
}

template <zs::Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* memory) {
  const zs::Header& header = call.weight->header;
  const amx::Tiles configured(static_cast<int>(panel::tile_step(header)));
  panel::IntegerScratch& scratch = *reinterpret_cast<panel::IntegerScratch*>(memory);
  const int64_t first = unit * dense::kUnitRows, size = header.group_size;
  const int64_t end = header.m - first < dense::kUnitRows ? header.m : first + dense::kUnitRows;
  const int64_t group_bytes = dense::code_bytes(header) / dense::groups(header);
  for (int64_t row = first; row < end; row += zs::kPanel) {
    const uint8_t* codes = dense::codes(*call.weight, row / zs::kPanel);
    panel::multiply_integer_tiles(call, pass, dense::scales(*call.weight, row / zs::kPanel), row, end - row, scratch,
                                  [=](int64_t g, int64_t last, int8_t* dst) {
                                    take_apart<kValues>(codes + g * group_bytes, (last - g) * size, dst);
                                  });
  }
}

}  // namespace integer_tiles
}  // namespace
