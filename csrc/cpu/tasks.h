// What launch.cpp and scan.cpp share: work in tasks for threads, and per-row or per-class numbers.
#pragma once

#include <algorithm>
#include <atomic>

#include "launch.h"

namespace fused_xent::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tasks are taken as threads come free: ignored rows cost nothing, so that equal shares would not
// be.
template <typename Task>
void run_tasks(const Threads& threads, int64_t n_tasks, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t) {
    for (int64_t i = next++; i < n_tasks; i = next++) task(i);
  };
  const int64_t count = std::min(threads.count, n_tasks);
  if (count > 1) {
    threads.run(count, work);
  } else {
    work(0);
  }
}

inline double acc_at(const Params& p, const void* values, int64_t i) {
  return p.dtype == DType::float64 ? static_cast<const double*>(values)[i]
                                   : static_cast<const float*>(values)[i];
}

inline double class_weight(const Params& p, int64_t index) {
  return p.weight == nullptr ? 1.0 : acc_at(p, p.weight, index);
}

}  // namespace fused_xent::cpu
