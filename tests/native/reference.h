// The expected results, by the definitions in long double, and the allowed errors.
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
  double magnitude = 0;  // of the terms whose difference is value
};

inline double unit_roundoff(DType acc) { return format_of(acc).epsilon / 2; }

// A float loss has an error of at most 5e-6, absolute or relative to its terms.
inline Expected expected_loss(DType acc, Real loss, Real terms) {
  const double scale = std::fmax(1, static_cast<double>(std::fabs(terms)));
  return {static_cast<double>(loss),
          scale * (acc == DType::float64 ? 64 * unit_roundoff(acc) : 5e-6), scale};
}
inline Expected expected_loss(DType acc, Real loss) { return expected_loss(acc, loss, loss); }

class Reference {
 public:
  std::vector<Expected> loss, lse, entropy, loss_slope;  // per row
  std::vector<int64_t> argmax;
  std::vector<Real> exact_lse, max, log_sum;
  std::vector<Expected> gradient;  // (n_rows, vocab_size)

  explicit Reference(const Problem& problem)
      : loss(problem.c.n_rows),
        lse(problem.c.n_rows),
        entropy(problem.c.n_rows),
        loss_slope(problem.c.n_rows),
        argmax(problem.c.n_rows, -1),
        exact_lse(problem.c.n_rows),
        max(problem.c.n_rows),
        log_sum(problem.c.n_rows),
        gradient(problem.c.n_rows * problem.c.vocab_size),
        problem_(problem) {
    for (int64_t row = 0; row < problem.c.n_rows; ++row) {
      if (problem.is_bad(row)) {
        poison(row);
      } else if (!problem.is_ignored(row)) {
        compute(row);
      }
    }
  }

  // q_j in xent_math.h.
  Real label(int64_t row, int64_t j) const {
    const Params& p = problem_.params;
    const Real smoothing = p.label_smoothing, uniform = smoothing / p.vocab_size;
    if (problem_.has_indices() && smoothing == 0) {
      return j == problem_.index(row) ? problem_.class_weight(j) : 0;
    }
    const Real hard =
        problem_.has_indices() ? j == problem_.index(row) : problem_.target.at(row, j);
    return problem_.has_indices()
               ? (1 - smoothing) * hard * problem_.class_weight(problem_.index(row)) +
                     uniform * problem_.class_weight(j)
               : problem_.class_weight(j) * ((1 - smoothing) * hard + uniform);
  }

  // z in xent_math.h.
  Real logit(int64_t row, int64_t j) const {
    const Params& p = problem_.params;
    const Real x = p.logit_scale * static_cast<Real>(problem_.logits.at(row, j));
    return p.softcap == 0 ? x : p.softcap * std::tanh(x / p.softcap);
  }

 private:
  // Values common to all classes of a row.
  struct Row {
    std::vector<Real> q, e, shifted;
    Real max = -INFINITY, sum = 0, mass = 0, log_sum = 0, cross_entropy = 0, entropy = 0;
    double transform_error = 0;
  };

  // The error of the transformed logits due to rounding.
  double transform_error(Real largest) const {
    const Params& p = problem_.params;
    if (!has_transform(p)) return 0;
    const Real size = p.softcap != 0 ? 3.5L * p.softcap : largest;
    return 2 * unit_roundoff(problem_.acc) * static_cast<double>(size);
  }

  void poison(int64_t row) {
    const Expected nan{NAN, 0, 1};
    loss[row] = lse[row] = entropy[row] = loss_slope[row] = nan;
    for (int64_t j = 0; j < problem_.c.vocab_size; ++j) {
      gradient[row * problem_.c.vocab_size + j] = nan;
    }
  }

  Row sweep(int64_t row) {
    const int64_t vocab_size = problem_.c.vocab_size;
    Row r{std::vector<Real>(vocab_size), std::vector<Real>(vocab_size),
          std::vector<Real>(vocab_size)};
    for (int64_t j = 0; j < vocab_size; ++j) {
      const Real z = logit(row, j), top = argmax[row] < 0 ? z : logit(row, argmax[row]);
      if (argmax[row] < 0 || z > top || (std::isnan(z) && !std::isnan(top))) argmax[row] = j;
      r.max = std::fmax(r.max, z);
    }
    Real moment = 0, largest = 0;
    for (int64_t j = 0; j < vocab_size; ++j) {
      const Real z = logit(row, j);
      if (std::isfinite(z)) largest = std::fmax(largest, std::fabs(z));
      r.q[j] = label(row, j);
      r.shifted[j] = z - r.max;
      r.e[j] = std::exp(r.shifted[j]);
      r.sum += r.e[j];
      r.mass += r.q[j];
      if (r.e[j] != 0) moment += r.e[j] * r.shifted[j];
    }
    r.log_sum = std::log(r.sum);
    r.entropy = r.log_sum - moment / r.sum;
    r.cross_entropy = r.log_sum - r.log_sum;  // 0, or NaN
    for (int64_t j = 0; j < vocab_size; ++j) {
      if (r.q[j] != 0) r.cross_entropy += r.q[j] * (r.log_sum - r.shifted[j]);
    }
    r.transform_error = transform_error(largest);
    return r;
  }

  // The focal loss and its slope by the definition, with P the probability of the label.
  Real focal_loss(Real cross_entropy, Real mass) const {
    const Real gamma = problem_.params.focal_gamma;
    if (gamma == 0 || cross_entropy == 0) return cross_entropy;
    return std::pow(-std::expm1(-cross_entropy / mass), gamma) * cross_entropy;
  }
  Real focal_slope(Real cross_entropy, Real mass) const {
    const Real gamma = problem_.params.focal_gamma;
    if (gamma == 0) return 1;
    if (cross_entropy == 0) return 0;
    const Real p = std::exp(-cross_entropy / mass);
    const Real other = -std::expm1(-cross_entropy / mass);
    const Real rise = p == 0 ? 0 : gamma * std::pow(other, gamma - 1) * p / mass * cross_entropy;
    return std::pow(other, gamma) + rise;
  }

  void compute(int64_t row) {
    const Params& p = problem_.params;
    const Row r = sweep(row);
    max[row] = r.max;
    log_sum[row] = r.log_sum;
    exact_lse[row] = r.max == -INFINITY ? r.max : r.max + r.log_sum;
    const Real square =
        p.lse_square_scale == 0 ? 0 : p.lse_square_scale * exact_lse[row] * exact_lse[row];
    const Real focal = focal_loss(r.cross_entropy, r.mass);
    const Real weight = problem_.weight_of_row(row);
    const Real largest =
        p.focal_gamma == 0 ? focal : (1 + p.focal_gamma) * std::fmax(1, r.cross_entropy);
    loss[row] = expected_loss(problem_.acc, weight * (focal + square),
                              std::fabs(weight) * (std::fabs(largest) + std::fabs(square)));
    loss[row].allowed += (1 + p.focal_gamma) * r.transform_error *
                         static_cast<double>(std::fabs(weight) * std::fmax(1, r.mass));
    lse[row] = expected_loss(problem_.acc, exact_lse[row]);
    lse[row].allowed += r.transform_error;
    entropy[row] = expected_loss(problem_.acc, r.entropy, 1 + r.log_sum);
    entropy[row].allowed += 4 * r.transform_error * static_cast<double>(1 + r.entropy);
    compute_gradient(row, r, weight);
  }

  void compute_gradient(int64_t row, const Row& r, Real weight) {
    const Params& p = problem_.params;
    const auto upstream_of = [&](const void* rows) {
      return rows == nullptr ? Real(0) : read(problem_.acc, rows, row);
    };
    const Real slope = focal_slope(r.cross_entropy, r.mass), slope_error = error_of_slope(r);
    loss_slope[row] = {static_cast<double>(slope), static_cast<double>(slope_error), 1};
    const Real upstream = problem_.upstream(row) * weight, g = upstream * slope;
    const Real of_entropy = upstream_of(p.grad_entropy), of_lse = upstream_of(p.grad_lse);
    const Real of_square =
        p.lse_square_scale == 0 ? 0 : 2 * upstream * p.lse_square_scale * exact_lse[row];
    for (int64_t j = 0; j < problem_.c.vocab_size; ++j) {
      const Real probability = r.e[j] / r.sum, softmax = g * r.mass * probability;
      const Real label = g * r.q[j], shifted = r.e[j] == 0 ? 0 : r.shifted[j];
      // At the target, p is part of p - 1, so its error is relative to 1, not to p.
      const Real beside = j == problem_.index(row) ? g * r.mass : softmax;
      Real more = of_square + of_lse, terms = std::fabs(of_square) + std::fabs(of_lse);
      if (of_entropy != 0) {
        more -= of_entropy * (r.entropy - r.log_sum + shifted);
        terms += std::fabs(of_entropy) * (1 + r.entropy + r.log_sum - shifted);
      }
      const Real y = p.softcap == 0 ? 0 : p.logit_scale * problem_.logits.at(row, j) / p.softcap;
      const Real e = std::exp(-2 * std::fabs(y));
      const Real derivative = p.logit_scale * 4 * e / ((1 + e) * (1 + e));
      const Real exponents = (r.e[j] == 0 ? 0 : r.log_sum - 2 * r.shifted[j]) +
                             2 * r.transform_error / unit_roundoff(problem_.acc) +
                             (e == 0 ? 0 : 4 * std::fabs(y));
      Expected& expected = gradient[row * problem_.c.vocab_size + j];
      expected = expected_gradient(
          (softmax - label + probability * more) * derivative,
          (std::fabs(beside) + std::fabs(label) + probability * terms) * std::fabs(derivative),
          exponents);
      if (p.focal_gamma == 0) continue;
      const Real part = upstream * (r.mass * probability - r.q[j]) * derivative;
      expected.allowed += static_cast<double>(std::fabs(part) * slope_error);
    }
  }

  // The error of the slope due to the rounding of the cross-entropy.
  Real error_of_slope(const Row& r) const {
    if (problem_.params.focal_gamma == 0) return 0;
    Real terms = r.mass * (1 + r.log_sum);
    for (size_t j = 0; j < r.q.size(); ++j) {
      if (r.q[j] != 0) terms -= r.q[j] * r.shifted[j];
    }
    const Real u = unit_roundoff(problem_.acc), c = r.cross_entropy;
    const Real step = 16 * u * terms + r.mass * r.transform_error;
    const Real slope = focal_slope(c, r.mass);
    return std::fmax(std::fabs(focal_slope(c + step, r.mass) - slope),
                     std::fabs(focal_slope(std::fmax(0, c - step), r.mass) - slope)) +
           kRoundings * u * (1 + problem_.params.focal_gamma) * std::fabs(slope);
  }

  // Rounding x - max, its multiple in exp, and log_sum changes a probability by each of them times
  // the unit roundoff; other arithmetic by a few roundoffs. Then the result is rounded to its type.
  Expected expected_gradient(Real gradient, Real terms, Real exponents) const {
    const DType dtype = problem_.c.dtype, acc = problem_.acc;
    const double value = static_cast<double>(gradient), magnitude = static_cast<double>(terms);
    const double computing =
        (kRoundings + static_cast<double>(exponents)) * unit_roundoff(acc) * magnitude;
    const double storing = dtype == acc ? 0 : ulp(dtype, value) / 2;
    // A probability below the smallest normal number may be flushed to 0.
    const double smallest = 4 * format_of(acc).smallest;
    return {value, computing + storing + smallest, magnitude};
  }

  static constexpr double kRoundings = 24;

  const Problem& problem_;
};

}  // namespace fused_xent::test
