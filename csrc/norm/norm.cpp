#include "norm/norm.h"

#include "threads.h"

#define ZS_ROOM norm
#define ZS_LOOPS NormLoop
#include "room.inc"

namespace zs {

namespace {

constexpr int64_t kAlone = 1 << 15;  // elements: below, waking the other threads takes longer

}  // namespace

void normalise(const Norm& norm, int threads) {
  on_each(norm.rows * norm.width < kAlone ? 1 : threads,
          [&](int thread, int of) { loop().rows(norm, norm.rows * thread / of, norm.rows * (thread + 1) / of); });
}

}  // namespace zs
