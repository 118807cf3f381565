// Memory of large outputs, handed out again once the tensor that used it is gone.
//
// malloc maps every block of 32 MB and more anew (glibc's highest threshold) and unmaps it when it is freed, so each
// such output comes as pages that do not exist yet: 8,192 tokens x 1,536 outputs fault 12,288 times, and up to twice
// that when two threads write neighbouring columns of the same rows and meet on the same page. That took longer than
// the multiplication: 58 ms with it, 22 ms without (AVX2, two threads, 4:16 of 384 inputs). Asking for huge pages
// instead costs more than it saves as soon as others free small pages: the kernel then compacts memory first.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace zs {

struct Block {
  uint8_t* data;
  int64_t nbytes;
};

class Pool {
 public:
  // A 64-byte aligned block of at least nbytes, to be given back. std::bad_alloc if there is no memory.
  Block* take(int64_t nbytes) {
    if (nbytes > kMost) throw std::bad_alloc();
    if (Block* kept = find(nbytes)) return kept;
    const int64_t whole = (nbytes + 63) / 64 * 64;
    auto block = std::make_unique<Block>(Block{nullptr, whole});
    block->data = allocate(whole);
    if (!block->data) {  // what is kept for later is needed now
      drop();
      block->data = allocate(whole);
    }
    if (!block->data) throw std::bad_alloc();
    return block.release();
  }

  // Keeps the block, and frees the one kept longest if there is no room. Of a lock that is held, or was when this
  // process was forked, nothing is expected: then the block is freed.
  void give(Block* block) noexcept {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock)
        for (Block*& kept : kept_) {  // the others move on, into the first gap or out
          std::swap(kept, block);
          if (!block) break;
        }
    }
    free(block);
  }

 private:
  static constexpr int kKept = 2;  // a layer's output and its successor's: what a model holds at once
  static constexpr int64_t kMost = int64_t{1} << 60;

  static uint8_t* allocate(int64_t nbytes) { return static_cast<uint8_t*>(std::aligned_alloc(64, nbytes)); }

  static void free(Block* block) noexcept {
    if (!block) return;
    std::free(block->data);
    delete block;
  }

  void drop() noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock)
      for (Block*& kept : kept_) free(std::exchange(kept, nullptr));
  }

  // A block more than twice as large is left for a larger output.
  Block* find(int64_t nbytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (Block*& kept : kept_)
      if (kept && kept->nbytes >= nbytes && kept->nbytes / 2 <= nbytes) return std::exchange(kept, nullptr);
    return nullptr;
  }

  std::mutex mutex_;
  Block* kept_[kKept] = {};  // the last one first
};

}  // namespace zs
