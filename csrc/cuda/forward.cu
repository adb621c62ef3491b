// Forward by rows: one read of the logits (and of the probabilities), a few numbers a row written.
//
// A team of threads sweeps a row, each with a maximum and a sum of its own, in 16-byte accesses of
// which it has four in flight; then the team merges these. Where rows are too few to fill the card,
// several blocks share one and leave their statistics to a second kernel.
#include "dispatch.cuh"
#include "regimes.h"
#include "sweep.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (kMinBlocks<T, S> == 4 ? 5 : 2))
    forward_rows(const __grid_constant__ Arguments a, int team_size, RowStats<Acc<T>>* partials) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  __shared__ Exchange<A> exchange;
  Team team(team_size);
  const int part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    const Target target = read_target(a, row);
    if (target.is_ignored || target.is_bad) {
      if (team.is_leader() && part == 0) write_unread_row<A>(a, row, target.is_bad);
      continue;
    }
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const Spread<T, S> spread(a, row);
    const RowView<const T> view = view_for(logits, logits, spread, static_cast<int>(a.vocab_size));
    const A target_logit =
        team.is_leader() && target.index >= 0 ? to_acc(view.data[target.index]) : A(0);
    const ShareFor<S> share(team, view.n_vectors, part, parts);
    StatsFor<T, S> swept;
    sweep_edges(swept, view, spread, share.edge_rank, share.edge_step);
    for (int v = share.first; v < share.end; v += share.step) {
      uint4 bits[kUnroll<S>];
      share.template read<T>(
          bits, v, [&](int, int w) { return load_vector(view.data + view.vector_class(w)); });
      add_vectors(swept, bits, view, spread, share, v);
    }
    const RowStats<A> stats = team.merge<kHasSpread>(swept.result(), exchange);
    if (!team.is_leader()) continue;
    if (parts == 1) {
      write_row(a, row, results_of_row(a, row, target.index, target_logit, stats));
    } else {
      partials[row * parts + part] = stats;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    merge_parts(const __grid_constant__ Arguments a, int parts, const RowStats<Acc<T>>* partials) {
  using A = Acc<T>;
  const int64_t n_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < a.n_rows;
       row += n_threads) {
    const Target target = read_target(a, row);
    if (target.is_ignored || target.is_bad) continue;  // written by its first part
    RowStats<A> stats = partials[row * parts];
    for (int part = 1; part < parts; ++part) merge_stats(stats, partials[row * parts + part]);
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const A target_logit = target.index < 0 ? A(0) : to_acc(logits[target.index]);
    write_row(a, row, results_of_row(a, row, target.index, target_logit, stats));
  }
}

}  // namespace

cudaError_t forward_by_rows(const Arguments& a, const Plan& plan, void* workspace,
                            cudaStream_t stream) {
  const cudaError_t error = with_types(a, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    forward_rows<T, S><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(
        a, plan.team, static_cast<RowStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
  if (error != cudaSuccess || plan.parts == 1) return error;
  return with_dtype(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    merge_parts<T><<<blocks_for(a.n_rows, kMaxThreads), kMaxThreads, 0, stream>>>(
        a, plan.parts, static_cast<const RowStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
}

}  // namespace fused_xent::cuda
