#include "pointwise/pointwise.h"

#include "threads.h"

#define ZS_ROOM pointwise
#define ZS_LOOPS PointwiseLoop
#include "room.inc"

namespace zs {

namespace {

constexpr int64_t kAlone = 1 << 16;  // numbers: below, waking the other threads takes longer
constexpr int64_t kPart = 64;        // numbers: no two threads write to one cache line

}  // namespace

void rotate(const Rotary& rotary) { loop().rotate(rotary); }

void combine(Pair what, const void* a, const void* b, void* y, Type type, int64_t count, int threads) {
  const int64_t parts = (count + kPart - 1) / kPart;
  on_each(count < kAlone ? 1 : threads, [&](int thread, int of) {
    const int64_t first = parts * thread / of * kPart, last = std::min(count, parts * (thread + 1) / of * kPart);
    if (first < last) loop().combine(what, a, b, y, type, first, last);
  });
}

}  // namespace zs
