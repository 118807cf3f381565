// y = act(x W^T + b), strips that share N of every M columns: bf16 on the matrix unit, fp32 as on AVX-512.
//
// buffer   type          shape                           alignment
// columns  u8            [strips][k'], k' = k N / M      64 (the section)
// values   bf16          [m/16][k'/32][16][16][2]        64: the stored panels, read as tiles
// panel    bf16          [tokens/16][k/64][2][16][32]    64: x, zero-padded to chunks of 64 inputs
// scratch  fp32          4 tiles of sums, then
//          bf16          [32][k' + 32] the strip's inputs of 32 tokens, rows an odd number of cache lines apart
//
// A chunk of 64 inputs of one token is two cache lines. One two-source permute picks any 32 of them, two pick any 64,
// so compacting costs two loads, one or two permutes and as many stores for each token and chunk, whatever N and M;
// the compacted rows then serve all V / 16 panels of the strip. At V = 64 and 50 % that is 32 permutes against 8 tile
// products (128 cycles) for 32 tokens and a chunk: the dense loop does 16 products.
#include "panel/amx.h"

#include "kernels/spmm_strip_nm/vector.h"
#include "panel/table.h"

namespace {

int64_t tiles_of(const zs::Weight& weight) { return panel::input_tiles(weight.header.k, zs::kChunk); }

// Elements from one compacted row to the next.
int64_t row_length(const zs::Header& header) {
  return dense::padded(strip_nm::kept(header), zs::Values::bf16) + panel::kTileInputs;
}

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const int64_t tiles = tiles_of(weight), limit = panel::pass_tokens_amx(tiles);
  const int64_t pass = tokens < limit ? (tokens + 15) / 16 * 16 : limit;
  return {limit, panel::kTileTokens, strip_nm::strips(weight.header), pass * tiles * 64,
          panel::kSumsBytes + panel::kTokensAtOnce * row_length(weight.header) * 2};
}

void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  panel::pack_tiles(call, pass, first, tokens, tiles_of(*call.weight));
}

// Gathers the strip's columns of `tokens` (16 or 32) packed tokens into rows of k' inputs and at least 1 to 32 zeros.
void compact(const zs::Header& header, const uint8_t* columns, const uint8_t* x, int64_t tiles, int64_t tokens,
             uint16_t* out, int64_t length) {
  const int64_t kept = strip_nm::kept(header), in_chunk = strip_nm::kept_in_chunk(header);
  for (int64_t j = 0, chunk = 0; j < kept; j += in_chunk, ++chunk) {
    const int64_t count = kept - j < in_chunk ? kept - j : in_chunk;
    const __mmask64 exists = count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
    const __m512i picked = _mm512_maskz_loadu_epi8(exists, columns + j);
    const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(picked));
    const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(picked, 1));
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t* line = x + t / 16 * tiles * panel::kTileBytes + 2 * chunk * panel::kTileBytes + t % 16 * 64;
      const __m512i first = _mm512_load_si512(line), second = _mm512_load_si512(line + panel::kTileBytes);
      // Whole vectors are stored: what lies past `count` is overwritten by the next chunk, or zeroed below.
      uint16_t* row = out + t * length + j;
      _mm512_storeu_si512(row, _mm512_permutex2var_epi16(first, low, second));
      if (count > 32) _mm512_storeu_si512(row + 32, _mm512_permutex2var_epi16(first, high, second));
    }
  }
  for (int64_t t = 0; t < tokens; ++t) _mm512_storeu_si512(out + t * length + kept, _mm512_setzero_si512());
}

void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const amx::Tiles configured;
  const zs::Header& header = call.weight->header;
  const int64_t tiles = tiles_of(*call.weight), length = row_length(header);
  const int64_t bytes = dense::panel_bytes(strip_nm::kept(header), zs::Values::bf16);
  const uint8_t* columns = strip_nm::columns_of(*call.weight, unit);
  const uint8_t* values = strip_nm::values_of(*call.weight, unit, zs::Values::bf16);
  uint16_t* compacted = reinterpret_cast<uint16_t*>(scratch + panel::kSumsBytes);
  for (int64_t t = 0; t < pass.tokens; t += panel::kTokensAtOnce) {
    const int64_t tokens = pass.tokens - t < panel::kTokensAtOnce ? pass.tokens - t : panel::kTokensAtOnce;
    compact(header, columns, call.panel + t * tiles * 64, tiles, tokens > 16 ? 32 : 16, compacted, length);
    const panel::Tokens x{reinterpret_cast<const uint8_t*>(compacted), 16 * length * 2, 64, length * 2};
    panel::multiply_tiles(call, x, pass.first + t, tokens, values, bytes, unit * header.strip,
                          strip_nm::rows_of(header, unit), reinterpret_cast<float*>(scratch));
  }
}

}  // namespace

ZS_KERNELS(ZS_ENTRY(strip_nm, fp32, vector::geometry, vector::pack, vector::run<zs::Values::fp32>),
           ZS_ENTRY(strip_nm, bf16, geometry, pack, run), ZS_END_OF_TABLE)
