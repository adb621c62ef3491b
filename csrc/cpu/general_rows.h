// Row kernels of what costs an instruction a class: transformed logits, statistics, the gradient of
// the entropy. A block's logits are put into scratch memory as the softmax sees them, and its loops
// run there one after another: it stays in the first-level cache. Included like simd.h.

// Logits [begin, begin + count) of a row, count at most kBlock; slopes may be null.
template <typename T>
XENT_INLINE void read_transformed(const T* x, int count, const Transform<Acc<T>>& transform,
                                  Acc<T>* logits, Acc<T>* slopes) {
  using A = Acc<T>;
  for (int i = 0; i < count; i += kLanes<A>) {
    const int n = count - i < kLanes<A> ? count - i : kLanes<A>;
    const auto lanes = transform(load_first(x + i, n));
    store(logits + i, lanes.logit);
    if (slopes != nullptr) store(slopes + i, lanes.slope);
  }
}

// Scratch memory for a block, with room for a vector more than it has.
template <typename A>
struct BlockScratch {
  alignas(64) A values[kBlock + kLanes<A>];
};

// The sum of e * (x - max).
template <typename A>
XENT_INLINE double block_moment(const A* x, const A* e, int count, A max) {
  LongSum<A> sum;
  for (int i = 0; i < count; i += kLanes<A>) {
    const int n = count - i < kLanes<A> ? count - i : kLanes<A>;
    const Vec<A> power = load_first(e + i, n), d = load_first(x + i, n) - max;
    sum.add(power == 0 ? Vec<A>{} : power * d);
  }
  return sum_lanes(sum.value());
}

// Finds the argmax of a block, by whose maximum and sum it may be above what there is.
template <typename A>
void raise_top(FullStats<double>& stats, const A* x, int64_t begin, int count, A max, double sum) {
  const auto take_first = [&](const auto& is_it) {
    int i = 0;
    while (i < count && !is_it(x[i])) ++i;
    if (i < count && is_above<double>(stats, x[i], begin + i)) {
      stats.top = x[i];
      stats.argmax = begin + i;
    }
  };
  if (sum != sum) take_first([](A value) { return value != value; });
  if (stats.argmax < 0 || max > stats.top) take_first([=](A value) { return value == max; });
}

// A spread whose classes are counted from `begin` on.
template <typename Spread>
struct SpreadFrom {
  static constexpr bool kExists = Spread::kExists;
  const Spread& spread;
  int64_t begin;

  XENT_INLINE auto pair(int64_t j) const { return spread.pair(begin + j); }
  XENT_INLINE auto first(int64_t j, int n) const { return spread.first(begin + j, n); }
};

template <typename T, typename Target>
FullStats<double> general_stats(const Params& p, int64_t row, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Exp = SubtractingExp<A>;
  const T* x = logits_row<T>(p, row);
  const Transform<A> transform(p);
  constexpr double kLowest = std::numeric_limits<A>::lowest();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  FullStats<double> all{{kLowest, 0, 0, 0}, 0, -kInfinity, -1};
  with_spread<A, Target>(p, row, [&](const auto& spread) {
    BlockScratch<A> logits, exponentials;
    for (int64_t j = begin; j < end; j += kBlock) {
      const int count = static_cast<int>(end - j < kBlock ? end - j : kBlock);
      read_transformed(x + j, count, transform, logits.values, static_cast<A*>(nullptr));
      const A max = block_max(logits.values, 0, count, -kInfinity);
      const Exp exp(max > kLowest ? max : kLowest);
      const SpreadFrom<std::decay_t<decltype(spread)>> of_block{spread, j};
      const BlockStats block =
          block_stats(logits.values, exp, of_block, 0, count, exponentials.values);
      const double moment =
          Exp::kScale * block_moment(logits.values, exponentials.values, count, exp.max);
      raise_top(all, logits.values, j, count, max, block.sum);
      merge_stats(all, {{exp.origin(), block.sum, block.mass, block.dot}, moment, -kInfinity, -1});
    }
  });
  return all;
}

template <typename T, typename Target>
void general_gradient(const Params& p, int64_t row, int64_t begin, int64_t end,
                      RowGradient gradient) {
  using A = Acc<T>;
  using Exp = SubtractingExp<A>;
  const T* x = logits_row<T>(p, row);
  T* out = gradient_row<T>(p, row);
  const Transform<A> transform(p);
  const Exp exp(gradient.max);
  const A factor = static_cast<A>(gradient.logit_factor * Exp::kScale);
  const A shifted_factor = static_cast<A>(gradient.shifted_factor * Exp::kScale);
  const A scale = static_cast<A>(gradient.spread);
  with_spread<A, Target>(p, row, [&](const auto& spread) {
    using Spread = std::decay_t<decltype(spread)>;
    for (int64_t j = begin; j < end; j += kLanes<A>) {
      const int n = static_cast<int>(end - j < kLanes<A> ? end - j : kLanes<A>);
      const auto lanes = transform(load_first(x + j, n));
      const Vec<A> d = lanes.logit - exp.max, e = exp.power(exp.exponent(lanes.logit));
      Vec<A> value = e * factor + (e == 0 ? Vec<A>{} : e * d * shifted_factor);
      if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;
      store_first(out + j, value * lanes.slope, n);
    }
  });
}

template <typename T>
Transformed transformed_logit(const Params& p, int64_t row, int64_t index) {
  const auto lanes = Transform<Acc<T>>(p)(load_first(logits_row<T>(p, row) + index, 1));
  return {lanes.logit[0], lanes.slope[0]};
}
