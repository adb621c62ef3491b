// Sparse labels: what the kernels for class indices need of them beforehand, and the gradients and
// the log-probabilities at their classes afterwards. See SparseLabels.
//
// A warp takes the labels of a row, or one thread does if they are at most kFewLabels: so that the
// labels of images, (batch, K, pixel), are read by whole cache lines. A thread requests kBatch
// classes before the first of their logits. Labels on one class are found in a hash table in shared
// memory, and added in their order: so two runs give the same bits.
//
// Bytes moved for a label, with 4 for a logit kept and 32 for the sector around one of the row:
//
//   read_labels             class (8 or 4), label 4, logit 32, kept 4
//   write_label_gradients   class (8 or 4), label 4, kept 4, gradient 32 in L2
//   write_log_probs         class (8 or 4), logit 32, result 4
//
// Class weights add 4, of which the table of all classes mostly stays in L2.
#include "dispatch.cuh"
#include "labels.cuh"
#include "regimes.h"
#include "team.cuh"
#include "transform.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kThreads = 64, kBatch = 4;
constexpr int64_t kFewLabels = 8;
constexpr int kNotCounted = -1, kOutOfRange = -2;  // in the place of a label's class

// Threads that share the labels of a row: 1 or kWarp.
template <int kLanes>
struct Lanes {
  static constexpr int kCount = kLanes;
  static constexpr int kRows = kThreads / kLanes;  // of a block

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ int slot() { return static_cast<int>(threadIdx.x) / kLanes; }
  static __device__ int64_t first_row() { return int64_t{blockIdx.x} * kRows + slot(); }
  static __device__ int64_t step() { return int64_t{gridDim.x} * kRows; }
  template <typename X>
  static __device__ __forceinline__ X from(int distance, X x) {
    return __shfl_xor_sync(~0u, x, distance);
  }
  // What one lane wrote to shared memory, others may read.
  static __device__ __forceinline__ void wait() {
    if constexpr (kLanes > 1) __syncwarp();
  }
};

// The labels of a row.
template <typename T>
struct LabelsOfRow {
  using A = Acc<T>;
  const Arguments& a;
  const SparseLabels& sparse;
  const int count;
  const int64_t first;  // the offset of the first one's class
  const A* labels;

  __device__ LabelsOfRow(const Arguments& a, const SparseLabels& sparse, int64_t row)
      : a(a),
        sparse(sparse),
        count(static_cast<int>(sparse.n_labels)),
        first(offset_of(sparse.classes_layout, row)),
        labels(row_of<const A>(sparse.labels, sparse.labels_layout, row)) {}

  __device__ __forceinline__ int class_of(int k) const {
    const int64_t y = class_of_label(sparse, first + k * sparse.classes_layout.class_stride);
    if (y == sparse.ignore_index) return kNotCounted;
    return 0 <= y && y < a.vocab_size ? static_cast<int>(y) : kOutOfRange;
  }
  // Label k, which is on class y, times the class weight.
  __device__ __forceinline__ A weight_of(int k, int y) const {
    return labels[k * sparse.labels_layout.class_stride] * class_weight<A>(a, y);
  }
};

// Some labels of a lane: those from `first` on.
template <typename T, typename L>
struct Batch {
  int first, y[kBatch];
  Acc<T> x[kBatch];  // 0 where there is no class

  __device__ __forceinline__ Batch(const LabelsOfRow<T>& row, const T* logits, int first)
      : first(first) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) y[u] = k(u) < row.count ? row.class_of(k(u)) : kNotCounted;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      x[u] = y[u] < 0 ? Acc<T>(0) : to_acc(logits[y[u] * row.a.logits_layout.class_stride]);
    }
  }
  __device__ int k(int u) const { return first + u * L::kCount; }
};

// ---- read_labels ------------------------------------------------------------------------------

// Of labels w_k t_k at transformed logits z_k. A term of a label of 0 is 0, and so is one between
// equal logits, even if they are infinite.
template <typename A>
struct LabelSums {
  A top = -kInfinity<A>;         // the greatest z_k
  int target = -1;               // its class; -1: there are no labels
  bool is_bad = false;           // a class is out of range
  A weight = 0, extra_loss = 0;  // sums of w_k t_k, and of w_k t_k (top - z_k)

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
  // The first of a row's lanes gets the sums of all.
  template <typename L>
  __device__ __forceinline__ void merge() {
    if constexpr (L::kCount == 1) return;
    LabelSums all = *this;
    for (int apart = L::kCount / 2; apart > 0; apart /= 2) {
      const A z = L::from(apart, all.top);
      const int y = L::from(apart, all.target);
      if (y >= 0 && all.is_below(z)) all.raise(z, y);
    }
    raise(all.top, all.target);
    for (int apart = L::kCount / 2; apart > 0; apart /= 2) {
      weight += L::from(apart, weight);
      extra_loss += L::from(apart, extra_loss);
    }
    is_bad = __any_sync(~0u, is_bad);
  }
};

template <typename T, typename L>
__device__ __forceinline__ LabelSums<Acc<T>> sums_of_row(const Arguments& a,
                                                         const SparseLabels& sparse, int64_t row) {
  using A = Acc<T>;
  const LabelsOfRow<T> labels(a, sparse, row);
  const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
  A* kept = static_cast<A*>(sparse.logits) + row * sparse.n_labels;
  LabelSums<A> sums;
  for (int first = L::lane(); first < labels.count; first += kBatch * L::kCount) {
    const Batch<T, L> batch(labels, logits, first);
    A weight[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool has_label = batch.y[u] >= 0 && sparse.labels != nullptr;
      weight[u] = has_label ? labels.weight_of(batch.k(u), batch.y[u]) : A(0);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      sums.is_bad |= batch.y[u] == kOutOfRange;
      if (batch.y[u] < 0) continue;
      if (sparse.logits != nullptr) kept[batch.k(u)] = batch.x[u];
      sums.add(transformed(transform_of<A>(a), batch.x[u]), batch.y[u], weight[u]);
    }
  }
  sums.template merge<L>();
  return sums;
}

template <typename T, typename L>
__global__ void __launch_bounds__(kThreads)
    read_labels_of_rows(const __grid_constant__ Arguments a,
                        const __grid_constant__ SparseLabels sparse) {
  using A = Acc<T>;
  for (int64_t row = L::first_row(); row < a.n_rows; row += L::step()) {
    LabelSums<A> sums;
    if (!has_no_weight(a, row)) sums = sums_of_row<T, L>(a, sparse, row);
    if (L::lane() != 0) continue;
    sparse.target[row] = sums.is_bad ? -1 : max(sums.target, 0);
    set_acc(sparse.target_weight, row, sums.weight);
    set_acc(sparse.extra_loss, row, smoothing_of<A>(a).keep * sums.extra_loss);
    set_acc(sparse.token_weight, row, A(sums.is_bad || sums.target >= 0));
  }
}

// ---- write_label_gradients --------------------------------------------------------------------

// The classes of a row's labels in shared memory, and the first label of each class.
struct FirstLabel {
  int k;
  bool is_alone;  // for sure
};

template <typename L>
class Classes {
 public:
  static __host__ __device__ int size(int n_labels) { return n_labels; }
  __device__ Classes(int* memory, int) : classes_(memory + threadIdx.x) {}

  template <typename Labels>
  __device__ __forceinline__ void read(const Labels& labels) {
    for (int k = 0; k < labels.count; ++k) classes_[k * kThreads] = labels.class_of(k);
  }
  __device__ __forceinline__ int at(int k) const { return classes_[k * kThreads]; }
  __device__ __forceinline__ FirstLabel first_on(int y) const {
    int k = 0;
    while (at(k) != y) ++k;
    return {k, false};
  }

 private:
  int* classes_;
};

// With a hash table in open addressing, at most half full. A slot is kFree, or twice the first
// label of a class, and 1 more if it is alone.
template <>
class Classes<Lanes<kWarp>> {
  using L = Lanes<kWarp>;

 public:
  static __host__ __device__ int size(int n_labels) { return n_labels + slots_for(n_labels); }
  __device__ Classes(int* memory, int n_labels)
      : classes_(memory + L::slot() * size(n_labels)),
        slots_(classes_ + n_labels),
        n_slots_(slots_for(n_labels)) {}

  template <typename Labels>
  __device__ __forceinline__ void read(const Labels& labels) {
    L::wait();  // the lanes have read the row before
    for (int k = L::lane(); k < labels.count; k += kWarp) classes_[k] = labels.class_of(k);
    for (int i = L::lane(); i < n_slots_; i += kWarp) slots_[i] = kFree;
    L::wait();
    for (int k = L::lane(); k < labels.count; k += kWarp) {
      if (at(k) >= 0) insert(k);
    }
    L::wait();
  }
  __device__ __forceinline__ int at(int k) const { return classes_[k]; }
  __device__ __forceinline__ FirstLabel first_on(int y) const {
    int slot = slot_of(y);
    while (at(slots_[slot] >> 1) != y) slot = next(slot);
    return {slots_[slot] >> 1, (slots_[slot] & 1) != 0};
  }

 private:
  static constexpr int kFree = -1;

  static __host__ __device__ int slots_for(int n_labels) {
    int n = 2 * kWarp;
    while (n < 2 * n_labels) n *= 2;
    return n;
  }
  __device__ __forceinline__ int slot_of(int y) const {
    const unsigned hash = static_cast<unsigned>(y) * 0x9e3779b1u;
    return static_cast<int>(__umulhi(hash, n_slots_));
  }
  __device__ __forceinline__ int next(int slot) const { return (slot + 1) & (n_slots_ - 1); }
  __device__ __forceinline__ void insert(int k) {
    for (int slot = slot_of(at(k));; slot = next(slot)) {
      const int before = atomicCAS(&slots_[slot], kFree, 2 * k + 1);
      if (before == kFree) return;
      if (at(before >> 1) != at(k)) continue;
      atomicMin(&slots_[slot], 2 * min(k, before >> 1));
      return;
    }
  }

  int *classes_, *slots_, n_slots_;
};

// The numbers of a row that its gradients at the labels have in common.
template <typename A>
struct GradientAtLabels {
  const RowResults<A> results;
  Upstream<A> upstream;
  const Smoothing<A> smoothing;
  const A mass, on_labels;  // on_labels: the sum of q_k of the labels

  __device__ GradientAtLabels(const Arguments& a, A scale, int64_t row)
      : results(saved_results<A>(a, row)),
        upstream(upstream_of(a, row, grad_loss_of(a, scale, row), results)),
        smoothing(smoothing_of<A>(a)),
        mass(mass_of(a, results.mass)),
        on_labels(smoothing.keep * target_weight<A>(a, row, 0)) {
    add_entropy_gradient(upstream, a, row, results);
  }
  // By a transformed logit z. The labels on other classes are like a part of the softmax.
  __device__ __forceinline__ A at(A z, A label, A class_weight) const {
    const A on_label = smoothing.keep * label;
    Upstream<A> here = upstream;
    here.softmax += upstream.g * (on_labels - on_label);
    return gradient_at_target(here, {class_weight, on_label, smoothing.uniform}, mass, results, z);
  }
};

// The rounding of a softcap may put a logit above the row's maximum.
template <typename A>
__device__ __forceinline__ A limited(A z, A max) {
  return z > max ? max : z;
}

template <typename T, typename L>
__global__ void __launch_bounds__(kThreads)
    write_gradients_at_labels(const __grid_constant__ Arguments a,
                              const __grid_constant__ SparseLabels sparse) {
  using A = Acc<T>;
  extern __shared__ int memory[];
  const A scale = upstream_scale<A>(a);
  const Transform<A>& transform = transform_of<A>(a);
  Classes<L> classes(memory, static_cast<int>(sparse.n_labels));
  for (int64_t row = L::first_row(); row < a.n_rows; row += L::step()) {
    if (has_no_weight(a, row) || sparse.target[row] < 0) continue;
    const LabelsOfRow<T> labels(a, sparse, row);
    const A* logits = static_cast<const A*>(sparse.logits) + row * sparse.n_labels;
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    classes.read(labels);
    const GradientAtLabels<A> gradient(a, scale, row);
    for (int k = L::lane(); k < labels.count; k += L::kCount) {
      const int y = classes.at(k);
      if (y < 0) continue;
      const FirstLabel first = classes.first_on(y);
      if (first.k != k) continue;
      A label = labels.weight_of(k, y);
      for (int i = k + 1; !first.is_alone && i < labels.count; ++i) {
        if (classes.at(i) == y) label += labels.weight_of(i, y);
      }
      const A x = logits[k], z = limited(transformed(transform, x), gradient.results.max);
      const A value = gradient.at(z, label, class_weight<A>(a, y)) * slope_at(transform, x);
      out[y * a.grad_layout.class_stride] = from_acc<T>(value);
    }
  }
}

// ---- write_log_probs --------------------------------------------------------------------------

template <typename T, typename L>
__global__ void __launch_bounds__(kThreads)
    write_log_probs_of_rows(const __grid_constant__ Arguments a,
                            const __grid_constant__ SparseLabels sparse) {
  using A = Acc<T>;
  for (int64_t row = L::first_row(); row < a.n_rows; row += L::step()) {
    const LabelsOfRow<T> labels(a, sparse, row);
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    A* out = row_of<A>(sparse.log_probs, sparse.log_probs_layout, row);
    const bool is_bad = sparse.target[row] < 0;
    const RowResults<A> results = saved_results<A>(a, row);
    for (int first = L::lane(); first < labels.count; first += kBatch * L::kCount) {
      const Batch<T, L> batch(labels, logits, first);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (batch.k(u) >= labels.count) continue;
        const A z = limited(transformed(transform_of<A>(a), batch.x[u]), results.max);
        const A log_prob = batch.y[u] < 0 ? A(0) : z - results.max - results.log_sum;
        out[batch.k(u) * sparse.log_probs_layout.class_stride] = is_bad ? kNaN<A> : log_prob;
      }
    }
  }
}

// ---- launchers --------------------------------------------------------------------------------

// Calls body(Type<T>, Lanes<n>).
template <typename Body>
cudaError_t with_lanes(const Arguments& a, const SparseLabels& sparse, const Body& body) {
  return with_dtype(a.dtype, [&]<typename T>(Type<T> type) {
    return sparse.n_labels <= kFewLabels ? body(type, Lanes<1>{}) : body(type, Lanes<kWarp>{});
  });
}

// shared: ints of each row.
template <typename L, typename Kernel>
cudaError_t launch(Kernel kernel, L, const Arguments& a, const SparseLabels& sparse, int shared,
                   cudaStream_t stream) {
  if (a.n_rows == 0) return cudaSuccess;
  const size_t bytes = size_t{L::kRows} * static_cast<size_t>(shared) * sizeof(int);
  kernel<<<blocks_for(a.n_rows, L::kRows), kThreads, bytes, stream>>>(with_constants(a), sparse);
  return cudaGetLastError();
}

}  // namespace

cudaError_t read_labels(const Arguments& a, const SparseLabels& sparse, cudaStream_t stream) {
  return with_lanes(a, sparse, [&]<typename T, typename L>(Type<T>, L lanes) {
    return launch(read_labels_of_rows<T, L>, lanes, a, sparse, 0, stream);
  });
}

cudaError_t write_label_gradients(const Arguments& a, const SparseLabels& sparse,
                                  cudaStream_t stream) {
  return with_lanes(a, sparse, [&]<typename T, typename L>(Type<T>, L lanes) {
    const int shared = Classes<L>::size(static_cast<int>(sparse.n_labels));
    return launch(write_gradients_at_labels<T, L>, lanes, a, sparse, shared, stream);
  });
}

cudaError_t write_log_probs(const Arguments& a, const SparseLabels& sparse, cudaStream_t stream) {
  return with_lanes(a, sparse, [&]<typename T, typename L>(Type<T>, L lanes) {
    return launch(write_log_probs_of_rows<T, L>, lanes, a, sparse, 0, stream);
  });
}

}  // namespace fused_xent::cuda
