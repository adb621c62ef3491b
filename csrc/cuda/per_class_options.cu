// Forward, backward and forward_backward with per-class options (see is_general), for rows of any
// layout. Forward reads the logits once; backward reads and writes once; forward_backward does
// both, and finds most of a row in a cache at its second read.
//
// A team of threads sweeps a row, in 16-byte accesses if its classes are adjacent. Otherwise the
// team is mostly a single thread, and neighbouring threads have neighbouring rows.
#include "dispatch.cuh"
#include "gradient.cuh"
#include "merge_parts.cuh"
#include "per_class_options.cuh"
#include "regimes.h"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;
// Blocks that a multiprocessor must have room for.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8   ? 1
                        : sizeof(T) == 4 ? 3
                                         : 2;

// A row, and one thread's share of its vectors and edges.
template <typename T, typename S>
struct GeneralRow {
  using A = Acc<T>;
  const Spread<T, S> spread;
  const bool has_spread;
  const int apart;
  const Transform<A>& transform;
  const int64_t stride;
  RowView<const T> view;
  Share<1> share;

  __device__ GeneralRow(const Arguments& a, int64_t row, int target, const T* out, const Team& team)
      : spread(a, row),
        has_spread(fused_xent::has_spread(a)),
        apart(class_apart(a, target)),
        transform(transform_of<A>(a)),
        stride(a.logits_layout.class_stride),
        view(row_of<const T>(a.logits, a.logits_layout, row), static_cast<int>(a.vocab_size)),
        share(team, 0) {
    const bool is_adjacent = stride == 1 && (out == nullptr || a.grad_layout.class_stride == 1) &&
                             (!has_spread || spread.class_stride == 1);
    const auto apart = reinterpret_cast<uintptr_t>(view.data) -
                       reinterpret_cast<uintptr_t>(out == nullptr ? view.data : out);
    if (!is_adjacent || apart % 16 != 0) view.use_no_vectors();
    share = Share<1>(team, view.n_vectors);
  }

  __device__ __forceinline__ A logit(int64_t j) const { return to_acc(view.data[j * stride]); }
  __device__ __forceinline__ A label(int j) const { return has_spread ? spread.at(j) : A(0); }
  __device__ __forceinline__ void labels(int j, A (&t)[kVector<T>]) const {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) t[i] = 0;
    if (has_spread) spread.vector(j, t);
  }

  __device__ __forceinline__ FullStats<A> sweep() const {
    GeneralStats<A> stats;
    for (int first = share.edge_rank; first < view.n_edges; first += 4 * share.edge_step) {
      A z[4], t[4];
      int j[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int i = first + u * share.edge_step;
        j[u] = i < view.n_edges ? view.edge_class(i) : INT32_MAX;
        if (j[u] == apart) j[u] = INT32_MAX;
        const bool is_there = j[u] != INT32_MAX;
        z[u] = is_there ? logit(j[u]) : -kInfinity<A>;
        t[u] = is_there ? label(j[u]) : A(0);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (j[u] != INT32_MAX) z[u] = transformed(transform, z[u]);
      }
      stats.add(z, t, j);
    }
    for (int v = share.first; v < share.end; v += share.step) {
      A z[kVector<T>], t[kVector<T>];
      int j[kVector<T>];
      unpack<T>(load_vector_cached(view.data + view.vector_class(v)), z);
      labels(view.vector_class(v), t);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        j[i] = view.vector_class(v) + i;
        z[i] = j[i] == apart ? -kInfinity<A> : transformed(transform, z[i]);
      }
      stats.add(z, t, j);
    }
    return stats.result();
  }

  __device__ __forceinline__ void write(T* out, int64_t out_stride,
                                        const GeneralGradient<A>& gradient) const {
    for (int i = share.edge_rank; i < view.n_edges; i += share.edge_step) {
      const int j = view.edge_class(i);
      out[j * out_stride] = from_acc<T>(gradient.at(logit(j), label(j)));
    }
    for (int v = share.first; v < share.end; v += share.step) {
      const int j = view.vector_class(v);
      A x[kVector<T>], t[kVector<T>];
      unpack<T>(load_vector(view.data + j), x);
      labels(j, t);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) x[i] = gradient.at(x[i], t[i]);
      store_vector(out + j, pack<T>(x));
    }
  }
};

// Returns the merged stats of a team to each of its threads, which are neighbours in the block.
// `shared` has a place for every thread of the block. A barrier: reads before it come before writes
// after it.
template <typename A>
__device__ __forceinline__ FullStats<A> merge_team(FullStats<A> stats, FullStats<A>* shared,
                                                   int size) {
  const int thread = static_cast<int>(threadIdx.x), rank = thread & (size - 1);
  const auto wait = [=] {
    if (size > kWarp) {
      __syncthreads();
    } else {
      const unsigned lanes = size == kWarp ? ~0u : (1u << size) - 1;
      __syncwarp(lanes << (thread % kWarp - rank));
    }
  };
  if (size == 1) return stats;
  shared[thread] = stats;
  for (int n = size / 2; n > 0; n /= 2) {
    wait();
    if (rank >= n) continue;
    merge_stats(stats, shared[thread + n]);
    shared[thread] = stats;
  }
  wait();
  stats = shared[thread - rank];
  wait();  // the next row's statistics go where these are
  return stats;
}

template <typename T>
__device__ __forceinline__ void fill_any_row(const Arguments& a, T* out, Acc<T> value,
                                             const Team& team) {
  const int64_t stride = a.grad_layout.class_stride;
  if (stride == 1) return fill_row(out, static_cast<int>(a.vocab_size), value, team);
  const Share<1> share(team, 0);
  for (int64_t j = share.edge_rank; j < a.vocab_size; j += share.edge_step) {
    out[j * stride] = from_acc<T>(value);
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>)
    general_rows(const __grid_constant__ Arguments a, int team_size, bool has_forward,
                 bool has_backward, FullStats<Acc<T>>* partials) {
  using A = Acc<T>;
  __shared__ FullStats<A> shared[kMaxThreads];
  const A scale = has_backward ? upstream_scale<A>(a) : A(0);
  write_unread_total_weight(a);
  const Team team(team_size);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    T* out = has_backward ? row_of<T>(a.grad_logits, a.grad_layout, row) : nullptr;
    const Target target = read_target(a, row);
    if (!target.is_read()) {
      const A value = unread_value<A>(target);
      if (has_forward && team.is_leader() && team.part() == 0) write_unread_row(a, row, value);
      if (has_backward) fill_any_row(a, out, value, team);
      continue;
    }
    const GeneralRow<T, S> view(a, row, target.index, out, team);
    // The thread that owns the target reads its logit before it overwrites it. Others read it only
    // in forward, before the barrier of the merge.
    const bool has_target = has_backward && view.share.find(view.view, target.index).is_mine;
    const bool needs_target = has_target || (has_forward && target.index >= 0);
    const A x = needs_target ? view.logit(target.index) : A(0), z = transformed(view.transform, x);
    RowResults<A> results;
    if (has_forward) {
      FullStats<A> stats = merge_team(view.sweep(), shared, team_size);
      if (team.parts() > 1) {
        if (team.is_leader()) partials[row * team.parts() + team.part()] = stats;
        continue;
      }
      results = results_of_row<A>(a, row, target.index, z, stats);
      if (team.is_leader()) write_results(a, row, results, stats.argmax);
      if (!has_backward) continue;
    } else {
      results = saved_results<A>(a, row);
    }
    Upstream<A> upstream = upstream_of(a, row, grad_loss_of(a, scale, row), results);
    add_entropy_gradient(upstream, a, row, results);
    const RowLabels<A> labels = labels_of_row<A>(a, row, target.index);
    const A mass = mass_of(a, results.mass);
    view.write(out, a.grad_layout.class_stride,
               {gradient_of_row(upstream, labels, mass, results), view.transform});
    if (!has_target) continue;
    const A at_target = gradient_at_target(upstream, labels, mass, results, z);
    out[target.index * a.grad_layout.class_stride] =
        from_acc<T>(at_target * slope_at(view.transform, x));
  }
}

}  // namespace

cudaError_t general(const Arguments& a, const Plan& plan, void* workspace, bool has_forward,
                    bool has_backward, cudaStream_t stream) {
  const int team = plan.regime == Regime::columns ? plan.workers : plan.team;
  const dim3 grid = grid_for(a, plan, team);
  const cudaError_t error = with_spread_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
    general_rows<T, S><<<grid, plan.threads, 0, stream>>>(
        a, team, has_forward, has_backward, static_cast<FullStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
  if (error != cudaSuccess || plan.parts == 1 || !has_forward) return error;
  return launch_merge_parts<FullStats>(a, plan, workspace, stream);
}

}  // namespace fused_xent::cuda
