#include "kernels/spmm_dense/layout.h"
#include "scales.h"

namespace zs {
namespace {

const char* check_integers(const Weight& weight) {
  const Header& header = weight.header;
  if (header.sections != 2) return "expected two sections: values, scales";
  const int64_t count = dense::panels(header.m);
  if (weight.nbytes[dense::kValuesSection] != static_cast<uint64_t>(count * dense::code_bytes(header)))
    return "the values section does not have the length that the shape asks for";
  if (weight.nbytes[dense::kScalesSection] != static_cast<uint64_t>(count * dense::scale_bytes(header)))
    return "the scales section does not have the length that the shape asks for";
  const int64_t per_panel = dense::groups(header) * kPanel;
  return check_scales(weight.section[dense::kScalesSection], count * per_panel, static_cast<Type>(header.scales),
                      [&](int64_t i) { return i / per_panel * kPanel + i % kPanel < header.m; });
}

}  // namespace

const char* check_dense(const Weight& weight) {
  const Header& header = weight.header;
  if (header.group_size) return check_integers(weight);
  const auto values = static_cast<Values>(header.values);
  if (header.sections != 1) return "expected one section: values";
  const int64_t expected = dense::panels(header.m) * dense::panel_bytes(header.k, values);
  if (weight.nbytes[dense::kValuesSection] != static_cast<uint64_t>(expected))
    return "the values section does not have the length that the shape asks for";
  return nullptr;
}

}  // namespace zs
