// What this machine can do at best: loops that do nothing but multiply-add in registers, or read memory.
#pragma once
#include <cstdint>

namespace zs {

// One ISA row's loops. `fp32` and `bf16` do `rounds` rounds and return the floating-point operations of all of them (a
// multiply-add counts two); `bf16` is null where the row has no arithmetic of its own for it.
struct Roofline {
  int64_t (*fp32)(int64_t rounds, float* sink);
  int64_t (*bf16)(int64_t rounds, float* sink);
  void (*read)(const float* data, int64_t count, float* sink);  // count is a multiple of 256
};

constexpr int64_t kReadStep = 256;  // floats

// The most that the active row reaches: `threads` threads together, each doing `rounds`. Returns all operations, 0 if
// the row has no arithmetic for `bf16`.
int64_t multiply_add(bool bf16, int64_t rounds, int threads);
// Reads nbytes (rounded down to whole steps) once, each thread its own part.
void read_once(const float* data, int64_t nbytes, int threads);

}  // namespace zs
