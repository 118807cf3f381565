// The loops of one ISA row.
#include "norm/norm.h"
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "simd/simd.h"

namespace {

using simd::f32;
constexpr int64_t kLanes = simd::kLanes;
constexpr int kSums = 4;

template <zs::Type T, zs::Type W>
void row(const zs::Norm& norm, int64_t at) {
  const int64_t width = norm.width, whole = width / kLanes * kLanes, rest = width - whole;
  f32 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = simd::zero();
  int64_t i = 0;
  for (; i + kSums * kLanes <= whole; i += kSums * kLanes)
    for (int s = 0; s < kSums; ++s) {
      const f32 x = panel::load_as(norm.x, at + i + s * kLanes, T);
      sums[s] = simd::fma(x, x, sums[s]);
    }
  for (; i < whole; i += kLanes) {
    const f32 x = panel::load_as(norm.x, at + i, T);
    sums[0] = simd::fma(x, x, sums[0]);
  }
  if (rest) {
    const f32 x = panel::load_tail(norm.x, at + whole, rest, T);
    sums[1] = simd::fma(x, x, sums[1]);
  }
  alignas(64) float lanes[kLanes];
  simd::store(lanes, simd::add(simd::add(sums[0], sums[1]), simd::add(sums[2], sums[3])));
  float squares = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) squares += lanes[lane];
  const f32 by = simd::set(1 / __builtin_sqrtf(squares / static_cast<float>(width) + norm.eps));
  const f32 offset = simd::set(norm.offset);
  for (i = 0; i < whole; i += kLanes) {
    const f32 x = simd::mul(panel::load_as(norm.x, at + i, T), by);
    panel::store_as(norm.y, at + i, simd::mul(x, simd::add(panel::load_as(norm.weight, i, W), offset)), T);
  }
  if (rest) {
    alignas(64) uint8_t last[kLanes * sizeof(float)];
    const f32 x = simd::mul(panel::load_tail(norm.x, at + whole, rest, T), by);
    panel::store_as(last, 0, simd::mul(x, simd::add(panel::load_tail(norm.weight, whole, rest, W), offset)), T);
    constexpr int64_t size = T == zs::Type::fp32 ? 4 : 2;
    __builtin_memcpy(static_cast<uint8_t*>(norm.y) + (at + whole) * size, last, rest * size);
  }
}

template <zs::Type T>
void typed(const zs::Norm& norm, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    if (norm.weights == zs::Type::fp32)
      row<T, zs::Type::fp32>(norm, r * norm.width);
    else
      row<T, T>(norm, r * norm.width);
  }
}

void rows(const zs::Norm& norm, int64_t first, int64_t last) {
  if (norm.type == zs::Type::fp32)
    typed<zs::Type::fp32>(norm, first, last);
  else if (norm.type == zs::Type::bf16)
    typed<zs::Type::bf16>(norm, first, last);
  else
    typed<zs::Type::fp16>(norm, first, last);
}

}  // namespace

namespace zs {
extern const NormLoop ZS_TABLE;
const NormLoop ZS_TABLE = {rows};
}  // namespace zs
