// The rows of a split vocabulary: see ../xent_shards.h.
#include "launch.h"
#include "tasks.h"

namespace fused_xent::cpu {

void add_up_shards(const Shards& shards, const Threads& threads) {
  constexpr int64_t kTaskRows = 512;
  run_pieces(threads, shards.n_rows, kTaskRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (shards.acc == DType::float64) {
        add_up_row<double>(shards, row);
      } else {
        add_up_row<float>(shards, row);
      }
    }
  });
}

}  // namespace fused_xent::cpu
