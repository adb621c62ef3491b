// The GPU that a tensor is on, and torch's stream there. Needs none of CUDA's own headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace fused_xent::binding {

// Until its scope ends the tensor's GPU is the current one, where kernels are launched.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream on the tensor's GPU that torch launches on now: a cudaStream_t. Fetch it in each call
// of an operator: it is the caller's to change.
void* current_stream(const torch::stable::Tensor& tensor);

}  // namespace fused_xent::binding
