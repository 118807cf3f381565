// y = act(x W^T + b) for W [m, k] stored as one bit a weight and the non-zeros.
//
// buffer       type          shape                     alignment
// x            fp32/bf16/16  [tokens, k]               any
// bits         u32           [m][k/32]                 64 (the section)
// row_offsets  u64           [m + 1]                   64
// values       fp32/bf16     [nnz], then 64 zero bytes 64
// panel        fp32          [tokens][k], k padded to 32, for up to 4 tokens
//                            [tokens/kBlock][k][width] for more
// y            as x          [tokens, m]               any
//
// Bits, offsets and lengths are checked in check.cpp, pointers and shapes in bind.cpp. A unit is 32 rows. Up to 4
// tokens: gemv.h, which streams the weights once. More: the bits of a row are turned into columns, some hundred at a
// time, and then it is the loop of `csr`; that costs one table step for 8 columns against a token block of
// multiply-adds for every non-zero.
//
// Floor for one token: m k / 8 + nnz b bytes read once (b bytes a value); at 50 % in bf16 that is 9/16 of dense.
#include "kernels/spmm_bitmask/columns.h"
#include "kernels/spmm_bitmask/gemv.h"
#include "kernels/spmm_bitmask/layout.h"
#include "kernels/spmm_csr/rows.h"
#include "panel/table.h"

namespace {

struct Scratch {
  rows::Scratch rows;
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

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  zs::Geometry geometry = rows::geometry(weight.header, tokens, sizeof(Scratch));
  const int64_t few = bitmask::kFewTokens * bitmask::stride(weight.header.k) * 4;  // a pass may end with a few
  if (geometry.panel_bytes < few) geometry.panel_bytes = few;
  return geometry;
}

void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  if (pass.tokens <= bitmask::kFewTokens)
    bitmask::pack_few(call, pass);
  else
    rows::pack(call, pass, first, tokens);
}

template <typename Value>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* memory) {
  const int64_t m = call.weight->header.m, row = unit * rows::kRows;
  const int64_t count = m - row < rows::kRows ? m - row : rows::kRows;
  if (pass.tokens == 1) return bitmask::multiply_few<1, Value>(call, pass, row, count);
  if (pass.tokens == 2) return bitmask::multiply_few<2, Value>(call, pass, row, count);
  if (pass.tokens == 3) return bitmask::multiply_few<3, Value>(call, pass, row, count);
  if (pass.tokens == 4) return bitmask::multiply_few<4, Value>(call, pass, row, count);
  Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
  Source<Value> source;
  source.weight = call.weight;
  source.row = row;
  source.count = count;
  source.columns = scratch.columns;
  rows::multiply(call, pass, source, scratch.rows, row, count);
}

}  // namespace

ZS_KERNELS(ZS_ENTRY(bitmask, fp32, geometry, pack, run<float>), ZS_ENTRY(bitmask, bf16, geometry, pack, run<uint16_t>),
           ZS_END_OF_TABLE)
