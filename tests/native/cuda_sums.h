// Compares the sums over rows and class weights of csrc/cuda/sums.cu with sums in long double: one
// block and several, every kind of labels, every dtype of the loss.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "../../csrc/cuda/launch.h"
#include "checks.h"

namespace fused_xent::test {

class SumCheck {
 public:
  explicit SumCheck(const Case& c) : c_(c), problem_(c), losses_(problem_.new_acc(c.n_rows)) {
    static_cast<Params&>(a_) = problem_.params;
    a_.row_loss = losses_.data();
    Random random;
    for (int64_t row = 0; row < c.n_rows; ++row) {
      const double loss = problem_.is_ignored(row) ? 0 : random.normal() + 0.1;
      write(problem_.acc, losses_.data(), row, problem_.is_bad(row) ? NAN : loss);
      total_loss_ += problem_.acc_at(losses_, row);
      if (problem_.is_ignored(row) || problem_.is_bad(row)) continue;
      const Real of_class = problem_.has_indices() ? problem_.class_weight(problem_.index(row)) : 1;
      total_weight_ += of_class * problem_.weight_of_row(row);
    }
  }

  void run(DType loss_dtype, bool mean, const double* normalizer) {
    const Real divisor = normalizer == nullptr ? total_weight_ : *normalizer;
    const Real exact = !mean ? total_loss_ : divisor == 0 ? Real(NAN) : total_loss_ / divisor;
    const double loss = static_cast<double>(exact);
    const std::string what = std::string(mean ? "mean" : "sum") +
                             (normalizer == nullptr ? "" : " by a normalizer") + " in " +
                             name_of(loss_dtype);
    for (const bool wants_total : {true, false}) {
      for (const bool wants_loss : {true, false}) {
        if (!wants_total && !wants_loss) continue;
        Memory total(8, 0), value(element_size(loss_dtype), 0),
            workspace(16 * cuda::kMaxSumBlocks, 0);
        const Memory untouched_total = total, untouched_value = value;
        const cuda::Sums sums{wants_total ? static_cast<double*>(total.data()) : nullptr,
                              wants_loss ? value.data() : nullptr, loss_dtype, mean};
        cuda::Arguments a = a_;
        a.total_weight = normalizer;
        // What is not needed must not be read.
        if (normalizer != nullptr || (!mean && !wants_total)) a.target = a.weight = nullptr;
        if (!wants_loss) a.row_loss = nullptr;
        const cudaError_t error =
            cuda::sum_rows(a, sums, static_cast<double*>(workspace.data()), nullptr);
        check(error == cudaSuccess, c_, what + ": " + cudaGetErrorString(error));
        check(
            workspace.guards_are_intact() && total.guards_are_intact() && value.guards_are_intact(),
            c_, what + " wrote beyond its results");
        check(wants_total || total == untouched_total, c_, what + " wrote a total nobody wanted");
        check(wants_loss || value == untouched_value, c_, what + " wrote a loss nobody wanted");
        if (wants_total) near(read(DType::float64, total.data(), 0), divisor, 0, what + ", total");
        if (wants_loss) near(read(loss_dtype, value.data(), 0), exact, ulp(loss_dtype, loss), what);
      }
    }
  }

 private:
  void near(double actual, Real exact, double rounding, const std::string& what) const {
    const double value = static_cast<double>(exact), terms = static_cast<double>(c_.n_rows) * 8;
    check_near(actual, {value, rounding / 2 + 1e-15 * terms + 1e-9 * std::fabs(value), 1}, c_,
               what.c_str(), -1, -1);
  }

  const Case c_;
  const Problem problem_;
  Memory losses_;
  cuda::Arguments a_{};
  Real total_loss_ = 0, total_weight_ = 0;
};

inline void check_class_weights(DType dtype, int64_t vocab_size) {
  Case c{
      dtype, {"weighted indices", TargetKind::int64, false, true, 0, Ignored::none}, 1, vocab_size};
  const Problem problem(c);
  double sum = NAN;
  Memory workspace(16 * cuda::kMaxSumBlocks, 0);
  const cudaError_t error = cuda::sum_class_weights(
      problem.params, &sum, static_cast<double*>(workspace.data()), nullptr);
  check(error == cudaSuccess, c, std::string("sum of class weights: ") + cudaGetErrorString(error));
  const double exact = problem.params.weight_sum;
  check_near(sum, {exact, 1e-12 * exact, 1}, c, "sum of class weights", -1, -1);
}

// A block has 512 threads with 32 rows each; beyond 256 blocks, they have more.
inline void check_sums(const std::vector<Labels>& all_labels, bool bfloat16_only) {
  const double normalizer = -2.5;
  int turn = 0;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    if (bfloat16_only && dtype != DType::bfloat16) continue;
    for (const Labels& labels : all_labels) {
      if (labels.is_float32 && element_size(dtype) != 2) continue;
      for (const int64_t n_rows : {0, 1, 33, 1025, 8193, 16385, 33000}) {
        // ignore_index is 255 for uint8: one of these classes.
        const bool is_byte = labels.kind == TargetKind::uint8 && labels.ignored != Ignored::bad;
        Case c{dtype, labels, n_rows, is_byte ? 300 : 5};
        c.options.token_weight = turn % 2 == 0;
        const DType loss_dtype = kDTypes[turn++ % 4];
        SumCheck sums(c);
        sums.run(loss_dtype, true, nullptr);
        sums.run(loss_dtype, true, &normalizer);
        sums.run(loss_dtype, false, nullptr);
      }
    }
    SumCheck({dtype, all_labels[0], 257 * 16384 + 5, 1}).run(DType::float64, true, nullptr);
    for (const int64_t size : {1, 31, 1024, 8193, 16385}) check_class_weights(dtype, size);
  }
}

}  // namespace fused_xent::test
