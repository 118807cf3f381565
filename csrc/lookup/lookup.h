// Rows of a table of integers, as an embedding gives them: y[i, j] = code[id[i], j] scale[id[i], j / group size].
#pragma once
#include "core.h"

namespace zs {

struct Lookup {
  const Weight* weight;  // format `dense`, values int8 or int4
  const int64_t* ids;    // [count], each within the table
  int64_t count;
  void* y;  // [count, k]
  Type type;
};

struct LookupLoop {
  void (*rows)(const Lookup& lookup, int64_t first, int64_t last);
};

void lookup(const Lookup& lookup, int threads);

}  // namespace zs
