// y = act(x W^T + b) where strips of V rows of W [m, k] share which N of every M columns they keep.
//
// buffer   type          shape                          alignment
// x        fp32/bf16/16  [tokens, k]                    any
// columns  u8            [strips][k'], k' = k N / M     64 (the section)
// values   fp32          [m/16][k'][16]                 64
//          bf16          [m/16][k'/2][16][2]            64, k' padded to 32
// panel    fp32          [tokens/kBlock][k][kBlock]     64
// scratch  u32           [k'] the strip's columns as absolute indices; then sums that wait, fp32 [V/16][tokens][16]
// y        as x          [tokens, m]                    any
//
// Column ranges are checked in check.cpp, pointers and shapes in csrc/bind. The loop is panel/fp32.h: with x packed
// column by column, a kept column is one index and no copy, so the strip costs N/M of the dense multiply-adds plus k'
// index decodings. A unit is one strip.
#pragma once
#include "kernels/spmm_strip_nm/layout.h"
#include "panel/fp32.h"

namespace {
namespace vector {

inline int64_t columns_bytes(const zs::Header& header) { return (strip_nm::kept(header) + 15) / 16 * 64; }

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const int64_t pass = panel::pass_tokens(weight.header.k, weight.nbytes[strip_nm::kValuesSection]);
  return {pass, panel::kBlock, strip_nm::strips(weight.header), (tokens < pass ? tokens : pass) * weight.header.k * 4,
          columns_bytes(weight.header) + panel::sums_bytes(weight.header.strip, tokens)};
}

void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  panel::pack_block(call, pass, first, tokens);
}

template <zs::Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const zs::Header& header = call.weight->header;
  const int64_t kept = strip_nm::kept(header), in_chunk = strip_nm::kept_in_chunk(header);
  const uint8_t* packed = strip_nm::columns_of(*call.weight, unit);
  uint32_t* columns = reinterpret_cast<uint32_t*>(scratch);
  uint32_t base = 0;
  for (int64_t j = 0; j < kept; j += in_chunk, base += zs::kChunk)
    for (int64_t i = j; i < j + in_chunk && i < kept; ++i) columns[i] = base + packed[i];
  panel::multiply_strip<kValues, true>(
      call, pass,
      {strip_nm::values_of(*call.weight, unit, kValues), dense::panel_bytes(kept, kValues), columns, kept,
       unit * header.strip, strip_nm::rows_of(header, unit)},
      scratch + columns_bytes(header));
}

}  // namespace vector
}  // namespace
