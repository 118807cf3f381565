// The only thread loop. A kernel never starts threads: it is given token ranges to pack and units to run.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "core.h"

namespace zs {

// A buffer that a thread keeps between calls; it only grows.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  uint8_t* at_least(int64_t nbytes) {
    if (nbytes > size_) {
      std::free(data_);
      size_ = (nbytes + 4095) / 4096 * 4096;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

// Calls body(thread, of how many) on each of `threads` threads.
template <typename Body>
inline void on_each(int threads, const Body& body) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  body(omp_get_thread_num(), omp_get_num_threads());
}

// Units that a thread takes at once. Neighbours: what one fetches ahead is the next one's, where units in turns fetched
// for the other thread (two threads, one token, 4096 x 4096 from memory: bitmask int4 1.13 times as fast, int8 1.09,
// dense int4 1.0 to 1.1). A sixteenth of a thread's share or less, so that all end at about the same time.
inline int64_t units_at_once(const Geometry& geometry, int threads) {
  return geometry.uneven ? 1 : std::max<int64_t>(1, geometry.units / (16 * threads));
}

// Runs the call on `threads` threads. Each output element is computed by one unit in one order, so the result does
// not depend on the number of threads.
inline void run(const Kernel& kernel, Call call, int threads) {
  thread_local Buffer shared;
  const Geometry geometry = kernel.geometry(*call.weight, call.tokens);
  const int64_t at_once = units_at_once(geometry, threads);
  call.panel = shared.at_least(geometry.panel_bytes);

  // Allocation may throw, and nothing may throw out of a parallel region: one block for all threads, made here.
  thread_local Buffer scratch;
  const int64_t each = (geometry.scratch_bytes + 4095) / 4096 * 4096 + 64;
  uint8_t* scratch_base = scratch.at_least(each * threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    uint8_t* mine = scratch_base + each * omp_get_thread_num();
    for (int64_t first = 0; first < call.tokens; first += geometry.pass_tokens) {
      const Pass pass{first, std::min(geometry.pass_tokens, call.tokens - first), geometry.pack_tokens};
      const int64_t packs = geometry.panel_bytes ? (pass.tokens + geometry.pack_tokens - 1) / geometry.pack_tokens : 0;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < packs; ++i)
        kernel.pack(call, pass, i * geometry.pack_tokens,
                    std::min(geometry.pack_tokens, pass.tokens - i * geometry.pack_tokens));
#pragma omp for schedule(dynamic, at_once)
      for (int64_t unit = 0; unit < geometry.units; ++unit) kernel.run(call, pass, unit, mine);
    }
  }
}

}  // namespace zs
