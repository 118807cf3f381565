// Memory for large outputs, as torch takes it.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "bind/bind.h"
#include "pool.h"

namespace binding {

namespace {

// What DLPack calls a managed tensor: a block of the pool, and where its sizes lie.
struct Output {
  nb::dlpack::dltensor tensor;
  zs::Block* block;
  void (*deleter)(Output*);
  std::vector<int64_t> shape, strides;
};

zs::Pool& pool() {
  static auto* pool = new zs::Pool;  // outlives every tensor
  return *pool;
}

// A block of the pool as a DLPack capsule of type `type`. What gives it back needs no interpreter: a tensor may die in
// any thread, and after Python has ended.
nb::object output(std::vector<int64_t> shape, int type) {
  if (type < 1 || type > 3) throw std::invalid_argument("type out of range");
  int64_t nbytes = type == 1 ? 4 : 2;
  for (const int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(nbytes, size, &nbytes)) throw std::invalid_argument("shape out of range");
  std::vector<int64_t> strides(shape.size());
  for (int64_t i = static_cast<int64_t>(shape.size()) - 1, step = 1; i >= 0; step *= std::max<int64_t>(shape[i--], 1))
    strides[i] = step;
  auto made = std::make_unique<Output>();
  made->shape = std::move(shape), made->strides = std::move(strides);
  const auto code = type == 2 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
  made->tensor.device = {nb::device::cpu::value, 0};
  made->tensor.ndim = static_cast<int32_t>(made->shape.size());
  made->tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(type == 1 ? 32 : 16), 1};
  made->tensor.shape = made->shape.data(), made->tensor.strides = made->strides.data();
  made->deleter = [](Output* self) {
    pool().give(self->block);
    delete self;
  };
  made->block = pool().take(nbytes);
  made->tensor.data = made->block->data;
  Output* const raw = made.release();
  PyObject* capsule = PyCapsule_New(raw, "dltensor", [](PyObject* self) {  // nobody took it: whoever does renames it
    if (PyCapsule_IsValid(self, "dltensor")) {
      auto* const left = static_cast<Output*>(PyCapsule_GetPointer(self, "dltensor"));
      left->deleter(left);
    }
  });
  if (!capsule) {
    raw->deleter(raw);
    nb::raise_python_error();
  }
  return nb::steal(capsule);
}

}  // namespace

void outputs(nb::module_& module) { module.def("output", &output, nb::arg("shape"), nb::arg("type")); }

}  // namespace binding
