// Runs the launchers of the CUDA kernels on a table of cases, in the emulator, and compares with
// the definitions in long double. A program without torch, so that sanitizers can be used.
//
//   cuda_check [--small] [--bfloat16]
//   [forward|backward|forward_backward|columns|per_class_options|sums|sparse_labels]
//
// --small: blocks of 64 threads and few cases, for race checks. --bfloat16: bfloat16 logits only.
// forward ...: only the kernels of that file in csrc/cuda; the others need not be linked.
#include <set>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../../csrc/cuda/launch.h"
#include "checks.h"
#include "cuda_labels.h"
#include "cuda_plans.h"
#include "cuda_sums.h"

namespace fused_xent::test {
namespace {

void require(cudaError_t error, const Case& c, const char* what) {
  check(error == cudaSuccess, c, std::string(what) + ": " + cudaGetErrorString(error));
}

// Poisons ignored rows with class stride 1, which no kernel may read, unless they are so short that
// blocks copy them. Only AddressSanitizer sees it; the first and last 8 bytes are left out, since
// ASan's granules of 8 bytes may span two rows.
class Forbidden {
 public:
  Forbidden(const Problem& problem, const Tensor& logits) : problem_(problem), logits_(logits) {
    mark(true);
  }
  ~Forbidden() { mark(false); }

 private:
  void mark([[maybe_unused]] bool forbidden) const {
#if defined(__SANITIZE_ADDRESS__)
    if (logits_.layout.class_stride != 1) return;
    const int64_t size = element_size(logits_.dtype), n_bytes = logits_.vocab_size * size;
    for (int64_t row = 0; row < logits_.n_rows; ++row) {
      if (!problem_.is_ignored(row)) continue;
      const char* data = static_cast<const char*>(logits_.memory.data());
      const char* bytes = data + logits_.index(row, 0) * size;
      if (forbidden && n_bytes > cuda::kMostStagedBytes)
        ASAN_POISON_MEMORY_REGION(bytes + 8, n_bytes - 16);
      if (!forbidden) ASAN_UNPOISON_MEMORY_REGION(bytes, n_bytes);
    }
#endif
  }

  const Problem& problem_;
  const Tensor& logits_;
};

// Runs the kernels on a problem with one choice of plans, in fresh memory, and checks the results.
class Run {
 public:
  Run(const Problem& problem, const Reference& reference, const Plans& plans,
      const std::string& only)
      : problem_(problem), reference_(reference) {
    static_cast<Params&>(a_) = problem.params;
    if (problem.c.labels.has_weight) a_.weight_sum_on_device = &problem.params.weight_sum;
    if (problem.c.n_rows % 2 == 1) {  // the same scale, partly as total_weight
      a_.total_weight = &kTotalWeight;
      a_.grad_scale *= kTotalWeight;
    }
    if (only != "forward_backward") forward_and_backward(plans, only);
    if (only != "forward" && only != "backward") {
      both_at_once(plans.forward_backward);
      if (only.empty()) scale(plans.forward_backward);
    }
  }

 private:
  void forward_and_backward(const Plans& plans, const std::string& only) {
    const Case& c = problem_.c;
    Tensor logits = problem_.logits, in_place = problem_.logits;
    Tensor grad_logits(c.dtype, c.gradient, c.n_rows, c.vocab_size, c.misalignment);
    Rows rows(problem_, a_);
    a_.logits = logits.memory.data();
    {
      const Forbidden forbidden(problem_, logits);
      Memory workspace(cuda::workspace_bytes(a_, plans.forward), 0);
      // Fill with numbers: NaN in unwritten parts could pass for the NaN of a target out of range.
      std::memset(workspace.data(), 0x3f, cuda::workspace_bytes(a_, plans.forward));
      if (only != "backward") {
        require(cuda::forward(a_, plans.forward, workspace.data(), nullptr), c, "forward");
        check(workspace.guards_are_intact(), c, "forward wrote beyond its workspace");
        check_rows(problem_, reference_, rows);
      } else {
        fill_rows();
      }
      if (only == "forward") return;
      write_to(a_, grad_logits);
      require(cuda::backward(a_, plans.backward, nullptr), c, "backward");
    }
    check_gradient(problem_, reference_, grad_logits, "backward");
    check(logits.memory == problem_.logits.memory, c, "logits have changed");
    if (c.gradient == c.logits) {
      a_.logits = in_place.memory.data();
      write_to(a_, in_place);
      require(cuda::backward(a_, plans.backward, nullptr), c, "backward in place");
      check_gradient(problem_, reference_, in_place, "backward in place");
    }
  }

  void both_at_once(const Plan& plan) {
    const Case& c = problem_.c;
    Tensor logits = problem_.logits;
    Tensor grad_logits(c.dtype, c.gradient, c.n_rows, c.vocab_size, c.misalignment);
    Rows rows(problem_, a_);
    a_.logits = logits.memory.data();
    for (Tensor* to : {&grad_logits, &logits}) {
      write_to(a_, *to);
      const cuda::Shape shape = cuda::shape_of(a_);
      if (plan.row_vector > 1 && !shape.adjacent_rows) continue;
      if (plan.regime != Regime::columns && !shape.adjacent_classes) continue;
      {
        const Forbidden forbidden(problem_, to == &logits ? grad_logits : logits);
        require(cuda::forward_backward(a_, plan, nullptr), c, "forward_backward");
      }
      check_rows(problem_, reference_, rows);
      check_gradient(problem_, reference_, *to, "forward_backward");
    }
  }

  // Fills in the state from the reference, for a backward without a forward.
  void fill_rows() {
    for (int64_t row = 0; row < problem_.c.n_rows; ++row) {
      if (problem_.is_ignored(row)) continue;
      double mass = 0;
      for (int64_t j = 0; j < problem_.c.vocab_size; ++j) {
        mass += static_cast<double>(reference_.label(row, j));
      }
      write(problem_.acc, a_.row_max, row, static_cast<double>(reference_.max[row]));
      write(problem_.acc, a_.log_sum, row, static_cast<double>(reference_.log_sum[row]));
      if (a_.label_mass != nullptr) write(problem_.acc, a_.label_mass, row, mass);
      if (a_.loss_slope != nullptr)
        write(problem_.acc, a_.loss_slope, row, reference_.loss_slope[row].value);
    }
  }

  // Scales a gradient of random numbers. Ignored rows are 0, and must stay 0 for any factor.
  void scale(Plan plan) {
    const Case& c = problem_.c;
    Tensor before = problem_.logits;
    Random random;
    for (int64_t row = 0; row < c.n_rows; ++row) {
      for (int64_t j = 0; j < c.vocab_size; ++j) {
        before.set(row, j, problem_.is_ignored(row) ? 0 : random.normal());
      }
    }
    Tensor gradient = before;
    write_to(a_, gradient);
    plan.held = 0;
    if (plan.regime == Regime::split) plan.regime = Regime::block;
    if (plan.threads > 256) plan.threads = plan.team = 256;
    require(cuda::scale_gradient(a_, plan, nullptr), c, "scale_gradient");
    check(gradient.gaps_are_intact(), c, "scale_gradient wrote outside of its elements");
    for (int64_t row = 0; row < c.n_rows; ++row) {
      for (int64_t j = 0; j < c.vocab_size; ++j) {
        const double value =
            problem_.is_ignored(row) ? 0 : before.at(row, j) * problem_.upstream(row);
        const double allowed =
            ulp(c.dtype, value) / 2 + 4 * unit_roundoff(problem_.acc) * std::fabs(value);
        check_near(gradient.at(row, j), {value, allowed, 0}, c, "scale_gradient", row, j);
      }
    }
  }

  static constexpr double kTotalWeight = -2.5;

  const Problem& problem_;
  const Reference& reference_;
  cuda::Arguments a_{};
};

// ---- the table -------------------------------------------------------------------------------

// Targets out of range reach the CUDA kernels; on the CPU a check refuses them first.
const Labels kNoClassLabels[] = {
    {"int64, some no class", TargetKind::int64, false, false, 0, Ignored::bad},
    {"weighted smoothed int32, some no class", TargetKind::int32, false, true, 0.1, Ignored::bad},
    {"uint8, some no class", TargetKind::uint8, false, false, 0, Ignored::bad},
};

class Table {
 public:
  Table(bool small, bool bfloat16_only, const std::string& only)
      : small_(small), bfloat16_only_(bfloat16_only), only_(only) {
    if (cuda::describe_device(&device_) != cudaSuccess) std::exit(2);
  }

  // Every launch shape of every kernel, with all vocabulary sizes that are boundaries for some.
  void vocabularies() {
    // 520: 65 vectors of bfloat16, one more than two warps have.
    std::vector<int64_t> sizes{1, 2, 7, 8, 9, 15, 17, 31, 33, 64, 100, 129, 257, 520, 600};
    if (small_) sizes = {7, 33, 257};
    each_labels([&](DType dtype, const Labels& labels) {
      const auto plans = all_plans(small_, device_, static_cast<int>(16 / element_size(dtype)));
      for (const Plans& plan : plans) {
        for (const int64_t size : {sizes[next(sizes.size())], sizes[next(sizes.size())]}) {
          Case c{dtype, labels, small_ ? 4 : 1 + next(9), size};
          c.misalignment = next(4);
          c.scalar_upstream = next(3) == 0;
          run(c, {plan});
        }
      }
    });
  }

  // Every layout, with vectors of rows where possible.
  void layouts() {
    each_labels([&](DType dtype, const Labels& labels) {
      for (int i = 0; i < kShapes; ++i) {
        const Shape shape = static_cast<Shape>(i);
        if (small_ && shape != Shape::column && shape != Shape::odd_image) continue;
        const bool is_adjacent = has_adjacent_rows(shape);
        // 32: rows form whole vectors of any type, even in two batches; 36: not in two batches.
        // 24 = 2 x 2 x 2 x 3, for rows of several dimensions.
        const int64_t n_rows = shape == Shape::padded_image ? 36 : is_adjacent ? 32 : 24;
        Case c{dtype, labels, n_rows, shape == Shape::image ? 21 : 1 + next(70)};
        c.logits = shape;
        c.gradient = next(3) > 0 ? c.logits : static_cast<Shape>(next(kShapes));
        c.target = next(3) > 0 ? c.logits : static_cast<Shape>(next(kShapes));
        c.misalignment = is_adjacent && next(4) > 0 ? 0 : next(4);
        const auto plans = all_plans(small_, device_, static_cast<int>(16 / element_size(dtype)));
        run(c, {plans[3], default_plans(c), plans.back()});
      }
    });
  }

  void values() {
    each_labels([&](DType dtype, const Labels& labels) {
      for (int values = 1; values < kValues; ++values) {
        Case c{dtype, labels, 7, 150};
        c.values = static_cast<Values>(values);
        const auto plans = all_plans(small_, device_, 1);
        run(c, {plans[next(plans.size())], default_plans(c)});
      }
    });
  }

  // Every option beyond torch's, with every kind of labels, in every regime; kinds of values take
  // turns.
  void options() {
    const int64_t shapes[][2] = {{7, 150}, {40, 7}, {3, 600}, {2, 3000}};
    const auto plans = all_plans(small_, device_, 1);
    int turn = 0;
    each_labels([&](DType dtype, const Labels& labels) {
      for (const CaseOptions& options : kCaseOptions) {
        for (const bool is_normal : {true, false, false, false}) {
          Case c{dtype, labels, 0, 0};
          if (!is_normal) c.values = static_cast<Values>(1 + turn++ % (kValues - 1));
          if (c.values == Values::large) continue;  // lse^2 is beyond float
          const bool needs_rows = small_ || c.values == Values::special;
          const auto [n_rows, vocab_size] = shapes[next(needs_rows ? 2 : 4)];
          c.n_rows = n_rows;
          c.vocab_size = vocab_size;
          c.options = options;
          c.logits = next(2) == 0 ? Shape::contiguous : static_cast<Shape>(next(kShapes));
          for (Shape* shape : {&c.gradient, &c.target}) {
            const Shape shapes[] = {c.logits, Shape::contiguous, static_cast<Shape>(next(kShapes))};
            *shape = shapes[next(3)];
          }
          c.misalignment = next(4);
          run(c, {plans[next(plans.size())], default_plans(c)});
        }
      }
      ++turn;  // otherwise each option would have one kind of values for all labels
    });
  }

  // More split rows than one block merges, and staged rows that fill whole blocks.
  void many_rows() {
    const Plan split = by_rows(64, 64, 2), columns = by_columns(64, 1, 1);
    run({DType::bfloat16, kLabels[0], 300, 600}, {{split, split, by_rows(64, 64)}});
    run({DType::bfloat16, kLabels[0], 130, 64}, {{columns, columns, columns}});
  }

  void sums() {
    if (small_) return;  // its blocks are of 512 threads
    std::vector<Labels> labels(std::begin(kLabels), std::end(kLabels));
    labels.insert(labels.end(), std::begin(kNoClassLabels), std::end(kNoClassLabels));
    check_sums(labels, bfloat16_only_);
  }

  void labels() const { check_labels(small_, bfloat16_only_); }

  // The plans chosen for users, at row lengths around which they change.
  void chosen() {
    for (const int64_t bytes : {96, 128, 512, 4096, 5000, 32768, 40000, 66000, 140000}) {
      for (const DType dtype : kDTypes) {
        if (bfloat16_only_ && dtype != DType::bfloat16) continue;
        for (const int labels : {0, 1, 3, 7}) {
          if (bytes > 40000 && labels != 0 && dtype != DType::bfloat16) continue;
          Case c{dtype, kLabels[labels], 1 + next(3), bytes / element_size(dtype) + next(3)};
          c.misalignment = next(3);
          run(c, {default_plans(c)});
          if (labels != 0 || bytes > 40000) continue;
          c.values = Values::peaked;  // with many classes, other targets have almost no probability
          c.n_rows = 4;
          run(c, {default_plans(c)});
        }
      }
    }
  }

 private:
  template <typename Body>
  void each_labels(const Body& body) {
    for (const DType dtype : kDTypes) {
      if (bfloat16_only_ && dtype != DType::bfloat16) continue;
      for (const Labels& labels : kLabels) {
        if (!labels.is_float32 || element_size(dtype) == 2) body(dtype, labels);
      }
      for (const Labels& labels : kNoClassLabels) body(dtype, labels);
    }
  }

  int64_t next(int64_t n) { return random_.below(n); }

  static cuda::Shape shape_of(const Problem& problem) {
    Params p = problem.params;
    p.grad_logits = const_cast<void*>(p.logits);
    if (problem.wants_entropy())
      p.entropy = p.grad_logits;  // any memory: this only selects the general kernels
    p.grad_layout = layout_of(problem.c.gradient, p.n_rows, p.vocab_size);
    return cuda::shape_of(p);
  }

  Plans default_plans(const Case& c) {
    const Problem problem(c);
    const cuda::Shape shape = shape_of(problem);
    return {cuda::plan_forward(shape, device_), cuda::plan_backward(shape, device_),
            cuda::plan_forward_backward(shape, device_)};
  }

  void run(const Case& c, const std::vector<Plans>& all) {
    const Problem problem(c);
    const Reference reference(problem);
    const cuda::Shape shape = shape_of(problem);
    for (Plans plans : all) {
      const Plans chosen = default_plans(c);
      bool skip = false;
      for (const auto& [plan, otherwise] : {std::pair{&plans.forward, &chosen.forward},
                                            {&plans.backward, &chosen.backward},
                                            {&plans.forward_backward, &chosen.forward_backward}}) {
        if (plan->regime == Regime::columns && plan->row_vector > 1 && !shape.adjacent_rows) {
          plan->row_vector = 1;
        }
        const char* why = cuda::why_not(*plan, shape, device_);
        if (why != nullptr) *plan = *otherwise;
        if (only_.empty()) continue;
        skip |= shape.is_general(plan->regime) != (only_ == "per_class_options");
        if (only_ != "per_class_options")
          skip |= (plan->regime == Regime::columns) != (only_ == "columns");
      }
      if (skip) continue;
      if (n_failures > 20) return;  // enough output
      const int64_t failures = n_failures;
      Run(problem, reference, plans, only_);
      if (n_failures > failures) {
        std::printf("  by %s; %s; %s\n", name_of_plan(plans.forward).c_str(),
                    name_of_plan(plans.backward).c_str(),
                    name_of_plan(plans.forward_backward).c_str());
      }
    }
  }

  bool small_, bfloat16_only_;
  std::string only_;
  cuda::Device device_{};
  Random random_;
};

int finish() {
  report();
  return n_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fused_xent::test

int main(int argc, char** argv) {
  using namespace fused_xent::test;
  std::set<std::string> arguments(argv + 1, argv + argc);
  std::string only;
  for (const char* name : {"forward", "backward", "forward_backward", "columns",
                           "per_class_options", "sums", "sparse_labels"}) {
    if (arguments.count(name) > 0) only = name;
  }
  Table table(arguments.count("--small") > 0, arguments.count("--bfloat16") > 0, only);
  if (only.empty() || only == "sums") table.sums();
  if (only.empty() || only == "sparse_labels") table.labels();
  if (only == "sums" || only == "sparse_labels") return finish();
  table.options();
  if (only == "per_class_options") return finish();
  table.vocabularies();
  table.layouts();
  if (arguments.count("--small") == 0) {
    table.values();
    table.chosen();
    table.many_rows();
  }
  return finish();
}
