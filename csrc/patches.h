// The rows that a convolution's matrix multiplies, cut from x while its kernel packs them.
#pragma once
#include <string>

#include "core.h"

namespace zs {

constexpr int kAxes = 3;  // a convolution over fewer has axes of extent 1 in front

// y[b, out..., i] = sum over kernel..., c of w[i, kernel..., c] x[b, out * stride + kernel * dilation - before, c];
// x is [batch, in..., channels] dense, and 0 outside.
struct Patches {
  int64_t batch, channels;
  int64_t in[kAxes], kernel[kAxes], stride[kAxes], dilation[kAxes], before[kAxes], out[kAxes];
};

// Empty if the sizes are sound and small enough to be counted, else what is wrong with them.
std::string problem(const Patches& patches);

// Writes rows [first, first + count) of the patches, [count, kernel... x channels], elements of `size` bytes, to dst.
void gather(const Patches& patches, const void* x, int64_t size, int64_t first, int64_t count, uint8_t* dst);

// As run() in threads.h, where call.x is the x of the patches; call.tokens are the positions of the output.
void run_patches(const Kernel& kernel, const Call& call, const Patches& patches, int threads);

}  // namespace zs
