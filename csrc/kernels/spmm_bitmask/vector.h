// y = act(x W^T + b) for W [m, k] stored as one bit a weight and the non-zeros, fp32 or bf16.
//
// buffer       type          shape                     alignment
// x            fp32/bf16/16  [tokens, k]               any
// bits         u32           [m][k/32]                 64 (the section)
// row_offsets  u64           [m + 1]                   64
// values       fp32/bf16     [nnz], then 64 zero bytes 64
// panel        see few.h for few tokens; for more
//              fp32          [tokens/kBlock][k][width] 64
// y            as x          [tokens, m]               any
//
// Bits, offsets and lengths are checked in check.cpp, pointers and shapes in csrc/bind. A unit is 32 rows; units are
// handed out one at a time, so rows of unequal length even out.
//
// Few tokens: few.h, which expands the weights against all columns of x. More: the bits of a row are turned into
// columns, some hundred at a time, and then it is the loop of `csr`; that costs one table step for 8 columns against a
// token block of multiply-adds for every non-zero.
//
// Floor for one token: m k / 8 + nnz b bytes read once (b bytes a value); at 50 % in bf16 that is 9/16 of dense. By
// llvm-mca (Sapphire Rapids) the loop takes, for 32 bf16 weights, 4.05 cycles with fp32 x and 3.05 with bf16 x, bound
// by the port that expands: 25 and 33 GB/s at 2.8 GHz, about twice what memory feeds a core. A step of 16 weights that
// widens each value by itself needs as many cycles for half of them. With 2, 4, 8 tokens: 5.1, 7.1, 12.6 cycles (fp32
// x), 3.7, 5.1, 8.0 (bf16 x). Measured on a Xeon with AVX-512 and no BF16 at 3.07 GHz, weights in L2: 4.0 cycles, 14
// for 8 tokens.
//
// AVX2, 2048 x 2048, 50 %, bf16, time against the code before (16-byte steps, masked loads of x): 1 token 0.6 to 0.7,
// 4 tokens 0.7, 8 tokens 0.68, 16 tokens 0.8 (the loop of `csr` served 5 and more). Expanding into panels for the dense
// loop was not worth its transposes: at 128 tokens and 50 % the loop of `csr` is as fast as the dense one without them,
// and at 80 % 1.5 times as fast.
#pragma once
#include "kernels/spmm_bitmask/columns.h"
#include "kernels/spmm_bitmask/few.h"
#include "kernels/spmm_bitmask/layout.h"
#include "kernels/spmm_csr/rows.h"

namespace {
namespace vector {

struct Scratch {
  union {
    rows::Scratch rows;
    bitmask::FewScratch few;
  };
  uint16_t columns[rows::kMaxStep + 8];
};

template <typename Value>
struct Source {
  const zs::Weight* weight;
  int64_t row, count;
  const Value* values[rows::kRows];  // the next one of each row
  uint16_t* columns;

  void rewind() {
    const Value* all = reinterpret_cast<const Value*>(weight->section[bitmask::kValuesSection]);
    for (int64_t r = 0; r < count; ++r) values[r] = all + bitmask::row_offsets(*weight)[row + r];
  }
  rows::Run<Value, uint16_t> run(int64_t r, int64_t first, int64_t end, const float* x, int64_t stride) const {
    const uint32_t* bits = bitmask::bits_of(*weight, row + r) + first / 32;
    const int64_t listed = bitmask::columns_of(bits, (end - first + 31) / 32, columns);
    return {values[r], columns, listed, end - first, x + first * stride};
  }
  void took(int64_t r, int64_t taken) { values[r] += taken; }
};

// Up to how many tokens expanding beats the loop of `csr`: always for a handful; its cost does not fall with the
// non-zeros, so for more only where these are many (AVX2, 8 tokens: 50 % 2.5 against 3.7 ms, 80 % 2.1 against 1.5).
int64_t few_tokens(const zs::Header& header) {
  return header.nnz * 5 >= static_cast<uint64_t>(header.m) * header.k * 2 ? 16 : 4;
}

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  zs::Geometry geometry = rows::geometry(weight.header, tokens, sizeof(Scratch));
  // A pass may also end with a few tokens.
  const int64_t limit = few_tokens(weight.header),
                few = bitmask::few_bytes(weight.header, tokens < limit ? tokens : limit);
  if (geometry.panel_bytes < few) geometry.panel_bytes = few;
  geometry.reads_x = true;  // add_poison
  return geometry;
}

template <typename Value>
void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  if (pass.tokens <= few_tokens(call.weight->header))
    bitmask::pack_few<Value>(call, pass, first, tokens);
  else
    rows::pack(call, pass, first, tokens);
}

template <typename Value>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* memory) {
  const int64_t m = call.weight->header.m, row = unit * rows::kRows;
  const int64_t count = m - row < rows::kRows ? m - row : rows::kRows;
  Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
  if (pass.tokens <= few_tokens(call.weight->header))
    return bitmask::multiply_few<Value>(call, pass, row, count, scratch.few);
  Source<Value> source;
  source.weight = call.weight;
  source.row = row;
  source.count = count;
  source.columns = scratch.columns;
  rows::multiply(call, pass, source, scratch.rows, row, count);
}

}  // namespace vector
}  // namespace
