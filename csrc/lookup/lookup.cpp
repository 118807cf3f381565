#include "lookup/lookup.h"

#include "isa.h"
#include "threads.h"

namespace zs {

#define ROW(name) extern const LookupLoop lookup_##name;
#include "isa_rows.inc"
#undef ROW

namespace {

constexpr int64_t kAlone = 1 << 15;  // numbers: below, waking the other threads takes longer

const LookupLoop& loop() {
  static const LookupLoop* const rows[] = {
#define ROW(name) &lookup_##name,
#include "isa_rows.inc"
#undef ROW
  };
  return *rows[isa::active()];
}

}  // namespace

void lookup(const Lookup& lookup, int threads) {
  on_each(lookup.count * lookup.weight->header.k < kAlone ? 1 : threads, [&](int thread, int of) {
    loop().rows(lookup, lookup.count * thread / of, lookup.count * (thread + 1) / of);
  });
}

}  // namespace zs
