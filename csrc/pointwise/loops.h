// The loops of one ISA row. They are compiled without contraction of products and sums (cmake/kernels.cmake).
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "pointwise/pointwise.h"
#include "simd/simd.h"

namespace {

using simd::f32;
constexpr int64_t kLanes = simd::kLanes;

constexpr int64_t size_of(zs::Type type) { return type == zs::Type::fp32 ? 4 : 2; }

// kLanes numbers, or as many as there are.
template <zs::Type T>
inline f32 load(const void* x, int64_t at, int64_t count) {
  return count >= kLanes ? panel::load_as(x, at, T) : panel::load_tail(x, at, count, T);
}

template <zs::Type T>
inline void store(void* y, int64_t at, int64_t count, f32 value) {
  if (count >= kLanes) return panel::store_as(y, at, value, T);
  alignas(64) uint8_t last[kLanes * sizeof(float)];
  panel::store_as(last, 0, value, T);
  __builtin_memcpy(static_cast<uint8_t*>(y) + at * size_of(T), last, count * size_of(T));
}

template <zs::Type T>
inline f32 rounded(f32 value) {
  if constexpr (T == zs::Type::fp32) return value;
  alignas(64) uint8_t kept[kLanes * sizeof(float)];
  panel::store_as(kept, 0, value, T);
  return panel::load_as(kept, 0, T);
}

template <zs::Type T>
void turn(const void* x, int64_t from, void* y, int64_t to, const void* cos, const void* sin, int64_t angle,
          int64_t turned, int64_t depth) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i, j = i + half;
    const f32 a = load<T>(x, from + i, count), b = load<T>(x, from + j, count);
    const f32 a_cos = rounded<T>(simd::mul(a, load<T>(cos, angle + i, count)));
    const f32 b_sin = rounded<T>(simd::mul(b, load<T>(sin, angle + i, count)));
    const f32 b_cos = rounded<T>(simd::mul(b, load<T>(cos, angle + j, count)));
    const f32 a_sin = rounded<T>(simd::mul(a, load<T>(sin, angle + j, count)));
    store<T>(y, to + i, count, simd::sub(a_cos, b_sin));
    store<T>(y, to + j, count, simd::add(b_cos, a_sin));
  }
  if (x != y && turned < depth)
    __builtin_memcpy(static_cast<uint8_t*>(y) + (to + turned) * size_of(T),
                     static_cast<const uint8_t*>(x) + (from + turned) * size_of(T), (depth - turned) * size_of(T));
}

template <zs::Type T>
void rotate_as(const zs::Rotary& r) {
  for (int64_t batch = 0; batch < r.batch; ++batch) {
    const int64_t angle = batch * r.angle_batch;
    for (int64_t head = 0; head < r.heads; ++head) {
      const int64_t at = (batch * r.heads + head) * r.depth;
      turn<T>(r.q, at, r.q, at, r.cos, r.sin, angle, r.turned, r.depth);
    }
    for (int64_t group = 0; group < r.groups; ++group) {
      const int64_t row = batch * r.groups + group;
      turn<T>(r.k, row * r.depth, r.to_k, batch * r.k_batch + group * r.k_head, r.cos, r.sin, angle, r.turned, r.depth);
      __builtin_memcpy(static_cast<uint8_t*>(r.to_v) + (batch * r.v_batch + group * r.v_head) * size_of(T),
                       static_cast<const uint8_t*>(r.v) + row * r.width * size_of(T), r.width * size_of(T));
    }
  }
}

void rotate_all(const zs::Rotary& r) {
  if (r.type == zs::Type::fp32)
    rotate_as<zs::Type::fp32>(r);
  else if (r.type == zs::Type::bf16)
    rotate_as<zs::Type::bf16>(r);
  else
    rotate_as<zs::Type::fp16>(r);
}

template <zs::Type T>
void combine_as(zs::Pair what, const void* a, const void* b, void* y, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kLanes) {
    const f32 one = load<T>(a, i, last - i), other = load<T>(b, i, last - i);
    store<T>(y, i, last - i, what == zs::Pair::add ? simd::add(one, other) : simd::mul(one, other));
  }
}

void combine_part(zs::Pair what, const void* a, const void* b, void* y, zs::Type type, int64_t first, int64_t last) {
  if (type == zs::Type::fp32)
    combine_as<zs::Type::fp32>(what, a, b, y, first, last);
  else if (type == zs::Type::bf16)
    combine_as<zs::Type::bf16>(what, a, b, y, first, last);
  else
    combine_as<zs::Type::fp16>(what, a, b, y, first, last);
}

}  // namespace

namespace zs {
extern const PointwiseLoop ZS_TABLE;
const PointwiseLoop ZS_TABLE = {rotate_all, combine_part};
}  // namespace zs
