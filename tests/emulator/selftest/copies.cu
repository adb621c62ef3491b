// Asynchronous copies into shared memory: groups in flight, double buffering, the bulk engine.
// run_copies() launches a case by name.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cases.h"

namespace {

enum Bug { kNone, kNoWait, kEarlyRead, kOverwrite };

__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
template <int kBytes>
__device__ void copy_async(void* target, const void* source) {  // .ca: 4, 8 or 16 bytes
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(target)),
               "l"(source), "n"(kBytes)
               : "memory");
}
// Copies source_bytes; the rest of the 16 bytes is filled with zeros.
__device__ void copy_async_16(void* target, const void* source, int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(source_bytes)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <Bug kBug>
__global__ void stage(const float* x, float* y) {
  __shared__ float staged[kThreads];
  copy_async<4>(&staged[threadIdx.x], x + threadIdx.x);
  commit();
  if (kBug != kNoWait) wait_group<0>();
  __syncthreads();
  y[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
}

// y: the first half after the wait for the older of two groups, the second half at that time, and
// the second half after its own wait.
__global__ void two_groups(const float* x, float* y) {
  __shared__ alignas(16) float staged[kThreads];
  const int i = static_cast<int>(threadIdx.x), half = kThreads / 2;  // 8 threads, 4 floats each
  copy_async_16(staged + 4 * i, x + 4 * i);
  commit();
  copy_async<8>(staged + half + 4 * i, x + half + 4 * i);
  copy_async<8>(staged + half + 4 * i + 2, x + half + 4 * i + 2);
  commit();
  wait_group<1>();
  y[i] = staged[4 * i + 3];
  y[8 + i] = staged[half + 4 * i + 3];
  wait_group<0>();
  y[16 + i] = staged[half + 4 * i + 3];
}

__global__ void partial(const float* x, float* y) {
  __shared__ alignas(16) float staged[4];
  copy_async_16(staged, x, 8);
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int i = 0; i < 4; ++i) y[i] = staged[i];
}

// Each thread adds its neighbour's element of four tiles of 16; two tiles are in flight.
template <Bug kBug>
__global__ void double_buffer(const float* x, float* y) {
  constexpr int kTile = 16, kTiles = kThreads / kTile;
  __shared__ float staged[2][kTile];
  const unsigned i = threadIdx.x;
  copy_async<4>(&staged[0][i], x + i);
  commit();
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) copy_async<4>(&staged[(tile + 1) % 2][i], x + (tile + 1) * kTile + i);
    commit();  // an empty group at the end, so that the count below holds
    wait_group<kBug == kEarlyRead ? 2 : 1>();
    __syncthreads();
    sum += staged[tile % 2][kTile - 1 - i];
    if (kBug != kOverwrite) __syncthreads();  // before the next copy overwrites what was read
  }
  y[i] = sum;
}

// Each thread has its own element in shared memory, and issues the next copy before reading it.
__global__ void overwrite_alone(const float* x, float* y) {
  __shared__ float place[kThreads / 2];
  const unsigned i = threadIdx.x;
  copy_async<4>(&place[i], x + i);
  asm volatile("cp.async.wait_all;" ::: "memory");
  copy_async<4>(&place[i], x + kThreads / 2 + i);
  const float first = place[i];
  asm volatile("cp.async.wait_all;" ::: "memory");
  y[i] = place[i] - first;
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
__global__ void bulk_copy(const float* x, float* y) {  // in and out through the bulk engine
  __shared__ alignas(128) float staged[kThreads];
  __shared__ alignas(8) uint64_t bar;
  const auto barrier = shared_address(&bar);
  const auto shared = shared_address(staged);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 256;" ::"r"(barrier));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], 256, [%2];" ::"r"(shared),
        "l"(x), "r"(barrier)
        : "memory");
  }
  asm volatile(
      "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared.b64 p, [%0], 0;"
      " @p bra DONE; bra WAIT; DONE: }" ::"r"(barrier)
      : "memory");
  const float mirrored = staged[kThreads - 1 - threadIdx.x];
  __syncthreads();
  staged[threadIdx.x] = mirrored;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;" ::"l"(y),
                 "r"(shared)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
#endif

template <Bug kBug>
bool run_stage(Buffers& b) {
  stage<kBug><<<1, kThreads>>>(b.exact, b.y);
  return reversed(b, kThreads);
}
bool run_two_groups(Buffers& b) {
  two_groups<<<1, 8>>>(b.exact, b.y);
  for (int i = 0; i < 8; ++i) {
    const float older = b.x[4 * i + 3], newer = b.x[kThreads / 2 + 4 * i + 3];
    if (b.y[i] != older || !std::isnan(b.y[8 + i]) || b.y[16 + i] != newer) return false;
  }
  return true;
}
bool run_partial(Buffers& b) {
  partial<<<1, 1>>>(b.exact, b.y);
  return b.y[0] == b.x[0] && b.y[1] == b.x[1] && b.y[2] == 0 && b.y[3] == 0;
}
template <Bug kBug>
bool run_double_buffer(Buffers& b) {
  double_buffer<kBug><<<1, 16>>>(b.exact, b.y);
  for (int i = 0; i < 16; ++i)
    if (b.y[i] != 4 * b.x[15 - i] + 16 * (0 + 1 + 2 + 3)) return false;
  return true;
}
bool run_overwrite_alone(Buffers& b) {
  overwrite_alone<<<1, kThreads / 2>>>(b.exact, b.y);
  for (int i = 0; i < kThreads / 2; ++i)
    if (b.y[i] != b.x[kThreads / 2 + i] - b.x[i]) return false;
  return true;
}
bool run_bulk_copy(Buffers& b) {
  bulk_copy<<<1, kThreads>>>(b.exact, b.y);
  return reversed(b, kThreads);
}

constexpr NamedCase kCases[] = {
    {"good_async_copy", run_stage<kNone>},
    {"good_two_groups", run_two_groups},
    {"good_partial_copy", run_partial},
    {"good_double_buffer", run_double_buffer<kNone>},
    {"good_bulk_copy", run_bulk_copy},
    {"missing_async_wait", run_stage<kNoWait>},
    {"early_read", run_double_buffer<kEarlyRead>},
    {"early_overwrite", run_double_buffer<kOverwrite>},
    {"early_overwrite_alone", run_overwrite_alone},
};

}  // namespace

extern "C" int run_copies(const char* name) { return run_named(kCases, name); }
