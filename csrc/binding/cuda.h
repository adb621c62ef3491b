// The operators on CUDA devices; cuda_device.cpp registers them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace fused_xent::binding {

void implement_on_cuda(torch::stable::detail::StableLibrary& m);

// For tests and the benchmark: forces the plan of "forward", "backward" or "forward_backward",
// which has cuda::Plan's members in order. An empty plan ends that. A plan that cannot serve makes
// the operator throw.
constexpr char kForceCudaPlanSchema[] = "force_cuda_plan(str operation, int[] plan) -> ()";
void force_cuda_plan(const std::string& operation, const std::vector<int64_t>& plan);

// Why the kernels cannot run with the machine's driver; "" if they can, or if there is none.
constexpr char kCudaDriverProblemSchema[] = "cuda_driver_problem() -> str";
std::string cuda_driver_problem();

}  // namespace fused_xent::binding
