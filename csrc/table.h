// The kernels that were compiled in, and the section checks of each format.
#pragma once
#include "core.h"

namespace zs {

// The next kernel for this format and value type after `previous` (null to start) that the active ISA row allows,
// best row first; null at the end.
const Kernel* next_kernel(const Header& header, const Kernel* previous);
const Kernel* find_kernel(const char* name);  // by name, whatever the row; null if unknown
int kernel_count();
const Kernel* kernel_at(int index);

// Null if the sections of a blob of a known format are sound, else what is wrong with them.
const char* check_sections(const Weight& weight);

}  // namespace zs
