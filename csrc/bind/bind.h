// What the files of this room share: they alone know nanobind. They take addresses, check everything once, and release
// the GIL around kernels.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "handles.h"
#include "table.h"

namespace binding {

namespace nb = nanobind;
using Names = std::vector<std::string>;
using Sizes = std::vector<int64_t>;

inline const uint8_t* bytes(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }

// The kernel of this name; std::invalid_argument where there is none that serves such a blob here.
const zs::Kernel* named(const zs::Header& header, const std::string& name);

// One call of a kernel, with everything checked but x.
struct Checked {
  std::shared_ptr<const zs::Handle> handle;
  const zs::Kernel* kernel;
  zs::Call call;
};

Checked checked(uintptr_t x, int type, int64_t tokens, int64_t k, uintptr_t blob, uint64_t nbytes, uintptr_t bias,
                int activation, uintptr_t y, int64_t m, int threads, const std::optional<std::string>& name);

// Each adds what its file has to the module.
void products(nb::module_& module);
void outputs(nb::module_& module);
void decoding(nb::module_& module);
void machine(nb::module_& module);

}  // namespace binding
