// The arguments of every kernel launcher: raw pointers, sizes, strides and options. Plain C++, no
// torch.
#pragma once

#include <cstdint>

#include "xent_inline.h"

namespace fused_xent {

enum class DType { float32, float64, bfloat16, float16 };
XENT_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

enum class TargetKind { int64, int32, uint8, probabilities };

constexpr int kMaxRowDims = 4;

// The offset of element (row, class) of a tensor, in elements. Rows are numbered in the order of
// the loss. Row dimensions are merged where strides allow, outermost first.
struct Layout {
  int n_dims;  // 1 to kMaxRowDims
  int64_t size[kMaxRowDims];
  int64_t stride[kMaxRowDims];
  int64_t class_stride;
};

// Row: the type that row numbers fit into. CUDA divides faster with 32 bits.
template <typename Row = int64_t>
XENT_INLINE int64_t row_offset(const Layout& layout, int64_t row) {
  auto rest = static_cast<Row>(row);
  int64_t offset = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int d = layout.n_dims - 1; d > 0; --d) {
    const auto size = static_cast<Row>(layout.size[d]);
    offset += rest % size * layout.stride[d];
    rest /= size;
  }
  return offset + rest * layout.stride[0];
}

// The options of a loss: OPTION(C++ type, schema type, name, default). Params, the operators'
// schemas and the binding that reads them follow from this list; fused_xent/_options.py has the
// names, ranges and meanings that users see.
#define FUSED_XENT_OPTIONS(OPTION)                                       \
  OPTION(int64_t, "int", ignore_index, -100)                             \
  OPTION(double, "float", label_smoothing, 0.0)                          \
  OPTION(double, "float", lse_square_scale, 0.0)                         \
  OPTION(double, "float", focal_gamma, 0.0) /* 0: plain cross-entropy */ \
  OPTION(double, "float", softcap, 0.0)     /* 0: none */                \
  OPTION(double, "float", logit_scale, 1.0)

struct Options {
#define FUSED_XENT_MEMBER(type, schema_type, name, default_value) type name = default_value;
  FUSED_XENT_OPTIONS(FUSED_XENT_MEMBER)
#undef FUSED_XENT_MEMBER
};

// "acc" below is the accumulation type: double for float64 logits, float for all others. A per-row
// value is of type acc and contiguous unless its comment says otherwise. A null pointer means that
// the input is not given or the output is not wanted.
struct Params : Options {
  DType dtype;  // of logits and grad_logits
  int64_t n_rows;
  int64_t vocab_size;
  const void* logits;
  Layout logits_layout;

  const void* target;  // indices: (n_rows,), contiguous; probabilities: by target_layout
  TargetKind target_kind;
  DType target_dtype;  // of probabilities: dtype, or float32 under 16-bit logits
  Layout target_layout;
  const void* weight;        // acc (vocab_size,), or null
  double weight_sum;         // of all class weights; vocab_size without them. Only used on the CPU
  const void* token_weight;  // per row, or null: all 1. Rows of weight 0 are not read
  // Of SparseLabels, null for all others:
  const void* label_weight;  // per row, in place of the target's class weight
  const void* extra_loss;    // per row, added to the cross-entropy

  // Per row, written by forward, read by backward.
  void* row_loss;
  void* row_max;  // of the transformed logits, as all below
  void* log_sum;
  void* label_mass;  // sum of a row's probabilities, smoothed and weighted; null for indices
  void* loss_slope;  // of the focal loss by the cross-entropy; null where focal_gamma is 0
  // Per row, statistics, written by forward if wanted.
  void* entropy;    // read by backward where there is grad_entropy
  int64_t* argmax;  // the first of the greatest, NaN above all; -1 of rows that are not read

  // Backward. The gradient is the sum of
  //   grad_loss[row * grad_loss_stride] * grad_scale * (d row_loss / d logits)
  //   grad_lse[row] * (d lse / d logits)
  //   grad_entropy[row] * (d entropy / d logits)
  const void* grad_loss;  // acc
  int64_t grad_loss_stride;
  double grad_scale = 1;
  const void* grad_lse;
  const void* grad_entropy;
  void* grad_logits;  // may be logits itself
  Layout grad_layout;
};

// Labels t_k on K classes y_k of each row, and none on the others. With q_k = keep * w_k * t_k as
// in xent_math.h, and a the label with the greatest logit,
//
//     sum_k q_k * (lse - z_k) = (sum_k q_k) * (lse - z_a) + sum_k q_k * (z_a - z_k)
//
// So such a row is one with the target a, whose weight is sum_k w_k t_k, and with an extra loss
// that needs no lse. read_labels computes these three numbers of each row; then the kernels for
// class indices run; then write_label_gradients replaces the gradients at the labels, which are the
// only ones that differ. One label needs neither extra_loss nor that last step: its row is one of a
// class index.
struct SparseLabels {
  int64_t n_labels;         // K, from 1 to kMaxLabels; 0: no sparse labels
  const void* classes;      // by classes_layout, whose class stride is that of k
  TargetKind classes_kind;  // int64 or int32
  Layout classes_layout;
  const void* labels;  // acc, by labels_layout; null: selected classes without labels
  Layout labels_layout;
  int64_t ignore_index;  // of labels that do not count

  // Per row, written by read_labels: they belong into Params. target is -1 where a label is out of
  // range; token_weight is written only for selected classes: 0 where none of them counts.
  int32_t* target;
  void* label_weight;
  void* extra_loss;  // null where n_labels is 1
  void* token_weight;
  void* logits;  // acc (n_rows, K): the input logits of the labels, for write_label_gradients

  // Written by write_log_probs: acc, the log-probabilities of the classes; 0 of those that do not
  // count.
  void* log_probs;
  Layout log_probs_layout;
};

constexpr int64_t kMaxLabels = 1024;  // K: the kernels have room for so many

XENT_INLINE bool has_indices(const Params& p) { return p.target_kind != TargetKind::probabilities; }

// True if the labels are spread over all classes, not on a target alone.
XENT_INLINE bool has_spread(const Params& p) { return !has_indices(p) || p.label_smoothing != 0; }

// True if the softmax sees transformed logits.
XENT_INLINE bool has_transform(const Params& p) { return p.softcap != 0 || p.logit_scale != 1; }

// True if statistics are wanted that cost a few instructions per class.
XENT_INLINE bool wants_statistics(const Params& p) {
  return p.entropy != nullptr || p.argmax != nullptr || p.grad_entropy != nullptr;
}

// True if a per-class option is on, which costs some instructions per class. Such calls run the
// slower general kernels, but on CUDA most transforms do not need them: see Shape::is_general.
XENT_INLINE bool is_general(const Params& p) { return has_transform(p) || wants_statistics(p); }

}  // namespace fused_xent
