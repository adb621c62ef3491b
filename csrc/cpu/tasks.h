// Work in tasks for threads.
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

}  // namespace fused_xent::cpu
