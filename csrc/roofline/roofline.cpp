#include "roofline/roofline.h"

#include <algorithm>

#include "isa.h"
#include "threads.h"

namespace zs {

#define ROW(name) extern const Roofline roofline_##name;
#include "isa_rows.inc"
#undef ROW

namespace {

const Roofline& loops() {
  static const Roofline* const rows[] = {
#define ROW(name) &roofline_##name,
#include "isa_rows.inc"
#undef ROW
  };
  return *rows[isa::active()];
}

}  // namespace

int64_t multiply_add(bool bf16, int64_t rounds, int threads) {
  const auto loop = bf16 ? loops().bf16 : loops().fp32;
  if (!loop) return 0;
  int64_t operations = 0;
  on_each(threads, [&](int thread, int) {
    float sink;
    const int64_t done = loop(rounds, &sink);
    if (thread == 0) operations = done;
  });
  return operations * threads;
}

void read_once(const float* data, int64_t nbytes, int threads) {
  const int64_t steps = nbytes / static_cast<int64_t>(sizeof(float)) / kReadStep;
  on_each(threads, [&](int thread, int of) {
    const int64_t first = steps * thread / of, last = steps * (thread + 1) / of;
    float sink;
    loops().read(data + first * kReadStep, (last - first) * kReadStep, &sink);
  });
}

}  // namespace zs
