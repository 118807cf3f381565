// The plain structs that cross a boundary: blob, kernel call, kernel table. No library types, no code that could be
// emitted as a weak symbol, so every translation unit may include this, whatever its instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zs {

enum class Values : uint8_t { fp32 = 1, bf16 = 2, int8 = 3, int4 = 4 };  // type of the stored weights
enum class Type : uint8_t { fp32 = 1, bf16 = 2, fp16 = 3 };              // type of x, y and the scales of integers
enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu, relu2 };

constexpr int kMaxSections = 4;
constexpr int kPanel = 16;  // rows of a panel: one AMX tile, one AVX-512 vector, two AVX2 vectors
constexpr int kChunk = 64;  // inputs that strip columns are counted in

// docs/format.md describes the bytes.
struct Header {
  char magic[8];
  char format[8];
  uint32_t m, k;
  uint64_t nnz, nbytes, hash;
  uint16_t version;
  uint8_t values, sections;
  uint16_t n, group;
  uint32_t strip;
  uint16_t group_size;  // inputs that share a scale; 0 unless the values are integers
  uint8_t scales, reserved;
};
static_assert(sizeof(Header) == 64, "the header is one cache line");

struct Section {
  uint64_t offset, nbytes;
};

// A validated blob: everything a kernel reads through these pointers has been range-checked.
struct Weight {
  Header header;
  const uint8_t* section[kMaxSections];
  uint64_t nbytes[kMaxSections];
};

// y[t, i] = act(sum_j w[i, j] x[t, j] + bias[i]); x is [tokens, k], y is [tokens, m], both dense and row-major.
struct Call {
  const Weight* weight;
  const void* x;
  const float* bias;  // [m] or null
  void* y;
  Type type;  // of x and y
  Activation activation;
  int64_t tokens;
  uint8_t* panel;  // Geometry::panel_bytes, shared by all threads, 64-byte aligned: x as the kernel wants it
};

// How one call is cut. The driver walks the tokens in passes; in each it runs the pack units, waits, runs the units.
struct Geometry {
  int64_t pass_tokens;    // tokens of one pass
  int64_t pack_tokens;    // tokens of one pack unit
  int64_t units;          // independent parts of the output of one pass
  int64_t panel_bytes;    // shared buffer for one pass
  int64_t scratch_bytes;  // private buffer for one thread
  bool reads_x = false;   // whether run() reads x too, and not only pack()
  bool uneven = false;    // whether one unit may take much longer than another
};

struct Pass {
  int64_t first, tokens;  // which tokens
  int64_t packed;         // how many of them a pack unit took, but for the last one
};

struct Kernel {
  const char* format;
  Values values;
  const char* isa;
  const char* name;  // op_format_values_isa
  Geometry (*geometry)(const Weight& weight, int64_t tokens);
  void (*pack)(const Call& call, Pass pass, int64_t first_token, int64_t tokens);  // first_token counts in the pass
  void (*run)(const Call& call, Pass pass, int64_t unit, uint8_t* scratch);
};

}  // namespace zs
