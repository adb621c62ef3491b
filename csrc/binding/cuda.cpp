// The operators on CUDA devices: for now a stand-in, which refuses each of them.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

namespace {

void refuse(StableIValue*, uint64_t, uint64_t) {
  throw std::runtime_error("fused_xent has no CUDA kernels yet");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CUDA, m) {
  for (const char* name :
       {"forward", "backward", "backward_", "forward_backward_", "scale_gradient_"}) {
    m.impl(name, &refuse);
  }
}
