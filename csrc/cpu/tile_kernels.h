// Tile kernels: up to kTileRows rows with one row in each vector lane, all classes of a row one
// after another: for strided classes (images), which are walked where they lie, and for
// vocabularies too small to fill vectors. Included like simd.h.

// Calls step(j, count) for all classes, in as few groups as there can be of at most kGroup, about
// equal: so none has less than 8 where there are 8 classes.
template <typename Step>
XENT_INLINE void for_class_groups(int64_t vocab_size, const Step& step) {
  const int64_t n_groups = (vocab_size + kGroup - 1) / kGroup;
  const int64_t size = (vocab_size + n_groups - 1) / n_groups;
  for (int64_t j = 0; j < vocab_size; j += size) {
    step(j, static_cast<int>(vocab_size - j < size ? vocab_size - j : size));
  }
}

// The label of each row of a tile, in lanes.
template <typename T>
struct TileLabels {
  using A = Acc<T>;
  using Bits = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
  int64_t index[kTileRows];  // -1 where there is none: of probabilities and of ignored rows
  Bits kept[kTileRows];      // all ones, or 0: of ignored rows, and of those beyond the last
  A target_weight[kTileRows] = {};
  A target_logit[kTileRows] = {};
  A share = 0;  // of a row's label that is on its target
  A spread = 1;
  bool any_kept = true;

  TileLabels(const Params& p, int64_t begin, int n_rows) {
    for (int i = 0; i < kTileRows; ++i) index[i] = -1;
    if (p.target_kind == TargetKind::probabilities) {
      for (int i = 0; i < kTileRows; ++i) kept[i] = -Bits{i < n_rows};
    } else {
      with_indices(p, [&](const auto* target) { set_indices(p, target + begin, n_rows); });
    }
  }

  XENT_INLINE Vec<Bits> kept_lanes(int lane) const { return load_bits<Vec<Bits>>(kept + lane); }
  XENT_INLINE Vec<A> on_target(int lane) const { return share * load(target_weight + lane); }

 private:
  template <typename Index>
  void set_indices(const Params& p, const Index* target, int n_rows) {
    const A* weight = static_cast<const A*>(p.weight);
    share = static_cast<A>(1 - p.label_smoothing);
    spread = static_cast<A>(p.label_smoothing / static_cast<double>(p.vocab_size));
    for (int i = 0; i < n_rows; ++i) {
      const int64_t y = target[i];
      index[i] = y == p.ignore_index ? -1 : y;
    }
    Bits any = 0;
    for (int i = 0; i < kTileRows; ++i) {
      kept[i] = static_cast<Bits>(~(index[i] >> 63));
      any |= kept[i];
    }
    any_kept = any != 0;
    for (int i = 0; i < n_rows; ++i) target_weight[i] = 1;
    for (int i = 0; i < n_rows && weight != nullptr; ++i) {
      if (index[i] >= 0) target_weight[i] = weight[index[i]];
    }
  }
};

// Takes target logits as a lane's classes go by. kNone: of probabilities, which have no target.
template <typename T, bool kNone>
class TargetPick {
  using A = Acc<T>;
  using Bits = typename TileLabels<T>::Bits;
  Vec<Bits> target_{}, next_{};  // counted from the group's first class; 255: not in this group
  Vec<A> logit_;

 public:
  // The next class is j, the first of a group.
  XENT_INLINE TargetPick(const TileLabels<T>& labels, int64_t j, int lane)
      : logit_(load(labels.target_logit + lane)) {
    for (int i = 0; i < kLanes<A>; ++i) {
      const uint64_t u = static_cast<uint64_t>(labels.index[lane + i] - j);
      target_[i] = static_cast<Bits>(u < kGroup ? u : 255);
    }
  }
  XENT_INLINE void operator()(Vec<A> x) {
    if (kNone) return;
    logit_ = next_ == target_ ? x : logit_;
    next_ += 1;
  }
  XENT_INLINE void finish(TileLabels<T>& labels, int lane) const {
    if (!kNone) store(labels.target_logit + lane, logit_);
  }
};

// t_j of all rows of a tile. Target is the type of probabilities, or void for indices.
template <typename T, typename Target>
struct TileSpread {
  using A = Acc<T>;
  TileMemory<Target> target;
  const A* weight;
  A scale, offset;
  TileScratch<A> scratch;

  TileSpread(const Params& p, int64_t begin, int64_t end)
      : target(p.target, p.target_layout, begin, end),
        weight(static_cast<const A*>(p.weight)),
        scale(static_cast<A>(1 - p.label_smoothing)),
        offset(static_cast<A>(p.label_smoothing / static_cast<double>(p.vocab_size))),
        scratch(target.n_rows) {}

  XENT_INLINE void read(int64_t j, int count) { target.read(j, count, scratch.lanes); }
  // Class j, which is the u-th that was read.
  XENT_INLINE Vec<A> at(int64_t j, int u, int lane) const {
    const Vec<A> t = load(scratch.lanes + u * kTileRows + lane) * scale + offset;
    return weight == nullptr ? t : t * weight[j];
  }
};

template <typename T>
struct TileSpread<T, void> {
  const Acc<T>* weight;

  TileSpread(const Params& p, int64_t, int64_t) : weight(static_cast<const Acc<T>*>(p.weight)) {}
  XENT_INLINE void read(int64_t, int) {}
  XENT_INLINE Vec<Acc<T>> at(int64_t j, int, int) const {
    return Vec<Acc<T>>{} + (weight == nullptr ? Acc<T>(1) : weight[j]);
  }
};

// Stores lanes [lane, lane + width) of a per-row result, those of them that are rows of the tile.
template <typename A>
XENT_INLINE void store_rows(void* to, int64_t begin, int lane, int n_rows, Vec<A> value) {
  A* rows = static_cast<A*>(to) + begin + lane;
  if (n_rows - lane >= kLanes<A>) {
    store(rows, value);
  } else {
    store_first(rows, value, n_rows - lane);
  }
}

template <typename T, typename Target, bool kHasSpread>
void forward_tile(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kWidth = kLanes<A>;
  const TileMemory<T> logits(p.logits, p.logits_layout, begin, end);
  TileLabels<T> labels(p, begin, logits.n_rows);
  TileSpread<T, Target> spread(p, begin, end);
  LaneStats<A, kHasSpread> stats[kTileRows / kWidth];
  TileScratch<A> scratch(logits.n_rows);
  const int n = logits.n_rows;

  if (labels.any_kept) {
    for_class_groups(p.vocab_size, [&](int64_t j, int count) {
      logits.read(j, count, scratch.lanes);
      if (kHasSpread) spread.read(j, count);
      for (int lane = 0; lane < n; lane += kWidth) {
        TargetPick<T, !std::is_void_v<Target>> pick(labels, j, lane);
        const auto t = [&](int u)
                           __attribute__((always_inline)) { return spread.at(j + u, u, lane); };
        stats[lane / kWidth].add(scratch.lanes + lane, count, j == 0, pick, t);
        pick.finish(labels, lane);
      }
    });
  }
  for (int lane = 0; lane < n; lane += kWidth) {
    const auto& s = stats[lane / kWidth];
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
    } else {
      loss = probability_loss(log_sum, mass, dot);
      store_rows<A>(p.label_mass, begin, lane, n, mass);
    }
    store_rows<A>(p.row_loss, begin, lane, n, labels.kept_lanes(lane) == 0 ? Vec<A>{} : loss);
    store_rows<A>(p.row_max, begin, lane, n, s.max);
    store_rows<A>(p.log_sum, begin, lane, n, log_sum);
  }
}

template <typename T, typename Target>
void tile_forward(const Params& p, int64_t begin, int64_t end) {
  if (std::is_void_v<Target> && p.label_smoothing == 0) {
    forward_tile<T, Target, false>(p, begin, end);
  } else {
    forward_tile<T, Target, true>(p, begin, end);
  }
}

// The per-row factors of a tile's gradient, in lanes.
template <typename T>
struct TileGradient {
  using A = Acc<T>;
  A max[kTileRows] = {}, log_sum[kTileRows] = {}, mass[kTileRows], upstream[kTileRows] = {};
  A logit_factor[kTileRows], spread[kTileRows];

  TileGradient(const Params& p, const TileLabels<T>& labels, int64_t begin, int n) {
    const int64_t bytes = n * sizeof(A);
    __builtin_memcpy(max, static_cast<const A*>(p.row_max) + begin, bytes);
    __builtin_memcpy(log_sum, static_cast<const A*>(p.log_sum) + begin, bytes);
    for (int i = 0; i < kTileRows; ++i) mass[i] = static_cast<A>(p.weight_sum);
    if (p.label_mass != nullptr) {
      __builtin_memcpy(mass, static_cast<const A*>(p.label_mass) + begin, bytes);
    }
    const A* grad_loss = static_cast<const A*>(p.grad_loss) + begin * p.grad_loss_stride;
    for (int i = 0; i < n; ++i) {
      upstream[i] = grad_loss[i * p.grad_loss_stride] * static_cast<A>(p.grad_scale);
    }
    for (int lane = 0; lane < n; lane += kLanes<A>) {
      const Vec<A> g = labels.kept_lanes(lane) == 0 ? Vec<A>{} : load(upstream + lane);
      const Vec<A> q = label_mass(labels.on_target(lane), labels.spread, load(mass + lane));
      store(spread + lane, g * labels.spread);
      store(logit_factor + lane, g * q * exp_nonpositive(-load(log_sum + lane)));
    }
  }

  // At the targets, once their logits have been picked.
  XENT_INLINE Vec<A> at_target(const TileLabels<T>& labels, int lane) const {
    const Vec<A> log_p =
        (load(labels.target_logit + lane) - load(max + lane)) - load(log_sum + lane);
    return load(upstream + lane) * target_gradient(labels.on_target(lane), labels.spread,
                                                   exp_nonpositive(log_p), expm1_nonpositive(log_p),
                                                   load(mass + lane),
                                                   load(labels.target_weight + lane));
  }
};

template <typename T, typename Target, bool kHasSpread>
void backward_tile(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kWidth = kLanes<A>;
  const TileMemory<T> logits(p.logits, p.logits_layout, begin, end);
  const TileMemory<T> out(p.grad_logits, p.grad_layout, begin, end);
  TileLabels<T> labels(p, begin, logits.n_rows);
  const TileGradient<T> gradient(p, labels, begin, logits.n_rows);
  TileSpread<T, Target> spread(p, begin, end);
  TileScratch<A> scratch(logits.n_rows);
  const int n = logits.n_rows;

  for_class_groups(p.vocab_size, [&](int64_t j, int count) {
    if (labels.any_kept) logits.read(j, count, scratch.lanes);
    if (kHasSpread) spread.read(j, count);
    for (int lane = 0; lane < n; lane += kWidth) {
      TargetPick<T, !std::is_void_v<Target>> pick(labels, j, lane);
      const Vec<A> max = load(gradient.max + lane), factor = load(gradient.logit_factor + lane);
      const auto kept = labels.kept_lanes(lane);
#pragma GCC unroll 2
      for (int u = 0; u < count; ++u) {
        A* at = scratch.lanes + u * kTileRows + lane;
        const Vec<A> x = load(at);
        pick(x);
        Vec<A> value = exp_nonpositive(x - max) * factor;
        if (kHasSpread) value -= spread.at(j + u, u, lane) * load(gradient.spread + lane);
        store_bits(at, (decltype(kept))value & kept);
      }
      pick.finish(labels, lane);
    }
    out.write(j, count, scratch.lanes);
  });
  if (!std::is_void_v<Target>) return;
  for (int lane = 0; lane < n; lane += kWidth) {
    store(scratch.lanes + lane, gradient.at_target(labels, lane));
  }
  for (int i = 0; i < n; ++i) {
    if (labels.index[i] >= 0) store_one(out.at(i, labels.index[i]), scratch.lanes[i]);
  }
}

template <typename T, typename Target>
void tile_backward(const Params& p, int64_t begin, int64_t end) {
  if (std::is_void_v<Target> && p.label_smoothing == 0) {
    backward_tile<T, Target, false>(p, begin, end);
  } else {
    backward_tile<T, Target, true>(p, begin, end);
  }
}

template <typename T>
void tile_scale(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const TileMemory<T> out(p.grad_logits, p.grad_layout, begin, end);
  TileScratch<A> scratch(out.n_rows);
  A factor[kTileRows] = {};
  for (int i = 0; i < out.n_rows; ++i) {
    const bool ignored =
        p.target_kind != TargetKind::probabilities && target_index(p, begin + i) == p.ignore_index;
    const A grad_loss = static_cast<const A*>(p.grad_loss)[(begin + i) * p.grad_loss_stride];
    factor[i] = ignored ? A(0) : grad_loss * static_cast<A>(p.grad_scale);
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
