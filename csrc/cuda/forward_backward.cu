// Loss and gradient by rows in one read and one write of the logits, which the gradient replaces
// (or not: grad_logits may be other memory).
//
// A row is kept on chip: by one block, or from sm_90 on by a cluster of blocks that exchange their
// statistics through distributed shared memory. Each thread copies vectors of its own into shared
// memory, asynchronously, all of them before it waits for the first, and no barrier guards them.
// What has no room is read twice, the second time from the second-level cache. While one block of a
// multiprocessor reads, another writes.
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
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
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
                          int n_blocks) {
  using A = Acc<T>;
  constexpr bool kHasSpread = Spread<T, S>::kExists;
  extern __shared__ uint4 ring[];
  __shared__ Exchange<A> exchange;
  int block = 0;
#if __CUDA_ARCH__ >= 900
  if (n_blocks > 1) {
    const auto cluster = cooperative_groups::this_cluster();
    block = static_cast<int>(cluster.block_rank());
    cluster.sync();  // nobody writes into a block that has not started
  }
#endif
  const A scale = upstream_scale<A>(a);
  Team team(team_size, n_blocks, block);
  const HeldRow held(ring, n_held);
  for (int64_t row = team.index(); row < a.n_rows; row += team.count()) {
    const Target target = read_target(a, row);
    T* out = row_of<T>(a.grad_logits, a.grad_layout, row);
    if (target.is_ignored || target.is_bad) {
      if (team.is_leader()) write_unread_row<A>(a, row, target.is_bad);
      fill_row(out, static_cast<int>(a.vocab_size), target.is_bad ? kNaN<A> : A(0), team, 0, 1);
    } else {
      const Spread<T, S> spread(a, row);
      const RowView<const T> view = view_for<T>(row_of<const T>(a.logits, a.logits_layout, row),
                                                out, spread, static_cast<int>(a.vocab_size));
      const Share share(team, view.n_vectors, 0, 1);
      const auto read = [&](int k, int v) { return held.read(view, k, v); };
      held.copy(view, share);
      const bool has_target = share.owns(view, target.index);
      const bool is_loss_wanted = team.is_leader() || a.focal_gamma != 0;
      const bool needs_target = has_target || (is_loss_wanted && target.index >= 0);
      const A target_logit = needs_target ? to_acc(view.data[target.index]) : A(0);

      StatsFor<T, S> swept;
      sweep_edges(swept, view, spread, share);
      wait_for_copies();
      sweep_vectors(swept, view, spread, share, read);
      const RowStats<A> stats = team.merge<kHasSpread>(swept.result(), exchange);
      // All but the loss and its slope is right without the target's logit.
      const RowResults<A> results = results_of_row(a, row, target.index, target_logit, stats);
      if (team.is_leader()) write_row(a, row, results);
      const RowGradient<A> gradient =
          gradient_of_row(a, scale, row, target.index, results, has_target, target_logit);
      const GradientOf<T, S, 2> values{gradient, spread};  // from shared memory: soon there
      write_edges(out, view, values, share);
      uint4 bits[2];
      read_vectors(bits, share, 0, share.begin + share.rank, read);
      write_vectors(out, view, values, share, bits, read);
      if (has_target) out[target.index] = from_acc<T>(gradient.at_target);
    }
  }
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, const Arguments& a, const Plan& plan, int64_t shared,
                   cudaStream_t stream) {
  const cudaError_t error = allow_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  const int64_t most = plan.max_groups > 0 ? plan.max_groups : INT32_MAX / plan.parts;
  const auto parts = static_cast<unsigned>(plan.parts);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {parts, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(a.n_rows, plan.threads / plan.team, most) * parts);
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.parts > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a, plan.team, plan.held, plan.parts);
}

}  // namespace

cudaError_t forward_backward_by_rows(const Arguments& a, const Plan& plan, int64_t shared,
                                     cudaStream_t stream) {
  return with_types(a, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    return launch(forward_backward_rows<T, S>, a, plan, shared, stream);
  });
}

}  // namespace fused_xent::cuda
