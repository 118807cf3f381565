#include "table.h"

#include <cstring>
#include <vector>

#include "isa.h"

namespace zs {

#include "kernel_declarations.inc"

#define CHECK(format) const char* check_##format(const Weight& weight);
#include "checks.inc"
#undef CHECK

namespace {

int row_of(const Kernel& kernel) {
  for (int row = 0; row < isa::count(); ++row)
    if (!std::strcmp(isa::name(row), kernel.isa)) return row;
  return 0;
}

// Best row first.
const std::vector<const Kernel*>& all() {
  static const std::vector<const Kernel*> kernels = [] {
    std::vector<const Kernel*> found;
    for (int row = isa::count() - 1; row >= 0; --row) {
      auto add = [&](const Kernel* kernel) {
        for (; kernel->name; ++kernel)
          if (row_of(*kernel) == row) found.push_back(kernel);
      };
#define TABLE(name) add(name);
#include "kernel_table.inc"
#undef TABLE
    }
    return found;
  }();
  return kernels;
}

bool serves(const Kernel& kernel, const Header& header) {
  return !std::strncmp(kernel.format, header.format, sizeof header.format) &&
         kernel.values == static_cast<Values>(header.values);
}

}  // namespace

const Kernel* next_kernel(const Header& header, const Kernel* previous) {
  bool found = previous == nullptr;
  for (const Kernel* kernel : all()) {
    if (found && serves(*kernel, header) && row_of(*kernel) <= isa::active()) return kernel;
    if (kernel == previous) found = true;
  }
  return nullptr;
}

const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel : all())
    if (!std::strcmp(kernel->name, name)) return kernel;
  return nullptr;
}

int kernel_count() { return static_cast<int>(all().size()); }
const Kernel* kernel_at(int index) { return all()[index]; }

const char* check_sections(const Weight& weight) {
#define CHECK(name) \
  if (!std::strncmp(weight.header.format, #name, sizeof weight.header.format)) return check_##name(weight);
#include "checks.inc"
#undef CHECK
  return "unknown format";
}

}  // namespace zs
