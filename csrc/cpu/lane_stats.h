// The statistics of one row a lane. Included like simd.h.

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

  // Adds count classes from j on: their logits z, kTileRows apart, and their labels t(u), u from 0
  // on. Calls pick for each logit.
  template <typename Pick, typename Spread>
  XENT_INLINE void add(const A* z, int count, int64_t j, Pick& pick, const Spread& t) {
    Vec<A> top = max;
#pragma GCC unroll 4
    for (int u = 0; u < count; ++u) {
      const Vec<A> logits = load(z + u * kTileRows);
      top = vmax(logits, top);
      pick(logits);
    }
    if (j != 0) rescale(top);
    max = top;
    Vec<A> masses{}, dots{};
#pragma GCC unroll 2
    for (int u = 0; u < count; ++u) {
      const Vec<A> d = load(z + u * kTileRows) - max;
      add_to_sum(exp_nonpositive(d));
      if (!kHasSpread) continue;
      const Vec<A> weight = t(u);
      masses += weight;
      dots += weight == 0 ? Vec<A>{} : weight * d;
    }
    const Vec<A> total = above_one_ + lost_;  // keeps lost_ small
    lost_ += above_one_ - total;
    above_one_ = total;
    if constexpr (kHasSpread) {
      this->mass.add(masses);
      this->dot.add(dots);
    }
  }

  XENT_INLINE Vec<A> sum() const { return above_one_ - 1 + lost_; }
  XENT_INLINE Vec<A> log_sum() const {
    const Vec<A> sum = above_one_ - 1, log = log_positive(sum);
    return sum == 0 ? log : log + lost_ / sum;
  }

 private:
  // The sum is above_one_ - 1 + lost_. No term is greater than above_one_, so Dekker's fast two-sum
  // finds the rounding error of each addition, which goes to lost_. log_sum has all of its digits
  // even near 0, where one class has almost all of the probability.
  Vec<A> above_one_ = Vec<A>{} + 1, lost_{};

  XENT_INLINE void add_to_sum(Vec<A> term) {
    const Vec<A> total = above_one_ + term;
    lost_ += term + (above_one_ - total);
    above_one_ = total;
  }
  XENT_INLINE void rescale(Vec<A> top) {
    const Vec<A> shift = max - top, factor = exp_nonpositive(shift);
    const Vec<A> sum = (above_one_ - 1) * factor;
    lost_ *= factor;
    above_one_ = Vec<A>{} + 1;
    add_to_sum(sum);
    if constexpr (kHasSpread) {
      // shift may overflow to -inf. Without mass the dot is 0 all the same.
      const Vec<A> mass = this->mass.value();
      this->dot.add(mass == 0 ? Vec<A>{} : shift * mass);
    }
  }
};

// With what entropy and argmax need: see FullStats.
template <typename A>
struct FullLaneStats : LaneStats<A, true> {
  using Base = LaneStats<A, true>;
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  using Index = Vec<Bits>;
  Index argmax{};

  template <typename Pick, typename Spread>
  XENT_INLINE void add(const A* z, int count, int64_t j, Pick& pick, const Spread& t) {
    const Vec<A> max = this->max, sum = this->sum();
    Base::add(z, count, j, pick, t);
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
      argmax = above == 0 ? argmax : static_cast<Bits>(j + u) - Index{};
    }
    moment_.add(moment);
  }

  XENT_INLINE Vec<A> entropy() const { return this->log_sum() - moment_.value() / this->sum(); }

 private:
  LongSum<A> moment_;
  Vec<A> top_ = -std::numeric_limits<A>::infinity() - Vec<A>{};  // NaN is above all numbers
};
