// The only file that knows nanobind. It takes addresses, checks everything once, and releases the GIL around kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "attention/attention.h"
#include "blob.h"
#include "decoder/decoder.h"
#include "handles.h"
#include "isa.h"
#include "lookup/lookup.h"
#include "norm/norm.h"
#include "patches.h"
#include "pointwise/pointwise.h"
#include "pool.h"
#include "roofline/roofline.h"
#include "table.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

using Names = std::vector<std::string>;

const uint8_t* bytes(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }

bool runs_here(const zs::Kernel& kernel) {
  for (int row = 0; row <= zs::isa::active(); ++row)
    if (kernel.isa == std::string(zs::isa::name(row))) return true;
  return false;
}

const zs::Kernel* named(const zs::Header& header, const std::string& name) {
  const zs::Kernel* kernel = zs::find_kernel(name.c_str());
  if (!kernel) throw std::invalid_argument("unknown kernel '" + name + "'");
  if (!runs_here(*kernel)) throw std::invalid_argument("kernel '" + name + "' needs an ISA row that is not in force");
  if (std::string(header.format, strnlen(header.format, 8)) != kernel->format ||
      header.values != static_cast<uint8_t>(kernel->values))
    throw std::invalid_argument("kernel '" + name + "' does not serve this blob");
  return kernel;
}

// One call of a kernel, with everything checked but x.
struct Checked {
  std::shared_ptr<const zs::Handle> handle;
  const zs::Kernel* kernel;
  zs::Call call;
};

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

// x: [tokens, k] and y: [tokens, m] of type `type` (1 fp32, 2 bf16, 3 fp16); bias: fp32 [m] or 0.
void linear(uintptr_t x, int type, int64_t tokens, int64_t k, uintptr_t blob, uint64_t nbytes, uintptr_t bias,
            int activation, uintptr_t y, int64_t m, int threads, const std::optional<std::string>& name) {
  const Checked made = checked(x, type, tokens, k, blob, nbytes, bias, activation, y, m, threads, name);
  if (tokens == 0) return;
  nb::gil_scoped_release release;
  zs::run(*made.kernel, made.call, threads);
}

// Batch, channels, then three sizes each of: in, kernel, stride, dilation, before, out.
using Sizes = std::vector<int64_t>;
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

void check_turned(const zs::Rotary& r) {
  if (r.batch < 0 || r.heads < 0 || r.groups < 0 || r.width < 0 || r.turned < 0 || r.turned % 2 || r.turned > r.depth)
    throw std::invalid_argument("rotary positions of " + std::to_string(r.turned) + " of " + std::to_string(r.depth) +
                                " numbers a head");
}

// Sizes: batch, heads, groups, tokens, depth, width; then the strides of zs::Attention in its order.
void attend(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mask, uintptr_t y, int type, float scale,
            const Sizes& sizes, int threads) {
  constexpr size_t kSizes = 15;
  zs::Attention a{};
  static_assert(offsetof(zs::Attention, mask_batch) - offsetof(zs::Attention, batch) == (kSizes - 1) * sizeof(int64_t));
  if (sizes.size() != kSizes || type < 1 || type > 3 || threads < 1)
    throw std::invalid_argument("sizes, type or thread count out of range");
  a.q = bytes(q), a.k = bytes(k), a.v = bytes(v), a.mask = bytes(mask), a.y = reinterpret_cast<void*>(y);
  a.type = static_cast<zs::Type>(type), a.scale = scale;
  std::memcpy(&a.batch, sizes.data(), kSizes * sizeof(int64_t));
  if (a.batch < 0 || a.groups < 1 || a.heads < 1 || a.heads % a.groups || a.tokens < 1 || a.depth < 1 || a.width < 1)
    throw std::invalid_argument("attention of " + std::to_string(a.heads) + " heads over " + std::to_string(a.groups) +
                                " of keys, " + std::to_string(a.tokens) + " tokens");
  nb::gil_scoped_release release;
  zs::attend(a, threads);
}

void normalise(uintptr_t x, uintptr_t weight, uintptr_t y, int type, int weights, int64_t rows, int64_t width,
               float eps, float offset, int threads) {
  if (type < 1 || type > 3 || (weights != 1 && weights != type) || rows < 0 || width < 1 || threads < 1)
    throw std::invalid_argument("types, sizes or thread count out of range");
  const zs::Norm norm{bytes(x),
                      bytes(weight),
                      reinterpret_cast<void*>(y),
                      static_cast<zs::Type>(type),
                      static_cast<zs::Type>(weights),
                      rows,
                      width,
                      eps,
                      offset};
  nb::gil_scoped_release release;
  zs::normalise(norm, threads);
}

// Sizes: those of zs::Rotary in its order, from batch on.
void rotate(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t cos, uintptr_t sin, uintptr_t to_k, uintptr_t to_v,
            int type, const Sizes& sizes) {
  constexpr size_t kSizes = 11;
  zs::Rotary r{};
  static_assert(offsetof(zs::Rotary, v_head) - offsetof(zs::Rotary, batch) == (kSizes - 1) * sizeof(int64_t));
  if (sizes.size() != kSizes || type < 1 || type > 3) throw std::invalid_argument("sizes or type out of range");
  r.q = reinterpret_cast<void*>(q), r.k = bytes(k), r.v = bytes(v), r.cos = bytes(cos), r.sin = bytes(sin);
  r.to_k = reinterpret_cast<void*>(to_k), r.to_v = reinterpret_cast<void*>(to_v), r.type = static_cast<zs::Type>(type);
  std::memcpy(&r.batch, sizes.data(), kSizes * sizeof(int64_t));
  check_turned(r);
  nb::gil_scoped_release release;
  zs::rotate(r);
}

// y = a + b, or a b with `multiply`; `count` numbers each.
void combine(bool multiply, uintptr_t a, uintptr_t b, uintptr_t y, int type, int64_t count, int threads) {
  if (type < 1 || type > 3 || count < 0 || threads < 1)
    throw std::invalid_argument("type, count or thread count out of range");
  nb::gil_scoped_release release;
  zs::combine(multiply ? zs::Pair::multiply : zs::Pair::add, bytes(a), bytes(b), reinterpret_cast<void*>(y),
              static_cast<zs::Type>(type), count, threads);
}

// Rows `ids` [count] of a table of integers go to y [count, k]. Raises IndexError for an id that it has not.
void lookup(uintptr_t blob, uint64_t nbytes, uintptr_t ids, int64_t count, uintptr_t y, int type, int threads) {
  const auto handle = zs::handle_of(bytes(blob), nbytes);
  const zs::Header& header = handle->weight.header;
  if (std::string(header.format, strnlen(header.format, 8)) != "dense" || !header.group_size)
    throw std::invalid_argument("a table is stored as dense integers");
  if (type < 1 || type > 3 || count < 0 || threads < 1)
    throw std::invalid_argument("type, count or thread count out of range");
  const auto* const id = reinterpret_cast<const int64_t*>(ids);
  for (int64_t i = 0; i < count; ++i)
    if (id[i] < 0 || id[i] >= header.m)
      throw std::out_of_range("token " + std::to_string(id[i]) + " is not in a table of " + std::to_string(header.m));
  nb::gil_scoped_release release;
  zs::lookup(zs::Lookup{&handle->weight, id, count, reinterpret_cast<void*>(y), static_cast<zs::Type>(type)}, threads);
}

// Reads what a call was given in one list, in order.
template <typename T>
class Reader {
 public:
  Reader(const std::vector<T>& from, const char* what) : from_(from), what_(what) {}
  T next() {
    if (at_ >= from_.size()) throw std::invalid_argument(std::string("too few ") + what_);
    return from_[at_++];
  }
  void end() const {
    if (at_ != from_.size()) throw std::invalid_argument(std::string("too many ") + what_);
  }

 private:
  const std::vector<T>& from_;
  const char* what_;
  size_t at_ = 0;
};

// A token of each of `batch` sequences through decoder layers, one after the other; of each of them
//   addresses  x, y, cos, sin, keys, values, mask or 0; of each product blob, its length, bias or 0; of each norm its
//              weight or 0, the weight's type and length
//   shape      heads, groups, depth, width, hidden, inner; of each product its activation
//   call       type, batch, tokens before this one, turned; strides of cos, the mask, keys (3) and values (3)
//   numbers    of attention its scale; of each norm eps and offset
//   kernels    of each product the name of its kernel, if any has one
// Products: q, k, v, o, gate, up, down. Norms: before attention, after it, before the MLP, after it, of q, of k.
// Returns the nanoseconds of the products, and of attention.
using Layer =
    std::tuple<Sizes, Sizes, Sizes, std::vector<double>, std::optional<std::vector<std::optional<std::string>>>>;
constexpr int kProducts = 7;

struct Ready {
  zs::Decoder layer{};
  std::shared_ptr<const zs::Handle> held[kProducts];
};

void read_layer(const Layer& given, int threads, Ready& ready) {
  const auto& [addresses, shape, call_sizes, numbers, kernels] = given;
  Reader<int64_t> at(addresses, "addresses"), sizes(shape, "sizes"), each(call_sizes, "sizes of a call");
  Reader<double> number(numbers, "numbers");
  const auto pointer = [&] { return static_cast<uintptr_t>(at.next()); };
  zs::Decoder& layer = ready.layer;
  zs::Attention& a = layer.attention;
  zs::Rotary& r = layer.rotary;
  a.heads = sizes.next(), a.groups = sizes.next(), a.depth = sizes.next(), a.width = sizes.next();
  layer.hidden = sizes.next(), layer.inner = sizes.next();
  const int64_t type = each.next();
  a.batch = each.next();
  const int64_t token = each.next(), turned = each.next();
  constexpr int64_t kMost = int64_t{1} << 31;
  for (const int64_t size : {a.heads, a.groups, a.depth, a.width, layer.hidden, layer.inner, a.batch})
    if (size < 1 || size > kMost) throw std::invalid_argument("sizes out of range");
  if (type < 1 || type > 3 || token < 0 || threads < 1 || a.heads % a.groups ||
      (kernels && kernels->size() != kProducts))
    throw std::invalid_argument("type, token, threads, heads or kernels out of range");
  a.type = r.type = static_cast<zs::Type>(type), a.tokens = token + 1, a.scale = static_cast<float>(number.next());
  r.batch = a.batch, r.heads = a.heads, r.groups = a.groups, r.depth = a.depth, r.width = a.width, r.turned = turned;
  check_turned(r);
  r.angle_batch = each.next(), a.mask_batch = each.next();
  a.k_batch = each.next(), a.k_head = each.next(), a.k_token = each.next();
  a.v_batch = each.next(), a.v_head = each.next(), a.v_token = each.next();
  a.q_batch = a.heads * a.depth, a.q_head = a.depth;
  r.k_batch = a.k_batch, r.k_head = a.k_head, r.v_batch = a.v_batch, r.v_head = a.v_head;
  const int64_t size = type == 1 ? 4 : 2;
  layer.x = bytes(pointer()), layer.y = reinterpret_cast<void*>(pointer());
  r.cos = bytes(pointer()), r.sin = bytes(pointer());
  const uintptr_t keys = pointer(), values = pointer();
  a.k = bytes(keys), a.v = bytes(values), a.mask = bytes(pointer());
  r.to_k = reinterpret_cast<void*>(keys + token * a.k_token * size);
  r.to_v = reinterpret_cast<void*>(values + token * a.v_token * size);

  const int64_t of_q = a.heads * a.depth, of_k = a.groups * a.depth, of_v = a.groups * a.width;
  const int64_t seen = a.heads * a.width;
  const struct {
    zs::Product* product;
    int64_t k, m;
  } products[kProducts] = {{&layer.q, layer.hidden, of_q},           {&layer.k, layer.hidden, of_k},
                           {&layer.v, layer.hidden, of_v},           {&layer.o, seen, layer.hidden},
                           {&layer.gate, layer.hidden, layer.inner}, {&layer.up, layer.hidden, layer.inner},
                           {&layer.down, layer.inner, layer.hidden}};
  for (int i = 0; i < kProducts; ++i) {
    const uintptr_t blob = pointer();
    const uint64_t nbytes = static_cast<uint64_t>(at.next());
    const uintptr_t bias = pointer();
    const int activation = static_cast<int>(sizes.next());
    Checked made = checked(0, static_cast<int>(type), a.batch, products[i].k, blob, nbytes, bias, activation, 0,
                           products[i].m, threads, kernels ? (*kernels)[i] : std::nullopt);
    *products[i].product = {made.kernel, made.call.weight, made.call.bias, made.call.activation};
    ready.held[i] = std::move(made.handle);
  }
  const std::pair<zs::LayerNorm*, int64_t> norms[] = {{&layer.before, layer.hidden}, {&layer.after, layer.hidden},
                                                      {&layer.then, layer.hidden},   {&layer.last, layer.hidden},
                                                      {&layer.of_q, of_q},           {&layer.of_k, of_k}};
  for (const auto& [norm, count] : norms) {
    norm->weight = bytes(pointer());
    const int64_t weights = at.next();
    norm->width = at.next(), norm->type = static_cast<zs::Type>(weights);
    norm->eps = static_cast<float>(number.next()), norm->offset = static_cast<float>(number.next());
    if (norm->weight && ((weights != 1 && weights != type) || norm->width < 1 || count % norm->width))
      throw std::invalid_argument("a norm of " + std::to_string(norm->width) + " for rows of " + std::to_string(count) +
                                  ", or of another type");
  }
  at.end(), sizes.end(), each.end(), number.end();
}

std::pair<int64_t, int64_t> decode(const std::vector<Layer>& layers, int threads) {
  std::vector<Ready> ready(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) read_layer(layers[i], threads, ready[i]);
  nb::gil_scoped_release release;
  std::pair<int64_t, int64_t> spent{0, 0};
  for (const Ready& one : ready) {
    const zs::Spent found = zs::decode(one.layer, threads);
    spent.first += found.products, spent.second += found.attention;
  }
  return spent;
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

NB_MODULE(_core, module) {
  module.doc() = "Kernels on packed weights. Takes addresses; use zeroskip.ops.";
  module.def("linear", &linear, nb::arg("x"), nb::arg("type"), nb::arg("tokens"), nb::arg("k"), nb::arg("blob"),
             nb::arg("nbytes"), nb::arg("bias"), nb::arg("activation"), nb::arg("y"), nb::arg("m"), nb::arg("threads"),
             nb::arg("kernel") = nb::none());
  module.def("convolve", &convolve, nb::arg("x"), nb::arg("type"), nb::arg("elements"), nb::arg("sizes"),
             nb::arg("blob"), nb::arg("nbytes"), nb::arg("bias"), nb::arg("activation"), nb::arg("y"), nb::arg("m"),
             nb::arg("threads"), nb::arg("kernel") = nb::none());
  module.def("output", &output, nb::arg("shape"), nb::arg("type"));
  module.def("attend", &attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("mask"), nb::arg("y"),
             nb::arg("type"), nb::arg("scale"), nb::arg("sizes"), nb::arg("threads"));
  module.def("normalise", &normalise, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("type"),
             nb::arg("weights"), nb::arg("rows"), nb::arg("width"), nb::arg("eps"), nb::arg("offset"),
             nb::arg("threads"));
  module.def("rotate", &rotate, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cos"), nb::arg("sin"),
             nb::arg("to_k"), nb::arg("to_v"), nb::arg("type"), nb::arg("sizes"));
  module.def("combine", &combine, nb::arg("multiply"), nb::arg("a"), nb::arg("b"), nb::arg("y"), nb::arg("type"),
             nb::arg("count"), nb::arg("threads"));
  module.def("lookup", &lookup, nb::arg("blob"), nb::arg("nbytes"), nb::arg("ids"), nb::arg("count"), nb::arg("y"),
             nb::arg("type"), nb::arg("threads"));
  module.def("decode", &decode, nb::arg("layers"), nb::arg("threads"));
  module.def("check", &check, nb::arg("blob"), nb::arg("nbytes"));
  module.def("hash_blob", [](uintptr_t blob, uint64_t nbytes) { return zs::hash_blob(bytes(blob), nbytes); });
  module.def("kernels", &kernels, nb::arg("blob"), nb::arg("nbytes"));
  module.def("chosen", &chosen, nb::arg("blob"), nb::arg("nbytes"), nb::arg("tokens"));
  module.def("tune", &tune, nb::arg("blob"), nb::arg("nbytes"), nb::arg("buckets"));
  module.def("forget_tuning", &zs::forget_tuning);
  module.def("isa_rows", &isa_rows);
  module.def("isa_active", [] { return std::string(zs::isa::name(zs::isa::active())); });
  module.def("isa_limit", [](const std::string& row) { return zs::isa::limit(row.c_str()); });
  module.def("all_kernels", &all_kernels);
  module.def("multiply_add", &multiply_add, nb::arg("bf16"), nb::arg("rounds"), nb::arg("threads"));
  module.def("read_once", &read_once, nb::arg("data"), nb::arg("nbytes"), nb::arg("threads"));
}
