// The loops of one ISA row. The queries of a group share its keys: each row of keys and of values is read once for up
// to kHeads of them, and two rows at a time, since one sum for each head would wait for its own last addition.
#include "attention/attention.h"
#include "panel/activations.h"
#include "panel/epilogue.h"
#include "simd/simd.h"

namespace {

using simd::f32;
constexpr int64_t kLanes = simd::kLanes;
constexpr int kHeads = 4;
constexpr int64_t kBlock = 64;  // tokens whose values stay in the first cache while columns are added up
constexpr float kLowest = -3.402823466e38f;

struct Rows {
  const uint8_t* data;
  int64_t stride, count, width;  // of rows in elements; how many, and how long
  const uint8_t* at(int64_t row, int64_t size) const { return data + row * stride * size; }
};

// GCC 12 warns of its own cast to half a register where simd::sum is inlined here.
inline float total(f32 v) {
  if constexpr (kLanes <= 8) return simd::sum(v);
  alignas(64) float lanes[kLanes], four[4] = {};
  simd::store(lanes, v);
  for (int64_t i = 0; i < kLanes; ++i) four[i % 4] += lanes[i];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

constexpr int64_t size_of(zs::Type type) { return type == zs::Type::fp32 ? 4 : 2; }

template <zs::Type T>
inline f32 part(const uint8_t* row, int64_t at, int64_t width) {
  return at + kLanes <= width ? panel::load_as(row, at, T) : panel::load_tail(row, at, width - at, T);
}

// scores[h][t] = queries[h] . keys[t] for H heads and N rows from t on.
template <zs::Type T, int H, int N>
inline void dot(const Rows& keys, int64_t t, const float* queries, float* scores) {
  const int64_t each = zs::padded(keys.width), row = zs::padded(keys.count);
  f32 sums[H][N];
  for (int h = 0; h < H; ++h)
    for (int n = 0; n < N; ++n) sums[h][n] = simd::zero();
  const uint8_t* at[N];
  for (int n = 0; n < N; ++n) at[n] = keys.at(t + n, size_of(T));
  const auto add = [&](int64_t d, const f32(&key)[N]) {
    for (int h = 0; h < H; ++h) {
      const f32 query = simd::load(queries + h * each + d);
      for (int n = 0; n < N; ++n) sums[h][n] = simd::fma(query, key[n], sums[h][n]);
    }
  };
  f32 key[N];
  int64_t d = 0;
  for (; d + kLanes <= keys.width; d += kLanes) {
    for (int n = 0; n < N; ++n) key[n] = panel::load_as(at[n], d, T);
    add(d, key);
  }
  if (d < keys.width) {
    for (int n = 0; n < N; ++n) key[n] = panel::load_tail(at[n], d, keys.width - d, T);
    add(d, key);
  }
  for (int h = 0; h < H; ++h)
    for (int n = 0; n < N; ++n) scores[h * row + t + n] = total(sums[h][n]);
}

template <zs::Type T, int H>
void score(const Rows& keys, const float* queries, float* scores) {
  int64_t t = 0;
  for (; t + 2 <= keys.count; t += 2) dot<T, H, 2>(keys, t, queries, scores);
  for (; t < keys.count; ++t) dot<T, H, 1>(keys, t, queries, scores);
}

// Turns the scores of a head into weights, and returns 1 / their sum; 0 where no token is looked at.
float weigh(float* scores, int64_t tokens, const uint8_t* mask) {
  const int64_t end = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = tokens; t < end; ++t) scores[t] = kLowest;
  if (mask)
    for (int64_t t = 0; t < tokens; ++t)
      if (!mask[t]) scores[t] = kLowest;
  f32 most = simd::set(kLowest);
  for (int64_t t = 0; t < end; t += kLanes) most = simd::max(most, simd::load(scores + t));
  alignas(64) float lanes[kLanes];
  simd::store(lanes, most);
  float top = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  for (int64_t t = 0; t < end; t += kLanes)
    simd::store(scores + t, panel::exp(simd::sub(simd::load(scores + t), simd::set(top))));
  for (int64_t t = tokens; t < end; ++t) scores[t] = 0;
  if (mask)
    for (int64_t t = 0; t < tokens; ++t)
      if (!mask[t]) scores[t] = 0;
  f32 sum = simd::zero();
  for (int64_t t = 0; t < end; t += kLanes) sum = simd::add(sum, simd::load(scores + t));
  const float all = total(sum);
  return all == 0 ? 0 : 1 / all;
}

// sums[h][w ...] += weights[h][t] values[t][w ...] for H heads, V vectors, the rows from `first` to `last`.
template <zs::Type T, int H, int V>
inline void add_columns(const Rows& values, int64_t first, int64_t last, int64_t w, const float* weights, float* sums) {
  const int64_t each = zs::padded(values.width), row = zs::padded(values.count);
  f32 acc[H][V];
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) acc[h][v] = simd::load(sums + h * each + w + v * kLanes);
  for (int64_t t = first; t < last; ++t) {
    f32 value[V];
    for (int v = 0; v < V; ++v) value[v] = part<T>(values.at(t, size_of(T)), w + v * kLanes, values.width);
    for (int h = 0; h < H; ++h) {
      const f32 weight = simd::set(weights[h * row + t]);
      for (int v = 0; v < V; ++v) acc[h][v] = simd::fma(weight, value[v], acc[h][v]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) simd::store(sums + h * each + w + v * kLanes, acc[h][v]);
}

template <zs::Type T, int H>
void mix(const Rows& values, const float* weights, float* sums) {
  for (int64_t first = 0; first < values.count; first += kBlock) {
    const int64_t last = first + kBlock < values.count ? first + kBlock : values.count;
    int64_t w = 0;
    for (; w + 2 * kLanes <= values.width; w += 2 * kLanes) add_columns<T, H, 2>(values, first, last, w, weights, sums);
    for (; w < values.width; w += kLanes) add_columns<T, H, 1>(values, first, last, w, weights, sums);
  }
}

template <zs::Type T, int H>
void heads(const zs::Attention& a, const Rows& keys, const Rows& values, const uint8_t* mask, int64_t batch,
           int64_t head, float* queries) {
  const int64_t depth = zs::padded(a.depth), tokens = zs::padded(a.tokens), width = zs::padded(a.width);
  float* const scores = queries + H * depth;
  float* const sums = scores + H * tokens;
  const auto* q = static_cast<const uint8_t*>(a.q);
  for (int h = 0; h < H; ++h) {
    const uint8_t* row = q + (batch * a.q_batch + (head + h) * a.q_head) * size_of(T);
    for (int64_t d = 0; d < a.depth; d += kLanes)
      simd::store(queries + h * depth + d, simd::mul(part<T>(row, d, a.depth), simd::set(a.scale)));
    for (int64_t w = 0; w < width; w += kLanes) simd::store(sums + h * width + w, simd::zero());
  }
  score<T, H>(keys, queries, scores);
  float over[H];
  for (int h = 0; h < H; ++h) over[h] = weigh(scores + h * tokens, a.tokens, mask);
  mix<T, H>(values, scores, sums);
  for (int h = 0; h < H; ++h) {
    const int64_t at = (batch * a.heads + head + h) * a.width;
    int64_t w = 0;
    for (; w + kLanes <= a.width; w += kLanes)
      panel::store_as(a.y, at + w, simd::mul(simd::load(sums + h * width + w), simd::set(over[h])), T);
    if (w < a.width) {
      alignas(64) uint8_t last[kLanes * sizeof(float)];
      panel::store_as(last, 0, simd::mul(simd::load(sums + h * width + w), simd::set(over[h])), T);
      __builtin_memcpy(static_cast<uint8_t*>(a.y) + (at + w) * size_of(T), last, (a.width - w) * size_of(T));
    }
  }
}

template <zs::Type T>
void typed(const zs::Attention& a, int64_t batch, int64_t group, float* scratch) {
  const auto* k = static_cast<const uint8_t*>(a.k);
  const auto* v = static_cast<const uint8_t*>(a.v);
  const Rows keys{k + (batch * a.k_batch + group * a.k_head) * size_of(T), a.k_token, a.tokens, a.depth};
  const Rows values{v + (batch * a.v_batch + group * a.v_head) * size_of(T), a.v_token, a.tokens, a.width};
  const uint8_t* mask = a.mask ? a.mask + batch * a.mask_batch : nullptr;
  const int64_t per = a.heads / a.groups, end = (group + 1) * per;
  int64_t head = group * per;
  for (; head + kHeads <= end; head += kHeads) heads<T, kHeads>(a, keys, values, mask, batch, head, scratch);
  for (; head + 2 <= end; head += 2) heads<T, 2>(a, keys, values, mask, batch, head, scratch);
  if (head < end) heads<T, 1>(a, keys, values, mask, batch, head, scratch);
}

void group(const zs::Attention& a, int64_t batch, int64_t which, float* scratch) {
  if (a.type == zs::Type::fp32)
    typed<zs::Type::fp32>(a, batch, which, scratch);
  else if (a.type == zs::Type::bf16)
    typed<zs::Type::bf16>(a, batch, which, scratch);
  else
    typed<zs::Type::fp16>(a, batch, which, scratch);
}

}  // namespace

namespace zs {
extern const AttentionLoop ZS_TABLE;
const AttentionLoop ZS_TABLE = {group};
}  // namespace zs
