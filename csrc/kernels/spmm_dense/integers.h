// y = act(x W^T + b) for a dense W [m, k] stored as int8 or int4 codes with a scale for each row and group of inputs.
//
// buffer   type          shape                        alignment
// x        fp32/bf16/16  [tokens, k]                  any
// values   u8            [m/16][k/4][16][4]           64, int8: code + 128
//                        [m/16][k/8][16][4]           64, int4: two codes + 8 a byte; k padded to whole groups
// scales   fp16/fp32     [m/16][k/group][16]          64
// panel                  x quantised, see panel/integers.h
// y        as x          [tokens, m]                  any
//
// Lengths and scales are checked in check.cpp, pointers and shapes in csrc/bind. A unit is 64 rows.
//
// Floor for one token: m k (b / 8 + s / group) bytes read once (b bits a code, s bytes a scale): int4 with fp16 scales
// for 64 inputs 0.53 bytes a weight, a quarter of bf16. AVX-512 needs 24 operations for the 1024 codes of a group of
// 64 inputs to take them apart, 16 to multiply, 5 to scale: at 2 a cycle some 45 codes a cycle, three times what
// memory feeds. AVX2 needs 29 for 256 codes of int4 and 48 for as many of int8.
#pragma once
#include "kernels/spmm_dense/layout.h"
#include "panel/integers.h"

namespace {
namespace integers {

template <zs::Values kValues>
zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  const zs::Header& header = weight.header;
  const int64_t block = panel::integer_block(tokens), pass = panel::integer_pass_tokens<kValues>(header, block);
  return {pass, block, dense::units(header), (tokens < pass ? tokens : pass) * panel::token_bytes<kValues>(header), 0};
}

template <zs::Values kValues>
void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  const int64_t size = call.weight->header.group_size;
  panel::pack_integers<kValues>(call, pass, first, tokens, [&](int64_t, int64_t at, int64_t count, int8_t* q) {
    return panel::quantize_group(call.x, at, count, size, call.type, q);
  });
}

template <zs::Values kValues>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t*) {
  const zs::Header& header = call.weight->header;
  const int64_t first = unit * dense::kUnitRows,
                end = header.m - first < dense::kUnitRows ? header.m : first + dense::kUnitRows;
  for (int64_t row = first; row < end; row += zs::kPanel)
    panel::multiply_code_panel<kValues>(
        call, pass,
        {dense::codes(*call.weight, row / zs::kPanel), dense::scales(*call.weight, row / zs::kPanel),
         static_cast<zs::Type>(header.scales)},
        [&](int64_t token, int64_t tokens, const float* sums) {
          panel::finish_tokens(call, pass.first + token, tokens, row, end - row, sums);
        });
}

}  // namespace integers
}  // namespace
