// Forward and backward by rows at once. It reads the logits once and writes the gradient once, over
// the logits or to other memory.
//
// A row is kept on chip: by a part of a warp, by one block, or from sm_90 on by a cluster of blocks
// that exchange their stats through distributed shared memory. Each thread holds its own vectors,
// some in registers and the others in shared memory; no thread reads those of another, so they need
// no barrier. Vectors that do not fit are read twice, the second time from L2. As soon as a thread
// has written the gradient of a group, it requests the same group of its team's next row: so memory
// is busy while rows are summed, and a multiprocessor does not need a second block for that.
#include "dispatch.cuh"
#include "gradient.cuh"
#include "regimes.h"
#include "sweep.cuh"

namespace fused_xent::cuda {
namespace {

// Half as many for float64, whose numbers take two registers each.
template <typename T>
constexpr int kMaxThreads = sizeof(T) == 8 ? 256 : 512;

// Groups that a thread holds in registers: see vectors_in_registers in plan.cpp.
template <typename T, typename S>
constexpr int kInRegisters = sizeof(T) == 8 || kReadsLabels<S> ? 0
                             : kIsCapped<S>                    ? 1
                                                               : 2;

__device__ __forceinline__ void copy_vector_async(uint4* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// What a thread knows of a row before it reads the logits.
template <typename T, typename S>
struct Row {
  int64_t index;
  Target target;
  bool is_read;  // false also for rows beyond the last
  T* out;
  Spread<T, S> spread;
  RowView<const T> view;

  // If the row is not read, the pointers are those of row 0.
  __device__ Row(const Arguments& a, int64_t index, const Target& target)
      : index(index),
        target(target),
        is_read(index < a.n_rows && target.is_read()),
        out(row_of<T>(a.grad_logits, a.grad_layout, is_read ? index : 0)),
        spread(a, is_read ? index : 0),
        view(view_for<T>(row_of<const T>(a.logits, a.logits_layout, is_read ? index : 0), out,
                         static_cast<int>(a.vocab_size))) {}
};

// One thread's share of a row: its first groups and its first edge are in registers, the n_shared
// next groups in shared memory.
template <typename T, typename S>
class Held {
 public:
  using RowOf = Row<T, S>;
  using ShareOf = ShareFor<S>;
  static constexpr int kCount = kUnroll<S>;

  __device__ Held(uint4* shared, int n_shared)
      : vectors_(shared + (threadIdx.x / kWarp * kCount * kWarp + threadIdx.x % kWarp)),
        n_shared_(n_shared) {}

  // Requests the whole row.
  __device__ __forceinline__ void fetch(const RowOf& row, const ShareOf& share) {
    fetch_edge(row, share);
#pragma unroll
    for (int g = 0; g < kHeld; ++g) fetch_registers(row, share, g);
    for (int g = 0; g < n_shared_; ++g) fetch_shared(row, share, g);
  }

  // The target may be left out of the registers for good: its gradient is written apart.
  __device__ __forceinline__ RowStats<Acc<T>> sweep(const RowOf& row, const ShareOf& share,
                                                    const Place& left_out, int apart,
                                                    const Transform<Acc<T>>& transform) {
    StatsFor<T, S> stats(transform);
    small_groups_ = 0;
    const auto add = [&](uint4(&bits)[kCount], int g) {
      const int v = first(share, g);
      if (v == left_out.group) leave_out<T>(bits, left_out.element);
      const bool is_small = add_vectors<T, S>(stats, bits, row.view, row.spread, share, v);
      if (kIsCapped<S> && g < 32) small_groups_ |= uint32_t{is_small} << g;
      if (v == left_out.group) forget_left_out<T, S>(stats);
    };
    if (share.edge_rank < row.view.n_edges) {
      const int j = row.view.edge_class(share.edge_rank);
      Acc<T> t = 0;
      if constexpr (Spread<T, S>::kExists) t = row.spread.at(j);
      if (j != apart) add_element<T, S>(stats, to_acc(edge_), t);
    }
    sweep_edges(stats, row.view, row.spread, apart, share.edge_rank + share.edge_step,
                share.edge_step);
#pragma unroll
    for (int g = 0; g < kHeld; ++g) {
      if (is_there(share, g)) add(registers_[g], g);
    }
    wait_for_copies();
    uint4 bits[kCount];
#pragma unroll 1
    for (int g = kHeld; is_there(share, g); ++g) {
      read(bits, row, share, g);
      add(bits, g);
    }
    return stats.result();
  }

  // Writes the gradient, and requests the next row, if that is read.
  template <typename Values>
  __device__ __forceinline__ void write(const RowOf& row, const ShareOf& share,
                                        const Values& values, const RowOf& next,
                                        const ShareOf& next_share) {
    const auto put = [&](const uint4(&bits)[kCount], int g) {
      const bool is_small = kIsCapped<S> && g < 32 && (small_groups_ >> g & 1) != 0;
      write_vectors(row.out, row.view, values, share, first(share, g), bits, is_small);
    };
    if (share.edge_rank < row.view.n_edges) {
      const int j = row.view.edge_class(share.edge_rank);
      row.out[j] = from_acc<T>(values.element(to_acc(edge_), j));
    }
    write_edges(row.out, row.view, values, share.edge_rank + share.edge_step, share.edge_step);
    if (next.is_read) fetch_edge(next, next_share);
#pragma unroll
    for (int g = 0; g < kHeld; ++g) {
      if (is_there(share, g)) put(registers_[g], g);
      if (next.is_read) fetch_registers(next, next_share, g);
    }
    uint4 bits[kCount];
#pragma unroll 1
    for (int g = 0; g < n_shared_; ++g) {
      if (is_there(share, kHeld + g)) {
        read(bits, row, share, kHeld + g);
        put(bits, kHeld + g);
      }
      if (next.is_read) fetch_shared(next, next_share, g);
    }
#pragma unroll 1
    for (int g = kHeld + n_shared_; is_there(share, g); ++g) {
      read(bits, row, share, g);
      put(bits, g);
    }
  }

 private:
  static constexpr int kHeld = kInRegisters<T, S>;

  static __device__ __forceinline__ int first(const ShareOf& share, int g) {
    return share.first + g * share.step;
  }
  static __device__ __forceinline__ bool is_there(const ShareOf& share, int g) {
    return first(share, g) < share.end;
  }
  __device__ __forceinline__ uint4* place(int g) const {
    return vectors_ + g * kCount * static_cast<int>(blockDim.x);
  }

  // Reads group g from shared memory, or from global memory if it did not fit.
  __device__ __forceinline__ void read(uint4 (&bits)[kCount], const RowOf& row,
                                       const ShareOf& share, int g) const {
    if (g - kHeld < n_shared_) {
      const uint4* from = place(g - kHeld);
      share.template read<T>(bits, first(share, g), [&](int u, int) { return from[u * kWarp]; });
    } else {
      share.template load<true>(bits, row.view, first(share, g));
    }
  }
  __device__ __forceinline__ void fetch_edge(const RowOf& row, const ShareOf& share) {
    if (share.edge_rank < row.view.n_edges) {
      edge_ = row.view.data[row.view.edge_class(share.edge_rank)];
    }
  }
  __device__ __forceinline__ void fetch_registers(const RowOf& row, const ShareOf& share, int g) {
    if (is_there(share, g)) share.template load<true>(registers_[g], row.view, first(share, g));
  }
  __device__ __forceinline__ void fetch_shared(const RowOf& row, const ShareOf& share, int g) {
    if (!is_there(share, kHeld + g)) return;
    uint4* to = place(g);
    share.for_vectors(first(share, kHeld + g), [&](int u, int w) {
      copy_vector_async(to + u * kWarp, row.view.data + row.view.vector_class(w));
    });
  }

  uint4* vectors_;
  int n_shared_;
  uint32_t small_groups_;  // of the first 32, those that the sweep has found to be small
  uint4 registers_[kHeld > 0 ? kHeld : 1][kCount];
  T edge_;
};

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    forward_backward_rows(const __grid_constant__ Arguments a, int team_size, int n_shared) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  extern __shared__ uint4 shared[];
  __shared__ Exchange<A> exchange;
#if __CUDA_ARCH__ >= 900
  // No block writes into another one that has not started.
  if (gridDim.x > 1) cooperative_groups::this_cluster().sync();
#endif
  const A scale = upstream_scale<A>(a);
  const Transform<A>& transform = transform_of<A>(a);
  Team team(team_size, true);
  Held<T, S> held(shared, n_shared / kUnroll<S>);
  const auto target_of = [&](int64_t index) {
    return index < a.n_rows ? read_target(a, index) : Target{};
  };
  const int64_t step = team.count();
  Row<T, S> row(a, team.index(), target_of(team.index()));
  bool is_fetched = false;
  while (row.index < a.n_rows) {
    const Target next_target = target_of(row.index + step);
    if (!row.is_read) {
      const A value = unread_value<A>(row.target);
      if (team.is_leader()) write_unread_row(a, row.index, value);
      fill_row(row_of<T>(a.grad_logits, a.grad_layout, row.index), static_cast<int>(a.vocab_size),
               value, team);
      row = Row<T, S>(a, row.index + step, next_target);
      is_fetched = false;
      continue;
    }
    const ShareFor<S> share(team, row.view.n_vectors);
    if (!is_fetched) held.fetch(row, share);
    const int target = row.target.index;
    const Place place = share.find(row.view, target);
    const A x = target >= 0 ? to_acc(row.view.data[target]) : A(0);
    const A target_logit = transformed(transform, x, kIsCapped<S>);

    const int apart = class_apart(a, target);
    RowStats<A> stats = team.merge<kHasSpread>(
        held.sweep(row, share, apart < 0 ? Place{} : place, apart, transform), exchange);
    const RowResults<A> results = results_of_row(a, row.index, target, target_logit, stats);
    if (team.is_leader()) write_results(a, row.index, results);
    const RowBackward<A> gradient =
        backward_of_row(a, scale, row.index, target, results, place.is_mine, target_logit);
    const Row<T, S> next(a, row.index + step, next_target);
    held.write(row, share, GradientOf<T, S>(gradient, row.spread, transform), next,
               ShareFor<S>(team, next.view.n_vectors));
    if (place.is_mine) {
      row.out[target] = from_acc<T>(gradient.at_target * slope_at(transform, x, kIsCapped<S>));
    }
    row = next;
    is_fetched = next.is_read;
  }
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, const Arguments& a, Plan plan, int64_t shared,
                   cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaError_t error = allow_shared(kernel, shared);
  if (error == cudaSuccess)
    error = fit_cluster(reinterpret_cast<const void*>(kernel), config, &plan);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = cluster_of(plan.parts);
  config.gridDim = grid_for(a, plan, plan.team);
  config.attrs = &cluster;
  config.numAttrs = plan.parts > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, a, plan.team, plan.held);
  return cudaGetLastError();  // not left to the next launch
}

}  // namespace

int capability_of_code(int capability) {
  int of_code = 0;
#if defined(__CUDA_ARCH_LIST__)  // of the host's pass: 800, 900
  for (const int compiled : {__CUDA_ARCH_LIST__}) {
    if (compiled / 10 <= capability && compiled / 10 > of_code) of_code = compiled / 10;
  }
#endif
  return of_code > 0 ? of_code : capability;
}

cudaError_t forward_backward_by_rows(const Arguments& a, const Plan& plan, int64_t shared,
                                     cudaStream_t stream) {
  return with_row_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
    return launch(forward_backward_rows<T, S>, a, plan, shared, stream);
  });
}

}  // namespace fused_xent::cuda
