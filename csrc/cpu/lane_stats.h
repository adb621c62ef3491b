// The forward pass of one row a lane. Included like simd.h.

// Online softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867): each lane keeps the
// maximum and the sum of what it has seen, and rescales its sum once a call of add, which makes
// 1 + 1 / kCount exponentials a logit.
template <typename A, bool kHasSpread>
struct LaneStats {
  // A finite start: lanes of -inf alone give exp(-inf - max) = 0 and not NaN.
  Vec<A> max = Vec<A>{} + std::numeric_limits<A>::lowest();
  LongSum<A> sum, mass, dot;

  template <int kCount>
  XENT_INLINE void add(const Vec<A> (&x)[kCount], const Vec<A> (&t)[kCount]) {
    Vec<A> top = max;
    for (int u = 0; u < kCount; ++u) top = vmax(x[u], top);
    const Vec<A> shift = max - top;
    max = top;
    sum.scale(exp_nonpositive(shift));
    // shift is -inf where it overflows, and mass is still 0 there.
    if (kHasSpread) dot.add(vmax(Vec<A>{} + std::numeric_limits<A>::lowest(), shift) * mass.sum);
    Vec<A> sums[2] = {}, masses{}, dots{};
    for (int u = 0; u < kCount; ++u) {
      const Vec<A> d = x[u] - max;
      sums[u % 2] += exp_nonpositive(d);
      if (kHasSpread) {
        masses += t[u];
        dots += t[u] == 0 ? Vec<A>{} : t[u] * d;
      }
    }
    sum.add(sums[0] + sums[1]);
    if (!kHasSpread) return;
    mass.add(masses);
    dot.add(dots);
  }
};
