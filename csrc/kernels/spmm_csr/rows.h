// Rows of scattered non-zeros times blocks of tokens, accumulated in fp32: the core of `csr`, and of `bitmask` for more
// than a handful of tokens.
//
//   y[t, i] = sum_j w[i, j] x[t, column(i, j)]
//
// The tokens lie in the vector lanes: x is packed into blocks of up to kBlock tokens, [block][k][width] fp32, the width
// being the tokens of the block rounded up to whole vectors (or to 1 or 4, so that decoding one token does not drag
// empty lanes along). A non-zero is then one broadcast weight and `width` multiply-adds against one run of x, whatever
// its column. A step has eight independent chains of additions: eight vectors of tokens, or fewer vectors and several
// non-zeros at a time, since 4 cycles of latency x 2 ports need eight.
//
// x of a whole block (64 tokens x k = 2048: 512 KB) outgrows L1, so the columns are walked in steps whose x stays there
// while kRows rows pass over it; the sums wait in scratch in between. At the end 16 rows x tokens of sums are
// transposed 4 x 4 at a time and leave through panel/epilogue.h.
//
// Every output is summed in an order that depends on its row and on the block it is in, never on the thread.
#pragma once
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "panel/transpose4.h"

namespace {
namespace rows {

using simd::f32;
using zs::kPanel;

constexpr int kRows = 32;                                              // rows of one unit of work
constexpr int kBlock = 8 * simd::kLanes < 64 ? 8 * simd::kLanes : 64;  // tokens of a full block
constexpr int kPackTokens = 16;                                        // tokens of one pack unit
constexpr int64_t kPassBytes = 1 << 20;                                // packed x of one pass: an L2
constexpr int64_t kStepBytes = 32 << 10;                               // packed x of one step: an L1
constexpr int64_t kMaxStep = 8192;                                     // columns of one step at most

using panel::f32x4;
using panel::transpose4;

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// Hides where a weight comes from: otherwise GCC gathers eight of them into vectors, and spills (12 times slower).
inline float opaque(float weight) {
#if defined(__x86_64__)
  asm("" : "+x"(weight));
#endif
  return weight;
}

// One, four or a whole vector of tokens under the same names.
struct One {
  typedef float Vector;
  static constexpr int kWidth = 1;
  static Vector load(const float* p) { return *p; }
  static void store(float* p, Vector v) { *p = v; }
  static Vector set(const float* p) { return opaque(*p); }
  static Vector set(const uint16_t* p) { return opaque(widen(*p)); }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
};
struct Four {
  typedef f32x4 Vector;
  static constexpr int kWidth = 4;
  static Vector load(const float* p) { return *reinterpret_cast<const f32x4*>(p); }
  static void store(float* p, Vector v) { *reinterpret_cast<f32x4*>(p) = v; }
  static Vector set(const float* p) { return f32x4{*p, *p, *p, *p}; }
  static Vector set(const uint16_t* p) {
    const float w = widen(*p);
    return f32x4{w, w, w, w};
  }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
};
struct Full {
  typedef f32 Vector;
  static constexpr int kWidth = simd::kLanes;
  static Vector load(const float* p) { return simd::load(p); }
  static void store(float* p, Vector v) { simd::store(p, v); }
  static Vector set(const float* p) { return simd::set(*p); }
  static Vector set(const uint16_t* p) { return simd::set_bf16(p); }
  static Vector add(Vector a, Vector b) { return simd::add(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return simd::fma(a, b, c); }
};

// Floats that a block of `tokens` takes for each column.
inline int64_t width(int64_t tokens) {
  if (tokens <= 1) return 1;
  return tokens <= 4 ? 4 : (tokens + simd::kLanes - 1) / simd::kLanes * simd::kLanes;
}

inline int64_t pass_tokens(int64_t k) {
  const int64_t blocks = kPassBytes / (k * kBlock * 4);
  return (blocks < 1 ? 1 : blocks > 16 ? 16 : blocks) * kBlock;
}

inline int64_t panel_bytes(int64_t k, int64_t tokens) {
  const int64_t pass = pass_tokens(k), most = tokens < pass ? tokens : pass, full = most / kBlock * kBlock;
  return (full + (most > full ? width(most - full) : 0)) * k * 4;
}

// Columns of one step, a multiple of 64: what fits L1, but enough for a row to have some 64 non-zeros in it, since each
// step of a row ends in a mispredicted branch and a trip of its sums to memory (2048 x 2048 at 90 %, 128 tokens, AVX2:
// 24 non-zeros 23 GFLOP/s, 64 non-zeros 30).
inline int64_t step_columns(const zs::Header& header, int64_t width) {
  const int64_t fit = kStepBytes / (width * 4);
  const int64_t cells = static_cast<int64_t>(header.m) * header.k, nnz = header.nnz ? header.nnz : 1;
  const int64_t dense_enough = 64 * (cells / nnz + 1);
  const int64_t step = (fit > dense_enough ? fit : dense_enough) / 64 * 64;
  return step < 64 ? 64 : step > kMaxStep ? kMaxStep : step;
}

// Packs tokens [first, first + count) of the pass into their block; the last ones of a block also fill its empty lanes
// with zeros. Sixteen columns of all tokens at a time, so that each line of the block is finished while it is in L1.
inline void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t count) {
  const int64_t k = call.weight->header.k, block = first / kBlock * kBlock;
  const int64_t in_block = pass.tokens - block < kBlock ? pass.tokens - block : kBlock, stride = width(in_block);
  float* dst = reinterpret_cast<float*>(call.panel) + block * k + (first - block);
  const int64_t lanes = first + count == block + in_block ? stride - (first - block) : count;
  constexpr int64_t kColumns = 16;
  alignas(64) float lines[4][kColumns];
  for (int64_t c = 0; c < k; c += kColumns) {
    const int64_t columns = k - c < kColumns ? k - c : kColumns;
    for (int64_t t = 0; t < lanes; t += 4) {
      if (call.type == zs::Type::fp32 && columns == kColumns && t + 4 <= count) {
        const float* x = static_cast<const float*>(call.x) + (pass.first + first + t) * k + c;
        for (int64_t j = 0; j < kColumns; j += 4) transpose4(x + j, k, dst + (c + j) * stride + t, stride);
        continue;
      }
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t at = (pass.first + first + t + i) * k + c;
        for (int64_t v = 0; v < kColumns; v += simd::kLanes) {
          f32 x = simd::zero();
          if (t + i < count && v < columns)
            x = columns - v >= simd::kLanes ? panel::load_as(call.x, at + v, call.type)
                                            : panel::load_tail(call.x, at + v, columns - v, call.type);
          simd::store(&lines[i][v], x);
        }
      }
      if (stride == 1)
        for (int64_t j = 0; j < columns; ++j) dst[c + j] = lines[0][j];
      else if (columns == kColumns)
        for (int64_t j = 0; j < kColumns; j += 4)
          transpose4(&lines[0][j], kColumns, dst + (c + j) * stride + t, stride);
      else
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < 4; ++i) dst[(c + j) * stride + t + i] = lines[i][j];
    }
  }
}

struct alignas(64) Scratch {
  float sums[kRows * kBlock];   // [row][width]
  float tile[kBlock * kPanel];  // [token][16 rows]
};

// Some consecutive non-zeros of a row. Those below `limit` belong to this step.
template <typename Value, typename Index>
struct Run {
  const Value* values;
  const Index* columns;  // ascending
  int64_t count, limit;
  const float* x;  // of column 0 of `columns`
};

// Adds one step of one row to `sums` [kVectors * width]; returns how many non-zeros it took.
template <typename Lanes, int kVectors, typename Value, typename Index>
inline int64_t multiply_row(const Run<Value, Index>& run, float* sums, bool first) {
  typedef typename Lanes::Vector Vector;
  constexpr int kSets = kVectors >= 5 ? 1 : kVectors >= 3 ? 2 : kVectors == 2 ? 4 : 8;
  constexpr int64_t kStride = kVectors * Lanes::kWidth;
  Vector acc[kSets][kVectors] = {};
  if (!first)
    for (int v = 0; v < kVectors; ++v) acc[0][v] = Lanes::load(sums + v * Lanes::kWidth);

  const auto step = [&](int64_t i, Vector(&into)[kVectors]) __attribute__((always_inline)) {
    const Vector w = Lanes::set(run.values + i);
    const float* at = run.x + static_cast<int64_t>(run.columns[i]) * kStride;
    for (int v = 0; v < kVectors; ++v) into[v] = Lanes::fma(w, Lanes::load(at + v * Lanes::kWidth), into[v]);
  };
  int64_t i = 0;
  for (; i + kSets <= run.count && static_cast<int64_t>(run.columns[i + kSets - 1]) < run.limit; i += kSets)
    for (int s = 0; s < kSets; ++s) step(i + s, acc[s]);
  if constexpr (kSets > 1)
    for (; i < run.count && static_cast<int64_t>(run.columns[i]) < run.limit; ++i) step(i, acc[0]);

  for (int half = kSets / 2; half > 0; half /= 2)
    for (int s = 0; s < half; ++s)
      for (int v = 0; v < kVectors; ++v) acc[s][v] = Lanes::add(acc[s][v], acc[s + half][v]);
  for (int v = 0; v < kVectors; ++v) Lanes::store(sums + v * Lanes::kWidth, acc[0][v]);
  return i;
}

// The sums of `rows` rows and `count` tokens leave in rows of y.
__attribute__((noinline)) void finish_block(const zs::Call& call, Scratch& scratch, int64_t row, int64_t rows,
                                            int64_t token, int64_t count, int64_t stride) {
  for (int64_t i = rows * stride; i < (rows + kPanel - 1) / kPanel * kPanel * stride; ++i) scratch.sums[i] = 0;
  for (int64_t p = 0; p < rows; p += kPanel) {
    const float* tile = scratch.sums + p;  // as it is for a single token
    if (stride > 1) {
      tile = scratch.tile;
      for (int64_t t = 0; t < count; t += 4)
        for (int64_t r = 0; r < kPanel; r += 4)
          transpose4(scratch.sums + (p + r) * stride + t, stride, scratch.tile + t * kPanel + r, kPanel);
    }
    for (int64_t t = 0; t < count; ++t) {
      f32 sums[kPanel / simd::kLanes];
      for (int v = 0; v < kPanel / simd::kLanes; ++v) sums[v] = simd::load(tile + t * kPanel + v * simd::kLanes);
      panel::finish(call, token + t, row + p, rows - p, sums);
    }
  }
}

// `Source` hands out the rows: rewind(), run(row, first column, end, x, stride) and took(row, count).
template <typename Lanes, int kVectors, typename Source>
inline void multiply_block(const zs::Call& call, Source& source, Scratch& scratch, int64_t row, int64_t rows,
                           const float* x, int64_t token, int64_t count) {
  constexpr int64_t kStride = kVectors * Lanes::kWidth;
  const int64_t k = call.weight->header.k, step = step_columns(call.weight->header, kStride);
  source.rewind();
  for (int64_t c = 0; c < k; c += step)
    for (int64_t r = 0; r < rows; ++r) {
      const auto run = source.run(r, c, c + step < k ? c + step : k, x, kStride);
      source.took(r, multiply_row<Lanes, kVectors>(run, scratch.sums + r * kStride, c == 0));
    }
  finish_block(call, scratch, row, rows, token, count, kStride);
}

// `count` tokens in as many vectors as they need: the compile-time number is found by descent.
template <int kVectors, typename Source>
inline void multiply_some(const zs::Call& call, Source& source, Scratch& scratch, int64_t row, int64_t rows,
                          const float* x, int64_t token, int64_t count) {
  if constexpr (kVectors > 1) {
    if (count <= (kVectors - 1) * simd::kLanes)
      return multiply_some<kVectors - 1>(call, source, scratch, row, rows, x, token, count);
  }
  multiply_block<Full, kVectors>(call, source, scratch, row, rows, x, token, count);
}

// Rows [row, row + rows) for every token of the pass.
template <typename Source>
inline void multiply(const zs::Call& call, zs::Pass pass, Source& source, Scratch& scratch, int64_t row, int64_t rows) {
  for (int64_t t = 0; t < pass.tokens; t += kBlock) {
    const float* x = reinterpret_cast<const float*>(call.panel) + t * call.weight->header.k;
    const int64_t count = pass.tokens - t < kBlock ? pass.tokens - t : kBlock;
    if (count == 1)
      multiply_block<One, 1>(call, source, scratch, row, rows, x, pass.first + t, count);
    else if (count <= 4)
      multiply_block<Four, 1>(call, source, scratch, row, rows, x, pass.first + t, count);
    else
      multiply_some<kBlock / simd::kLanes>(call, source, scratch, row, rows, x, pass.first + t, count);
  }
}

inline int64_t units(const zs::Header& header) { return (header.m + kRows - 1) / kRows; }

inline zs::Geometry geometry(const zs::Header& header, int64_t tokens, int64_t scratch_bytes) {
  return {pass_tokens(header.k), kPackTokens, units(header), panel_bytes(header.k, tokens), scratch_bytes, false, true};
}

}  // namespace rows
}  // namespace
