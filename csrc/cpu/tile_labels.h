// The labels of the rows of a tile, one row a lane, and the factors of their gradients. Included
// like simd.h.

// The label of each row of a tile, in lanes.
template <typename T>
struct TileLabels {
  using A = Acc<T>;
  using Bits = BitsOf<A>;
  const int n_rows, n_lanes;  // n_lanes: of the vectors that hold the rows
  int64_t index[kTileRows];   // -1 for probabilities and for rows that are left out
  Bits kept[kTileRows];       // all ones, or 0 for rows that are left out or beyond the last
  A target_weight[kTileRows] = {};
  A label_weight[kTileRows];  // of rows that have their own: see Params::label_weight
  const bool has_label_weight;
  A target_logit[kTileRows] = {};
  A share = 0;  // of a label: what smoothing keeps on the target
  A spread = 1;
  bool any_kept = true;

  TileLabels(const Params& p, int64_t begin, int n_rows)
      : n_rows(n_rows),
        n_lanes(static_cast<int>(ceil_div(n_rows, kLanes<A>)) * kLanes<A>),
        has_label_weight(p.label_weight != nullptr) {
    for (int i = 0; i < n_lanes; ++i) index[i] = i < n_rows ? 0 : -1;
    if (has_indices(p)) {
      with_indices(p, [&](const auto* target) { set_indices(p, target, begin); });
    } else {
      set_kept(p, begin);
      for (int i = 0; i < n_rows; ++i) index[i] = -1;
    }
  }

  // Copies the target logits among classes [j, j + count) from lanes to target_logit. With `apart`,
  // -inf is left in their place: LaneStats adds the target last. Nothing branches on the targets,
  // which cannot be predicted.
  XENT_INLINE void pick(int64_t j, int count, bool apart, A* lanes) {
    for (int lane = 0; lane < n_rows; lane += kLanes<A>) {
#pragma GCC unroll 16
      for (int i = lane; i < lane + kLanes<A>; ++i) {
        const uint64_t u = static_cast<uint64_t>(index[i] - j);
        A* from = (u < static_cast<uint64_t>(count) ? lanes + u * kTileRows : target_logit) + i;
        const A logit = *from;
        if (apart) *from = -std::numeric_limits<A>::infinity();
        target_logit[i] = logit;
      }
    }
  }
  XENT_INLINE Vec<Bits> index_lanes(int lane) const {
    Vec<Bits> classes{};
    for (int i = 0; i < kLanes<A>; ++i) classes[i] = static_cast<Bits>(index[lane + i]);
    return classes;
  }
  XENT_INLINE Vec<Bits> kept_lanes(int lane) const { return load_bits<Vec<Bits>>(kept + lane); }
  XENT_INLINE Vec<A> on_target(int lane) const { return share * load(label_weights() + lane); }
  XENT_INLINE const A* label_weights() const {
    return has_label_weight ? label_weight : target_weight;
  }
  XENT_INLINE RowLanes<A> rows(const Params& p, int64_t begin, int lane) const {
    const auto is_kept = load_bits<Narrow<Bits>>(kept + lane) != 0;
    return {p, begin + lane, n_rows - lane, __builtin_convertvector(is_kept, I64)};
  }

 private:
  // Keeps the rows whose index is not negative and whose token weight is not 0.
  void set_kept(const Params& p, int64_t begin) {
    for (int i = 0; i < n_rows && p.token_weight != nullptr; ++i) {
      if (static_cast<const A*>(p.token_weight)[begin + i] == 0) index[i] = -1;
    }
    Bits any = 0;
    for (int i = 0; i < n_lanes; ++i) {
      kept[i] = static_cast<Bits>(~(index[i] >> 63));
      any |= kept[i];
    }
    any_kept = any != 0;
  }

  template <typename Index>
  void set_indices(const Params& p, const Index* target, int64_t begin) {
    const A* weight = static_cast<const A*>(p.weight);
    const Smoothing<double> smoothing = smoothing_of(p);
    share = static_cast<A>(smoothing.keep);
    spread = static_cast<A>(smoothing.uniform);
    for (int i = 0; i < n_rows; ++i) {
      const int64_t y = target[begin + i];
      index[i] = y == p.ignore_index ? -1 : checked_class(p, y);
    }
    set_kept(p, begin);
    for (int i = 0; i < n_rows; ++i) target_weight[i] = 1;
    for (int i = 0; i < n_rows && weight != nullptr; ++i) {
      if (index[i] >= 0) target_weight[i] = weight[index[i]];
    }
    if (!has_label_weight) return;
    for (int i = 0; i < n_lanes; ++i) {
      label_weight[i] = i < n_rows ? static_cast<const A*>(p.label_weight)[begin + i] : A(0);
    }
  }
};

// The labels t_j of the rows of a tile. Target is the type of probabilities, or void for indices.
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
        scale(static_cast<A>(smoothing_of(p).keep)),
        offset(static_cast<A>(smoothing_of(p).uniform)),
        scratch(target.n_rows) {}

  XENT_INLINE void read(int64_t j, int count) { target.read(j, count, scratch.lanes); }
  // Of class j, the u-th of those that were read.
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

// The per-row factors of a tile's gradient, in lanes.
template <typename T>
struct TileGradient {
  using A = Acc<T>;
  A max[kTileRows] = {}, log_sum[kTileRows] = {}, mass[kTileRows], upstream[kTileRows] = {};
  A factor[kTileRows], spread[kTileRows], shifted_factor[kTileRows];  // see FullGradient
  A softmax[kTileRows] = {}, shifted[kTileRows] = {};                 // see Upstream
  const bool has_options;

  TileGradient(const Params& p, const TileLabels<T>& labels, int64_t begin)
      : has_options(has_row_options(p)) {
    const int64_t bytes = labels.n_rows * sizeof(A);
    __builtin_memcpy(max, static_cast<const A*>(p.row_max) + begin, bytes);
    __builtin_memcpy(log_sum, static_cast<const A*>(p.log_sum) + begin, bytes);
    for (int i = 0; i < labels.n_lanes; ++i) mass[i] = static_cast<A>(p.weight_sum);
    if (p.label_mass != nullptr) {
      __builtin_memcpy(mass, static_cast<const A*>(p.label_mass) + begin, bytes);
    }
    set_upstream(p, labels, begin);
    for (int lane = 0; lane < labels.n_rows; lane += kLanes<A>) {
      const auto kept = labels.kept_lanes(lane);
      const Vec<A> g = kept == 0 ? Vec<A>{} : load(upstream + lane);
      const Vec<A> q = label_mass(labels.on_target(lane), labels.spread, load(mass + lane));
      const Vec<A> one_over_sum = exp_nonpositive(-load(log_sum + lane));
      store(spread + lane, g * labels.spread);
      if (!has_options) {
        store(factor + lane, g * q * one_over_sum);
      } else {
        store(factor + lane, (g * q + load(softmax + lane)) * one_over_sum);
        store(shifted_factor + lane, load(shifted + lane) * one_over_sum);
      }
    }
  }

  // The softmax part of a gradient, without its labels' part. d is z - m.
  XENT_INLINE Vec<A> of_softmax(Vec<A> d, Vec<A> its_factor, int lane) const {
    const Vec<A> e = exp_nonpositive(d);
    if (!has_options) return e * its_factor;
    return e * its_factor + (e == 0 ? Vec<A>{} : e * d * load(shifted_factor + lane));
  }

  // The gradient at the targets, by their transformed logits.
  XENT_INLINE Vec<A> at_target(const TileLabels<T>& labels, int lane, Vec<A> target_logit) const {
    const Vec<A> d = target_logit - load(max + lane), log_p = d - load(log_sum + lane);
    const Vec<A> prob = exp_nonpositive(log_p);
    const Vec<A> gradient =
        load(upstream + lane) * target_gradient(labels.on_target(lane), labels.spread, prob,
                                                expm1_nonpositive(log_p), load(mass + lane),
                                                load(labels.target_weight + lane));
    if (!has_options) return gradient;
    return add_softmax_part(gradient, load(softmax + lane), load(shifted + lane), prob, d);
  }

 private:
  void set_upstream(const Params& p, const TileLabels<T>& labels, int64_t begin) {
    for (int lane = 0; lane < labels.n_rows; lane += kLanes<double>) {
      const RowLanes<A> rows = labels.rows(p, begin, lane);
      const F64 row_max = load_wide(max + lane, kLanes<double>);
      const auto row = upstream_of(rows, row_max, load_wide(log_sum + lane, kLanes<double>));
      store_narrow(upstream + lane, row.g, kLanes<double>);
      if (!has_options) continue;
      store_narrow(softmax + lane, row.softmax, kLanes<double>);
      store_narrow(shifted + lane, row.shifted, kLanes<double>);
    }
  }
};
