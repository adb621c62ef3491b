// Sums over rows and over class weights: the loss, and the total weight by which `mean` divides it.
// They are computed in float64, in an order that depends only on the number of rows.
#include "dispatch.cuh"
#include "labels.cuh"
#include "team.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kRowsPerBlock = 32 * kThreads;

struct Pair {
  double weight, loss;
};

// Returns the sum of all threads of the block to each of them.
__device__ __forceinline__ Pair sum_of_block(Pair mine) {
  __shared__ Pair warps[kThreads / kWarp];
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    mine.weight += __shfl_xor_sync(~0u, mine.weight, lane);
    mine.loss += __shfl_xor_sync(~0u, mine.loss, lane);
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  Pair sum{0, 0};
  for (const Pair& warp : warps) {
    sum.weight += warp.weight;
    sum.loss += warp.loss;
  }
  return sum;
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

__device__ __forceinline__ void finish(const Sums& sums, Pair sum) {
  if (threadIdx.x != 0) return;
  const double total_weight = sums.normalizer == nullptr ? sum.weight : *sums.normalizer;
  if (sums.total_weight != nullptr) *sums.total_weight = total_weight;
  if (sums.loss != nullptr)
    write_loss(sums, sums.mean ? mean_of(sum.loss, total_weight) : sum.loss);
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_blocks_of_rows(const __grid_constant__ Arguments a, const __grid_constant__ Sums sums,
                       Pair* partials) {
  Pair mine{0, 0};
  const int64_t n_threads = int64_t{gridDim.x} * kThreads;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < a.n_rows;
       row += n_threads) {
    const Target target = read_target(a, row);
    if (target.is_read()) {
      const A weight = target.index < 0 ? A(1) : class_weight<A>(a, target.index);
      mine.weight += double{weight} * token_weight<A>(a, row);
    }
    if (sums.loss != nullptr) mine.loss += static_cast<const A*>(a.row_loss)[row];
  }
  const Pair sum = sum_of_block(mine);
  if (gridDim.x == 1) {
    finish(sums, sum);
  } else if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_partials(const __grid_constant__ Sums sums, const Pair* partials, int count) {
  const int i = static_cast<int>(threadIdx.x);
  finish(sums, sum_of_block(i < count ? partials[i] : Pair{0, 0}));
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_weights(const A* weight, int64_t count, double* sum) {
  Pair mine{0, 0};
  for (int64_t j = threadIdx.x; j < count; j += kThreads) mine.weight += weight[j];
  const Pair all = sum_of_block(mine);
  if (threadIdx.x == 0) *sum = all.weight;
}

}  // namespace

cudaError_t sum_rows(const Arguments& a, const Sums& sums, double* workspace, cudaStream_t stream) {
  static_assert(kMaxSumBlocks <= kThreads);
  auto* partials = reinterpret_cast<Pair*>(workspace);
  unsigned grid = blocks_for(a.n_rows, kRowsPerBlock, kMaxSumBlocks);
  if (grid == 0) grid = 1;  // the sums of no rows are wanted as well
  const auto sum_blocks =
      a.dtype == DType::float64 ? sum_blocks_of_rows<double> : sum_blocks_of_rows<float>;
  sum_blocks<<<grid, kThreads, 0, stream>>>(a, sums, partials);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || grid == 1) return error;
  sum_partials<<<1, kThreads, 0, stream>>>(sums, partials, static_cast<int>(grid));
  return cudaGetLastError();
}

cudaError_t sum_class_weights(const Params& p, double* sum, cudaStream_t stream) {
  if (p.dtype == DType::float64) {
    sum_weights<<<1, kThreads, 0, stream>>>(static_cast<const double*>(p.weight), p.vocab_size,
                                            sum);
  } else {
    sum_weights<<<1, kThreads, 0, stream>>>(static_cast<const float*>(p.weight), p.vocab_size, sum);
  }
  return cudaGetLastError();
}

}  // namespace fused_xent::cuda
