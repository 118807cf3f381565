#include "attention/attention.h"

#include "threads.h"

#define ZS_ROOM attention
#define ZS_LOOPS AttentionLoop
#include "room.inc"

namespace zs {

namespace {

constexpr int64_t kAlone = 1 << 15;  // multiply-adds: below, waking the other threads takes longer

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
