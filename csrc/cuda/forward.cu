// Forward by rows. It reads the logits (and the probabilities) once and writes a few numbers a row.
//
// A team of threads sweeps a row. Each thread has a maximum and a sum of its own, and four 16-byte
// reads in flight; then the team merges its stats. Where rows are too few to fill the card, several
// blocks share one and write their stats to a workspace, which a second kernel merges. Short rows
// have a kernel in which each lane finishes a row of its own.
#include "dispatch.cuh"
#include "merge_parts.cuh"
#include "regimes.h"
#include "sweep.cuh"
#include "warp_rows.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (kMinBlocks<T, S> == 4 ? 5 : kMinBlocks<T, S>))
    forward_rows(const __grid_constant__ Arguments a, int team_size, RowStats<Acc<T>>* partials) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  __shared__ Exchange<A> exchange;
  write_unread_total_weight(a);
  const Transform<A>& transform = transform_of<A>(a);
  Team team(team_size);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    const Target target = read_target(a, row);
    if (!target.is_read()) {
      if (team.is_leader() && team.part() == 0) write_unread_row(a, row, unread_value<A>(target));
      continue;
    }
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const Spread<T, S> spread(a, row);
    const RowView<const T> view(logits, static_cast<int>(a.vocab_size));
    const A x = team.is_leader() && target.index >= 0 ? to_acc(view.data[target.index]) : A(0);
    const ShareFor<S> share(team, view.n_vectors);
    const int apart = class_apart(a, target.index);
    const Place place = share.find(view, apart);
    StatsFor<T, S> swept(transform);
    sweep_edges(swept, view, spread, apart, share.edge_rank, share.edge_step);
    for (int v = share.first; v < share.end; v += share.step) {
      uint4 bits[kUnroll<S>];
      share.template load<false>(bits, view, v);
      if (v == place.group) leave_out<T>(bits, place.element);
      add_vectors<T, S>(swept, bits, view, spread, share, v);
      if (v == place.group) forget_left_out<T, S>(swept);
    }
    RowStats<A> stats = team.merge<kHasSpread>(swept.result(), exchange);
    if (!team.is_leader()) continue;
    if (team.parts() == 1) {
      const A target_logit = transformed(transform, x, kIsCapped<S>);
      write_results(a, row, results_of_row(a, row, target.index, target_logit, stats));
    } else {
      partials[row * team.parts() + team.part()] = stats;
    }
  }
}

// The same for a part of a warp: see warp_rows.cuh.
template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, 4)
    forward_lane_rows(const __grid_constant__ Arguments a, int team_size, int n_passes) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  write_unread_total_weight(a);
  const Transform<A>& transform = transform_of<A>(a);
  const WarpTeam team(team_size, n_passes);
  const LaneRow<T> mine(a, team);
  const bool is_read = mine.target.is_read();
  const A x = is_read ? to_acc(mine.logits[mine.target.index]) : A(0);
  const Spread<T, S> spread(a, 0);  // the same for all rows
  RowStats<A> stats = empty_stats<A>();
  int target = -1;
  RowView<const T> view(mine.logits, 0);
  ShareFor<S> share(team, 0);
  uint4 bits[kUnroll<S>];
  const auto read = [&](int v) {
    if (v < share.end) share.template load<false>(bits, view, v);
  };
  const auto turn_to = [&](int pass) {
    target = team.in_pass(pass, mine.target.index);  // -1: the row has no classes to read
    view = RowView<const T>(team.in_pass(pass, mine.logits),
                            target < 0 ? 0 : static_cast<int>(a.vocab_size));
    share = ShareFor<S>(team, view.n_vectors);
    read(share.first);
  };
  turn_to(0);
  for (int pass = 0; pass < n_passes; ++pass) {
    const ClassPlace<T, kUnroll<S>> place(view, target);
    const int group = kHasSpread ? -1 : place.group(team);
    StatsFor<T, S> swept(transform);
    sweep_edges(swept, view, spread, kHasSpread ? -1 : target, share.edge_rank, share.edge_step);
    for (int v = share.first; v < share.end; v += share.step) {
      if (v == group) leave_out<T>(bits, place.element(team));
      add_vectors<T, S>(swept, bits, view, spread, share, v);
      read(v + share.step);
    }
    if (pass + 1 < n_passes) turn_to(pass + 1);  // memory is busy while the lanes are merged
    const RowStats<A> merged = merge_lanes<kHasSpread>(swept.result(), team.size(), ~0u);
    if (team.rank() == pass) stats = merged;
  }
  if (is_read) {
    const A target_logit = transformed(transform, x, false);
    write_results(a, mine.index,
                  results_of_row(a, mine.index, mine.target.index, target_logit, stats));
  } else if (mine.exists()) {
    write_unread_row(a, mine.index, unread_value<A>(mine.target));
  }
}

}  // namespace

cudaError_t forward_by_rows(const Arguments& a, const Plan& plan, void* workspace,
                            cudaStream_t stream) {
  const bool by_lanes = has_lane_rows(plan, shape_of(a));
  const cudaError_t error = with_row_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
    if constexpr (kHasLaneRows<T, S>) {
      if (by_lanes) return launch_in_passes(forward_lane_rows<T, S>, a, plan, stream);
    }
    forward_rows<T, S><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(
        a, plan.team, static_cast<RowStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
  if (error != cudaSuccess || plan.parts == 1) return error;
  return launch_merge_parts<RowStats>(a, plan, workspace, stream);
}

}  // namespace fused_xent::cuda
