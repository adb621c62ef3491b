// The launchers of single regimes, a file each; launch.cpp chooses among them by the plan.
#pragma once

#include "launch.h"

namespace fused_xent::cuda {

cudaError_t forward_by_rows(const Arguments& a, const Plan& plan, void* workspace,
                            cudaStream_t stream);
cudaError_t backward_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream);
cudaError_t scale_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream);
// `shared`: bytes of shared memory.
cudaError_t forward_backward_by_rows(const Arguments& a, const Plan& plan, int64_t shared,
                                     cudaStream_t stream);
cudaError_t by_columns(const Arguments& a, const Plan& plan, int64_t shared, bool has_forward,
                       bool has_backward, cudaStream_t stream);
// By rows or columns: see is_general.
cudaError_t general(const Arguments& a, const Plan& plan, void* workspace, bool has_forward,
                    bool has_backward, cudaStream_t stream);
// That of the code which a device of some capability runs: at most the device's own.
int capability_of_code(int capability);
cudaError_t scale_by_columns(const Arguments& a, const Plan& plan, cudaStream_t stream);

}  // namespace fused_xent::cuda
