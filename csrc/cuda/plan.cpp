#include "plan.h"

#include <algorithm>

namespace fused_xent::cuda {
namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kThreadPerRowBytes = 128;  // rows up to here: a cache line
constexpr int64_t kWarpBytes = 4 * kKiB;
constexpr int kVectorsOfThread = 8;               // of a row, while threads are enough
constexpr int64_t kPartBytes = 32 * kKiB;         // of a row that a block writes in backward
constexpr int64_t kMostHeld = 32;                 // vectors in shared memory that a thread holds
constexpr int64_t kMaxParts = 65535;              // rows of 2 GB
constexpr int kMaxCluster = 8;                    // the largest that every device with clusters has
constexpr int kVectorsInFlight = 4;               // that a thread reads before it uses them
constexpr int kBlocksPerSm = 4;                   // that keep enough bytes in flight
constexpr int64_t kStaticSharedBytes = 2 * kKiB;  // that the kernels declare, at most

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t vectors) { return ceil_div(vectors, kVectorsInFlight) * kVectorsInFlight; }

// The least power of two that is not below n, between two powers of two.
int power_of_two(int64_t n, int least, int most) {
  int power = least;
  while (power < n && power < most) power *= 2;
  return power;
}

// The launch bounds of forward_backward; the other kernels' are 256.
int max_threads(const Shape& shape) { return shape.element_size == 8 ? 256 : 512; }

// Vectors for each thread in a block's shared memory, of forward_backward.
int64_t room_for(const Plan& plan, const Device& device) {
  const int64_t room = (device.shared_bytes - kStaticSharedBytes) / (16 * plan.threads);
  return std::min(room / kVectorsInFlight * kVectorsInFlight, kMostHeld);
}

bool has_clusters(const Device& device) { return device.capability >= 90; }

Plan plan_columns(const Shape& shape, const Device& device) {
  Plan plan{Regime::columns, 256};
  const int vector = 16 / shape.element_size;
  const int64_t wanted_threads = int64_t{512} * device.sm_count;
  const bool may_have_vectors = shape.adjacent_rows && !shape.general;
  if (may_have_vectors && shape.n_rows / vector >= wanted_threads) plan.row_vector = vector;
  // At least 16 classes a worker, and workers only where rows alone are too few.
  const int64_t missing =
      ceil_div(wanted_threads * plan.row_vector, std::max<int64_t>(shape.n_rows, 1));
  plan.workers = power_of_two(std::min(missing, shape.vocab_size / 16), 1, 8);
  return plan;
}

bool is_by_columns(const Shape& shape) {
  return !shape.adjacent_classes || shape.row_bytes() <= kThreadPerRowBytes;
}

// A row to a part of a warp or to a block, by its length.
Plan plan_rows(const Shape& shape) {
  const int wanted = power_of_two(ceil_div(shape.row_vectors(), kVectorsOfThread), 2, 256);
  if (shape.row_bytes() <= kWarpBytes) return {Regime::warp, 128, wanted};
  return {Regime::block, wanted, wanted};
}

}  // namespace

const char* name_of(Regime regime) {
  const char* names[] = {"columns", "warp", "block", "split"};
  return names[static_cast<int>(regime)];
}

Plan plan_forward(const Shape& shape, const Device& device) {
  if (is_by_columns(shape)) return plan_columns(shape, device);
  Plan plan = plan_rows(shape);
  const int64_t parts =
      ceil_div(int64_t{kBlocksPerSm} * device.sm_count, std::max<int64_t>(shape.n_rows, 1));
  const int64_t most = shape.row_vectors() / (kVectorsInFlight * plan.threads);
  if (plan.regime == Regime::block && std::min(parts, most) > 1) {
    plan.regime = Regime::split;
    plan.parts = static_cast<int>(std::min(parts, most));
  }
  return plan;
}

Plan plan_backward(const Shape& shape, const Device& device) {
  if (is_by_columns(shape)) return plan_columns(shape, device);
  Plan plan = plan_rows(shape);
  if (plan.regime != Regime::block) return plan;
  const int64_t for_length = ceil_div(shape.row_bytes(), kPartBytes);
  const int64_t for_card =
      ceil_div(int64_t{kBlocksPerSm} * device.sm_count, std::max<int64_t>(shape.n_rows, 1));
  const int64_t most = shape.row_vectors() / (kVectorsInFlight * plan.threads);
  plan.parts = static_cast<int>(
      std::clamp<int64_t>(std::min(std::max(for_length, for_card), most), 1, kMaxParts));
  if (plan.parts > 1) plan.regime = Regime::split;
  return plan;
}

// What a thread of forward_backward has of a row, see there: in registers, and in all while blocks
// of a row are enough.
int64_t vectors_in_registers(const Shape& shape) {
  return shape.spread || shape.element_size == 8 ? 0 : 8;
}
int64_t vectors_of_row(const Shape& shape) { return shape.spread ? 16 : 32; }

// Measured on an H200 (bench/NOTES.md): a row costs each thread as much again as several vectors,
// so that a thread should have many; and the second of a block's rows is on its way while the first
// is written. A row for each would leave the first to be waited for, and more rows the last ones to
// multiprocessors that chance decides on.
Plan plan_forward_backward(const Shape& shape, const Device& device) {
  if (is_by_columns(shape)) return plan_columns(shape, device);
  Plan plan = plan_rows(shape);
  if (shape.general) return plan;
  const int64_t kept = vectors_in_registers(shape), n_vectors = shape.row_vectors();
  if (plan.regime == Regime::block) {
    const int64_t wanted = ceil_div(n_vectors, vectors_of_row(shape));
    plan.threads = plan.team = power_of_two(wanted, 32, max_threads(shape));
    const int64_t on_chip = plan.threads * (kept + room_for(plan, device));
    // What is read twice costs less than a second block for it.
    if (has_clusters(device) && n_vectors > on_chip + on_chip / 16) {
      plan.regime = Regime::split;
      plan.parts = power_of_two(ceil_div(n_vectors, on_chip), 2, kMaxCluster);
    }
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

int64_t shared_bytes(const Plan& plan, const Shape& shape) {
  if (plan.regime != Regime::columns) return int64_t{16} * plan.threads * plan.held;
  // A row's statistics from each worker, or its factors: four numbers.
  const int64_t acc = shape.element_size == 8 ? 8 : 4;
  return 4 * acc * plan.threads * plan.row_vector;
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
    if (plan.row_vector != 1 && shape.general) return "row_vector must be 1 for general kernels";
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
