// What a decode step does between its products, and a whole decoder layer of it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "attention/attention.h"
#include "bind/bind.h"
#include "decoder/decoder.h"
#include "lookup/lookup.h"
#include "norm/norm.h"
#include "pointwise/pointwise.h"

namespace binding {

namespace {

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

}  // namespace

void decoding(nb::module_& module) {
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
}

}  // namespace binding
