// Sparse labels: what the kernels for class indices need of them beforehand, and the gradients and
// log-probabilities at their classes afterwards. See SparseLabels.
//
// A warp takes the labels of a row, or one thread does if they are at most kFewLabels: so labels of
// images, (batch, K, pixel), are read by whole cache lines. Labels on one class are found in a hash
// table in shared memory, and added in their order: so two runs give the same bits.
//
// Bytes moved for a label, where a logit or a gradient costs the sector of 32 bytes around it:
//
//   read_labels             class (8 or 4), label 4, logit 32, logit kept 4 (before backward)
//   write_label_gradients   class (8 or 4), label 4, logit kept 4, gradient 32
//   write_log_probs         class (8 or 4), logit 32, result 4
#include "dispatch.cuh"
#include "labels.cuh"
#include "regimes.h"
#include "sparse_labels.cuh"
#include "team.cuh"
#include "transform.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int64_t kFewLabels = 8;

// ---- read_labels ------------------------------------------------------------------------------

// Of labels w_k t_k at transformed logits z_k. The term of a label of 0 is 0, and so is that of a
// logit equal to the greatest, even if both are infinite.
template <typename A>
struct LabelSums {
  A top = -kInfinity<A>;         // the greatest z_k
  int target = -1;               // its class; -1: there is no label
  bool is_bad = false;           // a class is out of range
  A weight = 0, extra_loss = 0;  // the sums of w_k t_k, and of w_k t_k (top - z_k)

  __device__ __forceinline__ bool is_below(A z) const { return target < 0 || z > top; }
  __device__ __forceinline__ void raise(A z, int y) {
    if (weight != 0 && z != top) extra_loss += weight * (z - top);
    top = z;
    target = y;
  }
  __device__ __forceinline__ void add(A z, int y, A w) {
    if (is_below(z)) raise(z, y);
    if (w != 0 && z != top) extra_loss += w * (top - z);
    weight += w;
  }
};

// Merges the sums of a warp's lanes; the first one gets the result.
template <typename A>
__device__ __forceinline__ void merge_lanes(LabelSums<A>& sums) {
  LabelSums<A> all = sums;
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const A z = __shfl_xor_sync(~0u, all.top, lane);
    const int y = __shfl_xor_sync(~0u, all.target, lane);
    if (y < 0 || !all.is_below(z)) continue;
    all.top = z;
    all.target = y;
  }
  sums.raise(all.top, all.target);
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    sums.weight += __shfl_xor_sync(~0u, sums.weight, lane);
    sums.extra_loss += __shfl_xor_sync(~0u, sums.extra_loss, lane);
  }
  sums.is_bad = __any_sync(~0u, sums.is_bad);
}

template <typename T, typename L>
__device__ __forceinline__ LabelSums<Acc<T>> sums_of_row(const Arguments& a,
                                                         const SparseLabels& sparse, int64_t row) {
  using A = Acc<T>;
  const LabelsOfRow<T> labels(a, sparse, row);
  const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
  A* kept = static_cast<A*>(sparse.logits) + row * sparse.n_labels;
  LabelSums<A> sums;
  for (int first = L::lane(); first < labels.count; first += kLabelBatch * L::kCount) {
    const LabelBatch<T, L> batch(labels, logits, first);
    A weight[kLabelBatch] = {};
    if (sparse.labels != nullptr) batch.read_weights(labels, weight);
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      sums.is_bad |= batch.y[u] == kOutOfRange;
      if (batch.y[u] < 0) continue;
      if (sparse.logits != nullptr) kept[batch.k(u)] = batch.x[u];
      sums.add(transformed(transform_of<A>(a), batch.x[u]), batch.y[u], weight[u]);
    }
  }
  if constexpr (L::kCount > 1) merge_lanes(sums);
  return sums;
}

template <typename T, typename L>
__global__ void __launch_bounds__(kLabelThreads)
    read_labels_of_rows(const __grid_constant__ Arguments a,
                        const __grid_constant__ SparseLabels sparse) {
  using A = Acc<T>;
  const int64_t row = L::row();
  if (row >= a.n_rows) return;
  LabelSums<A> sums;
  if (!has_no_weight(a, row)) sums = sums_of_row<T, L>(a, sparse, row);
  if (L::lane() != 0) return;
  sparse.target[row] = sums.is_bad ? -1 : max(sums.target, 0);
  set_acc(sparse.label_weight, row, sums.weight);
  const A keep = smoothing_of<A>(a).keep;  // it may keep nothing of an infinite loss
  set_acc(sparse.extra_loss, row, keep == 0 ? A(0) : keep * sums.extra_loss);
  set_acc(sparse.token_weight, row, A(sums.is_bad || sums.target >= 0));
}

// ---- gradients and log-probabilities ----------------------------------------------------------

// Beside label smoothing, whose rows have a maximum of faster arithmetic, the rounding of a softcap
// may put a logit above it.
template <typename A>
__device__ __forceinline__ A limited(A z, A max) {
  return z > max ? max : z;
}

// What the gradients of a row at its labels have in common.
template <typename A>
struct GradientAtLabels {
  const RowResults<A> results;
  Upstream<A> upstream;
  const Smoothing<A> smoothing;
  const A mass;

  __device__ GradientAtLabels(const Arguments& a, A scale, int64_t row)
      : results(saved_results<A>(a, row)),
        upstream(upstream_of(a, row, grad_loss_of(a, scale, row), results)),
        smoothing(smoothing_of<A>(a)),
        mass(mass_of(a, results.mass)) {
    add_entropy_gradient(upstream, a, row, results);
  }
  // By a transformed logit z. label: the sum of w_k t_k on its class; those on other classes are
  // like a part of the softmax. In double, since both may be far greater than the difference.
  __device__ __forceinline__ A at(A z, double label, double all_labels, A class_weight) const {
    const A on_label = smoothing.keep * static_cast<A>(label);
    Upstream<A> here = upstream;
    here.softmax += upstream.g * (smoothing.keep * static_cast<A>(all_labels - label));
    return gradient_at_target(here, {class_weight, on_label, smoothing.uniform}, mass, results,
                              limited(z, results.max));
  }
};

// The sum of all w_k t_k, in every lane.
template <typename T, typename L>
__device__ __forceinline__ double sum_of_labels(const LabelsOfRow<T>& labels,
                                                const LabelClasses<L>& classes) {
  double sum = 0;
  for (int k = L::lane(); k < labels.count; k += L::kCount) {
    if (classes.at(k) >= 0) sum += labels.weight_of(k, classes.at(k));
  }
  for (int lane = L::kCount / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  return sum;
}

template <typename T, typename L>
__global__ void __launch_bounds__(kLabelThreads)
    write_gradients_at_labels(const __grid_constant__ Arguments a,
                              const __grid_constant__ SparseLabels sparse) {
  using A = Acc<T>;
  extern __shared__ int memory[];
  const int64_t row = L::row();
  if (row >= a.n_rows || has_no_weight(a, row) || sparse.target[row] < 0) return;
  const LabelsOfRow<T> labels(a, sparse, row);
  const LabelClasses<L> classes(memory, labels);
  const GradientAtLabels<A> gradient(a, upstream_scale<A>(a), row);
  const Transform<A>& transform = transform_of<A>(a);
  const double all_labels = sum_of_labels<T, L>(labels, classes);
  const A* logits = static_cast<const A*>(sparse.logits) + row * sparse.n_labels;
  T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
  for (int k = L::lane(); k < labels.count; k += L::kCount) {
    const int y = classes.at(k);
    if (y < 0) continue;
    const FirstLabel first = classes.first_on(y);
    if (first.k != k) continue;
    double label = labels.weight_of(k, y);
    for (int i = k + 1; !first.is_alone && i < labels.count; ++i) {
      if (classes.at(i) == y) label += labels.weight_of(i, y);
    }
    const A x = logits[k];
    const A z = transformed(transform, x);
    const A by_z = gradient.at(z, label, all_labels, class_weight<A>(a, y));
    out[y * a.grad_layout.class_stride] = from_acc<T>(by_z * slope_at(transform, x));
  }
}

template <typename T, typename L>
__global__ void __launch_bounds__(kLabelThreads)
    write_log_probs_of_rows(const __grid_constant__ Arguments a,
                            const __grid_constant__ SparseLabels sparse) {
  using A = Acc<T>;
  const int64_t row = L::row();
  if (row >= a.n_rows) return;
  const LabelsOfRow<T> labels(a, sparse, row);
  const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
  A* out = row_of<A>(sparse.log_probs, sparse.log_probs_layout, row);
  const bool is_bad = sparse.target[row] < 0;
  const RowResults<A> results = saved_results<A>(a, row);
  for (int first = L::lane(); first < labels.count; first += kLabelBatch * L::kCount) {
    const LabelBatch<T, L> batch(labels, logits, first);
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      if (batch.k(u) >= labels.count) continue;
      const A z = limited(transformed(transform_of<A>(a), batch.x[u]), results.max);
      const A log_prob = batch.y[u] < 0 ? A(0) : z - results.max - results.log_sum;
      out[batch.k(u) * sparse.log_probs_layout.class_stride] = is_bad ? kNaN<A> : log_prob;
    }
  }
}

// ---- launchers --------------------------------------------------------------------------------

// Calls body(Type<T>, L): OneThread or OneWarp.
template <typename Body>
cudaError_t with_lanes(const Arguments& a, const SparseLabels& sparse, const Body& body) {
  return with_dtype(a.dtype, [&]<typename T>(Type<T> type) {
    return sparse.n_labels <= kFewLabels ? body(type, OneThread{}) : body(type, OneWarp{});
  });
}

// size: ints of shared memory for each row.
template <typename L, typename Kernel>
cudaError_t launch(L, Kernel kernel, const Arguments& a, const SparseLabels& sparse, int size,
                   cudaStream_t stream) {
  if (a.n_rows == 0) return cudaSuccess;
  const size_t shared = static_cast<size_t>(L::kRows * size) * sizeof(int);
  const unsigned grid = blocks_for(a.n_rows, L::kRows);
  kernel<<<grid, kLabelThreads, shared, stream>>>(with_constants(a), sparse);
  return cudaGetLastError();
}

}  // namespace

cudaError_t read_labels(const Arguments& a, const SparseLabels& sparse, cudaStream_t stream) {
  return with_lanes(a, sparse, [&]<typename T, typename L>(Type<T>, L lanes) {
    return launch(lanes, read_labels_of_rows<T, L>, a, sparse, 0, stream);
  });
}

cudaError_t write_label_gradients(const Arguments& a, const SparseLabels& sparse,
                                  cudaStream_t stream) {
  return with_lanes(a, sparse, [&]<typename T, typename L>(Type<T>, L lanes) {
    const int size = LabelClasses<L>::size(static_cast<int>(sparse.n_labels));
    return launch(lanes, write_gradients_at_labels<T, L>, a, sparse, size, stream);
  });
}

cudaError_t write_log_probs(const Arguments& a, const SparseLabels& sparse, cudaStream_t stream) {
  return with_lanes(a, sparse, [&]<typename T, typename L>(Type<T>, L lanes) {
    return launch(lanes, write_log_probs_of_rows<T, L>, a, sparse, 0, stream);
  });
}

}  // namespace fused_xent::cuda
