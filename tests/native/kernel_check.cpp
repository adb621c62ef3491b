// Runs every CPU kernel of the instruction set in use on a table of cases, and compares with the
// definitions in long double. Without torch, so sanitizers and emulated processors can be used.
//
//   g++ -O2 -std=c++20 -Wno-psabi csrc/cpu/*.cpp tests/native/kernel_check.cpp -o kernel_check
//   FUSED_XENT_CPU_CAPABILITY=avx2 ./kernel_check [--small] [--threads N] [--capability]
//
// --small: fewer and smaller cases, half a billion instructions in total.
// --threads: default 3, or 1 with --small. Above 1, results must equal those of one thread.
// --capability: print the instruction set in use, and exit.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/launch.h"
#include "checks.h"
#include "sparse.h"

namespace fused_xent::test {
namespace {

// ---- one case --------------------------------------------------------------------------------

cpu::Threads threads_of(int64_t count) {
  return {count, [](int64_t n, const std::function<void(int64_t)>& body) {
            std::vector<std::thread> threads;
            for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, i);
            for (std::thread& thread : threads) thread.join();
          }};
}

// All results of the kernels for a problem, in fresh memory.
struct Results {
  Params p;
  Tensor logits, grad_logits, in_place, fused;
  Rows rows, fused_rows;

  Results(const Problem& problem, const cpu::Threads& threads)
      : p(problem.params),
        logits(problem.logits),
        grad_logits(p.dtype, problem.c.gradient, p.n_rows, p.vocab_size, problem.c.misalignment),
        in_place(problem.logits),
        fused(problem.logits),
        rows(problem, p),
        fused_rows(rows) {
    const Sparse sparse(problem, p);
    if (problem.sparse.n_labels > 0) p.label_mass = nullptr;
    p.logits = logits.memory.data();
    sparse.read(p, threads);
    cpu::forward(p, threads);
    write_to(p, grad_logits);
    sparse.read(p, threads);
    cpu::backward(p, threads);
    sparse.write_gradients(p, threads);

    p.logits = in_place.memory.data();
    write_to(p, in_place);
    sparse.read(p, threads);
    cpu::backward(p, threads);
    sparse.write_gradients(p, threads);

    p.logits = fused.memory.data();
    write_to(p, fused);
    fused_rows = Rows(problem, p);
    if (problem.sparse.n_labels > 0) p.label_mass = nullptr;
    sparse.read(p, threads);
    cpu::forward_backward(p, threads);
    sparse.write_gradients(p, threads);
    check(sparse.guards_are_intact(), problem.c, "wrote beyond the labels' memory");
  }
};

// Multiplies a gradient in place by new factors.
void check_scale_gradient(const Problem& problem, const Tensor& gradient,
                          const cpu::Threads& threads) {
  const Case& c = problem.c;
  Params p = problem.params;
  Tensor scaled = gradient;
  write_to(p, scaled);
  cpu::scale_gradient(p, threads);
  check(scaled.gaps_are_intact(), c, "scale_gradient wrote outside of its elements");
  for (int64_t row = 0; row < c.n_rows; ++row) {
    for (int64_t j = 0; j < c.vocab_size; ++j) {
      const double value =
          problem.is_ignored(row) ? 0 : gradient.at(row, j) * problem.upstream(row);
      const double allowed =
          ulp(c.dtype, value) / 2 + 4 * unit_roundoff(problem.acc) * std::fabs(value);
      check_near(scaled.at(row, j), {value, allowed, 0}, c, "scale_gradient", row, j);
    }
  }
}

void check_same(const Case& c, const Results& one_thread, const Results& several) {
  const auto same = [&](const Memory& one, const Memory& other, const char* what) {
    check(one == other, c, std::string(what) + " depends on the number of threads");
  };
  check(one_thread.rows == several.rows, c, "forward depends on the number of threads");
  same(one_thread.grad_logits.memory, several.grad_logits.memory, "backward");
  same(one_thread.in_place.memory, several.in_place.memory, "backward in place");
  check(one_thread.fused_rows == several.fused_rows, c,
        "the loss of forward_backward depends on the number of threads");
  same(one_thread.fused.memory, several.fused.memory, "the gradient of forward_backward");
}

void run(const Case& c, int64_t n_threads) {
  Problem problem(c);
  const Reference reference(problem);
  const Results results(problem, threads_of(1));
  check(results.logits.memory == problem.logits.memory, c, "logits have changed");
  check_rows(problem, reference, results.rows);
  check_rows(problem, reference, results.fused_rows);
  check_gradient(problem, reference, results.grad_logits, "backward");
  check_gradient(problem, reference, results.in_place, "backward in place");
  check_gradient(problem, reference, results.fused, "forward_backward");
  if (problem.sparse.n_labels > 0 && !c.options.token_weight) {
    check_log_probs(problem, reference, threads_of(n_threads));
  }
  if (n_threads > 1) {
    check_same(c, results, Results(problem, threads_of(n_threads)));
  }
  problem.fill_grad_loss();
  check_scale_gradient(problem, results.fused, threads_of(n_threads));
  // A kernel may skip the work if a single factor is 1, but not if only the first of several is.
  problem.params.grad_scale = 1;
  write(problem.acc, problem.grad_loss.data(), 0, 1);
  check_scale_gradient(problem, results.fused, threads_of(n_threads));
}

// ---- scans and sums --------------------------------------------------------------------------

// scan_rows and sum_rows, which work by blocks of rows.
void run_scan(const CaseOptions& options, int64_t n_threads) {
  const Labels labels{"weighted indices", TargetKind::int32, false, true, 0, Ignored::some};
  Case c{DType::float32, labels, 70003, 1};
  c.options = options;
  Problem problem(c);
  Params& p = problem.params;
  p.vocab_size = 1;
  Memory losses = problem.new_acc(p.n_rows);
  p.row_loss = losses.data();
  double total_weight = 0, sum = 0;
  for (int64_t row = 0; row < p.n_rows; ++row) {
    write(problem.acc, losses.data(), row, static_cast<double>(row % 17));
    sum += static_cast<double>(row % 17);
    if (problem.is_ignored(row)) continue;
    total_weight += problem.class_weight(0) * problem.weight_of_row(row);
  }
  const cpu::Threads threads = threads_of(n_threads);
  check(cpu::sum_rows(p, threads) == sum, c, "sum_rows");
  const cpu::RowScan good = cpu::scan_rows(p, threads);
  check(good.bad_row == -1, c, "scan_rows sees a bad row");
  check_near(good.total_weight, {total_weight, 1e-9 * total_weight, 1}, c, "total_weight", -1, -1);
  int32_t* indices = static_cast<int32_t*>(problem.indices.data());
  for (const int64_t row : {69999, 65536, 65535, 8192, 3}) {
    if (problem.weight_of_row(row) == 0) continue;
    indices[row] = row % 2 == 0 ? -1 : 1;
    check(cpu::scan_rows(p, threads).bad_row == row, c, "scan_rows misses the first bad row");
  }
}

void run_scans(int64_t n_threads) {
  run_scan(CaseOptions{}, n_threads);
  run_scan(CaseOptions{.name = "token weights", .token_weight = true}, n_threads);
}

// ---- the table -------------------------------------------------------------------------------

class Table {
 public:
  Table(bool small, int64_t n_threads) : small_(small), n_threads_(n_threads) {}

  // Vocabulary sizes around the widths of vectors, pairs, blocks and segments.
  void vocabularies() {
    std::vector<int64_t> sizes{63,   64,   65,   127,  128,  129,   130,   160,   257,
                               1000, 2047, 2048, 2049, 4097, 16383, 16384, 16385, 33000};
    for (int64_t size = 1; size <= 40; ++size) sizes.push_back(size);
    if (small_) sizes = {1, 2, 3, 7, 8, 31, 128, 129, 159, 257, 2049};
    each_labels([&](DType dtype, const Labels& labels) {
      for (const int64_t size : sizes) {
        Case c{dtype, labels, rows_for(size), size};
        c.misalignment = next(4);
        c.scalar_upstream = next(3) == 0;
        run(c, n_threads_);
      }
    });
  }

  // Every layout, for logits, gradient and target each.
  void layouts() {
    std::vector<int64_t> sizes{1, 2, 3, 13, 40, 129, 300};
    if (small_) sizes = {1, 13, 129};
    each_labels([&](DType dtype, const Labels& labels) {
      for (int shape = 0; shape < kShapes; ++shape) {
        for (const int64_t size : sizes) {
          Case c{dtype, labels, rows_for(size), size};
          c.logits = static_cast<Shape>(shape);
          c.gradient = next(2) == 0 ? c.logits : static_cast<Shape>(next(kShapes));
          c.target = next(2) == 0 ? c.logits : static_cast<Shape>(next(kShapes));
          c.misalignment = next(4);
          run(c, n_threads_);
        }
      }
    });
  }

  void values() {
    std::vector<Case> shapes{
        {{}, {}, 300, 7}, {{}, {}, 64, 300}, {{}, {}, 1, 4500}, {{}, {}, 2, 16500}};
    if (small_) shapes = {{{}, {}, 33, 7}, {{}, {}, 7, 150}};
    each_labels([&](DType dtype, const Labels& labels) {
      for (int values = 1; values < kValues; ++values) {
        for (Case c : shapes) {
          if (small_ && next(3) != 0) continue;
          if (c.vocab_size == 16500 && &labels != kLabels) continue;  // segments, for all labels
          c.dtype = dtype;
          c.labels = labels;
          c.values = static_cast<Values>(values);
          c.logits = next(2) == 0 ? Shape::contiguous : Shape::column;
          run(c, n_threads_);
        }
      }
    });
  }

  // Every option beyond torch's, with every kind of labels, by rows and by tiles.
  void options() {
    std::vector<Case> shapes{
        {{}, {}, 300, 7}, {{}, {}, 7, 150}, {{}, {}, 2, 2100}, {{}, {}, 1, 16500}};
    if (small_) shapes = {{{}, {}, 33, 7}, {{}, {}, 7, 150}};
    each_labels([&](DType dtype, const Labels& labels) {
      for (const CaseOptions& options : kCaseOptions) {
        for (Case c : shapes) {
          if (c.vocab_size > 2000 && next(3) != 0) continue;
          c.dtype = dtype;
          c.labels = labels;
          c.options = options;
          c.logits = next(2) == 0 ? Shape::contiguous : static_cast<Shape>(next(kShapes));
          c.gradient = next(2) == 0 ? c.logits : Shape::contiguous;
          c.values = next(3) == 0 ? static_cast<Values>(next(kValues)) : Values::normal;
          if (c.values == Values::large) c.values = Values::normal;  // lse^2 is beyond float
          c.misalignment = next(4);
          run(c, n_threads_);
        }
      }
    });
  }

  // Every way to distribute work, with enough of it for several threads.
  void threads() {
    const Case shapes[] = {{{}, {}, 7, 16385},   // few rows: segments, or rows with one thread
                           {{}, {}, 13, 16385},  // rows
                           {{}, {}, 300, 129},   // rows, many per task
                           {{}, {}, 600, 13},    // tiles
                           {{}, {}, 600, 130}};
    each_labels([&](DType dtype, const Labels& labels) {
      if (&labels != kLabels && (dtype != DType::bfloat16 || labels.smoothing == 0)) return;
      for (Case c : shapes) {
        c.dtype = dtype;
        c.labels = labels;
        if (c.n_rows == 600) c.logits = c.gradient = c.target = Shape::image;
        run(c, n_threads_);
      }
    });
  }

 private:
  template <typename Body>
  void each_labels(const Body& body) {
    for (const DType dtype : kDTypes) {
      for (const Labels& labels : kLabels) {
        if (!labels.is_float32 || element_size(dtype) == 2) body(dtype, labels);
      }
      for (const Labels& labels : kSparseLabels) body(dtype, labels);
    }
  }

  int64_t next(int64_t n) { return random_.below(n); }

  // Row counts around the boundaries of tiles and tasks.
  int64_t rows_for(int64_t vocab_size) {
    const int64_t counts[] = {1, 2, 3, 7, 17, 64, 255, 256, 257, 600};
    const int64_t limit = small_ ? 600 : 5000;
    int64_t count = counts[next(10)];
    while (count > 1 && count * vocab_size > limit) count = counts[next(10)];
    return count;
  }

  bool small_;
  int64_t n_threads_;
  Random random_;
};

}  // namespace
}  // namespace fused_xent::test

int main(int argc, char** argv) {
  using namespace fused_xent::test;
  bool small = false;
  bool only_capability = false;
  int64_t n_threads = 0;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--small") small = true;
    if (std::string(argv[i]) == "--capability") only_capability = true;
    if (std::string(argv[i]) == "--threads" && i + 1 < argc) n_threads = std::atoi(argv[++i]);
  }
  if (n_threads == 0) n_threads = small ? 1 : 3;
  std::printf("capability: %s\n", fused_xent::cpu::capability_name());
  if (only_capability) return 0;
  Table table(small, n_threads);
  table.vocabularies();
  table.layouts();
  table.values();
  table.options();
  if (n_threads > 1) table.threads();
  run_scans(n_threads);
  report();
  return n_failures == 0 ? 0 : 1;
}
