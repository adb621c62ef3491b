// The planner: which kernel runs, and in what shape. Plain C++, no CUDA.
//
// With b bytes an element and n = vocab_size * b bytes a row:
//
//   regime    chosen for                          what works on a row
//   columns   class stride not 1, or n <= 128     one thread on one row, or on 16 bytes of adjacent
//                                                 rows; workers share its classes if there are many
//   warp      n <= 4 KiB                          2 to 32 neighbouring threads
//   block     longer rows                         a block of 32 to 512 threads
//   split     longer rows, too few to fill the    several blocks. forward: each leaves its part's
//             card with a block each; backward:   statistics, a second kernel merges them;
//             rows above 32 KiB; and, on          backward: each writes its part; forward_backward:
//             clusters, forward_backward: rows    a thread-block cluster of 2, 4 or 8
//             that no block has room for
//
// forward_backward keeps rows on chip, in registers and shared memory, between loss and gradient.
// The part of a row that does not fit is read again; by then it is in L2.
#pragma once

#include <cstdint>

#include "../xent_params.h"

namespace fused_xent::cuda {

enum class Regime { columns, warp, block, split };

struct Device {
  int capability;    // of the code that it runs, at most the device's own: 90 for 9.0
  int sm_count;      // multiprocessors
  int shared_bytes;  // at most for one block
};

// Inputs of the planner.
struct Shape {
  int64_t n_rows, vocab_size;
  int element_size;
  bool adjacent_classes;  // class stride 1, in all tensors of the logits' shape
  bool adjacent_rows;     // 16 bytes of neighbouring rows are aligned vectors, in all of these
  bool general = false;   // by rows, general kernels: no rows kept on chip
  bool spread = false;    // labels of all classes are read
  bool packed = false;    // the rows are one piece of aligned memory, in all tensors
  bool scaled = false, capped = false;  // by columns, general kernels: no vectors of rows

  bool is_general(Regime regime) const {
    return general || (regime == Regime::columns && (scaled || capped));
  }
  int64_t row_bytes() const { return vocab_size * element_size; }
  int64_t row_vectors() const { return (row_bytes() + 15) / 16; }  // as if aligned
};
Shape shape_of(const Params& p);

struct Plan {
  Regime regime;
  int threads;         // a block's
  int team = 0;        // by rows: threads of a block for each row, a power of two or all of them
  int parts = 1;       // split: blocks for each row
  int held = 0;        // forward_backward: 16-byte vectors that a thread holds in shared memory
  int workers = 1;     // columns: threads for each row
  int row_vector = 1;  // columns: adjacent rows of a thread
  // At most so many blocks or clusters, which loop over rows; 0: no limit. See has_lane_rows.
  int max_groups = 0;
};

Plan plan_forward(const Shape& shape, const Device& device);
Plan plan_backward(const Shape& shape, const Device& device);
Plan plan_forward_backward(const Shape& shape, const Device& device);

// Warp: forward and backward finish a row in each lane, see warp_rows.cuh. A lane finishes at most
// one row: if max_groups blocks are too few for that, more are launched.
bool has_lane_rows(const Plan& plan, const Shape& shape);
// Columns: blocks copy their rows to shared memory, each of at most kMostStagedBytes.
constexpr int kMostStagedBytes = 128;
bool is_staged(const Plan& plan, const Shape& shape);
// Bytes of dynamic shared memory.
int64_t shared_bytes(const Plan& plan, const Shape& shape);
// Why a plan, which may come from elsewhere, cannot serve; null if it can.
const char* why_not(const Plan& plan, const Shape& shape, const Device& device);

}  // namespace fused_xent::cuda
