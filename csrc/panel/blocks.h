// Blocks of tokens as panel/fp32.h multiplies them: how many tokens, and x packed column by column.
#pragma once
#include "panel/activations.h"
#include "panel/transpose4.h"

namespace {
namespace panel {

using zs::kPanel;
constexpr int kVectors = kPanel / simd::kLanes;                // vectors of one panel
constexpr int kSums = simd::kRegisters == 32 ? 28 : 12;        // accumulators that fit beside weights and broadcast
constexpr int kBlock = kVectors == 1 ? 14 : kSums / kVectors;  // tokens of a full block
constexpr bool kWide = simd::kLanes == 16;                     // AVX-512
constexpr int64_t kPassTokens = (kWide ? 14 : 42) * kBlock;    // most tokens of one pass
constexpr int64_t kPassBytes = 512 << 10;                      // packed x of one pass where the weight fits in L2
constexpr int64_t kNearBytes = 1 << 20;                        // such a weight

// Tokens of a pass: a large weight is read once for many, a small one stays in L2, and so should x.
inline int64_t pass_tokens(int64_t k, int64_t weight_bytes) {
  const int64_t fit = weight_bytes > kNearBytes ? kPassTokens : kPassBytes / (k * 4) / kBlock * kBlock;
  return fit < 4 * kBlock ? 4 * kBlock : fit > kPassTokens ? kPassTokens : fit;
}

// Packs tokens [first, first + count) of the pass, one block (count <= kBlock): dst[c * count + t] = x[t, c]. Sixteen
// columns at a time, four tokens by four columns in registers: storing single floats took half the time of a
// convolution of 64 channels.
inline void pack_block(const zs::Call& call, zs::Pass pass, int64_t first, int64_t count) {
  constexpr int64_t kColumns = 16;
  const int64_t k = call.weight->header.k, at = (pass.first + first) * k;
  float* dst = reinterpret_cast<float*>(call.panel) + first * k;
  alignas(64) float lines[kBlock * kColumns];
  for (int64_t c = 0; c < k; c += kColumns) {
    const int64_t columns = k - c < kColumns ? k - c : kColumns;
    const float* src = lines;
    int64_t step = kColumns;
    if (call.type == zs::Type::fp32 && columns == kColumns) {
      src = static_cast<const float*>(call.x) + at + c;
      step = k;
    } else {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t v = 0; v < columns; v += simd::kLanes)
          simd::store(lines + t * kColumns + v, columns - v >= simd::kLanes
                                                    ? load_as(call.x, at + t * k + c + v, call.type)
                                                    : load_tail(call.x, at + t * k + c + v, columns - v, call.type));
    }
    int64_t t = 0;
    if (columns == kColumns) {
      for (; t + 4 <= count; t += 4)
        for (int64_t j = 0; j < kColumns; j += 4)
          transpose4(src + t * step + j, step, dst + (c + j) * count + t, count);
      for (; t + 2 <= count; t += 2)
        for (int64_t j = 0; j < kColumns; j += 4)
          transpose2(src + t * step + j, step, dst + (c + j) * count + t, count);
    }
    for (; t < count; ++t)
      for (int64_t j = 0; j < columns; ++j) dst[(c + j) * count + t] = src[t * step + j];
  }
}

}  // namespace panel
}  // namespace
