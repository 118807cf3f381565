#include "roofline/roofline.h"

#include <algorithm>

#include "threads.h"

#define ZS_ROOM roofline
#define ZS_LOOPS Roofline
#include "room.inc"

namespace zs {

int64_t multiply_add(bool bf16, int64_t rounds, int threads) {
  const auto multiply = bf16 ? loop().bf16 : loop().fp32;
  if (!multiply) return 0;
  int64_t operations = 0;
  on_each(threads, [&](int thread, int) {
    float sink;
    const int64_t done = multiply(rounds, &sink);
    if (thread == 0) operations = done;
  });
  return operations * threads;
}

void read_once(const float* data, int64_t nbytes, int threads) {
  const int64_t steps = nbytes / static_cast<int64_t>(sizeof(float)) / kReadStep;
  on_each(threads, [&](int thread, int of) {
    const int64_t first = steps * thread / of, last = steps * (thread + 1) / of;
    float sink;
    loop().read(data + first * kReadStep, (last - first) * kReadStep, &sink);
  });
}

}  // namespace zs
