// Closing a kernel file: its entries of the run-time table.
#pragma once
#include "core.h"

#define ZS_STRING_(text) #text
#define ZS_STRING(text) ZS_STRING_(text)
#define ZS_ENTRY(format, values, geometry, pack, run)                                                                 \
  {#format, zs::Values::values, ZS_STRING(ZS_ISA), "spmm_" #format "_" #values "_" ZS_STRING(ZS_ISA), geometry, pack, \
   run}
#define ZS_END_OF_TABLE {nullptr, zs::Values::fp32, nullptr, nullptr, nullptr, nullptr, nullptr}
#define ZS_KERNELS(...)                    \
  namespace zs {                           \
  extern const Kernel ZS_TABLE[];          \
  const Kernel ZS_TABLE[] = {__VA_ARGS__}; \
  }
