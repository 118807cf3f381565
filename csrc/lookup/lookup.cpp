#include "lookup/lookup.h"

#include "threads.h"

#define ZS_ROOM lookup
#define ZS_LOOPS LookupLoop
#include "room.inc"

namespace zs {

namespace {

constexpr int64_t kAlone = 1 << 15;  // numbers: below, waking the other threads takes longer

}  // namespace

void lookup(const Lookup& lookup, int threads) {
  on_each(lookup.count * lookup.weight->header.k < kAlone ? 1 : threads, [&](int thread, int of) {
    loop().rows(lookup, lookup.count * thread / of, lookup.count * (thread + 1) / of);
  });
}

}  // namespace zs
