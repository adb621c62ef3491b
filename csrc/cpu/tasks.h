// Tasks that threads share.
#pragma once

#include <algorithm>
#include <atomic>

#include "launch.h"

namespace fused_xent::cpu {

// Runs task(0), ..., task(n_tasks - 1). A thread takes the next task when it has finished one:
// ignored rows cost nothing, so equal numbers of tasks would not be equal work.
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

// Calls body(begin, end) for the pieces of [0, count) of `step` each, as tasks.
template <typename Body>
void run_pieces(const Threads& threads, int64_t count, int64_t step, const Body& body) {
  run_tasks(threads, ceil_div(count, step),
            [&](int64_t i) { body(i * step, std::min((i + 1) * step, count)); });
}

}  // namespace fused_xent::cpu
