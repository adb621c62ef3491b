// Tile kernels: up to kTileRows rows, one in each vector lane, whose classes come one after
// another. They serve rows whose classes are strided (images), which need no transposition, and
// vocabularies that are too small to fill vectors. Included like simd.h.

// Calls step(j, count) for all classes, in as few groups of at most kGroup classes as possible. The
// groups are about equal: none has less than 8 classes if there are 8.
template <typename Step>
XENT_INLINE void for_class_groups(int64_t vocab_size, const Step& step) {
  if (vocab_size == 0) return;
  const int64_t size = ceil_div(vocab_size, ceil_div(vocab_size, kGroup));
  for (int64_t j = 0; j < vocab_size; j += size) {
    step(j, static_cast<int>(vocab_size - j < size ? vocab_size - j : size));
  }
}

// Writes a per-row result of the lanes from `lane` on, for those that are rows of the tile.
template <typename A>
XENT_INLINE void store_rows(void* to, int64_t begin, int lane, int n_rows, Vec<A> value) {
  A* rows = static_cast<A*>(to) + begin + lane;
  if (n_rows - lane >= kLanes<A>) {
    store(rows, value);
  } else {
    store_first(rows, value, n_rows - lane);
  }
}

template <typename A>
XENT_INLINE void transform_lanes(const Transform<A>& transform, int count, int n_rows, A* lanes) {
  for (int u = 0; u < count; ++u) {
    for (int lane = 0; lane < n_rows; lane += kLanes<A>) {
      A* at = lanes + u * kTileRows + lane;
      store(at, transform(load(at)).logit);
    }
  }
}

// Calls body<kHasSpread, kGeneral>() as p needs it. kGeneral: with per-class options. That has a
// spread in any case, which may be 0.
template <typename Target, typename Body>
XENT_INLINE void with_options(const Params& p, const Body& body) {
  if (is_general(p)) return body.template operator()<true, true>();
  if (std::is_void_v<Target> && p.label_smoothing == 0) {
    return body.template operator()<false, false>();
  }
  body.template operator()<true, false>();
}

// Turns the cross-entropies of a tile into its losses.
template <typename T>
void finish_tile(const Params& p, const TileLabels<T>& labels, int64_t begin) {
  using A = Acc<T>;
  const Smoothing<double> smoothing = smoothing_of(p);
  for (int lane = 0; lane < labels.n_rows; lane += kLanes<double>) {
    const RowLanes<A> rows = labels.rows(p, begin, lane);
    const F64 on_target = smoothing.keep * load_wide(labels.label_weights() + lane, rows.n);
    const F64 mass = has_indices(p) ? label_mass(on_target, smoothing.uniform, p.weight_sum - F64{})
                                    : rows.read(p.label_mass);
    const F64 lse = rows.read(p.row_max) + rows.read(p.log_sum);
    rows.write(p.row_loss, losses_of(rows, rows.read(p.row_loss), mass, lse));
  }
}

template <typename T, typename Target, bool kHasSpread, bool kGeneral>
void forward_tile(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kWidth = kLanes<A>;
  const TileMemory<T> logits(p.logits, p.logits_layout, begin, end);
  TileLabels<T> labels(p, begin, logits.n_rows);
  TileSpread<T, Target> spread(p, begin, end);
  const Transform<A> transform(p);
  std::conditional_t<kGeneral, FullLaneStats<A>, LaneStats<A, kHasSpread>>
      stats[kTileRows / kWidth];
  TileScratch<A> scratch(logits.n_rows);
  const int n = logits.n_rows;
  const bool is_apart = !kHasSpread || !has_spread(p);  // the target is added last

  if (labels.any_kept) {
    for_class_groups(p.vocab_size, [&](int64_t j, int count) {
      logits.read(j, count, scratch.lanes);
      if (kGeneral && has_transform(p)) transform_lanes(transform, count, n, scratch.lanes);
      if (std::is_void_v<Target>) labels.pick(j, count, is_apart, scratch.lanes);
      if (kHasSpread) spread.read(j, count);
      for (int lane = 0; lane < n; lane += kWidth) {
        const auto t = [&](int u)
                           __attribute__((always_inline)) { return spread.at(j + u, u, lane); };
        auto& s = stats[lane / kWidth];
        if (is_apart) {  // the sum is rounded as without per-class options
          s.template add<false>(scratch.lanes + lane, count, j, t);
        } else {
          s.add(scratch.lanes + lane, count, j, t);
        }
      }
    });
  }
  for (int lane = 0; lane < n; lane += kWidth) {
    auto& s = stats[lane / kWidth];
    if (is_apart) s.add_target(labels.target_logit + lane, labels.index_lanes(lane));
    Vec<A> mass{}, dot{};
    if constexpr (kHasSpread) {
      mass = s.mass.value();
      dot = s.dot.value();
    }
    const Vec<A> log_sum = s.log_sum();
    Vec<A> loss;
    if constexpr (std::is_void_v<Target>) {
      loss = index_loss(labels.on_target(lane), labels.spread,
                        load(labels.target_logit + lane) - s.max, log_sum, mass, dot);
      if (p.extra_loss != nullptr) {
        const int n_lanes = n - lane < kWidth ? n - lane : kWidth;
        loss += load_first(static_cast<const A*>(p.extra_loss) + begin + lane, n_lanes);
      }
    } else {
      loss = probability_loss(log_sum, mass, dot);
      store_rows<A>(p.label_mass, begin, lane, n, mass);
    }
    const auto is_left_out = labels.kept_lanes(lane) == 0;
    store_rows<A>(p.row_loss, begin, lane, n, is_left_out ? Vec<A>{} : loss);
    store_rows<A>(p.row_max, begin, lane, n, is_left_out ? Vec<A>{} : s.max);
    store_rows<A>(p.log_sum, begin, lane, n, is_left_out ? Vec<A>{} : log_sum);
    if constexpr (kGeneral) {
      const Vec<A> entropy = is_left_out ? Vec<A>{} : s.entropy();
      if (p.entropy != nullptr) store_rows<A>(p.entropy, begin, lane, n, entropy);
      for (int i = lane; i < n && i < lane + kWidth && p.argmax != nullptr; ++i) {
        p.argmax[begin + i] = labels.kept[i] != 0 ? static_cast<int64_t>(s.argmax[i - lane]) : -1;
      }
    }
  }
  if (has_row_options(p)) finish_tile(p, labels, begin);
}

template <typename T, typename Target>
void tile_forward(const Params& p, int64_t begin, int64_t end) {
  with_options<Target>(p, [&]<bool kHasSpread, bool kGeneral> {
    forward_tile<T, Target, kHasSpread, kGeneral>(p, begin, end);
  });
}

template <typename T, typename Target, bool kHasSpread, bool kGeneral>
void backward_tile(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kWidth = kLanes<A>;
  const TileMemory<T> logits(p.logits, p.logits_layout, begin, end);
  const TileMemory<T> out(p.grad_logits, p.grad_layout, begin, end);
  TileLabels<T> labels(p, begin, logits.n_rows);
  const TileGradient<T> gradient(p, labels, begin);
  TileSpread<T, Target> spread(p, begin, end);
  const Transform<A> transform(p);
  TileScratch<A> scratch(logits.n_rows);
  const int n = logits.n_rows;
  const bool has_spread = kHasSpread && labels.spread != 0;

  for_class_groups(p.vocab_size, [&](int64_t j, int count) {
    if (labels.any_kept) logits.read(j, count, scratch.lanes);
    if (std::is_void_v<Target>) labels.pick(j, count, false, scratch.lanes);
    if (kHasSpread) spread.read(j, count);
    for (int lane = 0; lane < n; lane += kWidth) {
      const Vec<A> max = load(gradient.max + lane), factor = load(gradient.factor + lane);
      const auto kept = labels.kept_lanes(lane);
#pragma GCC unroll 2
      for (int u = 0; u < count; ++u) {
        A* at = scratch.lanes + u * kTileRows + lane;
        const Vec<A> x = load(at);
        Vec<A> value;
        if constexpr (kGeneral) {
          const auto z = transform(x);
          value = gradient.of_softmax(z.logit - max, factor, lane);
          if (has_spread) value -= spread.at(j + u, u, lane) * load(gradient.spread + lane);
          value *= z.slope;
        } else {
          value = exp_nonpositive(x - max) * factor;
          if (kHasSpread) value -= spread.at(j + u, u, lane) * load(gradient.spread + lane);
        }
        store_bits(at, (decltype(kept))value & kept);
      }
    }
    out.write(j, count, scratch.lanes);
  });
  if (!std::is_void_v<Target>) return;
  for (int lane = 0; lane < n; lane += kWidth) {
    const Vec<A> picked = load(labels.target_logit + lane);
    Vec<A> value;
    if constexpr (kGeneral) {
      const auto z = transform(picked);
      value = gradient.at_target(labels, lane, z.logit) * z.slope;
    } else {
      value = gradient.at_target(labels, lane, picked);
    }
    store(scratch.lanes + lane, value);
  }
  for (int i = 0; i < n; ++i) {
    if (labels.index[i] >= 0) store_one(out.at(i, labels.index[i]), scratch.lanes[i]);
  }
}

template <typename T, typename Target>
void tile_backward(const Params& p, int64_t begin, int64_t end) {
  with_options<Target>(p, [&]<bool kHasSpread, bool kGeneral> {
    backward_tile<T, Target, kHasSpread, kGeneral>(p, begin, end);
  });
}

template <typename T>
void tile_scale(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const TileMemory<T> out(p.grad_logits, p.grad_layout, begin, end);
  TileScratch<A> scratch(out.n_rows);
  A factor[kTileRows] = {};
  for (int i = 0; i < out.n_rows; ++i) {
    const A grad_loss = static_cast<const A*>(p.grad_loss)[(begin + i) * p.grad_loss_stride];
    factor[i] = is_left_out(p, begin + i) ? A(0) : grad_loss * static_cast<A>(p.grad_scale);
  }
  for_class_groups(p.vocab_size, [&](int64_t j, int count) {
    out.read(j, count, scratch.lanes);
    for (int lane = 0; lane < out.n_rows; lane += kLanes<A>) {
      const Vec<A> scale = load(factor + lane);
      for (int u = 0; u < count; ++u) {
        A* at = scratch.lanes + u * kTileRows + lane;
        store(at, load(at) * scale);
      }
    }
    out.write(j, count, scratch.lanes);
  });
}
