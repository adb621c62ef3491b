#include "cuda_device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda.h"

namespace fused_xent::binding {

DeviceGuard::DeviceGuard(const torch::stable::Tensor& tensor)
    : guard_(std::make_shared<torch::stable::accelerator::DeviceGuard>(tensor.get_device_index())) {
}

void* current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CUDA, m) { implement_on_cuda(m); }

STABLE_TORCH_LIBRARY_FRAGMENT(fused_xent, m) {
  m.def(kForceCudaPlanSchema);
  m.def(kCudaDriverProblemSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CompositeExplicitAutograd, m) {
  m.impl("force_cuda_plan", TORCH_BOX(&force_cuda_plan));
  m.impl("cuda_driver_problem", TORCH_BOX(&cuda_driver_problem));
}

}  // namespace fused_xent::binding
