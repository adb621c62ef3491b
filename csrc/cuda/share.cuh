// How the threads of a team share a row: the vectors and edges of each, and loops over them.
#pragma once

#include "memory.cuh"
#include "team.cuh"

namespace fused_xent::cuda {

// A group: the vectors that a thread reads before it uses the first. Labels may be read beside the
// logits.
template <typename S>
constexpr int kUnroll = kReadsLabels<S> ? 2 : 4;

// Where a thread has a class: as an element of the group that begins with a vector, or in no group,
// as an edge.
struct Place {
  bool is_mine = false;
  int group = -1, element = 0;
};

// The share of a thread in its team's part of a row: groups of kCount vectors, and every
// edge_step-th edge. `lanes` neighbouring threads of a team are in one warp. They have neighbouring
// vectors, so that their groups together are one piece of the row.
template <int kCount>
struct Share {
  int first, end;   // the thread's first vector; the part's end
  int whole_end;    // the end of the vectors with which a whole group begins
  int lanes, step;  // from one vector of a group to the next; from one group to the next
  int edge_rank, edge_step;

  template <typename AnyTeam>
  __device__ Share(const AnyTeam& team, int n_vectors) {
    const int part = team.part(), parts = team.parts();
    int begin = 0;
    end = n_vectors;
    if (parts > 1) {
      const int per_part = ((n_vectors + parts - 1) / parts + kWarp - 1) / kWarp * kWarp;
      begin = min(part * per_part, n_vectors);
      end = min(begin + per_part, n_vectors);
    }
    const int lane = team.lane();
    lanes = team.lanes();
    first = begin + (team.rank() - lane) * kCount + lane;
    step = team.size() * kCount;
    // A group of four counts as whole only if it is whole for all lanes of the team, so that they
    // take the same branch.
    whole_end = kCount < 4 ? end - (kCount - 1) * lanes : end + lane + 1 - kCount * lanes;
    asm("" : "+r"(whole_end));  // keeps it in a register: else it is computed for each group
    edge_rank = team.rank() + part * team.size();
    edge_step = team.size() * parts;
  }

  __device__ __forceinline__ bool is_whole(int v) const { return v < whole_end; }

  // Where class j is; nowhere for -1.
  template <typename T>
  __device__ Place find(const RowView<T>& view, int j) const {
    if (j < 0) return {};
    const int after = j - view.head, v = after / kVector<T>;
    if (after < 0 || v >= view.n_vectors) {
      const int i = after < 0 ? j : j - view.n_vectors * kVector<T>;
      return {i % edge_step == edge_rank, -1, 0};
    }
    const int in_group = (v - first) & (step - 1);
    if (v < first || v >= end || in_group >= kCount * lanes) return {};
    if ((in_group & (lanes - 1)) != 0) return {};
    return {true, v - in_group, in_group / lanes * kVector<T> + after % kVector<T>};
  }

  // Reads the group that begins with vector v < end. read(u, w) returns its u-th vector, which is
  // the row's w-th.
  template <typename T, typename Read>
  __device__ __forceinline__ void read(uint4 (&bits)[kCount], int v, const Read& read) const {
    if (is_whole(v)) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) bits[u] = read(u, v + u * lanes);
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int w = v + u * lanes;
        bits[u] = w < end ? read(u, w) : all_minus_infinity<T>();
      }
    }
  }
  // The same from global memory.
  template <bool kCached, typename T>
  __device__ __forceinline__ void load(uint4 (&bits)[kCount], const RowView<const T>& view,
                                       int v) const {
    read<T>(bits, v, [&](int, int w) {
      const T* vector = view.data + view.vector_class(w);
      return kCached ? load_vector_cached(vector) : load_vector(vector);
    });
  }
  // Calls body(u, w) for each of them.
  template <typename Body>
  __device__ __forceinline__ void for_vectors(int v, const Body& body) const {
    if (is_whole(v)) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) body(u, v + u * lanes);
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (v + u * lanes < end) body(u, v + u * lanes);
      }
    }
  }
};
template <typename S>
using ShareFor = Share<kUnroll<S>>;

// True if all logits of a group are small and `of`, which computes exponentials, has a faster way
// for such: of.small(). Vectors beyond the share's end are minus infinity: not small.
template <typename T, typename Of, int kCount>
__device__ __forceinline__ bool are_small(const Of& of, const uint4 (&bits)[kCount]) {
  if constexpr (requires { of.small(); }) return are_within<T>(of.most_of_small(), bits);
  return false;
}

// Calls body(of, bits[u], w) for the vectors of the group that begins with vector v, of which the
// u-th is the row's w-th; with of.small() instead if the group is small. Other groups are rare
// then, so their loop is not unrolled, to be short.
template <typename T, typename Of, int kCount, typename Body>
__device__ __forceinline__ void for_vectors(const Of& of, bool is_small,
                                            const uint4 (&bits)[kCount], const Share<kCount>& share,
                                            int v, const Body& body) {
  if constexpr (requires { of.small(); }) {
    if (is_small) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) body(of.small(), bits[u], v + u * share.lanes);
      return;
    }
    uint4 left[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) left[u] = bits[u];
    const int end = min(v + kCount * share.lanes, share.end);
#pragma unroll 1
    for (int w = v; w < end; w += share.lanes) {
      body(of, left[0], w);
#pragma unroll
      for (int u = 1; u < kCount; ++u) left[u - 1] = left[u];
    }
  } else {
    share.for_vectors(v, [&](int u, int w) { body(of, bits[u], w); });
  }
}

}  // namespace fused_xent::cuda
