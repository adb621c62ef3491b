#include "plan.h"

#include <algorithm>

#include "../xent_math.h"

namespace fused_xent::cuda {
namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kThreadPerRowBytes = kMostStagedBytes;  // a longer row gets more threads
constexpr int64_t kWarpBytes = 4 * kKiB;                  // a longer row gets a block
constexpr int kVectorsOfThread = 8;                       // of a row, up to the largest block
constexpr int64_t kPartBytes = 32 * kKiB;         // of a row: what a block writes in backward
constexpr int64_t kMostHeld = 32;                 // vectors that a thread holds in shared memory
constexpr int64_t kMaxParts = 65535;              // enough for rows of 2 GB
constexpr int kMaxCluster = 8;                    // the largest that every device with clusters has
constexpr int kVectorsInFlight = 4;               // vectors that a thread reads at once
constexpr int64_t kThreadsInFlight = 480;         // of a multiprocessor: they read 30 KiB at once
constexpr int64_t kRowVectors = 4;                // a row costs a thread as much as so many
constexpr int64_t kMostWaves = 4;                 // of blocks; the last of more matters little
constexpr int64_t kLaneRowThreads = 1024;         // of a multiprocessor, about, by registers
constexpr int64_t kStaticSharedBytes = 2 * kKiB;  // at least what a kernel declares

int64_t round_up(int64_t vectors) { return ceil_div(vectors, kVectorsInFlight) * kVectorsInFlight; }

// The least power of two >= n, but not below least or above most, which are powers of two.
int power_of_two(int64_t n, int least, int most) {
  int power = least;
  while (power < n && power < most) power *= 2;
  return power;
}

// The launch bounds of forward_backward; the other kernels' are 256.
int max_threads(const Shape& shape) { return shape.element_size == 8 ? 256 : 512; }

// Vectors that shared memory has room for, for each thread of a block of forward_backward.
int64_t room_for(const Plan& plan, const Device& device) {
  const int64_t room = (device.shared_bytes - kStaticSharedBytes) / (16 * plan.threads);
  return std::min(room / kVectorsInFlight * kVectorsInFlight, kMostHeld);
}

bool has_clusters(const Device& device) { return device.capability >= 90; }

Plan plan_columns(const Shape& shape, const Device& device) {
  Plan plan{Regime::columns, 256};
  const int vector = 16 / shape.element_size;
  const int64_t n_rows = std::max<int64_t>(shape.n_rows, 1);
  // Several workers only where there are too few rows, and each with 16 classes at least.
  const auto workers = [&](int64_t threads) {
    return power_of_two(std::min(ceil_div(threads, n_rows), shape.vocab_size / 16), 1, 8);
  };
  // 256 threads of a multiprocessor have 16 KiB in flight by vectors, 1024 have 8 KiB without. So
  // there is no use for vectors of 8 or 4 bytes: images with fewer rows take a few microseconds.
  const int64_t for_vectors = int64_t{256} * device.sm_count * vector;
  const bool may_have_vectors = shape.adjacent_rows && !shape.is_general(Regime::columns);
  if (may_have_vectors && n_rows * workers(for_vectors) >= for_vectors) plan.row_vector = vector;
  plan.workers = workers(int64_t{512} * device.sm_count * plan.row_vector);
  return plan;
}

bool is_by_columns(const Shape& shape) {
  return !shape.adjacent_classes || shape.row_bytes() <= kThreadPerRowBytes;
}

// By its length, a row gets a part of a warp or a block. What a thread does once a row costs as
// much as several vectors, so many rows that have a part of a warp get half of it.
Plan plan_rows(const Shape& shape, const Device& device) {
  const int wanted = power_of_two(ceil_div(shape.row_vectors(), kVectorsOfThread), 2, 256);
  if (shape.row_bytes() > kWarpBytes) return {Regime::block, wanted, wanted};
  const int half = std::max(wanted / 2, 2);
  const bool is_enough = shape.n_rows >= ceil_div(kThreadsInFlight * device.sm_count, half);
  return {Regime::warp, 128, is_enough ? half : wanted};
}

// Gives each team of a warp several rows, see warp_rows.cuh: as many as leave waves of blocks that
// are three quarters full.
void give_rows_to_lanes(Plan& plan, const Shape& shape, const Device& device) {
  if (!has_lane_rows(plan, shape)) return;
  const int64_t teams = plan.threads / plan.team;
  const int64_t slots = device.sm_count * kLaneRowThreads / plan.threads;
  for (int n_rows = plan.team; n_rows > 1; n_rows /= 2) {
    const int64_t blocks = ceil_div(shape.n_rows, teams * n_rows);
    if (4 * blocks < 3 * slots * ceil_div(blocks, slots)) continue;
    plan.max_groups = static_cast<int>(blocks);
    return;
  }
}

// Splits rows that have a block each into `least` parts or more: as many as make whole waves of
// blocks, the fewest that are nine tenths full. slots: blocks that run at once. Each thread has
// kVectorsInFlight vectors of its part at least.
void split(Plan& plan, const Shape& shape, int64_t least, int64_t slots) {
  if (plan.regime != Regime::block) return;
  const int64_t n_rows = std::max<int64_t>(shape.n_rows, 1);
  int64_t parts = least, best = 0;
  for (int64_t waves = ceil_div(n_rows * least, slots); waves <= kMostWaves && best < 90; ++waves) {
    const int64_t fitting = waves * slots / n_rows;
    const int64_t filled = 100 * n_rows * fitting / (waves * slots);  // percent
    if (filled <= best) continue;
    best = filled;
    parts = fitting;
  }
  const int64_t most = shape.row_vectors() / (kVectorsInFlight * plan.threads);
  parts = std::min({parts, most, kMaxParts});
  if (parts <= 1) return;
  plan.regime = Regime::split;
  plan.parts = static_cast<int>(parts);
}

// Blocks of forward or backward that run at once, by their registers.
int64_t slots(const Plan& plan, const Shape& shape, const Device& device, int blocks_per_sm) {
  if (shape.general) blocks_per_sm = 2;
  if (shape.spread || shape.element_size == 8) blocks_per_sm = std::min(blocks_per_sm, 3);
  return int64_t{device.sm_count} * blocks_per_sm * 256 / plan.threads;
}

// The plan of forward or backward. least: parts of a row that is split.
Plan plan_one_pass(const Shape& shape, const Device& device, int64_t least, int blocks_per_sm) {
  if (is_by_columns(shape)) return plan_columns(shape, device);
  Plan plan = plan_rows(shape, device);
  give_rows_to_lanes(plan, shape, device);
  split(plan, shape, least, slots(plan, shape, device, blocks_per_sm));
  return plan;
}

// The time that rows take if each has so many threads of forward_backward, in vectors of a thread.
int64_t time_of_rows(const Shape& shape, const Device& device, int64_t threads) {
  const int64_t at_once = std::max<int64_t>(device.sm_count * max_threads(shape) / threads, 1);
  const int64_t vectors = ceil_div(shape.row_vectors(), threads);
  return ceil_div(shape.n_rows, at_once) * (vectors + kRowVectors);
}

// Gives rows that are too few to fill the card more threads, then clusters, while that saves a
// tenth of the time and leaves each thread kVectorsInFlight vectors.
void share_few_rows(Plan& plan, const Shape& shape, const Device& device) {
  const int64_t most =
      std::min<int64_t>(max_threads(shape) * (has_clusters(device) ? kMaxCluster : 1),
                        shape.row_vectors() / kVectorsInFlight);
  int threads = plan.threads * plan.parts;
  while (2 * threads <= most &&
         10 * time_of_rows(shape, device, 2 * threads) < 9 * time_of_rows(shape, device, threads)) {
    threads *= 2;
  }
  plan.threads = plan.team = std::min(threads, max_threads(shape));
  plan.parts = threads / plan.threads;
  if (plan.parts > 1) plan.regime = Regime::split;
}

}  // namespace

Plan plan_forward(const Shape& shape, const Device& device) {
  return plan_one_pass(shape, device, 1, 5);
}

Plan plan_backward(const Shape& shape, const Device& device) {
  return plan_one_pass(shape, device, ceil_div(shape.row_bytes(), kPartBytes), 4);
}

// Vectors of a row that a thread of forward_backward holds: in registers, and altogether unless the
// largest block would be too small.
int64_t vectors_in_registers(const Shape& shape) {
  return shape.spread || shape.element_size == 8 ? 0 : shape.capped ? 4 : 8;
}
int64_t vectors_of_row(const Shape& shape) { return shape.spread ? 16 : 32; }

// Measured on an H200 (bench/NOTES.md): what a thread does once a row costs as much as several
// vectors, so a thread should have many vectors. Each block should have two rows: the second is
// read while the first is written. With one row for each block, nothing overlaps; with more, chance
// decides which multiprocessors get the last rows.
Plan plan_forward_backward(const Shape& shape, const Device& device) {
  if (is_by_columns(shape)) return plan_columns(shape, device);
  Plan plan = plan_rows(shape, device);
  if (shape.general) return plan;
  const int64_t kept = vectors_in_registers(shape), n_vectors = shape.row_vectors();
  if (plan.regime == Regime::block) {
    const int64_t wanted = ceil_div(n_vectors, vectors_of_row(shape));
    plan.threads = plan.team = power_of_two(wanted, 32, max_threads(shape));
    const int64_t on_chip = plan.threads * (kept + room_for(plan, device));
    // Reading a sixteenth of the row twice is faster than a second block.
    if (has_clusters(device) && n_vectors > on_chip + on_chip / 16) {
      plan.parts = power_of_two(ceil_div(n_vectors, on_chip), 2, kMaxCluster);
    }
    share_few_rows(plan, shape, device);
  }
  const int64_t vectors = ceil_div(n_vectors, int64_t{plan.team} * plan.parts);
  plan.held =
      static_cast<int>(std::clamp(round_up(vectors - kept), int64_t{0}, room_for(plan, device)));
  const int64_t n_groups = ceil_div(shape.n_rows, plan.threads / plan.team);
  const int64_t at_once =
      ceil_div(int64_t{device.sm_count} * max_threads(shape), plan.threads * plan.parts);
  plan.max_groups = static_cast<int>(std::max(ceil_div(n_groups, 2), at_once));
  return plan;
}

bool has_lane_rows(const Plan& plan, const Shape& shape) {
  return plan.regime == Regime::warp && plan.team <= 32 && shape.element_size < 8 &&
         !shape.general && !shape.spread && !shape.capped;
}

bool is_staged(const Plan& plan, const Shape& shape) {
  return plan.regime == Regime::columns && plan.row_vector == 1 && shape.packed && !shape.spread &&
         !shape.is_general(plan.regime) && shape.row_bytes() <= kMostStagedBytes;
}

int64_t shared_bytes(const Plan& plan, const Shape& shape) {
  if (plan.regime != Regime::columns) return int64_t{16} * plan.threads * plan.held;
  // Four numbers: a row's stats from each worker, or its gradient.
  const int64_t acc = shape.element_size == 8 ? 8 : 4;
  const int64_t stats = 4 * acc * plan.threads * plan.row_vector;
  const int64_t rows = is_staged(plan, shape) ? plan.threads / plan.workers * shape.row_bytes() : 0;
  return stats + rows + rows / 128 * acc;  // those eight or four bytes are the skew of staged.cuh
}

const char* why_not(const Plan& plan, const Shape& shape, const Device& device) {
  const auto is_power_of_two = [](int n) { return n > 0 && (n & (n - 1)) == 0; };
  const bool one_block = plan.team == plan.threads;
  if (!is_power_of_two(plan.threads) || plan.threads < 32 || plan.threads > max_threads(shape))
    return "threads must be a power of two from 32 to 512, of float64 to 256";
  if (shared_bytes(plan, shape) + kStaticSharedBytes > device.shared_bytes)
    return "the device has less shared memory";
  if (plan.regime == Regime::columns) {
    if (plan.parts != 1) return "parts must be 1 by columns";
    if (!is_power_of_two(plan.workers) || plan.threads < 32 * plan.workers)
      return "workers must be a power of two, at most threads / 32";
    if (plan.row_vector != 1 && shape.is_general(plan.regime))
      return "row_vector must be 1 for general kernels";
    if (plan.row_vector != 1 &&
        !(shape.adjacent_rows && plan.row_vector == 16 / shape.element_size))
      return "row_vector must be 1, or of adjacent rows 16 bytes";
    return nullptr;
  }
  if (!shape.adjacent_classes) return "classes must be adjacent";
  if (!one_block && !(is_power_of_two(plan.team) && plan.team <= 32))
    return "team must be threads, or a power of two up to 32";
  if (shape.general && (plan.threads > 256 || plan.held != 0))
    return "general kernels hold nothing and have at most 256 threads";
  if (plan.parts < 1 || (plan.parts > 1 && !one_block)) return "parts must be of whole blocks";
  if ((plan.parts > 1) != (plan.regime == Regime::split)) return "parts must be those of a split";
  if (plan.held % kVectorsInFlight != 0) return "held must be a multiple of 4";
  if (plan.held < 0 || plan.max_groups < 0) return "held and max_groups must not be negative";
  return nullptr;
}

}  // namespace fused_xent::cuda
