// Backward by rows. It reads the logits (and the probabilities) once and writes the gradient once,
// which may take the logits' place. It is purely elementwise, so each part of a long row has a
// block of its own. scale_gradient is the same with another formula.
#include "dispatch.cuh"
#include "regimes.h"
#include "sweep.cuh"

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
  return with_row_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
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
