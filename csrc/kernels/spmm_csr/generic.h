// y = act(x W^T + b) for W [m, k] stored as its non-zeros and their columns.
//
// buffer       type          shape                     alignment
// x            fp32/bf16/16  [tokens, k]               any
// row_offsets  u64           [m + 1]                   64 (the section)
// columns      u16 or u32    [nnz]                     64
// values       fp32/bf16     [nnz]                     64
// panel        fp32          [tokens/kBlock][k][width] 64
// y            as x          [tokens, m]               any
//
// Offsets and columns are checked in check.cpp, pointers and shapes in csrc/bind. The loop is rows.h; a unit is 32
// rows.
//
// Floor for one token: nnz (2 + b) bytes read once (b bytes a value, k <= 65536). At 50 % in bf16 that is as much as
// dense; it pays from there on and beats `bitmask` above some 90 %, where that scans mostly empty words.
#include "kernels/spmm_csr/layout.h"
#include "kernels/spmm_csr/rows.h"
#include "panel/table.h"

namespace {

template <typename Value, typename Index>
struct Source {
  const uint64_t* offsets;  // of the unit's first row
  const Index* columns;
  const Value* values;
  int64_t count;
  int64_t cursor[rows::kRows];

  void rewind() {
    for (int64_t r = 0; r < count; ++r) cursor[r] = offsets[r];
  }
  rows::Run<Value, Index> run(int64_t r, int64_t, int64_t end, const float* x, int64_t) const {
    return {values + cursor[r], columns + cursor[r], static_cast<int64_t>(offsets[r + 1]) - cursor[r], end, x};
  }
  void took(int64_t r, int64_t taken) { cursor[r] += taken; }
};

zs::Geometry geometry(const zs::Weight& weight, int64_t tokens) {
  return rows::geometry(weight.header, tokens, sizeof(rows::Scratch));
}

void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) { rows::pack(call, pass, first, tokens); }

template <typename Value, typename Index>
void multiply(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  const zs::Weight& weight = *call.weight;
  const int64_t row = unit * rows::kRows;
  const int64_t count = weight.header.m - row < rows::kRows ? weight.header.m - row : rows::kRows;
  Source<Value, Index> source;
  source.offsets = csr::row_offsets(weight) + row;
  source.columns = csr::columns<Index>(weight);
  source.values = reinterpret_cast<const Value*>(weight.section[csr::kValuesSection]);
  source.count = count;
  rows::multiply(call, pass, source, *reinterpret_cast<rows::Scratch*>(scratch), row, count);
}

template <typename Value>
void run(const zs::Call& call, zs::Pass pass, int64_t unit, uint8_t* scratch) {
  if (csr::narrow(call.weight->header))
    multiply<Value, uint16_t>(call, pass, unit, scratch);
  else
    multiply<Value, uint32_t>(call, pass, unit, scratch);
}

}  // namespace

ZS_KERNELS(ZS_ENTRY(csr, fp32, geometry, pack, run<float>), ZS_ENTRY(csr, bf16, geometry, pack, run<uint16_t>),
           ZS_END_OF_TABLE)
