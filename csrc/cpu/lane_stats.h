// The forward pass of one row a lane. Included like simd.h.

// Online softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) by groups of classes:
// each lane keeps the maximum and the sum of what it has seen, and rescales its sum once a group.
template <typename A>
struct NoSpreadStats {};

template <typename A>
struct SpreadStats {
  LongSum<A> mass, dot;
};

template <typename A, bool kHasSpread>
struct LaneStats : std::conditional_t<kHasSpread, SpreadStats<A>, NoSpreadStats<A>> {
  // A finite start: lanes of -inf alone give exp(-inf - max) = 0 and not NaN.
  Vec<A> max = Vec<A>{} + std::numeric_limits<A>::lowest();
  LongSum<A> sum;

  // x: count classes, kTileRows apart; t(u): the labels' weight of the u-th of them. pick sees all.
  template <typename Pick, typename Spread>
  XENT_INLINE void add(const A* x, int count, bool is_first, Pick& pick, const Spread& t) {
    Vec<A> top = max;
#pragma GCC unroll 4
    for (int u = 0; u < count; ++u) {
      const Vec<A> logits = load(x + u * kTileRows);
      top = vmax(logits, top);
      pick(logits);
    }
    if (!is_first) rescale(top);
    max = top;
    Vec<A> sums[2] = {}, masses{}, dots{};
    const auto add_one = [&](int u, Vec<A>& to) __attribute__((always_inline)) {
      const Vec<A> d = load(x + u * kTileRows) - max;
      to += exp_nonpositive(d);
      if (!kHasSpread) return;
      const Vec<A> weight = t(u);
      masses += weight;
      dots += weight == 0 ? Vec<A>{} : weight * d;
    };
    int u = 0;
    for (; u + 2 <= count; u += 2) {
      add_one(u, sums[0]);
      add_one(u + 1, sums[1]);
    }
    if (u < count) add_one(u, sums[0]);
    sum.add(sums[0] + sums[1]);
    if constexpr (kHasSpread) {
      this->mass.add(masses);
      this->dot.add(dots);
    }
  }

 private:
  XENT_INLINE void rescale(Vec<A> top) {
    const Vec<A> shift = max - top;
    sum.scale(exp_nonpositive(shift));
    if constexpr (kHasSpread) {
      // shift is -inf where it overflows, and mass is still 0 there.
      const Vec<A> finite = vmax(Vec<A>{} + std::numeric_limits<A>::lowest(), shift);
      this->dot.add(finite * this->mass.sum);
    }
  }
};
