// 16 x 16 numbers of 32 bits, rows to columns, in registers; and sums of 16 rows by 16 tokens on their way out. AVX-512
// only.
#pragma once
#include <immintrin.h>

#include "panel/epilogue.h"

namespace {
namespace panel {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says so of its own shuffles
inline void transpose16(__m512i (&v)[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // w[4 q + 2 h + s]: in lane l, columns 4 l + 2 s and + 1 of rows 4 q + 2 h and + 1.
  for (int q = 0; q < 16; q += 4)
    for (int s = 0; s < 2; ++s) {
      v[q + 2 * s] = _mm512_unpacklo_epi64(w[q + s], w[q + 2 + s]);
      v[q + 2 * s + 1] = _mm512_unpackhi_epi64(w[q + s], w[q + 2 + s]);
    }
  // v[4 q + c]: in lane l, column 4 l + c of rows 4 q to 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x44),
                  high01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xEE);
    w[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    w[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
    w[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    w[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
  }
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}
#pragma GCC diagnostic pop

// sums[row][token], of which `tokens` and `rows` exist, go to y[token ..., row ...].
inline void finish_tile(const zs::Call& call, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                        const float* sums) {
  __m512i lines[16];
  for (int64_t i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(sums + i * 16);
  transpose16(lines);
  for (int64_t t = 0; t < tokens; ++t) {
    const simd::f32 sum[1] = {_mm512_castsi512_ps(lines[t])};
    finish(call, token + t, row, rows, sum);
  }
}

}  // namespace panel
}  // namespace
