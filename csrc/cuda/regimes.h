// The launchers of single regimes, a file for each; launch.cpp chooses among them by the plan.
#pragma once

#include "launch.h"

namespace fused_xent::cuda {

cudaError_t forward_by_rows(const Arguments& a, const Plan& plan, void* workspace,
                            cudaStream_t stream);
cudaError_t backward_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream);
cudaError_t scale_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream);
// shared: bytes of dynamic shared memory.
cudaError_t forward_backward_by_rows(const Arguments& a, const Plan& plan, int64_t shared,
                                     cudaStream_t stream);
cudaError_t by_columns(const Arguments& a, const Plan& plan, int64_t shared, bool has_forward,
                       bool has_backward, cudaStream_t stream);
cudaError_t scale_by_columns(const Arguments& a, const Plan& plan, cudaStream_t stream);
// With per-class options (see is_general), by rows or by columns.
cudaError_t general(const Arguments& a, const Plan& plan, void* workspace, bool has_forward,
                    bool has_backward, cudaStream_t stream);

// The arguments with what launchers set.
Arguments with_constants(const Arguments& given);

// Threads of scale_gradient on a multiprocessor, for which its kernels leave enough registers.
constexpr int kScaleThreadsPerSm = 1024;

// Lets a kernel have as much shared memory as the current device has.
cudaError_t allow_all_shared(const void* kernel);
// Reduces the blocks of a plan's clusters to what the current device can hold. config: the threads
// and the shared memory of a block.
cudaError_t fit_cluster(const void* kernel, cudaLaunchConfig_t config, Plan* plan);
inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return cluster;
}

// The capability of the code that a device runs: at most the device's own.
int capability_of_code(int capability);

}  // namespace fused_xent::cuda
