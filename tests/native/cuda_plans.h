// The plans that the CUDA kernels are tested with: every launch shape of every regime.
#pragma once

#include <string>
#include <vector>

#include "../../csrc/cuda/plan.h"

namespace fused_xent::test {

using cuda::Plan;
using cuda::Regime;

struct Plans {
  Plan forward, backward, forward_backward;
};

inline std::string name_of_plan(const Plan& p) {
  const auto text = [](int value) { return std::to_string(value); };
  const std::string regimes[] = {"columns", "warp", "block", "split"};
  return regimes[static_cast<int>(p.regime)] + " threads " + text(p.threads) + " team " +
         text(p.team) + " parts " + text(p.parts) + " held " + text(p.held) + " workers " +
         text(p.workers) + " row_vector " + text(p.row_vector) + " max_groups " +
         text(p.max_groups);
}

inline Plan by_rows(int threads, int team, int parts = 1, int held = 0, int max_groups = 0) {
  Plan plan{parts > 1 ? Regime::split : team == threads ? Regime::block : Regime::warp, threads};
  plan.team = team;
  plan.parts = parts;
  plan.held = held;
  plan.max_groups = max_groups;
  return plan;
}

inline Plan by_columns(int threads, int workers, int row_vector) {
  Plan plan{Regime::columns, threads};
  plan.workers = workers;
  plan.row_vector = row_vector;
  return plan;
}

// Every shape of every regime; forward, backward and forward_backward take turns.
inline std::vector<Plans> all_plans(bool small, const cuda::Device& device, int vector) {
  const int cluster = device.capability >= 90 ? 1 : 0;
  std::vector<Plans> plans{
      {by_rows(64, 4), by_rows(64, 2), by_rows(64, 8, 1, 4)},
      {by_rows(64, 64), by_rows(64, 64, 3), by_rows(64, 64, 1, 4, 1)},
      {by_rows(64, 64, 2), by_rows(64, 32), by_rows(64, 64, cluster ? 4 : 1, 4, 1)},
      {by_columns(64, 1, vector), by_columns(64, 2, 1), by_columns(64, 2, vector)},
      // One group of threads computes all rows in sequence.
      {by_rows(64, 64, 1, 0, 1), by_rows(64, 64, 1, 0, 1), by_rows(64, 64, 1, 0, 1)},
      {by_rows(64, 32, 1, 0, 1), by_rows(32, 16, 1, 0, 1), by_rows(64, 8, 1, 0, 1)},
  };
  if (small) return plans;
  plans.push_back({by_rows(256, 256), by_rows(256, 256), by_rows(512, 512, 1, 4, 1)});
  plans.push_back({by_rows(128, 32), by_rows(128, 16), by_rows(64, 2, 1, 0, 1)});
  plans.push_back({by_rows(256, 256, 5), by_rows(256, 256, 2), by_rows(128, 32, 1, 8, 1)});
  plans.push_back({by_rows(64, 8, 1, 0, 1), by_rows(64, 32, 1, 0, 1), by_rows(128, 16)});
  plans.push_back({by_rows(32, 32), by_rows(32, 1), by_rows(32, 32, cluster ? 2 : 1, 4, 2)});
  plans.push_back({by_rows(128, 128, 3), by_rows(128, 4), by_rows(64, 64, cluster ? 8 : 1, 8, 2)});
  plans.push_back({by_columns(256, 8, 1), by_columns(256, 4, vector), by_columns(128, 1, 1)});
  return plans;
}

}  // namespace fused_xent::test
