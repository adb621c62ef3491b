// Statistics of rows, one row in each lane. Included like simd.h.

template <typename A>
struct NoSpreadStats {};

template <typename A>
struct SpreadStats {
  LongSum<A> mass, dot;
};

// Online softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) by groups of classes:
// each lane keeps the maximum and the sum of its classes so far, and rescales the sum once a group.
template <typename A, bool kHasSpread>
struct LaneStats : std::conditional_t<kHasSpread, SpreadStats<A>, NoSpreadStats<A>> {
  // It starts finite: where all logits are -inf, exp(-inf - max) is 0 and not NaN.
  Vec<A> max = Vec<A>{} + std::numeric_limits<A>::lowest();
  LongSum<A> sum;

  // Adds count classes from j on: their logits z, kTileRows apart, and their labels t(u), u from 0
  // on. kTwoSum: labels are spread over the classes.
  template <bool kTwoSum = kHasSpread, typename Spread>
  XENT_INLINE void add(const A* z, int count, int64_t j, const Spread& t) {
    Vec<A> top = max;
#pragma GCC unroll 4
    for (int u = 0; u < count; ++u) top = vmax(load(z + u * kTileRows), top);
    if (j != 0) rescale(top);
    max = top;
    // With labels spread over the classes, the loss has all of its digits even where one class has
    // almost all of the probability: no term is greater than 1, so Dekker's fast two-sum finds the
    // rounding error of each addition. Otherwise such a target is added last: see add_target.
    constexpr A kStart = kTwoSum ? 1 : 0;
    Vec<A> total = Vec<A>{} + kStart, lost{}, masses{}, dots{};
#pragma GCC unroll 2
    for (int u = 0; u < count; ++u) {
      const Vec<A> d = load(z + u * kTileRows) - max, before = total;
      const Vec<A> e = exp_nonpositive(d);
      total += e;
      if (kTwoSum) lost += e + (before - total);
      if (!kHasSpread) continue;
      const Vec<A> weight = t(u);
      masses += weight;
      dots += weight == 0 ? Vec<A>{} : weight * d;
    }
    sum.add(total - kStart);
    if constexpr (kHasSpread) {
      sum.lost += lost;
      this->mass.add(masses);
      this->dot.add(dots);
    }
  }

  // Adds the target after all other classes. Where it has almost all of the probability, their sum
  // is the loss: added to 1 it would lose its digits, but LongSum keeps them.
  template <typename Index>
  XENT_INLINE void add_target(const A* z, Index) {
    add<false>(z, 1, 1, [](int) { return Vec<A>{}; });
  }

  XENT_INLINE Vec<A> log_sum() const {
    const Vec<A> log = log_positive(sum.sum);
    return sum.sum == 0 ? log : log + sum.lost / sum.sum;
  }

 private:
  XENT_INLINE void rescale(Vec<A> top) {
    const Vec<A> factor = exp_of_difference(max, top);
    sum.sum *= factor;
    sum.lost *= factor;
    if constexpr (kHasSpread) {
      // max - top may overflow to -inf. Without mass the dot is 0 all the same.
      const Vec<A> mass = this->mass.value();
      this->dot.add(mass == 0 ? Vec<A>{} : (max - top) * mass);
    }
  }
};

// LaneStats, and what entropy and argmax need: see FullStats.
template <typename A>
struct FullLaneStats : LaneStats<A, true> {
  using Base = LaneStats<A, true>;
  using Index = Vec<BitsOf<A>>;
  Index argmax{};

  template <bool kTwoSum = true, typename Spread>
  XENT_INLINE void add(const A* z, int count, int64_t j, const Spread& t) {
    const Vec<A> max = this->max, sum = this->sum.value();
    Base::template add<kTwoSum>(z, count, j, t);
    const Vec<A> shift = max - this->max, factor = exp_nonpositive(shift);
    Vec<A> moment = factor == 0 ? Vec<A>{} : factor * (moment_.value() + shift * sum);
    moment_ = {moment, Vec<A>{}};
    moment = Vec<A>{};
    for (int u = 0; u < count; ++u) {
      const Vec<A> logits = load(z + u * kTileRows), d = logits - this->max;
      const Vec<A> e = exp_nonpositive(d);
      moment += e == 0 ? Vec<A>{} : e * d;
      const auto above = ~(Index)(logits <= top_) & (Index)(top_ == top_);
      top_ = above == 0 ? top_ : logits;
      argmax = above == 0 ? argmax : static_cast<BitsOf<A>>(j + u) - Index{};
    }
    moment_.add(moment);
  }

  XENT_INLINE void add_target(const A* z, Index target) {
    const Vec<A> logit = load(z);
    const auto both_nan = (Index)(logit != logit) & (Index)(top_ != top_);
    const auto equal = (Index)(logit == top_) | both_nan;
    const auto above = ~(Index)(logit <= top_) & (Index)(top_ == top_);
    const auto is_argmax = above | (equal & (Index)(target < argmax));
    add<false>(z, 1, 1, [](int) { return Vec<A>{}; });
    argmax = is_argmax == 0 ? argmax : target;
  }

  XENT_INLINE Vec<A> entropy() const {
    return this->log_sum() - moment_.value() / this->sum.value();
  }

 private:
  LongSum<A> moment_;
  Vec<A> top_ = -std::numeric_limits<A>::infinity() - Vec<A>{};  // NaN is above all numbers
};
