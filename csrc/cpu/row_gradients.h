// The gradient of a row, or of a segment of one, whose classes are adjacent in memory. Without
// per-class options: the logits are not transformed, z is x. Included like simd.h.

// Writes a gradient: its softmax part, which pair(j) and rest(j, n) return, minus its labels' part.
template <bool kMayBeNan = true, typename T, typename Spread, typename OnPair, typename OnRest>
XENT_INLINE void write_gradient(T* out, const Spread& spread, int64_t begin, int64_t end,
                                Acc<T> scale, const OnPair& pair, const OnRest& rest) {
  using A = Acc<T>;
  for_pairs<A>(
      begin, end,
      [&](int64_t j) __attribute__((always_inline)) {
        Pair<A> value = pair(j);
        if constexpr (Spread::kExists) {
          const Pair<A> t = spread.pair(j);
          value = {value.first - t.first * scale, value.second - t.second * scale};
        }
        store_pair<kMayBeNan>(out + j, value);
      },
      [&](int64_t j, int n) __attribute__((always_inline)) {
        Vec<A> value = rest(j, n);
        if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;
        store_first(out + j, value, n);
      });
}

// Writes the gradient of whole pairs of vectors from begin on, and returns where they end.
// T is BFloat16. clang looks the function up for other types too, so it has to be a template.
template <typename T>
XENT_INLINE int64_t write_rounded_gradient(T* out, const T* x, int64_t begin, int64_t end,
                                           const RoundedExp& exp) {
  constexpr int64_t kPair = 2 * kLanes<float>;
  int64_t j = begin;
#pragma GCC unroll 2
  for (; j + kPair <= end; j += kPair) {
    fetch_ahead(x + j);
    const Pair<float> logits = load_pair<T>(x + j);
    store_bits(out + j, join_halves(exp(logits.first), exp(logits.second)));
  }
  return j;
}

template <typename T>
XENT_INLINE void write_target(const RowBatch& batch, int i, int64_t begin, int64_t end, T* out) {
  const int64_t y = batch.target[i];
  if (begin <= y && y < end) store_one(out + y, static_cast<Acc<T>>(batch.at_target[i]));
}

template <typename T, typename Target>
void segment_gradient(const Params& p, const RowBatch& batch, int i, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t row = batch.begin + i;
  const FullGradient<double> gradient = batch.gradient(i);
  const T* x = logits_row<T>(p, row);
  T* out = gradient_row<T>(p, row);
  with_spread<T, Target>(p, row, [&](const auto& spread) {
    using Spread = std::decay_t<decltype(spread)>;
    const RowExp<A, Spread> exp(gradient.max);  // whose origin is gradient.max
    const A factor = static_cast<A>(gradient.factor * exp.kScale);
    const auto softmax = [=](Vec<A> logits) __attribute__((always_inline)) {
      return exp.power(exp.exponent(logits)) * factor;
    };
    int64_t rest = begin;
    if constexpr (kByTurns<T> && !Spread::kExists) {
      if (RoundedExp::can_do(gradient.max, gradient.factor)) {
        const RoundedExp rounded(gradient.max, batch.log2_factor[i], gradient.factor < 0);
        rest = write_rounded_gradient(out, x, begin, end, rounded);
      }
    }
    write_gradient(
        out, spread, rest, end, static_cast<A>(gradient.spread),
        [&](int64_t j) __attribute__((always_inline)) {
          fetch_ahead(x + j);
          const Pair<A> logits = load_pair<T>(x + j);
          return Pair<A>{softmax(logits.first), softmax(logits.second)};
        },
        [&](int64_t j, int n)
            __attribute__((always_inline)) { return softmax(load_first(x + j, n)); });
  });
  write_target(batch, i, begin, end, out);
}

template <bool kMayBeNan, typename T, typename Spread>
XENT_INLINE void scale_saved(T* out, const Acc<T>* saved, const Spread& spread, int64_t begin,
                             int64_t end, Acc<T> factor, Acc<T> scale) {
  using A = Acc<T>;
  write_gradient<kMayBeNan>(
      out, spread, begin, end, scale,
      [&](int64_t j) __attribute__((always_inline)) {
        return Pair<A>{load(saved + j) * factor, load(saved + j + kLanes<A>) * factor};
      },
      [&](int64_t j, int n)
          __attribute__((always_inline)) { return load_first(saved + j, n) * factor; });
}

template <typename T, typename Target>
void row_gradient_of_saved(const Params& p, const RowBatch& batch, int i,
                           const RowScratch& scratch) {
  using A = Acc<T>;
  const int64_t row = batch.begin + i;
  const FullGradient<double> gradient = batch.gradient(i);
  constexpr bool kInPlace = std::is_same_v<T, A>;
  T* out = gradient_row<T>(p, row);
  const A* saved;
  if constexpr (kInPlace) {
    saved = out;
  } else {
    saved = scratch.exponentials;
  }
  const A scale = static_cast<A>(gradient.spread);
  with_spread<T, Target>(p, row, [&](const auto& spread) {
    using Spread = std::decay_t<decltype(spread)>;
    using Exp = std::conditional_t<kInPlace, SubtractingExp<A>, RowExp<A, Spread>>;
    for (int64_t begin = 0; begin < p.vocab_size; begin += kBlock) {
      const int64_t end = begin + kBlock < p.vocab_size ? begin + kBlock : p.vocab_size;
      const double shift = scratch.origins[begin / kBlock] - gradient.max;
      const double scale_of_block = shift == 0 ? Exp::kScale : Exp::kScale * std::exp(shift);
      const A factor = static_cast<A>(gradient.factor * scale_of_block);
      // The factor is finite only if no logit of the row is NaN or inf: then no gradient is NaN.
      if (kByTurns<T> && !Spread::kExists && std::fabs(factor) < std::numeric_limits<A>::max()) {
        scale_saved<false>(out, saved, spread, begin, end, factor, scale);
      } else {
        scale_saved<true>(out, saved, spread, begin, end, factor, scale);
      }
    }
  });
  write_target(batch, i, 0, p.vocab_size, out);
}

template <typename T>
void segment_scale(const Params& p, int64_t row, int64_t begin, int64_t end, double factor) {
  using A = Acc<T>;
  T* out = gradient_row<T>(p, row);
  const A scale = static_cast<A>(factor);
  write_gradient(
      out, NoSpread{}, begin, end, A(0),
      [&](int64_t j) __attribute__((always_inline)) {
        const Pair<A> value = load_pair<T>(out + j);
        return Pair<A>{value.first * scale, value.second * scale};
      },
      [&](int64_t j, int n)
          __attribute__((always_inline)) { return load_first(out + j, n) * scale; });
}
