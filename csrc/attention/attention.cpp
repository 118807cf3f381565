#include "attention/attention.h"

#include "isa.h"
#include "threads.h"

namespace zs {

#define ROW(name) extern const AttentionLoop attention_##name;
#include "isa_rows.inc"
#undef ROW

namespace {

constexpr int64_t kAlone = 1 << 15;  // multiply-adds: below, waking the other threads takes longer

const AttentionLoop& loop() {
  static const AttentionLoop* const rows[] = {
#define ROW(name) &attention_##name,
#include "isa_rows.inc"
#undef ROW
  };
  return *rows[isa::active()];
}

}  // namespace

void attend(const Attention& a, int threads) {
  const int64_t units = a.batch * a.groups, each = padded(scratch_floats(a));
  if (a.batch * a.heads * a.tokens * (a.depth + a.width) < kAlone) threads = 1;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(units, 1)));
  thread_local Buffer scratch;
  float* const base = reinterpret_cast<float*>(scratch.at_least(each * threads * static_cast<int64_t>(sizeof(float))));
  on_each(threads, [&](int thread, int of) {
    for (int64_t unit = units * thread / of; unit < units * (thread + 1) / of; ++unit)
      loop().group(a, unit / a.groups, unit % a.groups, base + each * thread);
  });
}

}  // namespace zs
