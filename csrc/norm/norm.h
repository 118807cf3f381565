// Division by the root of the mean square, the norm of most language models.
#pragma once
#include "core.h"

namespace zs {

// y[r, i] = x[r, i] / sqrt(mean of x[r]^2 + eps) (weight[i] + offset), x and y dense.
struct Norm {
  const void *x, *weight;
  void* y;
  Type type, weights;  // of x and y; of the weight
  int64_t rows, width;
  float eps, offset;
};

struct NormLoop {
  void (*rows)(const Norm& norm, int64_t first, int64_t last);
};

void normalise(const Norm& norm, int threads);

}  // namespace zs
