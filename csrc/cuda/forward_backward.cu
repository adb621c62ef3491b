// Loss and gradient by rows in one read and one write of the logits, which the gradient replaces
// (or not: grad_logits may be other memory).
//
// A row is kept on chip: by one block, or from sm_90 on by a cluster of blocks that exchange their
// statistics through distributed shared memory. Each thread copies vectors of its own into shared
// memory, asynchronously and a row ahead where there is room, so that no barrier guards them: rows
// follow each other with one barrier each. What has no room is read twice, the second time from the
// second-level cache.
#include "dispatch.cuh"
#include "sweep.cuh"

namespace fused_xent::cuda {
namespace {

// Float64, whose every number takes two registers, has half as many threads.
template <typename T>
constexpr int kMaxThreads = sizeof(T) == 8 ? 256 : 512;

__device__ __forceinline__ void copy_vector_async(uint4* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kLeftPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeftPending) : "memory");
}

// One thread's vectors of a row, of which the first `held` are in shared memory.
class HeldRow {
 public:
  __device__ HeldRow(uint4* vectors, int held) : vectors_(vectors + threadIdx.x), held_(held) {}

  template <typename T>
  __device__ void copy(const RowView<const T>& view, const Share& share) const {
    int v = share.begin + share.rank;
    for (int k = 0; k < held_ && v < share.end; ++k, v += share.step) {
      copy_vector_async(&at(k), view.data + view.vector_class(v));
    }
  }

  template <typename T>
  __device__ __forceinline__ uint4 read(const RowView<const T>& view, int k, int v) const {
    return k < held_ ? at(k) : load_vector(view.data + view.vector_class(v));
  }

 private:
  __device__ uint4& at(int k) const { return vectors_[k * static_cast<int>(blockDim.x)]; }

  uint4* vectors_;
  int held_;
};

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxThreads<T>, (kMinBlocks<T, S> / 2))
    forward_backward_rows(const __grid_constant__ Arguments a, int team_size, int n_held,
                          int stages, int n_blocks, int block) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  extern __shared__ uint4 ring[];
  __shared__ Exchange<A> exchange;
#if __CUDA_ARCH__ >= 900
  if (n_blocks > 1) {
    const auto cluster = cooperative_groups::this_cluster();
    block = static_cast<int>(cluster.block_rank());
    cluster.sync();  // nobody writes into a block that has not started
  }
#endif
  const A scale = upstream_scale<A>(a);
  Team team(team_size, n_blocks, block);
  const auto view_of = [&](int64_t row) {
    return view_for<T>(row_of<const T>(a.logits, a.logits_layout, row),
                       row_of<const T>(a.grad_logits, a.grad_layout, row), Spread<T, S>(a, row),
                       static_cast<int>(a.vocab_size));
  };
  const auto row_in = [&](int stage) {
    return HeldRow(ring + stage * n_held * static_cast<int>(blockDim.x), n_held);
  };
  const auto copy_row = [&](int64_t row, int stage) {
    if (row < a.n_rows) {
      const Target target = read_target(a, row);
      if (!target.is_ignored && !target.is_bad) {
        const RowView<const T> view = view_of(row);
        row_in(stage).copy(view, Share(team, view.n_vectors, 0, 1));
      }
    }
    end_of_copies();
  };

  // Rows are copied stages - 1 rows ahead of where they are worked on.
  const int64_t n_teams = team.count();
  int stage = 0;
  for (int64_t copied = team.index(), row = copied - (stages - 1) * n_teams; row < a.n_rows;
       copied += n_teams, row += n_teams) {
    copy_row(copied, stage);
    stage = stages - 1 - stage;  // of two: the other one, which holds the row to work on
    if (row < 0) continue;
    if (stages == 2) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    const Target target = read_target(a, row);
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    if (target.is_ignored || target.is_bad) {
      if (team.is_leader()) write_unread_row<A>(a, row, target.is_bad);
      fill_row(out, static_cast<int>(a.vocab_size), target.is_bad ? kNaN<A> : A(0), team, 0, 1);
    } else {
      const RowView<const T> view = view_of(row);
      const Share share(team, view.n_vectors, 0, 1);
      const Spread<T, S> spread(a, row);
      const HeldRow held = row_in(stage);
      const auto read = [&](int k, int v) { return held.read(view, k, v); };
      const bool has_target = share.owns(view, target.index);
      const bool needs_target = has_target || (team.is_leader() && target.index >= 0);
      const A target_logit = needs_target ? to_acc(view.data[target.index]) : A(0);

      RowStats<A> stats = empty_stats<A>();
      sweep_edges(stats, view, spread, share);
      sweep_vectors(stats, view, spread, share, read);
      stats = team.merge<kHasSpread>(stats, exchange);
      if (team.is_leader()) finish_forward(a, row, target.index, target_logit, stats);

      const RowGradient<A> gradient =
          gradient_of_row(a, scale, row, target.index, stats.max, log_sum_of(stats), stats.mass,
                          has_target, target_logit);
      const GradientOf<T, S, 2> values{gradient, spread};  // from shared memory: soon there
      write_edges(out, view, values, share);
      write_vectors(out, view, values, share, read);
      if (has_target) out[target.index] = from_acc<T>(gradient.at_target);
    }
  }
}

// As many blocks as are at work at a time, if there are rows for them.
template <typename Kernel>
cudaError_t launch_resident(Kernel kernel, const Arguments& a, const Plan& plan, int64_t shared,
                            cudaStream_t stream) {
  cudaError_t error = allow_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  int device = 0, sm_count = 0, blocks_per_sm = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, plan.threads,
                                                        static_cast<size_t>(shared));
  if (error != cudaSuccess) return error;
  const int64_t teams_per_block = plan.threads / plan.team;
  int64_t resident = int64_t{sm_count} * (blocks_per_sm > 0 ? blocks_per_sm : 1) / plan.parts;
  resident = resident > 0 ? resident : 1;
  if (plan.max_groups > 0 && plan.max_groups < resident) resident = plan.max_groups;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.parts), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(a.n_rows, teams_per_block, resident) * plan.parts);
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.parts > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a, plan.team, plan.held, plan.stages, plan.parts, 0);
}

}  // namespace

cudaError_t forward_backward_by_rows(const Arguments& a, const Plan& plan, int64_t shared,
                                     cudaStream_t stream) {
  return with_types(a, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    return launch_resident(forward_backward_rows<T, S>, a, plan, shared, stream);
  });
}

}  // namespace fused_xent::cuda
