// Integers behind a mask for many tokens: 16 rows at a time become a panel of `dense`, and its loop multiplies it.
//
// buffer   type   shape                   alignment
// panel           x quantised, see panel/integers.h
//          u8     [tokens]                was there an Inf or NaN?
// scratch  u8     [k/4 or k/8][16][4]     64: the codes of 16 rows as a `dense` blob has them, k padded to 128
//          fp32   [groups][16]            64: their scales
//
// integers.h expands every weight anew for each 8 tokens and adds lanes up for each token apart: good for few, but
// every further token costs 4 to 5 cycles for 128 weights. Here it is one, as with dense, and expanding happens once a
// pass. To expand 16 x 64 codes and turn them into fours of inputs takes some 130 cycles with AVX-512 (weights in L2,
// by a harness outside of this repository), as much as the products with 16 tokens: expansions, masks and shuffles all
// want one port, 16 operations for 128 weights of a row. So by that count it is half as fast as dense at 16 tokens, .8
// times at 64, .9 at 128. `zeroskip bench kernels --suite llm` at 50 %, one thread (Xeon with AVX-512, no AMX; the
// table is in docs/performance.md): int4 .58 and .92 times at 16 and 128 tokens, int8 .73 and .98; before this file
// .25, .23 and .31, .26. There with `ZEROSKIP_ISA=avx2` and `--suite synthetic --tokens 16,128`, 2048 x 2048: int4 .63
// and .93, int8 .81 (still by integers.h) and .96.
//
// The sums of finite x are those of dense integers, to the bit, but not those of integers.h. So this is an entry of its
// own: where each row shall have the same bits in every batch, only one of the two may serve (planning/rows.py).
//
// 16 rows are 16 streams, too many to be fetched by the machine's own guess: what a row takes from the stream is
// fetched from where the next panel's will be, one panel's bytes ahead (1.33 times as fast from memory, by that
// harness). As many lines each time: as many as were read, one or two, was 1.4 times slower, for nobody can guess
// which.
#pragma once
#include "kernels/spmm_bitmask/integers.h"
#include "panel/integers.h"
#include "panel/transpose4.h"

namespace {
namespace panels {

using zs::Values;
constexpr int64_t kUnitRows = 32;
constexpr int64_t kLine = 64;  // bytes: the codes of a chunk of one row, or of a quad of 16 rows

template <Values kValues>
int64_t code_bytes(const zs::Header& header) {
  return panel::code_bytes<kValues>(integers::columns(header));
}

template <Values kValues>
zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const zs::Header& header = weight.header;
  const int64_t block = panel::integer_block(tokens), limit = panel::integer_pass_tokens<kValues>(header, block);
  const int64_t pass = tokens < limit ? tokens : limit, groups = (panel::groups(header) + 15) / 16 * 16;
  return {limit,
          block,
          (header.m + kUnitRows - 1) / kUnitRows,
          pass * (panel::token_bytes<kValues>(header) + 1),
          code_bytes<kValues>(header) + groups * zs::kPanel * 4,
          true};
}

template <Values kValues>
uint8_t* flags(const zs::Call& call, zs::Pass pass) {
  return call.panel + pass.tokens * panel::token_bytes<kValues>(call.weight->header);
}

template <Values kValues>
void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  const int64_t size = call.weight->header.group_size;
  uint8_t* poisoned = flags<kValues>(call, pass) + first;
  __builtin_memset(poisoned, 0, tokens);
  panel::pack_integers<kValues>(call, pass, first, tokens, [&](int64_t t, int64_t at, int64_t count, int8_t* q) {
    panel::Quantized made;
    poisoned[t] |= integers::quantize_finite(call, at, count, size, q, made);
    return made;
  });
}

// to[column][row] = from[row][column] of 16 x 16 numbers of 32 bits. AVX-512 puts the quarters of four rows together as
// it loads them, under a mask, which any port can do; of the 64 shuffles of a transpose 32 are left.
inline void transpose(const float (&from)[16][16], float* to) {
#if defined(__AVX512F__)
  for (int c = 0; c < 16; c += 4) {
    __m512i rows[4], halves[4];  // rows[i]: in quarter q, four columns of row 4 q + i
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int q) __attribute__((always_inline)) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(from[4 * q + i] + c));
      };
      rows[i] = _mm512_broadcast_i32x4(quarter(0));
      rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x00F0, quarter(1));
      rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x0F00, quarter(2));
      rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0xF000, quarter(3));
    }
    for (int i = 0; i < 2; ++i) {
      halves[i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
      halves[2 + i] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; i += 2) {
      _mm512_storeu_si512(to + (c + i) * 16, _mm512_unpacklo_epi64(halves[i], halves[i + 1]));
      _mm512_storeu_si512(to + (c + i + 1) * 16, _mm512_unpackhi_epi64(halves[i], halves[i + 1]));
    }
  }
#else
  for (int row = 0; row < 16; row += 4)
    for (int column = 0; column < 16; column += 4)
      panel::transpose4(from[row] + column, 16, to + column * 16 + row, 16);
#endif
}

// Two vectors of codes share their bytes, the earlier in the low nibbles.
inline void join_nibbles(const uint8_t* from, uint8_t* to) {
  for (int pair = 0; pair < 8; ++pair, from += 2 * kLine, to += kLine)
    for (int i = 0; i < kLine; ++i) to[i] = static_cast<uint8_t>(from[i] | from[kLine + i] << 4);
}

// The codes of rows [row, row + rows), rows <= 16; what lies beyond them is 0, and is not looked at.
template <Values kValues>
void expand(const zs::Weight& weight, int64_t row, int64_t rows, uint8_t* out) {
  alignas(64) float lines[2][16][16] = {}, turned[16][16];
  const int64_t pairs = bitmask::words(weight.header) / 4;
  const uint64_t* offsets = bitmask::row_offsets(weight) + row;
  const int64_t next = static_cast<int64_t>(offsets[rows] - offsets[0]), next_bits = rows * pairs * 16;
  const uint8_t* codes[zs::kPanel];
  for (int64_t r = 0; r < rows; ++r) codes[r] = weight.section[bitmask::kValuesSection] + offsets[r];
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* bits = reinterpret_cast<const uint8_t*>(bitmask::bits_of(weight, row + r) + p * 4);
      const uint8_t* at = codes[r];
      simd::Chunk chunks[2];
      simd::expand_pair<kValues, 128>(reinterpret_cast<const uint32_t*>(bits), codes[r], chunks);
      for (int i = 0; i < 2; ++i) simd::store_codes<kValues>(reinterpret_cast<uint8_t*>(lines[i][r]), chunks[i]);
      __builtin_prefetch(bits + next_bits, 0, 2);
      __builtin_prefetch(at + next, 0, 2);
      if (kValues == Values::int8) __builtin_prefetch(at + next + kLine, 0, 2);
    }
    for (const auto& chunk : lines) {
      if constexpr (kValues == Values::int4) {
        transpose(chunk, turned[0]);
        join_nibbles(reinterpret_cast<const uint8_t*>(turned), out);
        out += 8 * kLine;
      } else {
        transpose(chunk, reinterpret_cast<float*>(out));
        out += 16 * kLine;
      }
    }
  }
}

// Their scales, [groups][16] fp32.
inline void gather_scales(const zs::Weight& weight, int64_t row, int64_t rows, float* out) {
  alignas(64) float lines[16][16] = {};
  const int64_t all = panel::groups(weight.header);
  const auto type = static_cast<zs::Type>(weight.header.scales);
  for (int64_t g = 0; g < all; g += 16, out += 256) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < 16 && g + i < all; i += simd::kLanes) {
        const int64_t at = (row + r) * all + g + i, left = all - g - i;
        const uint8_t* scales = weight.section[bitmask::kScalesSection];
        simd::store(lines[r] + i,
                    left >= simd::kLanes ? panel::load_as(scales, at, type) : panel::load_tail(scales, at, left, type));
      }
    transpose(lines, out);
  }
}

template <Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const zs::Weight& weight = *call.weight;
  const int64_t first = unit * kUnitRows, m = weight.header.m, end = m - first < kUnitRows ? m : first + kUnitRows;
  float* scales = reinterpret_cast<float*>(scratch + code_bytes<kValues>(weight.header));
  const uint8_t* poisoned = flags<kValues>(call, pass);
  for (int64_t row = first; row < end; row += zs::kPanel) {
    const int64_t rows = end - row < zs::kPanel ? end - row : zs::kPanel;
    expand<kValues>(weight, row, rows, scratch);
    gather_scales(weight, row, rows, scales);
    panel::multiply_code_panel<kValues>(
        call, pass, {scratch, reinterpret_cast<const uint8_t*>(scales), zs::Type::fp32},
        [&](int64_t token, int64_t tokens, float* sums) {
          for (int64_t t = 0; t < tokens; ++t)
            if (poisoned[token + t])
              bitmask::add_poison(call, pass.first + token + t, row, rows, sums + t * zs::kPanel, 1, bitmask::kPoison,
                                  [&](int64_t i, int64_t c) { return integers::weight_at<kValues>(weight, i, c); });
          panel::finish_tokens(call, pass.first + token, tokens, row, rows, sums);
        });
  }
}

}  // namespace panels
}  // namespace
