// Backward by rows. It reads the logits (and the probabilities) once and writes the gradient once,
// which may take the logits' place. It is purely elementwise, so each part of a long row has a
// block of its own. Short rows have a kernel in which each lane computes the factors of a row of
// its own. scale_gradient is the same with another formula.
#include "dispatch.cuh"
#include "gradient.cuh"
#include "regimes.h"
#include "warp_rows.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

// The first vectors of the row are requested before make_values() reads the row's numbers.
template <int kCount, typename T, typename MakeValues>
__device__ __forceinline__ void write_share(T* out, const RowView<const T>& view,
                                            const Share<kCount>& share,
                                            const MakeValues& make_values) {
  uint4 bits[kCount];
  const auto read = [&](int v) {
    if (v < share.end) share.template load<true>(bits, view, v);
  };
  read(share.first);
  const auto values = make_values();
  write_edges(out, view, values, share.edge_rank, share.edge_step);
  for (int v = share.first; v < share.end; v += share.step) {
    write_vectors(out, view, values, share, v, bits, are_small<T>(values, bits));
    read(v + share.step);
  }
}

// In double, two blocks on a multiprocessor would leave too few registers.
template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (sizeof(T) == 8 ? 1 : kMinBlocks<T, S>))
    backward_rows(const __grid_constant__ Arguments a, int team_size) {
  using A = Acc<T>;
  const A scale = upstream_scale<A>(a);
  const Transform<A>& transform = transform_of<A>(a);
  const Team team(team_size);
  const int vocab_size = static_cast<int>(a.vocab_size);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    const Target target = read_target(a, row);
    if (!target.is_read()) {
      fill_row(out, vocab_size, unread_value<A>(target), team);
      continue;
    }
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const Spread<T, S> spread(a, row);
    const RowView<const T> view = view_for<T>(logits, out, vocab_size);
    const ShareFor<S> share(team, view.n_vectors);
    // The thread that owns the target reads its logit before it overwrites it, and writes the
    // target's gradient after all others.
    const bool has_target = share.find(view, target.index).is_mine;
    const A x = has_target ? to_acc(logits[target.index]) : A(0);
    RowBackward<A> gradient;
    write_share(out, view, share, [&] {
      gradient = backward_of_row(a, scale, row, target.index, saved_results<A>(a, row), has_target,
                                 transformed(transform, x, kIsCapped<S>));
      return GradientOf<T, S>(gradient, spread, transform);
    });
    if (has_target) {
      out[target.index] = from_acc<T>(gradient.at_target * slope_at(transform, x, kIsCapped<S>));
    }
  }
}

// The same for a part of a warp: see warp_rows.cuh.
template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (sizeof(T) == 4 ? 3 : 4))
    backward_lane_rows(const __grid_constant__ Arguments a, int team_size, int n_passes) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  const A scale = upstream_scale<A>(a);
  const Transform<A>& transform = transform_of<A>(a);
  const WarpTeam team(team_size, n_passes);
  const LaneRow<T> mine(a, team);
  T* my_out = row_of<T>(a.grad_logits, a.grad_layout, mine.first_or_own());
  const bool is_mine_read = mine.target.is_read();
  A x = 0;
  RowBackward<A> my_gradient{{0, unread_value<A>(mine.target), 0}, 0};
  if (is_mine_read) {
    x = to_acc(mine.logits[mine.target.index]);
    my_gradient =
        backward_of_row(a, scale, mine.index, mine.target.index, saved_results<A>(a, mine.index),
                        true, transformed(transform, x, false));
  }
  const Spread<T, S> spread(a, 0);                     // the same for all rows
  const auto* base = static_cast<const T*>(a.logits);  // so the rows are known to be global memory
  const int vocab_size = static_cast<int>(a.vocab_size);
  __syncwarp();  // the lanes have read their targets' logits, which may be overwritten
  for (int pass = 0; pass < n_passes; ++pass) {
    const int state = team.in_pass(pass, mine.exists() + is_mine_read);  // 2: read, 0: no row
    const T* logits = base + team.in_pass(pass, mine.logits - base);
    T* out = team.in_pass(pass, my_out);
    const RowGradient<A> gradient{team.in_pass(pass, my_gradient.max),
                                  team.in_pass(pass, my_gradient.factor),
                                  kHasSpread ? team.in_pass(pass, my_gradient.spread) : A(0)};
    if (state == 2) {
      const RowView<const T> view = view_for<T>(logits, out, vocab_size);
      write_share(out, view, ShareFor<S>(team, view.n_vectors),
                  [&] { return GradientOf<T, S>(gradient, spread, transform); });
    } else if (state == 1) {
      fill_row(out, vocab_size, gradient.factor, team);
    }
  }
  __syncwarp();  // the teams have written the classes of all rows, the target's with the others
  if (is_mine_read) {
    my_out[mine.target.index] = from_acc<T>(my_gradient.at_target * slope_at(transform, x, false));
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kScaleThreadsPerSm / kMaxThreads)
    scale_rows(const __grid_constant__ Arguments a, int team_size) {
  using A = Acc<T>;
  const A scale = upstream_scale<A>(a);
  if (a.grad_loss_stride == 0 && grad_loss_of(a, scale, 0) == 1) return;
  const Team team(team_size);
  const int vocab_size = static_cast<int>(a.vocab_size);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    if (read_target(a, row).is_ignored) continue;
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    const RowView<const T> view(out, vocab_size);
    const Share<ScaledBy<T>::kCount> share(team, view.n_vectors);
    write_share(out, view, share, [&] { return ScaledBy<T>{grad_loss_of(a, scale, row)}; });
  }
}

}  // namespace

cudaError_t backward_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  const bool by_lanes = has_lane_rows(plan, shape_of(a));
  return with_row_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
    if constexpr (kHasLaneRows<T, S>) {
      if (by_lanes) return launch_in_passes(backward_lane_rows<T, S>, a, plan, stream);
    }
    backward_rows<T, S><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(a, plan.team);
    return cudaGetLastError();
  });
}

cudaError_t scale_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  return with_dtype(a.dtype, [&]<typename T>(Type<T>) {
    scale_rows<T><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(a, plan.team);
    return cudaGetLastError();
  });
}

}  // namespace fused_xent::cuda
