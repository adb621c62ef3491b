// Common code of the CPU and CUDA checks: counters, per-row results, comparisons, labels, options.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <string>

#include "problem.h"
#include "reference.h"
#include "tensors.h"

namespace fused_xent::test {

// ---- counting --------------------------------------------------------------------------------

struct Worst {
  double loss = 0;                      // absolute or relative
  double at_target = 0, elsewhere = 0;  // ulps of the larger term
  double share = 0;                     // of the allowed error
};

inline int64_t n_checks = 0, n_failures = 0;
inline Worst worst[4];  // by DType

inline void fail(const Case& c, const std::string& what) {
  if (++n_failures <= 20) std::printf("FAILED: %s\n  %s\n", c.name().c_str(), what.c_str());
}

inline void check(bool passes, const Case& c, const std::string& what) {
  ++n_checks;
  if (!passes) fail(c, what);
}

// Returns the error; 0 if both are NaN or the same infinity.
inline double check_near(double actual, const Expected& expected, const Case& c, const char* what,
                         int64_t row, int64_t j) {
  ++n_checks;
  const bool finite = std::isfinite(expected.value) && std::isfinite(actual);
  const bool same = actual == expected.value || (std::isnan(actual) && std::isnan(expected.value));
  if (!finite && same) return 0;
  const double error = std::fabs(actual - expected.value);
  if (!(error <= expected.allowed)) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "%s at row %" PRId64 ", class %" PRId64 ": got %.17g, expected %.17g +- %.3g",
                  what, row, j, actual, expected.value, expected.allowed);
    fail(c, text);
    return 0;
  }
  Worst& w = worst[static_cast<int>(c.dtype)];
  w.share = std::max(w.share, error / expected.allowed);
  return error;
}

// ---- results ---------------------------------------------------------------------------------

// Per-row results.
struct Rows {
  Memory loss, max, log_sum, label_mass, loss_slope, entropy, argmax;

  Rows(const Problem& problem, Params& p)
      : loss(problem.new_acc(p.n_rows)),
        max(problem.new_acc(p.n_rows)),
        log_sum(problem.new_acc(p.n_rows)) {
    p.row_loss = loss.data();
    p.row_max = max.data();
    p.log_sum = log_sum.data();
    const auto set = [&](auto*& pointer, Memory& rows, bool is_wanted) {
      if (is_wanted) rows = problem.new_acc(p.n_rows);
      pointer = is_wanted ? rows.data() : nullptr;
    };
    set(p.label_mass, label_mass, !problem.has_indices());
    set(p.loss_slope, loss_slope, p.focal_gamma != 0);
    set(p.entropy, entropy, problem.wants_entropy());
    if (problem.c.options.statistics) argmax = Memory(8 * p.n_rows, 8 * problem.c.misalignment);
    p.argmax = problem.c.options.statistics ? static_cast<int64_t*>(argmax.data()) : nullptr;
  }
  bool operator==(const Rows&) const = default;
  bool guards_are_intact() const {
    for (const Memory* rows :
         {&loss, &max, &log_sum, &label_mass, &loss_slope, &entropy, &argmax}) {
      if (*rows != Memory() && !rows->guards_are_intact()) return false;
    }
    return true;
  }
};

inline void write_to(Params& p, Tensor& grad_logits) {
  p.grad_logits = grad_logits.memory.data();
  p.grad_layout = grad_logits.layout;
}

// After a transformation, rounding may put a logit that is almost the maximum above it.
inline bool is_argmax(const Problem& problem, const Reference& reference, int64_t row, int64_t j) {
  const int64_t best = reference.argmax[row];
  if (j == best || !has_transform(problem.params)) return j == best;
  if (best < 0 || j < 0 || j >= problem.c.vocab_size) return false;
  for (int64_t i = 0; i < j; ++i) {
    if (problem.logits.at(row, i) == problem.logits.at(row, j)) return false;
  }
  return reference.logit(row, j) >= reference.logit(row, best) - reference.lse[row].allowed;
}

inline void check_statistics(const Problem& problem, const Reference& reference, const Rows& rows,
                             int64_t row) {
  const Case& c = problem.c;
  const auto near = [&](const Memory& actual, const std::vector<Expected>& expected,
                        const char* what) {
    check_near(problem.acc_at(actual, row), expected[row], c, what, row, -1);
  };
  if (c.options.focal_gamma != 0) near(rows.loss_slope, reference.loss_slope, "loss_slope");
  if (problem.wants_entropy()) near(rows.entropy, reference.entropy, "entropy");
  if (!c.options.statistics) return;
  const int64_t argmax = static_cast<const int64_t*>(rows.argmax.data())[row];
  check(is_argmax(problem, reference, row, argmax), c,
        "argmax of row " + std::to_string(row) + " is " + std::to_string(argmax) + ", not " +
            std::to_string(reference.argmax[row]));
}

inline void check_rows(const Problem& problem, const Reference& reference, const Rows& rows) {
  const Case& c = problem.c;
  check(rows.guards_are_intact(), c, "wrote beyond per-row results");
  for (int64_t row = 0; row < c.n_rows; ++row) {
    const double loss = problem.acc_at(rows.loss, row);
    const Expected& expected = reference.loss[row];
    const double error = check_near(loss, expected, c, "loss", row, -1) / expected.magnitude;
    check_statistics(problem, reference, rows, row);
    const double lse = problem.acc_at(rows.max, row) + problem.acc_at(rows.log_sum, row);
    check_near(lse, reference.lse[row], c, "row_max + log_sum", row, -1);
    if (problem.is_ignored(row)) continue;
    Worst& w = worst[static_cast<int>(c.dtype)];
    w.loss = std::max(w.loss, error);
  }
}

inline void check_gradient(const Problem& problem, const Reference& reference,
                           const Tensor& gradient, const char* what) {
  const Case& c = problem.c;
  Worst& w = worst[static_cast<int>(c.dtype)];
  check(gradient.gaps_are_intact(), c, std::string(what) + " wrote outside of its elements");
  for (int64_t row = 0; row < c.n_rows; ++row) {
    for (int64_t j = 0; j < c.vocab_size; ++j) {
      const Expected& expected = reference.gradient[row * c.vocab_size + j];
      const double error = check_near(gradient.at(row, j), expected, c, what, row, j);
      double& largest = j == problem.index(row) ? w.at_target : w.elsewhere;
      if (error != 0) largest = std::max(largest, error / ulp(c.dtype, expected.magnitude));
    }
  }
}

// ---- the table -------------------------------------------------------------------------------

inline const DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

inline const Labels kLabels[] = {
    {"int64", TargetKind::int64, false, false, 0, Ignored::none},
    {"weighted int32, some ignored", TargetKind::int32, false, true, 0, Ignored::some},
    {"smoothed uint8, some ignored", TargetKind::uint8, false, false, 0.1, Ignored::some},
    {"weighted smoothed int64", TargetKind::int64, false, true, 0.3, Ignored::none},
    {"int64, others of infinite weight", TargetKind::int64, false, true, 0, Ignored::none, true},
    {"int64, all ignored", TargetKind::int64, false, false, 0, Ignored::all},
    {"probabilities", TargetKind::probabilities, false, false, 0, Ignored::none},
    {"weighted smoothed probabilities", TargetKind::probabilities, false, true, 0.2, Ignored::none},
    {"float32 probabilities", TargetKind::probabilities, true, false, 0, Ignored::none},
    {"weighted smoothed float32 probabilities", TargetKind::probabilities, true, true, 0.2,
     Ignored::none},
};

inline const Labels kSparseLabels[] = {
    {"one sparse label", TargetKind::probabilities, false, false, 0, Ignored::none, false, 1},
    {"three sparse labels", TargetKind::probabilities, false, true, 0, Ignored::none, false, 3},
    {"forty weighted smoothed sparse labels", TargetKind::probabilities, false, true, 0.2,
     Ignored::none, false, 40},
};

// Options beyond torch's: those of the loss, transformations, statistics, and all at once.
inline const CaseOptions kCaseOptions[] = {
    {.name = "token weights and z-loss",
     .token_weight = true,
     .lse_square_scale = 0.01,
     .grad_lse = true},
    {.name = "focal loss", .token_weight = true, .focal_gamma = 2},
    {.name = "softcap", .softcap = 5},
    {.name = "logit_scale", .focal_gamma = 0.5, .logit_scale = 0.75},
    {.name = "negative logit_scale", .logit_scale = -0.75},
    {.name = "statistics", .token_weight = true, .statistics = true, .grad_entropy = true},
    {.name = "all options",
     .token_weight = true,
     .lse_square_scale = 0.1,
     .focal_gamma = 1.5,
     .softcap = 30,
     .logit_scale = 1.25,
     .statistics = true,
     .grad_lse = true,
     .grad_entropy = true},
};

inline void report() {
  std::printf("%" PRId64 " checks, %" PRId64 " failures\n", n_checks, n_failures);
  std::printf("%-10s %18s %28s %28s %18s\n", "worst", "loss (abs or rel)",
              "gradient at target (ulp)", "gradient elsewhere (ulp)", "of allowed error");
  for (const DType dtype : kDTypes) {
    const Worst& w = worst[static_cast<int>(dtype)];
    std::printf("%-10s %18.3g %28.4g %28.4g %17.0f%%\n", name_of(dtype), w.loss, w.at_target,
                w.elsewhere, 100 * w.share);
  }
}

}  // namespace fused_xent::test
