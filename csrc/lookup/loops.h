// The loops of one ISA row.
#include "kernels/spmm_dense/layout.h"
#include "lookup/lookup.h"
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "simd/simd.h"

namespace {

using simd::f32;
constexpr int64_t kLanes = simd::kLanes;
static_assert(kLanes <= 32, "a vector lies within a group");

void row(const zs::Lookup& lookup, int64_t id, int64_t to) {
  const zs::Header& header = lookup.weight->header;
  const int64_t panel = id / zs::kPanel, lane = id % zs::kPanel, k = header.k;
  const bool halves = static_cast<zs::Values>(header.values) == zs::Values::int4;
  const uint8_t* const codes = dense::codes(*lookup.weight, panel);
  const uint8_t* const scales = dense::scales(*lookup.weight, panel);
  const int64_t size = lookup.type == zs::Type::fp32 ? 4 : 2;
  alignas(64) float numbers[kLanes], steps[kLanes];
  for (int64_t j = 0; j < k; j += kLanes) {
    for (int64_t i = j; i < j + kLanes; ++i) {  // columns are padded to whole groups
      const int64_t quad = halves ? i / 8 : i / 4;
      const int code = codes[(quad * zs::kPanel + lane) * 4 + i % 4];
      numbers[i - j] = static_cast<float>(halves ? (i / 4 % 2 ? code >> 4 : code & 15) - 8 : code - 128);
    }
    const int64_t at = j / header.group_size * zs::kPanel + lane;
    float step;
    if (static_cast<zs::Type>(header.scales) == zs::Type::fp16) {
      simd::store(steps, panel::load_tail(scales, at, 1, zs::Type::fp16));
      step = steps[0];
    } else {
      __builtin_memcpy(&step, scales + at * 4, 4);
    }
    const f32 value = simd::mul(simd::load(numbers), simd::set(step));
    if (j + kLanes <= k) {
      panel::store_as(lookup.y, to + j, value, lookup.type);
    } else {
      alignas(64) uint8_t last[kLanes * sizeof(float)];
      panel::store_as(last, 0, value, lookup.type);
      __builtin_memcpy(static_cast<uint8_t*>(lookup.y) + (to + j) * size, last, (k - j) * size);
    }
  }
}

void rows(const zs::Lookup& lookup, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) row(lookup, lookup.ids[i], i * lookup.weight->header.k);
}

}  // namespace

namespace zs {
extern const LookupLoop ZS_TABLE;
const LookupLoop ZS_TABLE = {rows};
}  // namespace zs
