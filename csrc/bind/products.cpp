// Products of a packed weight, and what is asked of one.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <limits>
#include <stdexcept>

#include "bind/bind.h"
#include "blob.h"
#include "patches.h"
#include "threads.h"

namespace binding {

namespace {

// x: [tokens, k] and y: [tokens, m] of type `type` (1 fp32, 2 bf16, 3 fp16); bias: fp32 [m] or 0.
void linear(uintptr_t x, int type, int64_t tokens, int64_t k, uintptr_t blob, uint64_t nbytes, uintptr_t bias,
            int activation, uintptr_t y, int64_t m, int threads, const std::optional<std::string>& name) {
  const Checked made = checked(x, type, tokens, k, blob, nbytes, bias, activation, y, m, threads, name);
  if (tokens == 0) return;
  nb::gil_scoped_release release;
  zs::run(*made.kernel, made.call, threads);
}

// Batch, channels, then three sizes each of: in, kernel, stride, dilation, before, out.
zs::Patches patches_of(const Sizes& sizes) {
  if (sizes.size() != sizeof(zs::Patches) / sizeof(int64_t)) throw std::invalid_argument("a convolution has 20 sizes");
  zs::Patches patches;
  std::memcpy(&patches, sizes.data(), sizeof patches);
  const std::string wrong = zs::problem(patches);
  if (!wrong.empty()) throw std::invalid_argument(wrong);
  return patches;
}

int64_t product(const int64_t (&sizes)[zs::kAxes], int64_t by) { return sizes[0] * sizes[1] * sizes[2] * by; }

// x: [batch, in..., channels] of `elements` elements, y: [batch, out..., m]; the rest as for linear.
void convolve(uintptr_t x, int type, int64_t elements, const Sizes& sizes, uintptr_t blob, uint64_t nbytes,
              uintptr_t bias, int activation, uintptr_t y, int64_t m, int threads,
              const std::optional<std::string>& name) {
  const zs::Patches patches = patches_of(sizes);
  const int64_t tokens = product(patches.out, patches.batch), k = product(patches.kernel, patches.channels);
  if (elements != product(patches.in, patches.batch * patches.channels))
    throw std::invalid_argument("x has " + std::to_string(elements) + " elements, its sizes say " +
                                std::to_string(product(patches.in, patches.batch * patches.channels)));
  const Checked made = checked(x, type, tokens, k, blob, nbytes, bias, activation, y, m, threads, name);
  if (tokens == 0) return;
  nb::gil_scoped_release release;
  zs::run_patches(*made.kernel, made.call, patches, threads);
}

void check(uintptr_t blob, uint64_t nbytes) { zs::validate(bytes(blob), nbytes); }

Names kernels(uintptr_t blob, uint64_t nbytes) {
  const auto handle = zs::handle_of(bytes(blob), nbytes);
  Names names;
  const zs::Kernel* kernel = nullptr;
  while ((kernel = zs::next_kernel(handle->weight.header, kernel))) names.push_back(kernel->name);
  return names;
}

std::string chosen(uintptr_t blob, uint64_t nbytes, int64_t tokens) {
  const zs::Kernel* kernel = zs::handle_of(bytes(blob), nbytes)->kernel_for(tokens);
  return kernel ? kernel->name : "";
}

void tune(uintptr_t blob, uint64_t nbytes, const std::vector<std::pair<std::optional<int64_t>, std::string>>& buckets) {
  const auto handle = zs::handle_of(bytes(blob), nbytes);
  std::vector<zs::Bucket> table;
  int64_t last = 0;
  for (const auto& [max_tokens, name] : buckets) {
    const int64_t limit = max_tokens.value_or(std::numeric_limits<int64_t>::max());
    if (limit <= last) throw std::invalid_argument("token buckets must ascend");
    table.push_back({last = limit, named(handle->weight.header, name)});
  }
  if (last != std::numeric_limits<int64_t>::max()) throw std::invalid_argument("the last token bucket must be open");
  zs::tune(handle->weight.header, std::move(table));
}

}  // namespace

void products(nb::module_& module) {
  module.def("linear", &linear, nb::arg("x"), nb::arg("type"), nb::arg("tokens"), nb::arg("k"), nb::arg("blob"),
             nb::arg("nbytes"), nb::arg("bias"), nb::arg("activation"), nb::arg("y"), nb::arg("m"), nb::arg("threads"),
             nb::arg("kernel") = nb::none());
  module.def("convolve", &convolve, nb::arg("x"), nb::arg("type"), nb::arg("elements"), nb::arg("sizes"),
             nb::arg("blob"), nb::arg("nbytes"), nb::arg("bias"), nb::arg("activation"), nb::arg("y"), nb::arg("m"),
             nb::arg("threads"), nb::arg("kernel") = nb::none());
  module.def("check", &check, nb::arg("blob"), nb::arg("nbytes"));
  module.def("hash_blob", [](uintptr_t blob, uint64_t nbytes) { return zs::hash_blob(bytes(blob), nbytes); });
  module.def("kernels", &kernels, nb::arg("blob"), nb::arg("nbytes"));
  module.def("chosen", &chosen, nb::arg("blob"), nb::arg("nbytes"), nb::arg("tokens"));
  module.def("tune", &tune, nb::arg("blob"), nb::arg("nbytes"), nb::arg("buckets"));
  module.def("forget_tuning", &zs::forget_tuning);
}

}  // namespace binding
