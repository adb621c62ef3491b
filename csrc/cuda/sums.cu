// Sums over rows and over class weights: the loss, and the total weight by which `mean` divides it.
// They are computed in float64, in an order that depends only on the number of rows.
//
// A thread requests kBatch rows before it adds the first, so 8192 rows are one round trip to L2 of
// one block: 32 KB of losses, and 64 KB of targets where the weights are wanted.
#include "dispatch.cuh"
#include "labels.cuh"
#include "team.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kThreads = 512;  // of 1024 threads, each would have too few registers
constexpr int64_t kRowsPerBlock = 32 * kThreads;
template <typename A>
constexpr int kBatch = 64 / sizeof(A);

struct Pair {
  double weight, loss;
};

__device__ __forceinline__ Pair sum_of_warp(Pair mine) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    mine.weight += __shfl_xor_sync(~0u, mine.weight, lane);
    mine.loss += __shfl_xor_sync(~0u, mine.loss, lane);
  }
  return mine;
}

// Returns the sum of all threads of the block to those of its first warp.
__device__ __forceinline__ Pair sum_of_block(Pair mine) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Pair warps[kWarps];
  mine = sum_of_warp(mine);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x >= kWarp) return {0, 0};
  return sum_of_warp(threadIdx.x < kWarps ? warps[threadIdx.x] : Pair{0, 0});
}

__device__ __forceinline__ void write_loss(const Sums& sums, double loss) {
  switch (sums.loss_dtype) {
    case DType::float64:
      *static_cast<double*>(sums.loss) = loss;
      break;
    case DType::float32:
      *static_cast<float*>(sums.loss) = static_cast<float>(loss);
      break;
    case DType::bfloat16:
      *static_cast<__nv_bfloat16*>(sums.loss) = __float2bfloat16_rn(static_cast<float>(loss));
      break;
    default:
      *static_cast<__half*>(sums.loss) = __float2half_rn(static_cast<float>(loss));
  }
}

__device__ __forceinline__ void finish(const Arguments& a, const Sums& sums, Pair sum) {
  if (threadIdx.x != 0) return;
  const double total_weight = a.total_weight == nullptr ? sum.weight : *a.total_weight;
  if (sums.total_weight != nullptr) *sums.total_weight = total_weight;
  if (sums.loss != nullptr)
    write_loss(sums, sums.mean ? mean_of(sum.loss, total_weight) : sum.loss);
}

// The rows first, first + kThreads and so on, a batch. Rows beyond the last have no weight.
template <typename A>
struct Batch {
  const Arguments& a;
  int64_t first;

  __device__ int64_t row(int u) const { return first + u * kThreads; }
  __device__ bool has(int u) const { return row(u) < a.n_rows; }

  __device__ __forceinline__ void read_losses(A (&loss)[kBatch<A>]) const {
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) {
      loss[u] = has(u) ? static_cast<const A*>(a.row_loss)[row(u)] : A(0);
    }
  }

  __device__ __forceinline__ double weight() const {
    double sum = 0;
    int target[kBatch<A>];
    if (has_indices(a)) read_targets(target);
    if (has_indices(a) && a.weight == nullptr && a.token_weight == nullptr) {
      int count = 0;  // conversions to float64 would take longer than the loads
#pragma unroll
      for (int u = 0; u < kBatch<A>; ++u) count += target[u] >= 0;
      return count;
    }
    A token[kBatch<A>], of_class[kBatch<A>];
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) token[u] = has(u) ? token_weight<A>(a, row(u)) : A(0);
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) {
      const bool counts = token[u] != 0 && (!has_indices(a) || target[u] >= 0);
      of_class[u] = !counts ? A(0) : has_indices(a) ? class_weight<A>(a, target[u]) : A(1);
      if (!counts) token[u] = 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) sum += double{of_class[u]} * token[u];
    return sum;
  }

 private:
  __device__ bool is_class(int64_t target) const {
    return 0 <= target && target < a.vocab_size && target != a.ignore_index;
  }
  template <typename Index>
  __device__ __forceinline__ void read(const Index* from, int (&target)[kBatch<A>]) const {
    Index index[kBatch<A>];
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) {
      index[u] = has(u) ? from[row(u)] : Index(0);
    }
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) {
      target[u] = has(u) && is_class(index[u]) ? static_cast<int>(index[u]) : -1;
    }
  }
  // -1: ignored, no class, or beyond the last row.
  __device__ __forceinline__ void read_targets(int (&target)[kBatch<A>]) const {
    with_indices(a, [&](const auto* from) { read(from, target); });
  }
};

template <typename A>
__global__ void __launch_bounds__(kThreads, 1)
    sum_blocks_of_rows(const __grid_constant__ Arguments a, const __grid_constant__ Sums sums,
                       Pair* partials) {
  const bool wants_weight =
      a.total_weight == nullptr && (sums.mean || sums.total_weight != nullptr);
  Pair mine{0, 0};
  const int64_t rows_at_once = int64_t{kBatch<A>} * kThreads;
  for (int64_t begin = blockIdx.x * rows_at_once; begin < a.n_rows;
       begin += gridDim.x * rows_at_once) {
    const Batch<A> batch{a, begin + threadIdx.x};
    A loss[kBatch<A>] = {};
    if (sums.loss != nullptr) batch.read_losses(loss);
    if (wants_weight) mine.weight += batch.weight();
#pragma unroll
    for (int u = 0; u < kBatch<A>; ++u) mine.loss += loss[u];
  }
  const Pair sum = sum_of_block(mine);
  if (gridDim.x == 1) {
    finish(a, sums, sum);
  } else if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_partials(const __grid_constant__ Arguments a, const __grid_constant__ Sums sums,
                 const Pair* partials, int count) {
  const int i = static_cast<int>(threadIdx.x);
  finish(a, sums, sum_of_block(i < count ? partials[i] : Pair{0, 0}));
}

}  // namespace

cudaError_t sum_rows(const Arguments& a, const Sums& sums, double* workspace, cudaStream_t stream) {
  static_assert(kMaxSumBlocks <= kThreads);
  if (sums.loss == nullptr && sums.total_weight == nullptr) return cudaSuccess;
  auto* partials = reinterpret_cast<Pair*>(workspace);
  unsigned grid = blocks_for(a.n_rows, kRowsPerBlock, kMaxSumBlocks);
  if (grid == 0) grid = 1;  // the sums of no rows are wanted as well
  const auto sum_blocks =
      a.dtype == DType::float64 ? sum_blocks_of_rows<double> : sum_blocks_of_rows<float>;
  sum_blocks<<<grid, kThreads, 0, stream>>>(a, sums, partials);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || grid == 1) return error;
  sum_partials<<<1, kThreads, 0, stream>>>(a, sums, partials, static_cast<int>(grid));
  return cudaGetLastError();
}

cudaError_t sum_class_weights(const Params& p, double* sum, double* workspace,
                              cudaStream_t stream) {
  Arguments weights{};  // as the losses of rows
  weights.dtype = p.dtype;
  weights.n_rows = p.vocab_size;
  weights.row_loss = const_cast<void*>(p.weight);
  return sum_rows(weights, {nullptr, sum, DType::float64, false}, workspace, stream);
}

}  // namespace fused_xent::cuda
