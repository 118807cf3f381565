// x as integers.h multiplies it: bytes, where the sums of each group start, and scales.
#pragma once
#include "kernels/spmm_bitmask/poison.h"
#include "panel/quantize.h"
#include "simd/codes.h"

namespace {
namespace integers {

using simd::f32;
using zs::Values;
constexpr int64_t kAtOnce = 8;           // tokens of one expansion
constexpr int64_t kPassBytes = 1 << 20;  // packed x of one pass: an L2

inline int64_t columns(const zs::Header& header) { return bitmask::words(header) * 32; }
inline int64_t groups(const zs::Header& header) { return columns(header) / header.group_size; }  // some may not exist
inline int64_t start_lanes(const zs::Header& header) {
  return static_cast<Values>(header.values) == Values::int4 ? simd::start_lanes<Values::int4>(header.group_size)
                                                            : simd::start_lanes<Values::int8>(header.group_size);
}
inline int64_t token_bytes(const zs::Header& header) {
  return (columns(header) + groups(header) * 4 * (1 + start_lanes(header)) + 4095) / 4096 * 4096 + 512;
}
inline int64_t flags_bytes(int64_t tokens) { return (tokens + 63) / 64 * 64; }
inline int64_t pass_tokens(const zs::Header& header) {
  const int64_t fit = kPassBytes / token_bytes(header) / kAtOnce * kAtOnce;
  return fit < kAtOnce ? kAtOnce : fit > 256 ? 256 : fit;
}

// x of one token as the panel holds it.
struct Token {
  int8_t* q;
  int32_t* starts;
  float* scales;
};
inline Token token_at(const zs::Call& call, zs::Pass pass, int64_t t) {
  const zs::Header& header = call.weight->header;
  uint8_t* at = call.panel + flags_bytes(pass.tokens) + t * token_bytes(header);
  int32_t* starts = reinterpret_cast<int32_t*>(at + columns(header));
  float* scales = reinterpret_cast<float*>(starts + groups(header) * start_lanes(header));
  return {reinterpret_cast<int8_t*>(at), starts, scales};
}

// One group of one token; true if there was Inf or NaN in it.
inline bool quantize_finite(const zs::Call& call, int64_t at, int64_t count, int64_t size, int8_t* q,
                            panel::Quantized& made) {
  alignas(64) float x[panel::kLargestGroup];
  for (int64_t i = 0; i < size; i += simd::kLanes) {
    f32 v = simd::zero();
    if (i + simd::kLanes <= count)
      v = panel::load_as(call.x, at + i, call.type);
    else if (i < count)
      v = panel::load_tail(call.x, at + i, count - i, call.type);
    simd::store(x + i, v);
  }
  const bool poisoned = bitmask::make_finite(x, size);
  made = panel::quantize_group(x, 0, size, size, zs::Type::fp32, q);
  return poisoned;
}

template <Values kValues>
void pack(const zs::Call& call, zs::Pass pass, int64_t first, int64_t tokens) {
  const zs::Header& header = call.weight->header;
  const int64_t k = header.k, size = header.group_size;
  for (int64_t t = first; t < first + tokens; ++t) {
    const Token token = token_at(call, pass, t);
    bool poisoned = false;
    for (int64_t g = 0; g < groups(header); ++g) {
      const int64_t left = k - g * size;
      panel::Quantized made;
      poisoned |= quantize_finite(call, (pass.first + t) * k + g * size,
                                  left < 0      ? 0
                                  : left < size ? left
                                                : size,
                                  size, token.q + g * size, made);
      const bool high = simd::is_sixteenfold<kValues>(size) && g * size / 64 % 2;
      token.scales[g] = high ? made.scale / 16 : made.scale;
      const int64_t lanes = simd::start_lanes<kValues>(size);
      const int32_t factor = (high ? -16 : -1) * simd::kZeroCode<kValues>;
      int32_t* starts = token.starts + g * lanes;
      for (int64_t i = 0; i < lanes; ++i) starts[i] = 0;
      for (int64_t quad = 0; lanes && quad < size / 4; quad += lanes)
        for (int64_t i = 0; i < lanes; ++i) {
          const int8_t* q = token.q + g * size + (quad + i) * 4;
          starts[i] += factor * (q[0] + q[1] + q[2] + q[3]);
        }
    }
    call.panel[t] = poisoned;
  }
}

}  // namespace integers
}  // namespace
