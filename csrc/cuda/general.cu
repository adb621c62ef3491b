// All three passes where a class costs more than the softmax, for rows of any layout: one read of
// the logits forward, one read and one write backward, and both for both at once, the second read
// soon enough to find most of a row in a cache.
//
// A team of threads sweeps a row: in 16-byte accesses where its classes are adjacent, else, most
// often, a single thread, whose neighbours have the neighbouring rows.
#include "dispatch.cuh"
#include "general.cuh"
#include "regimes.h"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

// A row as a thread meets it: its part of the vectors, and of the other elements.
template <typename T, typename S>
struct GeneralRow {
  using A = Acc<T>;
  const Spread<T, S> spread;
  const bool has_spread;
  const Transform<A> transform;
  const int64_t stride;
  RowView<const T> view;
  Share<1> share;

  __device__ GeneralRow(const Arguments& a, int64_t row, const T* out, const Team& team, int part,
                        int parts)
      : spread(a, row),
        has_spread(spread_of<A>(a) != 0),
        transform(a),
        stride(a.logits_layout.class_stride),
        view(row_of<const T>(a.logits, a.logits_layout, row), static_cast<int>(a.vocab_size)),
        share(team, 0, part, parts) {
    const bool is_adjacent = stride == 1 && (out == nullptr || a.grad_layout.class_stride == 1) &&
                             (!has_spread || spread.class_stride == 1);
    const auto apart = reinterpret_cast<uintptr_t>(view.data) -
                       reinterpret_cast<uintptr_t>(out == nullptr ? view.data : out);
    if (!is_adjacent || apart % 16 != 0 || (has_spread && !spread.has_vectors_at(view.head))) {
      view.head = view.n_edges = static_cast<int>(a.vocab_size);
      view.n_vectors = 0;
    }
    share = Share<1>(team, view.n_vectors, part, parts);
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
        const bool is_there = i < view.n_edges;
        j[u] = is_there ? view.edge_class(i) : INT32_MAX;
        z[u] = is_there ? logit(j[u]) : -kInfinity<A>;
        t[u] = is_there ? label(j[u]) : A(0);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (j[u] != INT32_MAX) z[u] = transform.logit(z[u]);
      }
      stats.add(z, t, j);
    }
    for (int v = share.first; v < share.end; v += share.step) {
      A z[kVector<T>], t[kVector<T>];
      int j[kVector<T>];
      unpack<T>(load_vector(view.data + view.vector_class(v)), z);
      labels(view.vector_class(v), t);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        z[i] = transform.logit(z[i]);
        j[i] = view.vector_class(v) + i;
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

// All threads of a team, neighbours in the block, get the sum of their stats. `shared` has a place
// for every thread of the block. Orders their reads before it and writes after it.
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

template <typename A>
__device__ __forceinline__ A entropy_of(const FullStats<A>& stats, A log_sum) {
  return log_sum - stats.moment / stats.sum;
}

template <typename T>
__device__ __forceinline__ void fill_any_row(const Arguments& a, T* out, Acc<T> value,
                                             const Team& team, int part, int parts) {
  const int64_t stride = a.grad_layout.class_stride;
  if (stride == 1) {
    return fill_row(out, static_cast<int>(a.vocab_size), value, team, part, parts);
  }
  for (int64_t j = team.rank() + int64_t{part} * team.size(); j < a.vocab_size;
       j += int64_t{parts} * team.size()) {
    out[j * stride] = from_acc<T>(value);
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads, (sizeof(T) == 8 ? 1 : 2))
    general_rows(const __grid_constant__ Arguments a, int team_size, bool has_forward,
                 bool has_backward, FullStats<Acc<T>>* partials) {
  using A = Acc<T>;
  __shared__ FullStats<A> shared[kMaxThreads];
  const A scale = has_backward ? upstream_scale<A>(a) : A(0);
  const Team team(team_size);
  const int part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    T* out = has_backward ? row_of<T>(a.grad_logits, a.grad_layout, row) : nullptr;
    const Target target = read_target(a, row);
    if (target.is_ignored || target.is_bad) {
      if (has_forward && team.is_leader() && part == 0) {
        write_unread_row<A>(a, row, target.is_bad);
      }
      if (has_backward) {
        fill_any_row(a, out, target.is_bad ? kNaN<A> : A(0), team, part, parts);
      }
      continue;
    }
    const GeneralRow<T, S> view(a, row, out, team, part, parts);
    // The target's own thread reads its logit before it overwrites it; the others while a merge is
    // still to come.
    const bool has_target = has_backward && view.share.owns(view.view, target.index);
    const bool needs_target = has_target || (has_forward && target.index >= 0);
    const A x = needs_target ? view.logit(target.index) : A(0), z = view.transform.logit(x);
    RowResults<A> results;
    A entropy = 0;
    if (has_forward) {
      const FullStats<A> stats = merge_team(view.sweep(), shared, team_size);
      if (parts > 1) {
        if (team.is_leader()) partials[row * parts + part] = stats;
        continue;
      }
      results = results_of_row<A>(a, row, target.index, z, stats);
      entropy = entropy_of(stats, results.log_sum);
      if (team.is_leader()) {
        write_row(a, row, results);
        write_statistics(a, row, entropy, stats.argmax);
      }
      if (!has_backward) continue;
    } else {
      results = saved_results<A>(a, row);
      if (a.grad_entropy != nullptr) entropy = static_cast<const A*>(a.entropy)[row];
    }
    const Upstream<A> upstream = general_upstream(a, scale, row, results, entropy);
    const A spread = spread_of<A>(a), one_over_sum = exp(-results.log_sum);
    const A q = label_mass(on_target_of<A>(a, target.index), spread, mass_of(a, results.mass));
    const GeneralGradient<A> gradient{
        results.max, (upstream.g * q + upstream.softmax) * one_over_sum,
        upstream.shifted * one_over_sum, upstream.g * spread, view.transform};
    view.write(out, a.grad_layout.class_stride, gradient);
    if (!has_target) continue;
    const A at_target = gradient_at_target(a, upstream, target.index, z, results);
    out[target.index * a.grad_layout.class_stride] =
        from_acc<T>(at_target * view.transform.slope(x));
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    merge_general_parts(const __grid_constant__ Arguments a, int parts,
                        const FullStats<Acc<T>>* partials) {
  using A = Acc<T>;
  const int64_t n_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < a.n_rows;
       row += n_threads) {
    const Target target = read_target(a, row);
    if (target.is_ignored || target.is_bad) continue;  // written by its first part
    FullStats<A> stats = partials[row * parts];
    for (int part = 1; part < parts; ++part) merge_stats(stats, partials[row * parts + part]);
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const A x = target.index < 0 ? A(0) : to_acc(logits[target.index]);
    const auto results = results_of_row<A>(a, row, target.index, Transform<A>(a).logit(x), stats);
    write_row(a, row, results);
    write_statistics(a, row, entropy_of(stats, results.log_sum), stats.argmax);
  }
}

}  // namespace

cudaError_t general(const Arguments& a, const Plan& plan, void* workspace, bool has_forward,
                    bool has_backward, cudaStream_t stream) {
  const int team = plan.regime == Regime::columns ? plan.workers : plan.team;
  const dim3 grid = grid_for(a, plan, team);
  const cudaError_t error = with_spread_types(a, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    general_rows<T, S><<<grid, plan.threads, 0, stream>>>(
        a, team, has_forward, has_backward, static_cast<FullStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
  if (error != cudaSuccess || plan.parts == 1 || !has_forward) return error;
  return with_dtype(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    merge_general_parts<T><<<blocks_for(a.n_rows, kMaxThreads), kMaxThreads, 0, stream>>>(
        a, plan.parts, static_cast<const FullStats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
}

}  // namespace fused_xent::cuda
