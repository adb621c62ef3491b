// Rows of up to 4 KiB, many of them for each warp.
//
// What a row costs apart from its classes (its target, its logarithm, the factors of its gradient)
// takes a warp as long for 32 rows as for one. So each lane does that for a row of its own. The
// teams of the warp sweep the rows in passes, one row at a time: lane p of a team has the row of
// pass p.
#pragma once

#include "dispatch.cuh"
#include "labels.cuh"
#include "share.cuh"

namespace fused_xent::cuda {

// True if there are such kernels for logits of T and labels of S: see has_lane_rows in plan.h.
template <typename T, typename S>
constexpr bool kHasLaneRows = sizeof(T) < 8 && !kReadsLabels<S> && !kIsCapped<S>;

// A part of a warp that sweeps rows, with the members of Team that Share needs.
class WarpTeam {
 public:
  __device__ WarpTeam(int size, int n_passes) : size_(size), n_passes_(n_passes) {
    log2_size_ = 31 - __clz(size);
  }

  __device__ int size() const { return size_; }
  __device__ int log2_size() const { return log2_size_; }
  __device__ int lanes() const { return size_; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (size_ - 1); }
  __device__ int rank() const { return lane(); }
  static __device__ constexpr int part() { return 0; }
  static __device__ constexpr int parts() { return 1; }

  // This lane's row; -1 if there is none.
  __device__ int64_t row(int64_t n_rows) const {
    const unsigned teams = blockDim.x >> log2_size_;
    const unsigned team = blockIdx.x * teams + (threadIdx.x >> log2_size_);
    const int64_t row = int64_t{team} * n_passes_ + lane();
    return lane() < n_passes_ && row < n_rows ? row : -1;
  }
  // The value of the lane that has the row of a pass.
  template <typename X>
  __device__ __forceinline__ X in_pass(int pass, X x) const {
    return __shfl_sync(~0u, x, pass, size_);
  }
  template <typename T>
  __device__ __forceinline__ T* in_pass(int pass, T* p) const {
    return reinterpret_cast<T*>(in_pass(pass, reinterpret_cast<unsigned long long>(p)));
  }

 private:
  int size_, n_passes_, log2_size_;
};

// What a lane knows of its own row.
template <typename T>
struct LaneRow {
  int64_t index;  // -1: none
  Target target;
  const T* logits;  // of row 0 if there is none

  __device__ LaneRow(const Arguments& a, const WarpTeam& team)
      : index(team.row(a.n_rows)),
        target(exists() ? read_target(a, index) : Target{}),
        logits(row_of<const T>(a.logits, a.logits_layout, first_or_own())) {}

  __device__ bool exists() const { return index >= 0; }
  __device__ int64_t first_or_own() const { return exists() ? index : 0; }
};

// Where a team has class j of a row: as element() of the group that begins with vector group(). If
// j is an edge, there is no such group, or the element is beyond the row's vectors: there minus
// infinity stands already, so leaving it out changes nothing.
template <typename T, int kCount>
struct ClassPlace {
  int after, vector;

  __device__ ClassPlace(const RowView<const T>& view, int j)
      : after(j - view.head), vector(after >> (kVector<T> == 8 ? 3 : 2)) {}

  __device__ int group(const WarpTeam& team) const {
    return vector & ~((kCount - 1) * team.size());
  }
  __device__ int element(const WarpTeam& team) const {
    const int u = vector >> team.log2_size() & (kCount - 1);
    return u * kVector<T> + (after & (kVector<T> - 1));
  }
};

// Launches kernel(a, team, n_passes). Where max_groups limits the blocks, teams have several rows,
// at most one for each of their lanes.
template <typename Kernel>
cudaError_t launch_in_passes(Kernel kernel, const Arguments& a, const Plan& plan,
                             cudaStream_t stream) {
  const int64_t teams = plan.threads / plan.team, most = plan.max_groups * teams;
  const auto n_passes =
      most == 0 ? 1 : static_cast<int>(std::min<int64_t>(ceil_div(a.n_rows, most), plan.team));
  const unsigned grid = blocks_for(a.n_rows, teams * n_passes);
  kernel<<<grid, plan.threads, 0, stream>>>(a, plan.team, n_passes);
  return cudaGetLastError();
}

}  // namespace fused_xent::cuda
