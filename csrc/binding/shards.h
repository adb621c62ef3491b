// The operator add_up_shards on any device: reads its arguments, checks them, allocates what it
// returns.
#pragma once

#include <tuple>

#include "../xent_shards.h"
#include "operators.h"

namespace fused_xent::binding {

// What the ranks have sent of each row, and what is known of the row. Owns the tensors.
struct ShardRows {
  Shards shards{};
  Tensor max, log_sum;
  OptionalTensor part, label_mass, entropy, argmax, first_class, end_class, token_weight, is_bad;

  // Takes all arguments before it checks any: each owns its memory.
  explicit ShardRows(Reader& in)
      : max(in.take<Tensor>()),
        log_sum(in.take<Tensor>()),
        part(in.take<OptionalTensor>()),
        label_mass(in.take<OptionalTensor>()),
        entropy(in.take<OptionalTensor>()),
        argmax(in.take<OptionalTensor>()),
        first_class(in.take<OptionalTensor>()),
        end_class(in.take<OptionalTensor>()),
        token_weight(in.take<OptionalTensor>()),
        is_bad(in.take<OptionalTensor>()) {
    shards.rank = in.take<int64_t>();
    shards.n_classes = in.take<int64_t>();
    keeps_mass_ = in.take<bool>();
    shards.lse_square_scale = in.take<double>();
    shards.focal_gamma = in.take<double>();
    set_sizes();
    shards.max = sent("max", max, shards.n_rows);
    shards.log_sum = sent("log_sum", log_sum, shards.n_rows);
    shards.part = sent("part", part, shards.n_rows);
    shards.label_mass = sent("label_mass", label_mass, shards.n_rows);
    shards.entropy = sent("entropy", entropy, shards.n_rows);
    shards.argmax = sent("argmax", argmax, shards.n_rows);
    shards.first_class = sent("first_class", first_class, 1);
    shards.end_class = sent("end_class", end_class, 1);
    shards.token_weight = of_rows("token_weight", token_weight, max.scalar_type());
    shards.is_bad = static_cast<const bool*>(of_rows("is_bad", is_bad, ScalarType::Bool));
  }

  // state, rise, loss, other_mass, lse, entropy and argmax; those that are not wanted are empty.
  auto results() {
    Shards& s = shards;
    const bool has_loss = part.has_value(), has_slope = has_loss && s.focal_gamma != 0;
    const bool has_mass = has_loss && keeps_mass_;
    const ScalarType acc = max.scalar_type();
    const Tensor state = empty_on(max, {2 + has_mass + has_slope, s.n_rows}, acc);
    char* of_state = static_cast<char*>(state.mutable_data_ptr());
    for (void** row : {&s.row_max, &s.row_log_sum, has_mass ? &s.own_mass : nullptr,
                       has_slope ? &s.loss_slope : nullptr}) {
      if (row == nullptr) continue;
      *row = of_state;
      of_state += s.n_rows * element_size(s.acc);
    }
    const Tensor rise =
        has_loss ? empty_on(max, {0}, acc) : empty_on(max, {s.n_ranks, s.n_rows}, acc);
    if (!has_loss) s.rise = rise.mutable_data_ptr();
    const auto new_rows = [&](bool is_wanted, ScalarType dtype, auto& pointer) {
      const Tensor rows = empty_on(max, {is_wanted ? s.n_rows : 0}, dtype);
      if (is_wanted)
        pointer = static_cast<std::decay_t<decltype(pointer)>>(rows.mutable_data_ptr());
      return rows;
    };
    const Tensor loss = new_rows(has_loss, acc, s.row_loss);
    const Tensor other_mass = new_rows(has_loss, acc, s.other_mass);
    const Tensor lse = new_rows(argmax.has_value(), acc, s.row_lse);
    const Tensor of_entropy = new_rows(entropy.has_value(), acc, s.row_entropy);
    const Tensor of_argmax = new_rows(argmax.has_value(), ScalarType::Long, s.row_argmax);
    return std::tuple(state, rise, loss, other_mass, lse, of_entropy, of_argmax);
  }

 private:
  bool keeps_mass_;

  void set_sizes() {
    shards.acc = dtype_of("max", max.scalar_type());
    FUSED_XENT_CHECK(element_size(shards.acc) >= 4 && max.dim() == 2 && max.size(0) > 0,
                     "max must be float32 or float64 of shape (ranks, rows), got shape " +
                         tuple_of(max.sizes()));
    shards.n_ranks = max.size(0);
    shards.n_rows = max.size(1);
    shards.rank_stride = shards.n_ranks > 1 ? max.stride(0) : 0;
    FUSED_XENT_CHECK(0 <= shards.rank && shards.rank < shards.n_ranks,
                     "rank must be in [0, " + std::to_string(shards.n_ranks) + "), got " +
                         std::to_string(shards.rank));
  }

  const void* sent(const char* name, const OptionalTensor& given, int64_t count) const {
    if (!given) return nullptr;
    const Tensor& tensor = *given;
    const bool fits = tensor.dim() == 2 && tensor.size(0) == shards.n_ranks &&
                      tensor.size(1) == count && (count < 2 || tensor.stride(1) == 1) &&
                      (shards.n_ranks == 1 || tensor.stride(0) == shards.rank_stride);
    FUSED_XENT_CHECK(fits && tensor.scalar_type() == max.scalar_type() &&
                         tensor.get_device_index() == max.get_device_index(),
                     std::string(name) + " must be like max, of " + std::to_string(count) +
                         " numbers of each rank, got shape " + tuple_of(tensor.sizes()));
    return tensor.const_data_ptr();
  }

  const void* of_rows(const char* name, OptionalTensor& given, ScalarType dtype) const {
    if (!given) return nullptr;
    FUSED_XENT_CHECK(given->dim() == 1 && given->size(0) == shards.n_rows &&
                         given->scalar_type() == dtype &&
                         given->get_device_index() == max.get_device_index(),
                     std::string(name) + " must hold one value of each row, got shape " +
                         tuple_of(given->sizes()));
    given = torch::stable::contiguous(*given);
    return given->const_data_ptr();
  }
};

// launch(shards, max) runs on max's device.
template <auto launch>
void add_up_shards(StableIValue* stack, uint64_t, uint64_t) {
  Reader in(stack);
  ShardRows rows(in);
  const auto results = rows.results();
  launch(rows.shards, rows.max);
  std::apply([&](const auto&... result) { return_to(stack, result...); }, results);
}

}  // namespace fused_xent::binding
