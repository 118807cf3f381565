// The rows of this CPU, all kernels, and the limits of the machine.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bind/bind.h"
#include "isa.h"
#include "roofline/roofline.h"

namespace binding {

namespace {

std::vector<std::pair<std::string, std::optional<std::string>>> isa_rows() {
  std::vector<std::pair<std::string, std::optional<std::string>>> rows;
  for (int row = 0; row < zs::isa::count(); ++row) {
    const char* missing = zs::isa::missing(row);
    rows.emplace_back(zs::isa::name(row), missing ? std::optional<std::string>(missing) : std::nullopt);
  }
  return rows;
}

int64_t multiply_add(bool bf16, int64_t rounds, int threads) {
  if (rounds < 0 || threads < 1) throw std::invalid_argument("rounds or thread count out of range");
  nb::gil_scoped_release release;
  return zs::multiply_add(bf16, rounds, threads);
}

void read_once(uintptr_t data, int64_t nbytes, int threads) {
  if (nbytes < 0 || threads < 1) throw std::invalid_argument("size or thread count out of range");
  nb::gil_scoped_release release;
  zs::read_once(reinterpret_cast<const float*>(data), nbytes, threads);
}

Names all_kernels() {
  Names names;
  for (int i = 0; i < zs::kernel_count(); ++i) names.push_back(zs::kernel_at(i)->name);
  return names;
}

}  // namespace

void machine(nb::module_& module) {
  module.def("isa_rows", &isa_rows);
  module.def("isa_active", [] { return std::string(zs::isa::name(zs::isa::active())); });
  module.def("isa_limit", [](const std::string& row) { return zs::isa::limit(row.c_str()); });
  module.def("all_kernels", &all_kernels);
  module.def("multiply_add", &multiply_add, nb::arg("bf16"), nb::arg("rounds"), nb::arg("threads"));
  module.def("read_once", &read_once, nb::arg("data"), nb::arg("nbytes"), nb::arg("threads"));
}

}  // namespace binding
