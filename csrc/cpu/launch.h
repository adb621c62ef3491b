// Softmax cross-entropy on the CPU: the launchers, which choose kernels and share work among
// threads.
#pragma once

#include <cstdint>
#include <functional>

#include "../xent_params.h"
#include "../xent_shards.h"

namespace fused_xent::cpu {

// Runs body(0), ..., body(count - 1), each in a thread of its own, and returns when all have ended.
struct Threads {
  int64_t count;
  void (*run)(int64_t count, const std::function<void(int64_t)>& body);
};

// What must be known of the targets before anything is computed.
struct RowScan {
  int64_t bad_row = -1;  // the first whose target is neither a class nor ignore_index
  double total_weight = 0;
};
RowScan scan_rows(const Params& p, const Threads& threads);

// The first label of sparse labels that is neither a class nor ignore_index; rows of token weight 0
// are not checked.
struct BadLabel {
  int64_t row = -1, label = 0, its_class = 0;
};
BadLabel find_bad_label(const Params& p, const SparseLabels& sparse, const Threads& threads);

// Before the functions below, after them, and after forward: see SparseLabels. Labels are in range.
void read_labels(const Params& p, const SparseLabels& sparse, const Threads& threads);
void write_label_gradients(const Params& p, const SparseLabels& sparse, const Threads& threads);
void write_log_probs(const Params& p, const SparseLabels& sparse, const Threads& threads);

// Writes the results of each row.
void forward(const Params& p, const Threads& threads);
// Reads these, except row_loss, and writes grad_logits.
void backward(const Params& p, const Threads& threads);
// Forward and backward of each row at once, while its logits are in the cache.
void forward_backward(const Params& p, const Threads& threads);
// grad_logits *= grad_loss * grad_scale, row by row.
void scale_gradient(const Params& p, const Threads& threads);

double sum_rows(const Params& p, const Threads& threads);  // of row_loss

// Adds up the rows of a split vocabulary.
void add_up_shards(const Shards& shards, const Threads& threads);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable". It is the best that
// the processor and FUSED_XENT_CPU_CAPABILITY, which is read once, allow.
const char* capability_name();

}  // namespace fused_xent::cpu
