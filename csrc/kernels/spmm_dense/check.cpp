#include "kernels/spmm_dense/layout.h"

namespace zs {

const char* check_dense(const Weight& weight) {
  const Header& header = weight.header;
  const auto values = static_cast<Values>(header.values);
  if (header.sections != 1) return "expected one section: values";
  const int64_t expected = dense::panels(header.m) * dense::panel_bytes(header.k, values);
  if (weight.nbytes[dense::kValuesSection] != static_cast<uint64_t>(expected))
    return "the values section does not have the length that the shape asks for";
  return nullptr;
}

}  // namespace zs
