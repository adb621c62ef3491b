// What is computed of a batch of rows before and after the loops over their classes: see RowBatch.
// Included like simd.h.

template <typename T>
void read_targets(const Params& p, RowBatch& batch) {
  using A = Acc<T>;
  const Transform<A> transform(p);
  // Lanes without a row that is kept compute with zeros.
  for (int i = 0; i < batch.n || i % kLanes<double> != 0; ++i) {
    const int64_t row = batch.begin + i;
    const bool is_kept = i < batch.n && !is_left_out(p, row);
    if (!is_kept) batch.stats[i] = {};
    batch.kept[i] = is_kept ? -1 : 0;
    const bool has_target = is_kept && has_indices(p);
    batch.target[i] = has_target ? checked_class(p, target_index(p, row)) : -1;
    const int64_t y = batch.target[i];
    if (y < 0) {
      batch.target_weight[i] = batch.label_weight[i] = 0;
      batch.target_logit[i] = batch.target_slope[i] = 0;
      continue;
    }
    const T* logit = logits_row<T>(p, row) + y;
    batch.target_weight[i] = class_weight(p, y);
    batch.label_weight[i] = label_weight(p, row, y);
    batch.target_logit[i] = load_one(logit);
    batch.target_slope[i] = 1;
    if (!has_transform(p)) continue;
    const auto lanes = transform(load_first(logit, 1));
    batch.target_logit[i] = lanes.logit[0];
    batch.target_slope[i] = lanes.slope[0];
  }
}

template <typename A>
XENT_INLINE RowLanes<A> lanes_of_batch(const Params& p, const RowBatch& batch, int lane) {
  return {p, batch.begin + lane, batch.n - lane, load_bits<I64>(batch.kept + lane)};
}

// The labels of rows: on_target as in RowLabels, and their sum Q.
struct LabelLanes {
  F64 on_target, q;
};
// mass is the sum of t_j.
XENT_INLINE LabelLanes labels_of_batch(const Params& p, const RowBatch& batch, int lane,
                                       const Smoothing<double>& smoothing, F64 mass) {
  if (!has_indices(p)) return {F64{}, mass};
  const F64 on_target = smoothing.keep * load(batch.label_weight + lane);
  return {on_target, label_mass(on_target, smoothing.uniform, p.weight_sum - F64{})};
}

// The first class whose logit is the greatest.
XENT_INLINE int64_t argmax_of(const FullStats<double>& others, double target_logit,
                              int64_t target) {
  const bool is_target = target >= 0 && is_above(others, target_logit, target);
  return is_target ? target : others.argmax;
}

// If a target is far above the other classes, their sum is the loss: it would lose its digits if
// it were added to 1. So the rounding error of that addition is kept.
template <typename T>
void finish_batch(const Params& p, RowBatch& batch) {
  using A = Acc<T>;
  const Smoothing<double> smoothing = smoothing_of(p);
  const bool is_apart = !has_spread(p);
  for (int lane = 0; lane < batch.n; lane += kLanes<double>) {
    const RowLanes<A> rows = lanes_of_batch<A>(p, batch, lane);
    const SegmentStats* stats = batch.stats + lane;
    const auto sums = [=](auto member) __attribute__((always_inline)) {
      return lanes_of([=](int i) { return stats[i].sums.*member; });
    };
    const F64 target = load(batch.target_logit + lane);
    F64 max = lanes_of([=](int i) { return stats[i].max; });
    if (is_apart) max = vmax(target, max);
    const F64 shift = sums(&FullStats<double>::max) - max, scale = exp_nonpositive(shift);
    const F64 others = sums(&FullStats<double>::sum), d = target - max;
    F64 sum = others * scale, lost{}, mass{}, dot{}, e{};
    if (is_apart) {
      e = exp_nonpositive(d);
      add_to(sum, lost, e);
    } else {
      mass = sums(&FullStats<double>::mass);
      dot = sums(&FullStats<double>::dot);
      dot = mass == 0 ? dot : dot + shift * mass;
    }
    F64 log_sum = log_positive(sum);
    log_sum = sum == 0 ? log_sum : log_sum + lost / sum;
    // The sum is at least 1, the maximum's own term, but rounding may leave it a little below.
    log_sum = ((0 < sum) & (sum < 1)) ? F64{} : log_sum;

    const LabelLanes labels = labels_of_batch(p, batch, lane, smoothing, mass);
    // The transformed target may be rounded differently than in the loop over all classes.
    const F64 shifted_target = d > 0 ? F64{} : d;
    F64 loss = has_indices(p) ? index_loss(labels.on_target, smoothing.uniform, shifted_target,
                                           log_sum, mass, dot)
                              : probability_loss(log_sum, mass, dot);
    if (p.extra_loss != nullptr) loss += rows.read(p.extra_loss);
    if (has_row_options(p)) loss = losses_of(rows, loss, labels.q, max + log_sum);
    rows.write(p.row_loss, loss);
    rows.write(p.row_max, max);
    rows.write(p.log_sum, log_sum);
    store(batch.max + lane, max);
    store(batch.log_sum + lane, rounded_to<A>(log_sum));
    store(batch.one_over_sum + lane, scale / sum);
    rows.write(p.label_mass, mass);
    if (p.entropy == nullptr) continue;
    const F64 of_others = scale * (sums(&FullStats<double>::moment) + shift * others);
    const F64 moment = (scale == 0 ? F64{} : of_others) + (e == 0 ? F64{} : e * d);
    rows.write(p.entropy, log_sum - moment / sum);
  }
  for (int i = 0; i < batch.n && p.argmax != nullptr; ++i) {
    const int64_t apart = is_apart ? batch.target[i] : -1;
    const int64_t argmax = argmax_of(batch.stats[i].sums, batch.target_logit[i], apart);
    p.argmax[batch.begin + i] = batch.kept[i] ? argmax : -1;
  }
}

template <typename T>
void start_gradients(const Params& p, RowBatch& batch, bool saved) {
  using A = Acc<T>;
  const Smoothing<double> smoothing = smoothing_of(p);
  const bool is_fused =
      std::is_same_v<RowExp<A, NoSpread>, FusedExp> && !has_spread(p) && !is_general(p);
  for (int lane = 0; lane < batch.n; lane += kLanes<double>) {
    const RowLanes<A> rows = lanes_of_batch<A>(p, batch, lane);
    const F64 max = saved ? load(batch.max + lane) : rows.read(p.row_max);
    const F64 log_sum = saved ? load(batch.log_sum + lane) : rows.read(p.log_sum);
    const F64 mass = has_indices(p) ? p.weight_sum - F64{} : rows.read(p.label_mass);
    const LabelLanes labels = labels_of_batch(p, batch, lane, smoothing, mass);
    const Upstream<F64> upstream = upstream_of(rows, max, log_sum);

    F64 origin = is_fused ? FusedExp::origin_of(max) : max, one_over_sum;
    if (saved) {
      origin = lanes_of([&](int i) { return batch.stats[lane + i].sums.max; });
      one_over_sum = load(batch.one_over_sum + lane);
    } else {
      one_over_sum = exp_nonpositive((origin - max) - log_sum);
    }
    const F64 factor = (upstream.g * labels.q + upstream.softmax) * one_over_sum;
    store(batch.max + lane, max);
    store(batch.origin + lane, origin);
    store(batch.factor + lane, factor);
    store(batch.shifted_factor + lane, upstream.shifted * one_over_sum);
    store(batch.spread + lane, upstream.g * (has_indices(p) ? smoothing.uniform : 1));
    if constexpr (kByTurns<T>) {
      const F64 size = factor < 0 ? -factor : factor;
      store(batch.log2_factor + lane, log_positive(size) * 1.4426950408889634);
    }

    const F64 d = load(batch.target_logit + lane) - max, log_prob = d - log_sum;
    const F64 prob = exp_nonpositive(log_prob);
    F64 at_target = upstream.g * target_gradient(labels.on_target, smoothing.uniform, prob,
                                                 expm1_nonpositive(log_prob), mass,
                                                 load(batch.target_weight + lane));
    if (has_row_options(p)) {
      at_target = add_softmax_part(at_target, upstream.softmax, upstream.shifted, prob, d);
    }
    store(batch.at_target + lane, at_target * load(batch.target_slope + lane));
  }
}
