// The loops of one ISA row. Enough independent chains hide the latency of a multiply-add (4 cycles on 2 ports need 8);
// they fit the registers beside two operands. The operands keep every chain near 1: no overflow, no subnormals.
#include "roofline/roofline.h"
#include "simd/simd.h"
#ifdef ZS_ROW_amx
#include "simd/amx.h"
#endif

namespace {

constexpr int kChains = simd::kRegisters >= 32 ? 16 : 12;

void keep(simd::f32 (&chain)[kChains], float* sink) {
  for (int i = 1; i < kChains; ++i) chain[0] = simd::add(chain[0], chain[i]);
  *sink = simd::sum(chain[0]);
}

int64_t fp32(int64_t rounds, float* sink) {
  const simd::f32 scale = simd::set(0.5f), shift = simd::set(0.5f);
  simd::f32 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = simd::set(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kChains; ++i) chain[i] = simd::fma(chain[i], scale, shift);
  keep(chain, sink);
  return rounds * kChains * simd::kLanes * 2;
}

#if defined(ZS_ROW_amx)
// Four sums of tiles from two by two operands, as a product of matrices would use them. 16 x 16 sums of 32 products.
int64_t bf16(int64_t rounds, float* sink) {
  alignas(64) float out[256] = {};
  amx::Tiles tiles;
  ZS_TILE_ZERO(0);
  ZS_TILE_ZERO(1);
  ZS_TILE_ZERO(2);
  ZS_TILE_ZERO(3);
  ZS_TILE_LOAD(4, out, 64);
  ZS_TILE_LOAD(5, out, 64);
  ZS_TILE_LOAD(6, out, 64);
  ZS_TILE_LOAD(7, out, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    ZS_TILE_DOT(0, 4, 6);
    ZS_TILE_DOT(1, 4, 7);
    ZS_TILE_DOT(2, 5, 6);
    ZS_TILE_DOT(3, 5, 7);
  }
  ZS_TILE_STORE(0, out, 64);
  *sink = out[0];
  return rounds * 4 * 16 * 16 * 32 * 2;
}
#define ZS_BF16 bf16
#elif defined(ZS_ROW_avx512bf16)
int64_t bf16(int64_t rounds, float* sink) {
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
  simd::f32 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = simd::zero();
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], ones, ones);
  keep(chain, sink);
  return rounds * kChains * 32 * 2;
}
#define ZS_BF16 bf16
#else
#define ZS_BF16 nullptr
#endif

void read(const float* data, int64_t count, float* sink) {
  constexpr int kSums = 8;
  simd::f32 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = simd::zero();
  for (int64_t at = 0; at < count; at += kSums * simd::kLanes)
    for (int i = 0; i < kSums; ++i) sums[i] = simd::add(sums[i], simd::load(data + at + i * simd::kLanes));
  for (int i = 1; i < kSums; ++i) sums[0] = simd::add(sums[0], sums[i]);
  *sink = simd::sum(sums[0]);
}
static_assert(zs::kReadStep % (8 * simd::kLanes) == 0, "whole steps");

}  // namespace

namespace zs {
extern const Roofline ZS_TABLE;
const Roofline ZS_TABLE = {fp32, ZS_BF16, read};
}  // namespace zs
