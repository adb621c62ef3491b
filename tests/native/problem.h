// One case of the table, and the inputs made from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/xent_params.h"
#include "tensors.h"

namespace fused_xent::test {

enum class Ignored { none, some, all, bad };  // bad: some targets are out of range

struct Labels {
  const char* name;
  TargetKind kind;
  bool is_float32;  // float32 probabilities for any logits; otherwise they have the logits' type
  bool has_weight;
  double smoothing;
  Ignored ignored;
  bool has_infinite_weights = false;  // at classes that are no row's target
  int64_t n_labels = 0;               // of sparse labels, which are probabilities too
};

// Options beyond torch's, statistics, and the upstream gradients of statistics.
struct CaseOptions {
  const char* name = "default options";
  bool token_weight = false;  // 0 or negative in some rows; where 0, the target is out of range
  double lse_square_scale = 0, focal_gamma = 0, softcap = 0, logit_scale = 1;
  bool statistics = false, grad_lse = false, grad_entropy = false;
};

enum class Values {
  normal,
  offset,     // all near 1e4 or 100
  peaked,     // the target has a probability near 1
  ascending,  // every block of a row has a new maximum
  equal,
  large,    // differences close to the range of the type
  masked,   // -inf at classes other than the target
  special,  // NaN, inf and -inf, by row
  late,     // many values whose sum is rounded, then a far larger one
  halves    // too far apart for one exponential; 16-bit kernels change the scale
};
constexpr int kValues = 10;

inline const char* name_of(Values values) {
  const char* names[kValues] = {"normal", "offset", "peaked",  "ascending", "equal",
                                "large",  "masked", "special", "late",      "halves"};
  return names[static_cast<int>(values)];
}

inline const char* name_of(DType dtype) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

struct Case {
  DType dtype;
  Labels labels;
  int64_t n_rows, vocab_size;
  Values values = Values::normal;
  Shape logits = Shape::contiguous, gradient = Shape::contiguous, target = Shape::contiguous;
  int64_t misalignment = 0;  // elements
  bool scalar_upstream = false;
  CaseOptions options{};

  std::string name() const {
    const auto text = [](auto value) { return std::to_string(value); };
    return std::string(name_of(dtype)) + " (" + text(n_rows) + ", " + text(vocab_size) + ") " +
           labels.name + ", " + options.name + ", " + name_of(values) + " values, logits " +
           name_of(logits) + ", grad_logits " + name_of(gradient) + ", target " + name_of(target) +
           ", misaligned by " + text(misalignment) +
           (scalar_upstream ? ", one grad_loss" : ", grad_loss a row");
  }
};

// splitmix64: the same numbers on every machine.
class Random {
 public:
  double uniform() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
  }
  double normal() { return 2 * (uniform() + uniform() + uniform() + uniform() - 2); }
  int64_t below(int64_t n) { return static_cast<int64_t>(uniform() * static_cast<double>(n)); }

 private:
  uint64_t state_ = 1;
};

// The inputs of a case, and params that point to the inputs only.
class Problem {
 public:
  const Case c;
  const DType acc;
  Params params{};
  Tensor logits, target;  // target: probabilities
  SparseLabels sparse{};  // the same labels, if the case has sparse ones
  Memory indices, weight, token_weight, grad_loss, grad_lse, grad_entropy, classes, labels;

  explicit Problem(const Case& c)
      : c(c), acc(c.dtype == DType::float64 ? DType::float64 : DType::float32) {
    params.dtype = c.dtype;
    params.n_rows = c.n_rows;
    params.vocab_size = c.vocab_size;
    params.label_smoothing = c.labels.smoothing;
    params.target_kind = c.labels.kind;
    params.lse_square_scale = c.options.lse_square_scale;
    params.focal_gamma = c.options.focal_gamma;
    params.softcap = c.options.softcap;
    params.logit_scale = c.options.logit_scale;
    fill_weight();
    if (c.options.token_weight) fill_token_weight();
    if (c.labels.n_labels > 0) {
      fill_sparse_labels();
    } else {
      has_indices() ? fill_indices() : fill_probabilities();
    }
    fill_logits();
    if (c.labels.has_infinite_weights) fill_infinite_weights();
    fill_grad_loss();
    if (c.options.grad_lse) params.grad_lse = fill_upstream(grad_lse);
    if (c.options.grad_entropy) params.grad_entropy = fill_upstream(grad_entropy);
  }
  Problem(const Problem&) = delete;

  bool has_indices() const { return c.labels.kind != TargetKind::probabilities; }
  // Returns -1 for probabilities.
  int64_t index(int64_t row) const {
    switch (c.labels.kind) {
      case TargetKind::int64:
        return static_cast<const int64_t*>(indices.data())[row];
      case TargetKind::int32:
        return static_cast<const int32_t*>(indices.data())[row];
      case TargetKind::uint8:
        return static_cast<const uint8_t*>(indices.data())[row];
      default:
        return -1;
    }
  }
  // Kernels must not read such rows.
  bool is_ignored(int64_t row) const {
    return weight_of_row(row) == 0 || (has_indices() && index(row) == params.ignore_index);
  }
  bool is_bad(int64_t row) const {
    return has_indices() && !is_ignored(row) && (index(row) < 0 || index(row) >= c.vocab_size);
  }
  bool wants_entropy() const { return c.options.statistics || c.options.grad_entropy; }
  double class_weight(int64_t j) const { return c.labels.has_weight ? acc_at(weight, j) : 1; }
  double weight_of_row(int64_t row) const {
    return c.options.token_weight ? acc_at(token_weight, row) : 1;
  }
  // The upstream gradient of a row's loss, without token_weight.
  double upstream(int64_t row) const {
    return acc_at(grad_loss, row * params.grad_loss_stride) * params.grad_scale;
  }
  int64_t class_of_label(int64_t row, int64_t k) const {
    return static_cast<const int64_t*>(classes.data())[at_label(row, k)];
  }
  double acc_at(const Memory& memory, int64_t i) const { return read(acc, memory.data(), i); }
  Memory new_acc(int64_t n) const {
    return Memory(n * element_size(acc), c.misalignment * element_size(acc));
  }

  // Infinite for ignored rows, whose gradient must still be 0. The first row's scaled gradient is
  // often 1: a kernel must not conclude that all are.
  void fill_grad_loss() {
    params.grad_loss_stride = c.scalar_upstream ? 0 : 1;
    params.grad_scale = std::ldexp(1.0, static_cast<int>(random_.below(4)) - 2);
    grad_loss = new_acc(c.scalar_upstream ? 1 : c.n_rows);
    for (int64_t i = 0; i < (c.scalar_upstream ? 1 : c.n_rows); ++i) {
      double value = i % 7 == 6 ? 0 : (i % 3 == 1 ? -1 : 1) + random_.normal() / 8;
      if (i == 0 && random_.below(2) == 0) value = 1 / params.grad_scale;
      if (!c.scalar_upstream && is_ignored(i)) value = INFINITY;
      write(acc, grad_loss.data(), i, value);
    }
    params.grad_loss = grad_loss.data();
  }

 private:
  void fill_weight() {
    params.weight_sum = static_cast<double>(c.vocab_size);
    if (!c.labels.has_weight) return;
    weight = new_acc(c.vocab_size);
    params.weight = weight.data();
    params.weight_sum = 0;
    for (int64_t j = 0; j < c.vocab_size; ++j) {
      write(acc, weight.data(), j, j % 5 == 3 ? 0 : 2 * random_.uniform());
      params.weight_sum += acc_at(weight, j);
    }
  }

  void fill_token_weight() {
    token_weight = new_acc(c.n_rows);
    params.token_weight = token_weight.data();
    for (int64_t row = 0; row < c.n_rows; ++row) {
      const double values[] = {1, 0, -0.5, 1.75};
      write(acc, token_weight.data(), row, values[row % 4]);
    }
  }

  void fill_infinite_weights() {
    std::vector<bool> is_target(c.vocab_size);
    for (int64_t row = 0; row < c.n_rows; ++row) {
      if (!is_ignored(row) && !is_bad(row)) is_target[index(row)] = true;
    }
    for (int64_t j = 0; j < c.vocab_size; ++j) {
      if (!is_target[j]) write(acc, weight.data(), j, INFINITY);
    }
    params.weight_sum = INFINITY;
  }

  const void* fill_upstream(Memory& upstream) {
    upstream = new_acc(c.n_rows);
    for (int64_t row = 0; row < c.n_rows; ++row) {
      write(acc, upstream.data(), row, row % 5 == 4 ? 0 : random_.normal());
    }
    return upstream.data();
  }

  void fill_indices() {
    const bool is_byte = c.labels.kind == TargetKind::uint8;
    const int64_t size = is_byte ? 1 : c.labels.kind == TargetKind::int32 ? 4 : 8;
    const int64_t bound = is_byte && c.vocab_size > 256 ? 256 : c.vocab_size;
    params.ignore_index = is_byte ? 255 : -100;
    indices = Memory(c.n_rows * size, c.misalignment * size);
    params.target = indices.data();
    for (int64_t row = 0; row < c.n_rows; ++row) {
      int64_t y = random_.below(bound);
      if (row % 4 == 0) y = row % 8 == 0 ? bound - 1 : 0;
      if (y == params.ignore_index) y = 0;
      const bool some = c.labels.ignored == Ignored::some && row % 3 == 1;
      const bool is_bad = c.labels.ignored == Ignored::bad && row % 3 == 1;
      if (some || c.labels.ignored == Ignored::all) y = params.ignore_index;
      if (is_bad || (!some && weight_of_row(row) == 0)) {
        // 1 << 32 is class 0 if truncated to 32 bits.
        const int64_t bad[] = {c.vocab_size, -1,
                               c.labels.kind == TargetKind::int64 ? 1LL << 32 : -2};
        y = is_byte ? 254 : bad[row / 3 % 3];
      }
      std::memcpy(static_cast<char*>(indices.data()) + row * size, &y,
                  size);  // assumes little-endian
    }
  }

  void fill_probabilities() {
    params.target_dtype = c.labels.is_float32 ? DType::float32 : c.dtype;
    target = Tensor(params.target_dtype, c.target, c.n_rows, c.vocab_size, c.misalignment);
    params.target = target.memory.data();
    params.target_layout = target.layout;
    for (int64_t row = 0; row < c.n_rows; ++row) {
      const int64_t only = row % 5 == 2 ? random_.below(c.vocab_size) : -1;
      for (int64_t j = 0; j < c.vocab_size; ++j) {
        const double share =
            j % 4 == 1 ? 0 : 2 * random_.uniform() / static_cast<double>(c.vocab_size);
        target.set(row, j, only < 0 ? share : j == only);
      }
    }
  }

  int64_t at_label(int64_t row, int64_t k) const {
    return row * sparse.classes_layout.stride[0] + k * sparse.classes_layout.class_stride;
  }

  // Labels repeat, and some do not count. Rows of token weight 0 have classes out of range.
  void fill_sparse_labels() {
    const int64_t n = c.labels.n_labels;
    params.target_dtype = acc;
    target = Tensor(acc, Shape::contiguous, c.n_rows, c.vocab_size, 0);
    params.target = target.memory.data();
    params.target_layout = target.layout;
    const bool by_rows = c.target == Shape::contiguous;
    const Layout layout{1, {c.n_rows}, {by_rows ? n : 1}, by_rows ? 1 : c.n_rows};
    classes = Memory(8 * c.n_rows * n, 8 * c.misalignment);
    labels = new_acc(c.n_rows * n);
    sparse.n_labels = n;
    sparse.classes = classes.data();
    sparse.classes_kind = TargetKind::int64;
    sparse.classes_layout = sparse.labels_layout = layout;
    sparse.labels = labels.data();
    sparse.ignore_index = -100;
    for (int64_t row = 0; row < c.n_rows; ++row) {
      for (int64_t j = 0; j < c.vocab_size; ++j) target.set(row, j, 0);
      for (int64_t k = 0; k < n; ++k) {
        const bool counts = row % 7 != 3 && random_.below(5) > 0;
        const double label = 2 * random_.uniform() / static_cast<double>(n);
        int64_t y = counts ? random_.below(std::min<int64_t>(c.vocab_size, 4 * n)) : -100;
        if (weight_of_row(row) == 0) y = c.vocab_size + k;
        write(acc, labels.data(), at_label(row, k), label);
        static_cast<int64_t*>(classes.data())[at_label(row, k)] = y;
        if (0 <= y && y < c.vocab_size) {
          target.set(row, y, target.at(row, y) + acc_at(labels, at_label(row, k)));
        }
      }
    }
  }

  double logit(int64_t row, int64_t j) {
    const double x = random_.normal() * 3;
    const double large[] = {1e30, 1e300, 1e30, 3e4};
    switch (c.values) {
      case Values::offset:
        return x + (row % 2 == 0 ? 1 : -1) * (row % 4 < 2 ? 1e4 : 100);
      case Values::peaked:
        return j == index(row) ? 8 + static_cast<double>(row % 4) * 10 : x;
      case Values::ascending:
        return 60 * static_cast<double>(j) / static_cast<double>(c.vocab_size) + x / 8;
      case Values::equal:  // exact in bfloat16
        return row % 3 == 0 ? -3 : row % 3 == 1 ? 9984 : -1504;
      case Values::large:
        if (row % 5 == 4 && (c.dtype == DType::float32 || c.dtype == DType::bfloat16)) return 3e38;
        return large[static_cast<int>(c.dtype)] * random_.normal() / 2;
      case Values::late:
        return j == c.vocab_size - 1 ? 20 : random_.uniform();
      case Values::halves:  // about 2^17, out of range for float16
        if (c.dtype == DType::float16) return 2 * j < c.vocab_size ? 3e4 : 6e4;
        return 2 * j < c.vocab_size ? 98304 : 139264;
      case Values::masked:
        return j % 3 == 2 && j != index(row) ? -INFINITY : x;
      case Values::special:
        switch (row % 6) {
          case 1:
            return j == row % c.vocab_size ? NAN : x;
          case 2:
            return j == row % c.vocab_size ? INFINITY : x;
          case 3:
            return -INFINITY;
          case 4:
            return j == index(row) ? -INFINITY : x;
        }
        return x;
      default:
        return x;
    }
  }

  void fill_logits() {
    logits = Tensor(c.dtype, c.logits, c.n_rows, c.vocab_size, c.misalignment);
    params.logits = logits.memory.data();
    params.logits_layout = logits.layout;
    for (int64_t row = 0; row < c.n_rows; ++row) {
      if (is_ignored(row)) continue;  // stays NaN
      for (int64_t j = 0; j < c.vocab_size; ++j) logits.set(row, j, logit(row, j));
    }
  }

  Random random_;
};

}  // namespace fused_xent::test
