// Forward, backward and forward_backward where the classes of a row are not adjacent, or so few
// that one thread takes them all: images (batch, class, pixel), transposed matrices, ten classes.
//
// A thread has one row, or 16 bytes of adjacent rows, and walks over the classes. Neighbouring
// threads have neighbouring rows, so that accesses are whole cache lines without a transposition.
// Where rows are few, several workers share the classes of each. Forward reads once; backward reads
// and writes once; forward_backward finds the logits in a cache at its second read.
//
// Short rows whose classes are adjacent lie the other way round: neighbouring threads would read
// and write single elements in as many cache lines. So a block first copies its rows, one piece of
// memory, to shared memory, by 16 bytes, and copies the gradient back in the same way.
#include "column_rows.cuh"
#include "dispatch.cuh"
#include "regimes.h"
#include "staged.cuh"
#include "sweep.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kMaxThreads = 256;

template <typename T, typename S>
using ColumnStats = LongSweepStats<Acc<T>, Spread<T, S>::kExists>;

// logit(j) points to class j of the first row.
template <typename T, typename S, int R, typename At>
__device__ __forceinline__ void sweep_rows(const Arguments& p, const Rows<kUnroll<S>, R>& rows,
                                           const At& logit, ColumnStats<T, S> (&stats)[R]) {
  using A = Acc<T>;
  const Spread<T, S> spread(p, rows.first);
  rows.for_classes([&](int j, auto count) {
    Numbers<T, R> logits[kUnroll<S>];
    A x[R], max[R], sum[R], mass[R], dot[R];
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      if (u < count) logits[u].template load<true>(logit(j + u));
    }
    if (!Spread<T, S>::kExists && rows.has_target_in_group(j)) {
      asm volatile("");  // keeps this a branch
#pragma unroll
      for (int u = 0; u < kUnroll<S>; ++u) {
        logits[u].get(x);
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] = j + u == rows.target[r] ? -kInfinity<A> : x[r];
        logits[u].set(x);
      }
    }
    Numbers<T, R> top = logits[0];
#pragma unroll
    for (int u = 1; u < kUnroll<S>; ++u) {
      if (u < count) top.raise(logits[u]);
    }
    top.get(x);
#pragma unroll
    for (int r = 0; r < R; ++r) max[r] = fmax(stats[r].max, x[r]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      stats[r].raise_max(max[r]);
      sum[r] = mass[r] = dot[r] = 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      if (u >= count) continue;
      logits[u].get(x);
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] += exp_nonpositive(x[r] - max[r]);
      if constexpr (Spread<T, S>::kExists) {
        A t[R];
        load_spread<true, R>(spread, has_indices(p), j + u, t);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          mass[r] += t[r];
          if (t[r] != 0) dot[r] += t[r] * (x[r] - max[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      add_to(stats[r].sum, stats[r].lost_sum, sum[r]);
      if constexpr (Spread<T, S>::kExists) stats[r].add_labels(mass[r], dot[r]);
    }
  });
}

// Merges the workers' stats of a row, writes its results and returns its gradient.
template <typename T>
__device__ __forceinline__ RowBackward<Acc<T>> finish_row(const Arguments& a, Acc<T> scale,
                                                          int64_t row,
                                                          const RowStats<Acc<T>>* stats,
                                                          int n_workers, int stride,
                                                          bool has_forward, bool has_backward) {
  using A = Acc<T>;
  const Target target = read_target(a, row);
  if (!target.is_read()) {
    const A value = unread_value<A>(target);
    if (has_forward) write_unread_row(a, row, value);
    return {{0, value, 0}, 0};
  }
  const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
  const A target_logit =
      target.index < 0 ? A(0) : to_acc(logits[target.index * a.logits_layout.class_stride]);
  const bool wants_target = has_backward && target.index >= 0;
  RowResults<A> results;
  if (has_forward) {
    RowStats<A> merged = stats[0];
    for (int i = 1; i < n_workers; ++i) merge_stats(merged, stats[i * stride]);
    results = results_of_row(a, row, target.index, target_logit, merged);
    write_results(a, row, results);
    if (!has_backward) return {};
  } else {
    results = saved_results<A>(a, row);
  }
  return backward_of_row(a, scale, row, target.index, results, wants_target, target_logit);
}

// out(j) points to where its gradient goes.
template <typename T, typename S, int R, typename At, typename Out>
__device__ __forceinline__ void write_rows(const Arguments& a, const Rows<kUnroll<S>, R>& rows,
                                           const At& logit, const Out& out,
                                           const RowBackward<Acc<T>>* shared) {
  using A = Acc<T>;
  const Spread<T, S> spread(a, rows.first);
  RowGradient<A> gradients[R];
#pragma unroll
  for (int r = 0; r < R; ++r) gradients[r] = shared[r];
  rows.for_classes([&](int j, auto count) {
    Numbers<T, R> numbers[kUnroll<S>];
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      if (u < count && rows.any) numbers[u].template load<false>(logit(j + u));
    }
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      if (u >= count) continue;
      A x[R];
      numbers[u].get(x);
      [[maybe_unused]] A t[R];
      if constexpr (Spread<T, S>::kExists) {
        if (rows.any) load_spread<false, R>(spread, has_indices(a), j + u, t);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        A value = gradients[r].factor;  // the whole gradient of a row that is not read
        if (rows.any) {
          value *= exp_nonpositive(x[r] - gradients[r].max);
          if constexpr (Spread<T, S>::kExists) value -= t[r] * gradients[r].spread;
        }
        x[r] = rows.is_kept[r] ? value : A(0);
      }
      numbers[u].set(x);
      numbers[u].store(out(j + u));
    }
  });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!rows.owns(rows.target[r])) continue;
    out(rows.target[r])[r] = from_acc<T>(shared[r].at_target);
  }
}

template <typename T, typename S, int R, bool kStaged>
__global__ void __launch_bounds__(kMaxThreads, (R == 1 ? kMinBlocks<T, S> - kStaged
                                                : std::is_void_v<S> && sizeof(T) < 8 ? 2
                                                                                     : 1))
    columns(const __grid_constant__ Arguments a, int n_workers, bool has_forward,
            bool has_backward) {
  using A = Acc<T>;
  static_assert(sizeof(RowBackward<A>) == sizeof(RowStats<A>));
  extern __shared__ __align__(16) char memory[];
  auto* stats = reinterpret_cast<RowStats<A>*>(memory);
  auto* gradients = reinterpret_cast<RowBackward<A>*>(memory);
  const Staged<T> staged(memory, static_cast<int>(a.vocab_size));
  write_unread_total_weight(a);
  const A scale = has_backward ? upstream_scale<A>(a) : A(0);
  const int lanes = static_cast<int>(blockDim.x) / n_workers, n_slots = lanes * R;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int worker = static_cast<int>(threadIdx.x) / lanes;
  for (int64_t block = blockIdx.x; block * n_slots < a.n_rows; block += gridDim.x) {
    const int64_t first = block * n_slots;
    const Rows<kUnroll<S>, R> rows(a, first + lane * R, worker, n_workers);
    const bool has_rows = rows.first < a.n_rows;
    const auto n_staged = static_cast<int>(min(a.n_rows - first, int64_t{n_slots}));
    if constexpr (kStaged) {
      staged.copy_from(static_cast<const T*>(a.logits) + first * a.vocab_size, n_staged);
      __syncthreads();
    }
    const int64_t row = has_rows ? rows.first : 0;
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    T* gradient = row_of<T>(a.grad_logits, a.grad_layout, row);
    const auto logit = [&](int64_t j) -> const T* {
      if constexpr (kStaged) return staged.at(lane, static_cast<int>(j));
      return logits + j * a.logits_layout.class_stride;
    };
    const auto out = [&](int64_t j) -> T* {
      if constexpr (kStaged) return staged.at(lane, static_cast<int>(j));
      return gradient + j * a.grad_layout.class_stride;
    };
    if (has_forward) {
      ColumnStats<T, S> mine[R];
      if (has_rows && rows.any) sweep_rows<T, S, R>(a, rows, logit, mine);
#pragma unroll
      for (int r = 0; r < R; ++r) stats[worker * n_slots + lane * R + r] = mine[r].result();
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < n_slots; slot += blockDim.x) {
      if (first + slot >= a.n_rows) continue;
      gradients[slot] = finish_row<T>(a, scale, first + slot, stats + slot, n_workers, n_slots,
                                      has_forward, has_backward);
    }
    __syncthreads();
    if (has_backward && has_rows) {
      write_rows<T, S, R>(a, rows, logit, out, gradients + lane * R);
    }
    __syncthreads();  // the next rows' stats overwrite these gradients
    if constexpr (kStaged) {
      if (has_backward) {
        staged.copy_to(static_cast<T*>(a.grad_logits) + first * a.vocab_size, n_staged);
      }
      __syncthreads();
    }
  }
}

// A thread reads 4 classes of its rows before it writes the first.
template <typename T, int R>
__global__ void __launch_bounds__(kMaxThreads, kScaleThreadsPerSm / kMaxThreads)
    scale_columns(const __grid_constant__ Arguments a, int n_workers) {
  using A = Acc<T>;
  const A scale = upstream_scale<A>(a);
  if (a.grad_loss_stride == 0 && grad_loss_of(a, scale, 0) == 1) return;
  const int lanes = static_cast<int>(blockDim.x) / n_workers;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int worker = static_cast<int>(threadIdx.x) / lanes;
  for (int64_t first = (int64_t{blockIdx.x} * lanes + lane) * R; first < a.n_rows;
       first += int64_t{gridDim.x} * lanes * R) {
    const Rows<4, R> rows(a, first, worker, n_workers);
    bool any_kept = false;
#pragma unroll
    for (int r = 0; r < R; ++r) any_kept |= rows.is_kept[r];
    if (!any_kept) continue;
    A factor[R];
#pragma unroll
    for (int r = 0; r < R; ++r) factor[r] = rows.is_kept[r] ? grad_loss_of(a, scale, first + r) : 1;
    T* out = row_of<T>(a.grad_logits, a.grad_layout, first);
    rows.for_classes([&](int j, auto count) {
      Numbers<T, R> numbers[4];
      const auto place = [&](int u) { return out + (j + u) * a.grad_layout.class_stride; };
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (u < count) numbers[u].template load<true>(place(u));
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (u >= count) continue;
        A x[R];
        numbers[u].get(x);
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] *= factor[r];
        numbers[u].set(x);
        numbers[u].store(place(u));
      }
    });
  }
}

template <typename T, typename S, int R, bool kStaged = false>
cudaError_t launch(const Arguments& a, const Plan& plan, int64_t shared, bool has_forward,
                   bool has_backward, cudaStream_t stream) {
  const auto kernel = columns<T, S, R, kStaged>;
  const cudaError_t error = allow_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  const unsigned grid = blocks_for(a.n_rows, plan.threads / plan.workers * R);
  kernel<<<grid, plan.threads, static_cast<size_t>(shared), stream>>>(a, plan.workers, has_forward,
                                                                      has_backward);
  return cudaGetLastError();
}

template <typename T, int R>
cudaError_t launch_scale(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  const unsigned grid = blocks_for(a.n_rows, plan.threads / plan.workers * R, plan.max_groups);
  scale_columns<T, R><<<grid, plan.threads, 0, stream>>>(a, plan.workers);
  return cudaGetLastError();
}

}  // namespace

cudaError_t by_columns(const Arguments& a, const Plan& plan, int64_t shared, bool has_forward,
                       bool has_backward, cudaStream_t stream) {
  const bool staged = is_staged(plan, shape_of(a));
  return with_types(a, [&]<typename T, typename S>(Type<T>, Type<S>) {
    if constexpr (std::is_void_v<S>) {
      if (staged) return launch<T, S, 1, true>(a, plan, shared, has_forward, has_backward, stream);
    }
    if (plan.row_vector == 1) {
      return launch<T, S, 1>(a, plan, shared, has_forward, has_backward, stream);
    }
    return launch<T, S, kVector<T>>(a, plan, shared, has_forward, has_backward, stream);
  });
}

cudaError_t scale_by_columns(const Arguments& a, const Plan& plan, cudaStream_t stream) {
  return with_dtype(a.dtype, [&]<typename T>(Type<T>) {
    return plan.row_vector == 1 ? launch_scale<T, 1>(a, plan, stream)
                                : launch_scale<T, kVector<T>>(a, plan, stream);
  });
}

}  // namespace fused_xent::cuda
