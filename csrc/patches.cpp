// Patches of a convolution, and the loop that feeds them to any kernel.
//
// Floor: x read once, the weight once, y written once, as for torch's own convolution, which makes no patches. A matrix
// of patches [tokens, k] has each x `positions` times (9 for 3 x 3): written once and read once it is 18 times x
// through memory (64 channels of 56 x 56 in fp32: 14 MB against 0.8), about as long as the whole dense convolution
// takes.
//
// Two designs. The plain one gathers that matrix and calls the kernel on it. The one kept gathers the rows of one pack
// unit (6 to 16 tokens) into the thread's buffer as the kernel is about to pack them, so they are read from the cache
// they were just written to, and only the kernel's panel, which fits L2, is ever whole. Both copy runs: of an x with
// its channels innermost, a row of the kernel is one run of memory. Times of torch's fastest layout over ours, one
// thread, AVX2, fp32, plain and kept, strips 8:16@64 (50 %) then csr at 90 % zeros:
//
//   64 -> 64 of 56 x 56        .87 1.11   1.06 1.40
//   128 -> 128 of 28 x 28     1.39 1.39   1.77 1.88
//   64 images of 32, 16 x 16   .69 1.12    .73 1.29
//   64 images of 64, 8 x 8     .99 1.22   1.16 1.53
//   64 images of 16, 32 x 32   .33  .59    .39  .67
//
// With few outputs the packing stays the larger part, however it is fed: the last line is left to torch.
#include "patches.h"

#include <algorithm>
#include <cstring>

#include "threads.h"

namespace zs {

namespace {

constexpr int64_t kLimit = int64_t{1} << 31;
constexpr int64_t kGatherTokens = 16;  // of one unit where the kernel packs nothing

int64_t product(const int64_t (&sizes)[kAxes]) { return sizes[0] * sizes[1] * sizes[2]; }

// One position of the output, and the next one after it.
struct Position {
  int64_t b, at[kAxes];

  Position(const Patches& p, int64_t index) {
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      at[axis] = index % p.out[axis];
      index /= p.out[axis];
    }
    b = index;
  }
  void next(const Patches& p) {
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      if (++at[axis] < p.out[axis]) return;
      at[axis] = 0;
    }
    ++b;
  }
};

// The kernel's positions along the last axis at `row` of x: one run of memory if they are neighbours.
uint8_t* copy_row(const Patches& p, const uint8_t* row, int64_t start, int64_t pixel, uint8_t* dst) {
  const int64_t width = p.in[2], count = p.kernel[2], step = p.dilation[2];
  if (step == 1) {
    const int64_t low = std::clamp<int64_t>(-start, 0, count), high = std::clamp<int64_t>(width - start, low, count);
    if (low > 0) std::memset(dst, 0, low * pixel);
    if (high > low) std::memcpy(dst + low * pixel, row + (start + low) * pixel, (high - low) * pixel);
    if (high < count) std::memset(dst + high * pixel, 0, (count - high) * pixel);
    return dst + count * pixel;
  }
  for (int64_t i = 0; i < count; ++i, dst += pixel) {
    const int64_t at = start + i * step;
    if (at >= 0 && at < width)
      std::memcpy(dst, row + at * pixel, pixel);
    else
      std::memset(dst, 0, pixel);
  }
  return dst;
}

}  // namespace

std::string problem(const Patches& p) {
  double in = static_cast<double>(p.batch) * p.channels, out = p.batch, k = p.channels;
  bool sound = p.batch >= 0 && p.channels > 0;
  for (int axis = 0; axis < kAxes; ++axis) {
    for (const int64_t size : {p.kernel[axis], p.stride[axis], p.dilation[axis], p.out[axis], p.in[axis]})
      sound = sound && size > 0 && size < kLimit;
    sound = sound && p.before[axis] >= 0 && p.before[axis] < kLimit;
    in *= p.in[axis], out *= p.out[axis], k *= p.kernel[axis];
  }
  return sound && in < 1e15 && out < 1e15 && k < 1e9 ? "" : "the sizes of the convolution are out of range";
}

void gather(const Patches& p, const void* x, int64_t size, int64_t first, int64_t count, uint8_t* dst) {
  const int64_t pixel = p.channels * size, line = p.in[2] * pixel, plane = p.in[1] * line;
  const int64_t run = p.kernel[2] * pixel;
  Position position(p, first);
  for (int64_t t = 0; t < count; ++t, position.next(p)) {
    const uint8_t* image = static_cast<const uint8_t*>(x) + position.b * p.in[0] * plane;
    const int64_t start = position.at[2] * p.stride[2] - p.before[2];
    for (int64_t d = 0; d < p.kernel[0]; ++d) {
      const int64_t z = position.at[0] * p.stride[0] + d * p.dilation[0] - p.before[0];
      for (int64_t h = 0; h < p.kernel[1]; ++h) {
        const int64_t y = position.at[1] * p.stride[1] + h * p.dilation[1] - p.before[1];
        if (z >= 0 && z < p.in[0] && y >= 0 && y < p.in[1]) {
          dst = copy_row(p, image + z * plane + y * line, start, pixel, dst);
        } else {
          std::memset(dst, 0, run);
          dst += run;
        }
      }
    }
  }
}

void run_patches(const Kernel& kernel, const Call& call, const Patches& patches, int threads) {
  thread_local Buffer panel, rows, scratch;
  const Geometry geometry = kernel.geometry(*call.weight, call.tokens);
  const int64_t at_once = units_at_once(geometry, threads), size = call.type == Type::fp32 ? 4 : 2;
  const int64_t row_bytes = product(patches.kernel) * patches.channels * size;
  const int64_t pass_tokens = std::min(geometry.pass_tokens, call.tokens);
  const int64_t piece = geometry.panel_bytes ? geometry.pack_tokens : kGatherTokens;
  // Rows that only pack() reads are gathered where the last ones lay, which are in the cache.
  const bool keep = geometry.reads_x || !geometry.panel_bytes;
  const int64_t some = ((keep ? pass_tokens : piece) * row_bytes + 4095) / 4096 * 4096 + 64;
  const int64_t each = (geometry.scratch_bytes + 4095) / 4096 * 4096 + 64;
  uint8_t* const rows_base = rows.at_least(keep ? some : some * threads);
  uint8_t* const scratch_base = scratch.at_least(each * threads);

  Call part = call;  // the kernel sees a call of one pass
  part.x = rows_base;
  part.panel = panel.at_least(geometry.panel_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1) firstprivate(part)
  {
    const int64_t thread = omp_get_thread_num();
    for (int64_t first = 0; first < call.tokens; first += pass_tokens) {
      const Pass pass{0, std::min(pass_tokens, call.tokens - first), geometry.pack_tokens};
      part.tokens = pass.tokens;
      part.y = static_cast<uint8_t*>(call.y) + first * call.weight->header.m * size;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < pass.tokens; t += piece) {
        const int64_t count = std::min(piece, pass.tokens - t);
        uint8_t* const here = keep ? rows_base + t * row_bytes : rows_base + thread * some;
        gather(patches, call.x, size, first + t, count, here);
        if (!keep) part.x = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(here) - t * row_bytes);
        if (geometry.panel_bytes) kernel.pack(part, pass, t, count);
      }
#pragma omp for schedule(dynamic, at_once)
      for (int64_t unit = 0; unit < geometry.units; ++unit) kernel.run(part, pass, unit, scratch_base + each * thread);
    }
  }
}

}  // namespace zs
