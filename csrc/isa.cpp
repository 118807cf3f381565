#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zs::isa {
namespace {

#if defined(__x86_64__)

// The kernel grants the tile registers once per process, and only when asked (arch_prctl(ARCH_REQ_XCOMP_PERM)).
bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const char* missing_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return "cpuid leaf 7";
  if (!(d & (1u << 24))) return "AMX-TILE";
  if (!(d & (1u << 22))) return "AMX-BF16";
  if (!(d & (1u << 25))) return "AMX-INT8";
  static const bool permitted = amx_permitted();
  return permitted ? nullptr : "the kernel's permission for AMX tiles";
}

const char* probe(const char* row) {
  __builtin_cpu_init();
  if (!std::strcmp(row, "scalar")) return nullptr;
  if (!__builtin_cpu_supports("avx2")) return "AVX2";
  if (!__builtin_cpu_supports("fma")) return "FMA";
  if (!__builtin_cpu_supports("bmi2")) return "BMI2";
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 29))) return "F16C";
  if (!std::strcmp(row, "avx2")) return nullptr;
  if (!__builtin_cpu_supports("avx512f")) return "AVX-512F";
  if (!__builtin_cpu_supports("avx512bw")) return "AVX-512BW";
  if (!__builtin_cpu_supports("avx512dq")) return "AVX-512DQ";
  if (!__builtin_cpu_supports("avx512vl")) return "AVX-512VL";
  if (!__builtin_cpu_supports("avx512vbmi")) return "AVX-512VBMI";
  if (!__builtin_cpu_supports("avx512vbmi2")) return "AVX-512VBMI2";
  if (!__builtin_cpu_supports("avx512vnni")) return "AVX-512VNNI";
  if (!std::strcmp(row, "avx512")) return nullptr;
  if (!__builtin_cpu_supports("avx512bf16")) return "AVX-512BF16";
  if (!std::strcmp(row, "avx512bf16")) return nullptr;
  return missing_amx();
}

#else

const char* probe(const char*) { return nullptr; }  // only the scalar row is compiled in

#endif

constexpr const char* kRows[] = {
#define ROW(name) #name,
#include "isa_rows.inc"
#undef ROW
};
constexpr int kCount = sizeof(kRows) / sizeof(kRows[0]);

int best() {
  int row = 0;
  while (row + 1 < kCount && !probe(kRows[row + 1])) ++row;
  return row;
}

std::atomic<int> allowed{-1};

}  // namespace

int count() { return kCount; }
const char* name(int row) { return kRows[row]; }
const char* missing(int row) { return probe(kRows[row]); }

int active() {
  int row = allowed.load(std::memory_order_relaxed);
  if (row < 0) allowed.store(row = best(), std::memory_order_relaxed);
  return row;
}

bool limit(const char* wanted) {
  for (int row = 0; row < kCount; ++row) {
    if (std::strcmp(kRows[row], wanted)) continue;
    if (probe(kRows[row])) return false;
    allowed.store(row, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace zs::isa
