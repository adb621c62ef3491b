#include "schemas.h"

STABLE_TORCH_LIBRARY(fused_xent, m) {
  fused_xent::binding::define_operators(m);
  m.def("cpu_capability() -> str");
  m.def("empty_cache() -> int");
}
