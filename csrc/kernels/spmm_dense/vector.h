// y = act(x W^T + b) for a dense W [m, k]: the honest rival inside the house.
//
// buffer   type          shape                      alignment
// x        fp32/bf16/16  [tokens, k]                any
// values   fp32          [m/16][k][16]              64
//          bf16          [m/16][k/2][16][2]         64, k padded to 32
// panel    fp32          [tokens/kBlock][k][kBlock] 64
// scratch  fp32          [64/16][tokens][16]        64, sums that wait
// y        as x          [tokens, m]                any
//
// Lengths are checked in check.cpp, pointers and shapes in csrc/bind. The loop is panel/fp32.h; a unit is 64 rows.
#pragma once
#include "kernels/spmm_dense/layout.h"
#include "panel/fp32.h"

namespace {
namespace vector {

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const int64_t pass = panel::pass_tokens(weight.header.k, weight.nbytes[dense::kValuesSection]);
  return {pass, panel::kBlock, dense::units(weight.header), (tokens < pass ? tokens : pass) * weight.header.k * 4,
          panel::sums_bytes(dense::kUnitRows, tokens)};
}

void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  panel::pack_block(call, pass, first, tokens);
}

template <zs::Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const zs::Header& header = call.weight->header;
  const int64_t row = unit * dense::kUnitRows, bytes = dense::panel_bytes(header.k, kValues);
  const int64_t rows = header.m - row < dense::kUnitRows ? header.m - row : dense::kUnitRows;
  const uint8_t* values = call.weight->section[dense::kValuesSection] + row / zs::kPanel * bytes;
  panel::multiply_strip<kValues, false>(call, pass, {values, bytes, nullptr, header.k, row, rows}, scratch);
}

}  // namespace vector
}  // namespace
