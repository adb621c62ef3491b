// The rows of a vocabulary that is split over ranks: what the results of their shards add up to,
// for host and device. No torch.
//
// Rank r computes the row's results by its own classes alone: the maximum m_r and log(s_r), so
// lse_r = m_r + log(s_r), the entropy, the argmax, and of the labels q_j on its classes
//
//     part_r = sum_j q_j * (lse_r - z_j),   Q_r = sum_j q_j
//
// With rise_r = lse - lse_r, by which the lse of all classes is above a shard's,
//
//     cross_entropy = sum_r part_r + Q_r * rise_r
//     entropy       = sum_r exp(-rise_r) * (entropy_r + rise_r)
//
// All ranks add in the order of the ranks, so that they get the same bits.
#pragma once

#include "xent_rows.h"

namespace fused_xent {

// "acc" is the accumulation type, as in Params. A value that each rank has sent of row i is at
// [r * rank_stride + i]; a null pointer means that it is not given, or not wanted.
struct Shards {
  DType acc;  // float32 or float64
  int64_t n_rows, n_ranks, rank_stride;
  int64_t rank;  // this process's
  // What the ranks have sent: acc. An empty shard has the maximum -inf and log_sum 0.
  const void *max, *log_sum;
  const void* part;  // without label_mass: -1 where the row's class is on another rank
  const void* label_mass;
  const void* entropy;
  const void* argmax;  // the bits of an int32_t in a float, or of an int64_t in a double
  // The classes [first_class, end_class) of each rank, at [r * rank_stride]. Null: checked already.
  const void *first_class, *end_class;
  int64_t n_classes;
  // Of this process, per row:
  const void* token_weight;  // acc; null: all 1. Rows of weight 0 have the results of unread rows
  const bool* is_bad;        // rows with a class out of range: their loss and gradient are NaN
  double lse_square_scale, focal_gamma;

  // Results per row, acc but for argmax.
  void *row_max, *row_log_sum;  // of all classes
  void* own_mass;               // label_mass of this process
  void* rise;                   // (n_ranks, n_rows)
  void* row_loss;
  void* loss_slope;  // of the focal loss
  void* other_mass;  // token_weight * loss_slope * Q of the other shards
  void *row_lse, *row_entropy;
  int64_t* row_argmax;
};

template <typename Acc>
struct RowShards {
  const Shards& s;
  int64_t row;

  template <typename Value = Acc>
  XENT_INLINE Value at(const void* values, int64_t rank) const {
    return static_cast<const Value*>(values)[rank * s.rank_stride + row];
  }
  XENT_INLINE Acc of_rank(const void* values, int64_t rank) const {
    return static_cast<const Acc*>(values)[rank * s.rank_stride];
  }

  // The first rank with the greatest maximum. Rows with NaN or inf have the log_sum NaN.
  XENT_INLINE int64_t top_rank() const {
    int64_t top = 0;
    for (int64_t r = 1; r < s.n_ranks; ++r) {
      if (at(s.max, r) > at(s.max, top)) top = r;
    }
    return top;
  }

  // True if the ranks have the classes [0, n_classes), in the order of the ranks.
  XENT_INLINE bool has_all_classes() const {
    if (s.first_class == nullptr) return true;
    Acc end = 0;
    bool is_right = true;
    for (int64_t r = 0; r < s.n_ranks; ++r) {
      const Acc first = of_rank(s.first_class, r), next = of_rank(s.end_class, r);
      is_right = is_right && (first == end || first == next);
      end = next > end ? next : end;
    }
    return is_right && end == static_cast<Acc>(s.n_classes);
  }

  // log(s) of all classes. The shard of the maximum adds what its classes have beside the maximum:
  // that may be far below 1.
  XENT_INLINE Acc log_sum(int64_t top) const {
    Acc others = 0;
    for (int64_t r = 0; r < s.n_ranks; ++r) {
      const Acc log_sum = at(s.log_sum, r);
      others += r == top ? std::expm1(log_sum) : std::exp(at(s.max, r) - at(s.max, top) + log_sum);
    }
    return has_all_classes() ? std::log1p(others) : static_cast<Acc>(NAN);
  }

  XENT_INLINE Acc label_mass(int64_t rank) const {
    if (s.label_mass != nullptr) return at(s.label_mass, rank);
    return at(s.part, rank) < 0 ? Acc(0) : Acc(1);
  }

  // The argmax of the rank with the maximum, or of the first one with an infinite or NaN class.
  XENT_INLINE int64_t argmax(int64_t top) const {
    for (int64_t r = s.n_ranks; r-- > 0;) {
      if (at(s.log_sum, r) != at(s.log_sum, r)) top = r;
    }
    return at<std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>>(s.argmax, top);
  }
};

template <typename Acc>
XENT_INLINE void add_up_row(const Shards& s, int64_t row) {
  const auto set = [row](void* values, Acc value) { set_acc(values, row, value); };
  const RowShards<Acc> shards{s, row};
  const int64_t top = shards.top_rank();
  const Acc max = shards.at(s.max, top), log_sum = shards.log_sum(top);
  const Acc weight =
      s.token_weight == nullptr ? Acc(1) : static_cast<const Acc*>(s.token_weight)[row];
  Acc cross_entropy = 0, mass = 0, other_mass = 0, entropy = 0;
  for (int64_t r = 0; r < s.n_ranks; ++r) {
    const Acc rise = (log_sum - shards.at(s.log_sum, r)) - (shards.at(s.max, r) - max);
    if (s.rise != nullptr) static_cast<Acc*>(s.rise)[r * s.n_rows + row] = rise;
    if (s.entropy != nullptr) {
      const Acc share = std::exp(-rise);
      entropy += share == 0 ? Acc(0) : share * (shards.at(s.entropy, r) + rise);
    }
    if (s.part == nullptr) continue;
    const Acc part = shards.at(s.part, r), q = shards.label_mass(r);
    const bool is_elsewhere = s.label_mass == nullptr && q == 0;
    cross_entropy += (is_elsewhere ? Acc(0) : part) + (q == 0 ? Acc(0) : q * rise);
    mass += q;
    if (r == s.rank) set(s.own_mass, q);
    other_mass += r == s.rank ? Acc(0) : q;
  }
  set(s.row_max, max);
  set(s.row_log_sum, log_sum);
  const bool is_unread = weight == 0;
  // Without label_mass, the class of the row is on one rank, if all ranks have the same target.
  const bool is_torn = s.label_mass == nullptr && mass != 1;
  const bool is_bad = is_torn || (s.is_bad != nullptr && s.is_bad[row]);
  if (s.row_loss != nullptr) {
    FocalLoss<Acc> focal{cross_entropy, 1};
    if (s.focal_gamma != 0) {
      focal = focal_loss<ScalarMath<Acc>>(cross_entropy, mass, static_cast<Acc>(s.focal_gamma));
    }
    const Acc lse_square_scale = static_cast<Acc>(s.lse_square_scale);
    const Acc loss = loss_of_row(focal.loss, weight, lse_square_scale, max + log_sum);
    const Acc nan = static_cast<Acc>(NAN), of_others = weight * focal.slope * other_mass;
    set(s.row_loss, is_unread ? Acc(0) : is_bad ? nan : loss);
    set(s.loss_slope, focal.slope);
    set(s.other_mass, is_unread ? Acc(0) : is_bad ? nan : other_mass == 0 ? Acc(0) : of_others);
  }
  set(s.row_lse, is_unread ? Acc(0) : max + log_sum);
  set(s.row_entropy, is_unread ? Acc(0) : entropy);
  if (s.row_argmax != nullptr) s.row_argmax[row] = is_unread ? -1 : shards.argmax(top);
}

}  // namespace fused_xent
