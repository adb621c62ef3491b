// The sparse labels of one row: who takes them, what they are, and which of them are on one class.
#pragma once

#include <cstdint>

#include "labels.cuh"
#include "memory.cuh"
#include "team.cuh"

namespace fused_xent::cuda {

constexpr int kLabelThreads = 64;  // of a block
constexpr int kLabelBatch = 4;
constexpr int kNotCounted = -1, kOutOfRange = -2;  // in the place of a label's class

// The threads that share the labels of a row: one, or a warp.
template <int kLanes>
struct Lanes {
  static constexpr int kCount = kLanes;
  static constexpr int kRows = kLabelThreads / kLanes;  // of a block

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ int row_in_block() { return static_cast<int>(threadIdx.x) / kLanes; }
  static __device__ int64_t row() { return int64_t{blockIdx.x} * kRows + row_in_block(); }
};
using OneThread = Lanes<1>;
using OneWarp = Lanes<kWarp>;

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
        first(row_offset<uint32_t>(sparse.classes_layout, row)),
        labels(row_of<const A>(sparse.labels, sparse.labels_layout, row)) {}

  __device__ __forceinline__ int class_of(int k) const {
    return checked(class_of_label(sparse, first + k * sparse.classes_layout.class_stride));
  }
  __device__ __forceinline__ int checked(int64_t y) const {
    if (y == sparse.ignore_index) return kNotCounted;
    return 0 <= y && y < a.vocab_size ? static_cast<int>(y) : kOutOfRange;
  }
  // Label k, which is on class y, times the class weight.
  __device__ __forceinline__ A weight_of(int k, int y) const {
    return labels[k * sparse.labels_layout.class_stride] * class_weight<A>(a, y);
  }
};

// Some labels of a lane, from `first` on: all of their classes are requested before the logits.
template <typename T, typename L>
struct LabelBatch {
  int first, y[kLabelBatch];
  Acc<T> x[kLabelBatch];  // 0 where there is no class

  __device__ __forceinline__ LabelBatch(const LabelsOfRow<T>& row, const T* logits, int first)
      : first(first) {
    if (row.sparse.classes_kind == TargetKind::int64) {
      read_classes<int64_t>(row);
    } else {
      read_classes<int32_t>(row);
    }
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      x[u] = y[u] < 0 ? Acc<T>(0) : to_acc(logits[y[u] * row.a.logits_layout.class_stride]);
    }
  }
  __device__ int k(int u) const { return first + u * L::kCount; }
  // The labels times their class weights; 0 of those that do not count.
  __device__ __forceinline__ void read_weights(const LabelsOfRow<T>& row,
                                               Acc<T> (&weight)[kLabelBatch]) const {
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      weight[u] = y[u] < 0 ? Acc<T>(0) : row.labels[k(u) * row.sparse.labels_layout.class_stride];
    }
    if (row.a.weight == nullptr) return;
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      weight[u] *= y[u] < 0 ? Acc<T>(0) : class_weight<Acc<T>>(row.a, y[u]);
    }
  }

 private:
  template <typename Index>
  __device__ __forceinline__ void read_classes(const LabelsOfRow<T>& row) {
    const auto* classes = static_cast<const Index*>(row.sparse.classes) + row.first;
    Index given[kLabelBatch];
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      given[u] = classes[min(k(u), row.count - 1) * row.sparse.classes_layout.class_stride];
    }
#pragma unroll
    for (int u = 0; u < kLabelBatch; ++u) {
      y[u] = k(u) < row.count ? row.checked(given[u]) : kNotCounted;
    }
  }
};

// ---- labels on one class ----------------------------------------------------------------------

// The first label on a class. is_alone: no other label is, for sure.
struct FirstLabel {
  int k;
  bool is_alone;
};

// The classes of a row's labels in shared memory. size: ints for each row.
template <typename L>
class LabelClasses;

template <>
class LabelClasses<OneThread> {
 public:
  static int size(int n_labels) { return n_labels; }

  template <typename T>
  __device__ __forceinline__ LabelClasses(int* memory, const LabelsOfRow<T>& row)
      : classes_(memory + threadIdx.x) {
    for (int k = 0; k < row.count; ++k) classes_[k * kLabelThreads] = row.class_of(k);
  }
  __device__ __forceinline__ int at(int k) const { return classes_[k * kLabelThreads]; }
  __device__ __forceinline__ FirstLabel first_on(int y) const {
    int k = 0;
    while (at(k) != y) ++k;
    return {k, false};
  }

 private:
  int* classes_;
};

// With a hash table in open addressing, at most half full. A slot is kFree, or twice the first
// label on a class, and 1 more while that is alone. So its class never changes.
template <>
class LabelClasses<OneWarp> {
 public:
  static __host__ __device__ int size(int n_labels) { return n_labels + slots_for(n_labels); }

  template <typename T>
  __device__ __forceinline__ LabelClasses(int* memory, const LabelsOfRow<T>& row)
      : classes_(memory + OneWarp::row_in_block() * size(row.count)),
        slots_(classes_ + row.count),
        n_slots_(slots_for(row.count)) {
    const int lane = OneWarp::lane();
    for (int k = lane; k < row.count; k += kWarp) classes_[k] = row.class_of(k);
    for (int i = lane; i < n_slots_; i += kWarp) slots_[i] = kFree;
    __syncwarp();
    for (int k = lane; k < row.count; k += kWarp) {
      if (at(k) >= 0) insert(k);
    }
    __syncwarp();
  }
  __device__ __forceinline__ int at(int k) const { return classes_[k]; }
  __device__ __forceinline__ FirstLabel first_on(int y) const {
    int i = slot_of(y);
    while (at(slots_[i] >> 1) != y) i = next(i);
    return {slots_[i] >> 1, (slots_[i] & 1) != 0};
  }

 private:
  static constexpr int kFree = -1;

  static __host__ __device__ int slots_for(int n_labels) {
    int n = 2 * kWarp;
    while (n < 2 * n_labels) n *= 2;
    return n;
  }
  // From the upper bits of a product (Knuth's multiplicative hashing).
  __device__ __forceinline__ int slot_of(int y) const {
    return static_cast<int>(__umulhi(static_cast<unsigned>(y) * 0x9e3779b1u, n_slots_));
  }
  __device__ __forceinline__ int next(int i) const { return (i + 1) & (n_slots_ - 1); }
  __device__ __forceinline__ void insert(int k) {
    const int y = at(k);
    for (int i = slot_of(y);; i = next(i)) {
      const int before = atomicCAS(&slots_[i], kFree, 2 * k + 1);
      if (before == kFree) return;
      if (at(before >> 1) != y) continue;
      atomicMin(&slots_[i], 2 * min(k, before >> 1));
      return;
    }
  }

  int *classes_, *slots_, n_slots_;
};

}  // namespace fused_xent::cuda
