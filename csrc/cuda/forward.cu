// Forward by rows. It reads the logits (and the probabilities) once and writes a few numbers a row.
//
// A team of threads sweeps a row. Each thread has a maximum and a sum of its own, and four 16-byte
// reads in flight; then the team merges its stats. Where rows are too few to fill the card, several
// blocks share one and write their stats to a workspace, which a second kernel merges.
#include "dispatch.cuh"
#include "merge_parts.cuh"
#include "regimes.h"
#include "sweep.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (kMinBlocks<T, S> == 4 ? 5 : kMinBlocks<T, S>))
    forward_rows(const __grid_constant__ Arguments a, int team_size, RowStats<Acc<T>>* partials) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  __shared__ Exchange<A> exchange;
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
      share.template read<T>(
          bits, v, [&](int, int w) { return load_vector(view.data + view.vector_class(w)); });
      if (v == place.group) leave_out<T>(bits, place.element);
      add_vectors<T, S>(swept, bits, view, spread, share, v);
      if (v == place.group) forget_left_out<T, S>(swept);
    }
    RowStats<A> stats = team.merge<kHasSpread>(swept.result(), exchange);
    if (!team.is_leader()) continue;
    if (team.parts() == 1) {
      write_results(
          a, row,
          results_of_row(a, row, target.index, transformed(transform, x, kIsCapped<S>), stats), -1);
    } else {
      partials[row * team.parts() + team.part()] = stats;
    }
  }
}

}  // namespace

cudaError_t forward_by_rows(const Arguments& a, const Plan& plan, void* workspace,
                            cudaStream_t stream) {
  const cudaError_t error = with_row_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
    forward_rows<T, S><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(
        a, plan.team, static_cast<RowStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
  if (error != cudaSuccess || plan.parts == 1) return error;
  return launch_merge_parts<RowStats>(a, plan, workspace, stream);
}

}  // namespace fused_xent::cuda
