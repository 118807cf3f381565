#include "norm/norm.h"

#include "isa.h"
#include "threads.h"

namespace zs {

#define ROW(name) extern const NormLoop norm_##name;
#include "isa_rows.inc"
#undef ROW

namespace {

constexpr int64_t kAlone = 1 << 15;  // elements: below, waking the other threads takes longer

const NormLoop& loop() {
  static const NormLoop* const rows[] = {
#define ROW(name) &norm_##name,
#include "isa_rows.inc"
#undef ROW
  };
  return *rows[isa::active()];
}

}  // namespace

void normalise(const Norm& norm, int threads) {
  on_each(norm.rows * norm.width < kAlone ? 1 : threads,
          [&](int thread, int of) { loop().rows(norm, norm.rows * thread / of, norm.rows * (thread + 1) / of); });
}

}  // namespace zs
