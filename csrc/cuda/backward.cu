// Backward by rows: one read of the logits (and of the probabilities), one write of the gradient,
// which may take their place. Purely elementwise: a block on each part of a long row.
//
// scale_gradient is the same with another formula.
#include "dispatch.cuh"
#include "sweep.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

// make_values() waits for what it needs of the row while the row's first vectors are on their way.
template <int kCount, typename T, typename MakeValues>
__device__ __forceinline__ void write_share(T* out, const RowView<const T>& view,
                                            const Share<kCount>& share,
                                            const MakeValues& make_values) {
  uint4 bits[kCount];
  const auto read = [&](int v) {
    if (v >= share.end) return;
    share.template read<T>(
        bits, v, [&](int, int w) { return load_vector_cached(view.data + view.vector_class(w)); });
  };
  read(share.first);
  const auto values = make_values();
  write_edges(out, view, values, share.edge_rank, share.edge_step);
  for (int v = share.first; v < share.end; v += share.step) {
    write_vectors(out, view, values, share, v, bits);
    read(v + share.step);
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (kMinBlocks<T, S>))
    backward_rows(const __grid_constant__ Arguments a, int team_size) {
  using A = Acc<T>;
  const A scale = upstream_scale<A>(a);
  const Team team(team_size);
  const int vocab_size = static_cast<int>(a.vocab_size);
  const int part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    const Target target = read_target(a, row);
    if (target.is_ignored || target.is_bad) {
      fill_row(out, vocab_size, target.is_bad ? kNaN<A> : A(0), team, part, parts);
      continue;
    }
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const Spread<T, S> spread(a, row);
    const RowView<const T> view = view_for<T>(logits, out, spread, vocab_size);
    const ShareFor<S> share(team, view.n_vectors, part, parts);
    // The target's own thread reads its logit before it overwrites it, and its gradient after.
    const bool has_target = share.owns(view, target.index);
    const A target_logit = has_target ? to_acc(logits[target.index]) : A(0);
    RowGradient<A> gradient;
    write_share(out, view, share, [&] {
      gradient = gradient_of_row(a, scale, row, target.index, saved_results<A>(a, row), has_target,
                                 target_logit);
      return GradientOf<T, S>(gradient, spread);
    });
    if (has_target) out[target.index] = from_acc<T>(gradient.at_target);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    scale_rows(const __grid_constant__ Arguments a, int team_size) {
  using A = Acc<T>;
  const A scale = upstream_scale<A>(a);
  if (a.grad_loss_stride == 0 && upstream_of(a, scale, 0) == 1) return;
  const Team team(team_size);
  const int vocab_size = static_cast<int>(a.vocab_size);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    if (read_target(a, row).is_ignored) continue;
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    const RowView<const T> view(out, vocab_size);
    const int part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
    const Share<ScaledBy<T>::kCount> share(team, view.n_vectors, part, parts);
    write_share(out, view, share, [&] { return ScaledBy<T>{upstream_of(a, scale, row)}; });
  }
}

}  // namespace

cudaError_t backward_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  return with_types(a, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    backward_rows<T, S><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(a, plan.team);
    return cudaGetLastError();
  });
}

cudaError_t scale_by_rows(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  return with_dtype(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    scale_rows<T><<<grid_for(a, plan, plan.team), plan.threads, 0, stream>>>(a, plan.team);
    return cudaGetLastError();
  });
}

}  // namespace fused_xent::cuda
