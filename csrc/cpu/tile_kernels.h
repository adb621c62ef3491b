// Tile kernels: up to kTileRows rows with one row in each vector lane, all classes of a row one
// after another: for strided classes (images), which are walked where they lie, and for
// vocabularies too small to fill vectors. Included like simd.h.
//
// A tile whose rows are adjacent in memory is read and written directly. Any other is gathered into
// scratch memory, kGroup classes at a time.

constexpr int kGroup = 8;

template <typename T>
class TileMemory {
 public:
  const int n_rows;

  TileMemory(const void* data, const Layout& layout, int64_t begin, int64_t end)
      : n_rows(static_cast<int>(end - begin)),
        base_(static_cast<T*>(const_cast<void*>(data)) + row_offset(layout, begin)),
        class_stride_(layout.class_stride) {
    const int inner = layout.n_dims - 1;
    const int64_t until_end = layout.size[inner] - begin % layout.size[inner];
    is_regular_ = inner == 0 || n_rows <= until_end;
    row_stride_ = layout.stride[inner];
    is_direct_ = is_regular_ && row_stride_ == 1 && n_rows % kLanes<Acc<T>> == 0;
    for (int i = 0; i < n_rows && !is_regular_; ++i) {
      offsets_[i] = row_offset(layout, begin + i) - row_offset(layout, begin);
    }
    // Lanes beyond the last row are computed on, and not used.
    const int width = kLanes<Acc<T>>, last = n_rows / width * width;
    for (int u = 0; u < kGroup && last < n_rows; ++u) {
      __builtin_memset(scratch_ + u * kTileRows + last, 0, width * sizeof(T));
    }
  }

  T* at(int row, int64_t j) const {
    return base_ + (is_regular_ ? row * row_stride_ : offsets_[row]) + j * class_stride_;
  }
  int64_t stride() const { return is_direct_ ? class_stride_ : kTileRows; }

  // Classes [j, j + count) as count rows of lanes, stride() apart.
  template <typename Count>
  XENT_INLINE const T* read(int64_t j, Count count) {
    if (is_direct_) return at(0, j);
    for (int i = 0; i < n_rows; ++i) {
      const T* from = at(i, j);
      for (int u = 0; u < count; ++u) scratch_[u * kTileRows + i] = from[u * class_stride_];
    }
    return scratch_;
  }

  // Where to put classes [j, j + count); flush completes the write.
  T* write(int64_t j) { return is_direct_ ? at(0, j) : scratch_; }
  template <typename Count>
  XENT_INLINE void flush(int64_t j, Count count) const {
    if (is_direct_) return;
    for (int i = 0; i < n_rows; ++i) {
      T* to = at(i, j);
      for (int u = 0; u < count; ++u) to[u * class_stride_] = scratch_[u * kTileRows + i];
    }
  }

  // Zeros in place of classes that are not to be read, stride() apart.
  const T* zeros() {
    __builtin_memset(scratch_, 0, sizeof scratch_);
    is_direct_ = false;
    return scratch_;
  }

 private:
  T* base_;
  int64_t class_stride_, row_stride_;
  bool is_regular_, is_direct_;
  int64_t offsets_[kTileRows];  // of an irregular tile
  T scratch_[kGroup * kTileRows];
};

// Calls step(j, count) for all classes, count a compile-time kGroup, 2 or 1.
template <typename Step>
XENT_INLINE void for_class_groups(int64_t vocab_size, Step step) {
  int64_t j = 0;
  for (; j + kGroup <= vocab_size; j += kGroup) step(j, std::integral_constant<int, kGroup>{});
  for (; j + 2 <= vocab_size; j += 2) step(j, std::integral_constant<int, 2>{});
  if (j < vocab_size) step(j, std::integral_constant<int, 1>{});
}

// The label of each row of a tile, gathered into lanes. Ignored rows are not kept.
template <typename T>
struct TileLabels {
  using A = Acc<T>;
  A kept[kTileRows];
  A on_target[kTileRows];
  A target_weight[kTileRows];
  T target_logit[kTileRows];
  int64_t index[kTileRows];  // -1 where there is none
  A spread = 1;
  bool any_kept = true;

  TileLabels(const Params& p, const TileMemory<T>& logits, int64_t begin) {
    const int n = logits.n_rows;
    switch (p.target_kind) {
      case TargetKind::int64:
        gather(p, static_cast<const int64_t*>(p.target) + begin, logits);
        break;
      case TargetKind::int32:
        gather(p, static_cast<const int32_t*>(p.target) + begin, logits);
        break;
      case TargetKind::uint8:
        gather(p, static_cast<const uint8_t*>(p.target) + begin, logits);
        break;
      case TargetKind::probabilities:
        for (int i = 0; i < kTileRows; ++i) {
          kept[i] = i < n;
          on_target[i] = target_weight[i] = 0;
          target_logit[i] = T{};
          index[i] = -1;
        }
    }
  }

 private:
  template <typename Index>
  void gather(const Params& p, const Index* target, const TileMemory<T>& logits) {
    const A* weight = static_cast<const A*>(p.weight);
    const A share = static_cast<A>(1 - p.label_smoothing);
    spread = static_cast<A>(p.label_smoothing / static_cast<double>(p.vocab_size));
    any_kept = false;
    for (int i = 0; i < kTileRows; ++i) {
      const bool keep = i < logits.n_rows && target[i] != p.ignore_index;
      kept[i] = keep;
      index[i] = keep ? target[i] : -1;
      target_weight[i] = !keep ? A(0) : weight == nullptr ? A(1) : weight[target[i]];
      on_target[i] = share * target_weight[i];
      target_logit[i] = keep ? *logits.at(i, target[i]) : T{};
      any_kept |= keep;
    }
  }
};

// t_j of all rows of a tile at class j. Target is the type of probabilities, or void for indices.
template <typename T, typename Target>
struct TileSpread {
  using A = Acc<T>;
  TileMemory<Target> target;
  const A* weight;
  A scale, offset;
  const Target* group = nullptr;

  TileSpread(const Params& p, int64_t begin, int64_t end)
      : target(p.target, p.target_layout, begin, end),
        weight(static_cast<const A*>(p.weight)),
        scale(static_cast<A>(1 - p.label_smoothing)),
        offset(static_cast<A>(p.label_smoothing / static_cast<double>(p.vocab_size))) {}

  template <typename Count>
  XENT_INLINE void read(int64_t j, Count count) {
    group = target.read(j, count);
  }
  XENT_INLINE Vec<A> at(int64_t j, int u, int lane) const {
    const Vec<A> t = load(group + u * target.stride() + lane) * scale + offset;
    return weight == nullptr ? t : t * weight[j + u];
  }
};

template <typename T>
struct TileSpread<T, void> {
  const Acc<T>* weight;

  TileSpread(const Params& p, int64_t, int64_t) : weight(static_cast<const Acc<T>*>(p.weight)) {}
  template <typename Count>
  XENT_INLINE void read(int64_t, Count) {}
  XENT_INLINE Vec<Acc<T>> at(int64_t j, int u, int) const {
    return Vec<Acc<T>>{} + (weight == nullptr ? Acc<T>(1) : weight[j + u]);
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
  TileMemory<T> logits(p.logits, p.logits_layout, begin, end);
  const TileLabels<T> labels(p, logits, begin);
  TileSpread<T, Target> spread(p, begin, end);
  LaneStats<A, kHasSpread> stats[kTileRows / kWidth];
  const int n = logits.n_rows;

  if (labels.any_kept) {
    for_class_groups(p.vocab_size, [&](int64_t j, auto count) {
      const T* x = logits.read(j, count);
      if (kHasSpread) spread.read(j, count);
      for (int lane = 0; lane < n; lane += kWidth) {
        Vec<A> group[count()], t[count()];
        for (int u = 0; u < count; ++u) {
          group[u] = load(x + u * logits.stride() + lane);
          if (kHasSpread) t[u] = spread.at(j, u, lane);
        }
        stats[lane / kWidth].add(group, t);
      }
    });
  }
  for (int lane = 0; lane < n; lane += kWidth) {
    const auto& s = stats[lane / kWidth];
    const Vec<A> mass = s.mass.value(), dot = s.dot.value();
    const Vec<A> log_sum = log_positive(s.sum.value());
    Vec<A> loss;
    if constexpr (std::is_void_v<Target>) {
      loss = index_loss(load(labels.on_target + lane), labels.spread,
                        load(labels.target_logit + lane) - s.max, log_sum, mass, dot);
    } else {
      loss = probability_loss(log_sum, mass, dot);
      store_rows<A>(p.label_mass, begin, lane, n, mass);
    }
    store_rows<A>(p.row_loss, begin, lane, n, load(labels.kept + lane) == 0 ? Vec<A>{} : loss);
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
  A max[kTileRows], logit_factor[kTileRows], spread[kTileRows];
  T at_target[kTileRows];

  TileGradient(const Params& p, const TileLabels<T>& labels, int64_t begin, int n) {
    A log_sum[kTileRows], mass[kTileRows], upstream[kTileRows];
    const A* grad_losses = static_cast<const A*>(p.grad_loss);
    for (int i = 0; i < kTileRows; ++i) {
      const int64_t row = begin + (i < n ? i : 0);
      const A grad_loss = grad_losses[row * p.grad_loss_stride];
      max[i] = static_cast<const A*>(p.row_max)[row];
      log_sum[i] = static_cast<const A*>(p.log_sum)[row];
      mass[i] = p.label_mass == nullptr ? static_cast<A>(p.weight_sum)
                                        : static_cast<const A*>(p.label_mass)[row];
      upstream[i] = labels.kept[i] == 0 ? A(0) : grad_loss * static_cast<A>(p.grad_scale);
      spread[i] = upstream[i] * labels.spread;
    }
    for (int lane = 0; lane < n; lane += kLanes<A>) {
      const Vec<A> on_target = load(labels.on_target + lane), g = load(upstream + lane);
      const Vec<A> lane_mass = load(mass + lane), lane_log_sum = load(log_sum + lane);
      const Vec<A> log_p = (load(labels.target_logit + lane) - load(max + lane)) - lane_log_sum;
      store(logit_factor + lane,
            g * (on_target + labels.spread * lane_mass) * exp_nonpositive(-lane_log_sum));
      store(at_target + lane, g * target_gradient(on_target, labels.spread, exp_nonpositive(log_p),
                                                  expm1_nonpositive(log_p), lane_mass,
                                                  load(labels.target_weight + lane)));
    }
  }
};

template <typename T, typename Target, bool kHasSpread>
void backward_tile(const Params& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kWidth = kLanes<A>;
  TileMemory<T> logits(p.logits, p.logits_layout, begin, end);
  TileMemory<T> out(p.grad_logits, p.grad_layout, begin, end);
  const TileLabels<T> labels(p, logits, begin);
  const TileGradient<T> gradient(p, labels, begin, logits.n_rows);
  TileSpread<T, Target> spread(p, begin, end);
  const int n = logits.n_rows;

  for_class_groups(p.vocab_size, [&](int64_t j, auto count) {
    const T* x = labels.any_kept ? logits.read(j, count) : logits.zeros();
    const int64_t stride = logits.stride();
    if (kHasSpread) spread.read(j, count);
    T* to = out.write(j);
    for (int lane = 0; lane < n; lane += kWidth) {
      const Vec<A> max = load(gradient.max + lane), factor = load(gradient.logit_factor + lane);
      const auto ignored = load(labels.kept + lane) == 0;
      for (int u = 0; u < count; ++u) {
        Vec<A> value = exp_nonpositive(load(x + u * stride + lane) - max) * factor;
        if (kHasSpread) value -= spread.at(j, u, lane) * load(gradient.spread + lane);
        store(to + u * out.stride() + lane, ignored ? Vec<A>{} : value);
      }
    }
    out.flush(j, count);
  });
  for (int i = 0; i < n; ++i) {
    if (labels.index[i] >= 0) *out.at(i, labels.index[i]) = gradient.at_target[i];
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
  TileMemory<T> out(p.grad_logits, p.grad_layout, begin, end);
  A factor[kTileRows] = {};
  for (int i = 0; i < out.n_rows; ++i) {
    const bool ignored =
        p.target_kind != TargetKind::probabilities && target_index(p, begin + i) == p.ignore_index;
    const A grad_loss = static_cast<const A*>(p.grad_loss)[(begin + i) * p.grad_loss_stride];
    factor[i] = ignored ? A(0) : grad_loss * static_cast<A>(p.grad_scale);
  }
  for_class_groups(p.vocab_size, [&](int64_t j, auto count) {
    const T* from = out.read(j, count);
    T* to = out.write(j);
    for (int lane = 0; lane < out.n_rows; lane += kLanes<A>) {
      const Vec<A> scale = load(factor + lane);
      for (int u = 0; u < count; ++u) {
        const int64_t at = u * out.stride() + lane;
        store(to + at, load(from + at) * scale);
      }
    }
    out.flush(j, count);
  });
}
