// What the kernels must give, by the definitions and in long double, and how near they must come.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "problem.h"
#include "tensors.h"

namespace fused_xent::test {

using Real = long double;

struct Expected {
  double value = 0;
  double allowed = 0;    // the largest error
  double magnitude = 0;  // of the terms that value is the difference of
};

inline double unit_roundoff(DType acc) { return format_of(acc).epsilon / 2; }

// Of a float row the loss is exact to 5e-6, absolutely or relatively.
inline Expected expected_loss(DType acc, Real loss) {
  const double value = static_cast<double>(loss), scale = std::fmax(1, std::fabs(value));
  return {value, scale * (acc == DType::float64 ? 64 * unit_roundoff(acc) : 5e-6), scale};
}

class Reference {
 public:
  std::vector<Expected> loss;  // a row
  std::vector<Real> lse;
  std::vector<Expected> gradient;  // (n_rows, vocab_size)

  explicit Reference(const Problem& problem)
      : loss(problem.c.n_rows),
        lse(problem.c.n_rows),
        gradient(problem.c.n_rows * problem.c.vocab_size),
        problem_(problem) {
    for (int64_t row = 0; row < problem.c.n_rows; ++row) {
      if (!problem.is_ignored(row)) compute(row);
    }
  }

  // q_j of xent_math.h.
  Real label(int64_t row, int64_t j) const {
    const Params& p = problem_.params;
    const Real smoothing = p.label_smoothing, uniform = smoothing / p.vocab_size;
    const Real hard =
        problem_.has_indices() ? j == problem_.index(row) : problem_.target.at(row, j);
    return problem_.has_indices()
               ? (1 - smoothing) * hard * problem_.class_weight(problem_.index(row)) +
                     uniform * problem_.class_weight(j)
               : problem_.class_weight(j) * ((1 - smoothing) * hard + uniform);
  }

 private:
  void compute(int64_t row) {
    const int64_t vocab_size = problem_.c.vocab_size;
    std::vector<Real> q(vocab_size), e(vocab_size), shifted(vocab_size);
    Real max = -INFINITY, sum = 0, mass = 0, row_loss = 0;
    for (int64_t j = 0; j < vocab_size; ++j) {
      max = std::fmax(max, static_cast<Real>(problem_.logits.at(row, j)));
    }
    for (int64_t j = 0; j < vocab_size; ++j) {
      q[j] = label(row, j);
      shifted[j] = problem_.logits.at(row, j) - max;
      e[j] = std::exp(shifted[j]);
      sum += e[j];
      mass += q[j];
    }
    const Real log_sum = std::log(sum);
    lse[row] = max == -INFINITY ? max : max + log_sum;
    row_loss = log_sum - log_sum;  // 0, or not a number
    for (int64_t j = 0; j < vocab_size; ++j) {
      if (q[j] != 0) row_loss += q[j] * (log_sum - shifted[j]);
    }
    loss[row] = expected_loss(problem_.acc, row_loss);
    const Real g = problem_.upstream(row);
    for (int64_t j = 0; j < vocab_size; ++j) {
      const Real softmax = g * mass * (e[j] / sum), label = g * q[j];
      // At an index its probability p comes from p - 1: right beside 1, not beside p.
      const Real beside = j == problem_.index(row) ? g * mass : softmax;
      gradient[row * vocab_size + j] =
          expected_gradient(softmax - label, std::fabs(beside) + std::fabs(label),
                            e[j] == 0 ? 0 : log_sum - 2 * shifted[j]);
    }
  }

  // Rounding x - max, its multiple in exp and log_sum moves a probability by a unit roundoff times
  // each of them, the rest of the arithmetic by a few; then the result is rounded to its own type.
  Expected expected_gradient(Real gradient, Real terms, Real exponents) const {
    const DType dtype = problem_.c.dtype, acc = problem_.acc;
    const double value = static_cast<double>(gradient), magnitude = static_cast<double>(terms);
    const double computing =
        (kRoundings + static_cast<double>(exponents)) * unit_roundoff(acc) * magnitude;
    const double storing = dtype == acc ? 0 : ulp(dtype, value) / 2;
    // A probability below the smallest normal number may be 0.
    const double smallest = 4 * format_of(acc).smallest;
    return {value, computing + storing + smallest, magnitude};
  }

  static constexpr double kRoundings = 24;

  const Problem& problem_;
};

}  // namespace fused_xent::test
