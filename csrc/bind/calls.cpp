#include <cstring>
#include <stdexcept>

#include "bind/bind.h"
#include "isa.h"

namespace binding {

namespace {

bool runs_here(const zs::Kernel& kernel) {
  for (int row = 0; row <= zs::isa::active(); ++row)
    if (kernel.isa == std::string(zs::isa::name(row))) return true;
  return false;
}

}  // namespace

const zs::Kernel* named(const zs::Header& header, const std::string& name) {
  const zs::Kernel* kernel = zs::find_kernel(name.c_str());
  if (!kernel) throw std::invalid_argument("unknown kernel '" + name + "'");
  if (!runs_here(*kernel)) throw std::invalid_argument("kernel '" + name + "' needs an ISA row that is not in force");
  if (std::string(header.format, strnlen(header.format, 8)) != kernel->format ||
      header.values != static_cast<uint8_t>(kernel->values))
    throw std::invalid_argument("kernel '" + name + "' does not serve this blob");
  return kernel;
}

Checked checked(uintptr_t x, int type, int64_t tokens, int64_t k, uintptr_t blob, uint64_t nbytes, uintptr_t bias,
                int activation, uintptr_t y, int64_t m, int threads, const std::optional<std::string>& name) {
  auto handle = zs::handle_of(bytes(blob), nbytes);
  const zs::Header& header = handle->weight.header;
  if (k != header.k || m != header.m)
    throw std::invalid_argument("the packed weight is " + std::to_string(header.m) + " x " + std::to_string(header.k) +
                                ", the call has " + std::to_string(m) + " outputs and " + std::to_string(k) +
                                " inputs");
  if (type < 1 || type > 3 || activation < 0 || activation > 5 || threads < 1)
    throw std::invalid_argument("type, activation or thread count out of range");
  const zs::Kernel* kernel = name ? named(header, *name) : handle->kernel_for(tokens);
  if (!kernel) throw std::invalid_argument("no kernel for this format and value type in this build");
  const zs::Call call{&handle->weight,
                      bytes(x),
                      reinterpret_cast<const float*>(bias),
                      reinterpret_cast<void*>(y),
                      static_cast<zs::Type>(type),
                      static_cast<zs::Activation>(activation),
                      tokens,
                      nullptr};
  return {std::move(handle), kernel, call};
}

}  // namespace binding
