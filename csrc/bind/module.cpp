#include "bind/bind.h"

NB_MODULE(_core, module) {
  module.doc() = "Kernels on packed weights. Takes addresses; use zeroskip.ops.";
  binding::products(module);
  binding::outputs(module);
  binding::decoding(module);
  binding::machine(module);
}
