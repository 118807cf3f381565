// Closing a kernel file: its entries of the run-time table.
#pragma once
#include "core.h"

#define ZS_STRING_(text) #text
#define ZS_STRING(text) ZS_STRING_(text)
// An entry, and another way for the same weights on the same row.
#define ZS_ENTRY(format, values, geometry, pack, run) \
  ZS_ENTRY_AS(#format "_" #values, format, values, geometry, pack, run)
#define ZS_SECOND(way, format, values, geometry, pack, run) \
  ZS_ENTRY_AS(#format "_" #values "_" #way, format, values, geometry, pack, run)
#define ZS_ENTRY_AS(name, format, values, geometry, pack, run) \
  {#format, zs::Values::values, ZS_STRING(ZS_ISA), "spmm_" name "_" ZS_STRING(ZS_ISA), geometry, pack, run}
#define ZS_END_OF_TABLE {nullptr, zs::Values::fp32, nullptr, nullptr, nullptr, nullptr, nullptr}
#define ZS_KERNELS(...)                    \
  namespace zs {                           \
  extern const Kernel ZS_TABLE[];          \
  const Kernel ZS_TABLE[] = {__VA_ARGS__}; \
  }
