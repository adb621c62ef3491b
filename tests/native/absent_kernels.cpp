// Weak stand-ins for the launchers of csrc/cuda files that a program is built without; linked files
// override them.
#include "../../csrc/cuda/regimes.h"

namespace fused_xent::cuda {

#define ABSENT __attribute__((weak))
constexpr cudaError_t kAbsent = cudaErrorNotSupported;

ABSENT int capability_of_code(int capability) { return capability; }
ABSENT cudaError_t forward_by_rows(const Arguments&, const Plan&, void*, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t backward_by_rows(const Arguments&, const Plan&, cudaStream_t) { return kAbsent; }
ABSENT cudaError_t scale_by_rows(const Arguments&, const Plan&, cudaStream_t) { return kAbsent; }
ABSENT cudaError_t forward_backward_by_rows(const Arguments&, const Plan&, int64_t, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t by_columns(const Arguments&, const Plan&, int64_t, bool, bool, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t general(const Arguments&, const Plan&, void*, bool, bool, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t sum_rows(const Arguments&, const Sums&, double*, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t sum_class_weights(const Params&, double*, double*, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t read_labels(const Arguments&, const SparseLabels&, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t write_label_gradients(const Arguments&, const SparseLabels&, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t write_log_probs(const Arguments&, const SparseLabels&, cudaStream_t) {
  return kAbsent;
}
ABSENT cudaError_t scale_by_columns(const Arguments&, const Plan&, cudaStream_t) { return kAbsent; }

}  // namespace fused_xent::cuda
