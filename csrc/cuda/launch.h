// Softmax cross-entropy on CUDA devices: the launchers. No torch: pointers to device memory, sizes
// and a stream. Nothing here waits for the device, so all of it can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../xent_rows.h"
#include "../xent_shards.h"
#include "plan.h"

namespace fused_xent::cuda {

// True if labels are read for all classes. In float64, those of label smoothing are as well.
XENT_INLINE bool reads_labels(const Params& p) {
  const bool is_uniform = p.weight == nullptr && p.dtype != DType::float64;
  return !has_indices(p) || (p.label_smoothing != 0 && !is_uniform);
}

// Kernels count rows and classes in 32 bits, with room for a step; tensors may have more elements.
constexpr int64_t kMaxRows = INT32_MAX, kMaxClasses = int64_t{1} << 30;
constexpr int kLeastCapability = 80;  // of a device, as in Device
constexpr double kMaxFastSoftcap = 64;

// tanh(u) / u by powers of u^2 for |u| <= kTanhSeriesEnd, with a relative error of at most 2e-7:
// the least that five terms can have.
constexpr int kTanhTerms = 5;
constexpr double kTanhSeriesEnd = 2.0 / 3;
constexpr double kTanhSeries[kTanhTerms] = {0.9999998062, -0.3333113293, 0.1329282665,
                                            -0.0513016452, 0.0143409764};

// The constants of transformed logits, and of their exponentials as powers of 2: with a softcap, of
// the tanh's exponential and of the capped logit, otherwise of exp(z).
template <typename A>
struct Transform {
  A scale, softcap, inner;  // inner: of the tanh's argument
  A exponent, cap;
  // Of logits up to most_by_series: the polynomials of half the tanh, and of the capped logit.
  A most_by_series, half_tanh[kTanhTerms], capped[kTanhTerms];

  Transform() = default;
  explicit Transform(const Params& p) {
    constexpr double kLog2E = 1.4426950408889634;
    const double inner_or_0 = p.softcap == 0 ? 0 : p.logit_scale / p.softcap;
    scale = static_cast<A>(p.logit_scale);
    softcap = static_cast<A>(p.softcap);
    inner = static_cast<A>(inner_or_0);
    exponent = static_cast<A>(kLog2E * (p.softcap == 0 ? p.logit_scale : -2 * inner_or_0));
    cap = static_cast<A>(kLog2E * p.softcap);
    // Beyond these limits its terms may leave a float's range.
    const bool has_series = 0x1p-13 < inner_or_0 && inner_or_0 < 0x1p13;
    most_by_series = static_cast<A>(has_series ? kTanhSeriesEnd / inner_or_0 : 0);
    double power = has_series ? inner_or_0 : 0;
    for (int k = 0; k < kTanhTerms; ++k) {
      half_tanh[k] = static_cast<A>(power * kTanhSeries[k] / 2);
      capped[k] = static_cast<A>(power * kTanhSeries[k] * p.softcap * kLog2E);
      power *= inner_or_0 * inner_or_0;
    }
  }
};

// Params, and what only CUDA needs. Every pointer is to memory of the current device.
struct Arguments : Params {
  const double* weight_sum_on_device;  // of all class weights; null: vocab_size
  // Loss and gradient of `mean` are divided by it; null: the loss by the sum of the rows' weights,
  // the gradient by 1.
  const double* total_weight;
  // Forward writes 0 here, if not null and if there are rows: the total_weight of losses that are
  // not added up, which nobody reads.
  double* unread_total_weight;
  // grad_loss may be null: 1.

  // Set by the launchers: a division of float64 takes a thread longer than its part of a row.
  Smoothing<double> smoothing;
  Smoothing<float> smoothing_float;
  Transform<double> transform;
  Transform<float> transform_float;
};

// The current device.
cudaError_t describe_device(Device* device);

// For forward: the statistics of each part of each row, where a row has several parts.
int64_t workspace_bytes(const Params& p, const Plan& plan);

// The same four as on the CPU, see ../cpu/launch.h. A target that is no class and not ignore_index
// makes its row's loss and gradient NaN.
cudaError_t forward(const Arguments& a, const Plan& plan, void* workspace, cudaStream_t stream);
cudaError_t backward(const Arguments& a, const Plan& plan, cudaStream_t stream);
cudaError_t forward_backward(const Arguments& a, const Plan& plan, cudaStream_t stream);
cudaError_t scale_gradient(const Arguments& a, const Plan& plan, cudaStream_t stream);

// Before and after these four, and after forward: see SparseLabels. A label that is no class and
// not ignore_index gives its row the target -1.
cudaError_t read_labels(const Arguments& a, const SparseLabels& sparse, cudaStream_t stream);
cudaError_t write_label_gradients(const Arguments& a, const SparseLabels& sparse,
                                  cudaStream_t stream);
cudaError_t write_log_probs(const Arguments& a, const SparseLabels& sparse, cudaStream_t stream);

// Sums over rows that are neither ignored nor out of range; null: not wanted. Only what they need
// is read: no targets where the total weight is known or not wanted.
struct Sums {
  double* total_weight;  // class weight * token weight of rows that count, or a's total_weight
  void* loss;            // the sum of row_loss, or its mean by total_weight; see xent_math.h
  DType loss_dtype;
  bool mean;
};
constexpr int kMaxSumBlocks = 256;  // two doubles of workspace each
cudaError_t sum_rows(const Arguments& a, const Sums& sums, double* workspace, cudaStream_t stream);
cudaError_t sum_class_weights(const Params& p, double* sum, double* workspace, cudaStream_t stream);

// Adds up the rows of a split vocabulary.
cudaError_t add_up_shards(const Shards& shards, cudaStream_t stream);

}  // namespace fused_xent::cuda
