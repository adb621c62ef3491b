// Row kernels with per-class options (see is_general): transformed logits, the statistics entropy
// and argmax, and the gradient of the entropy. The transformed logits z of a block are written to
// scratch memory, which stays in the first-level cache, and several loops read them there. Included
// like simd.h.

// Writes the transformed logits of count classes.
template <typename T>
XENT_INLINE void transform_block(const T* x, int count, const Transform<Acc<T>>& transform,
                                 Acc<T>* z) {
  for_lanes<Acc<T>>(0, count,
                    [&](int64_t i, int n) { store(z + i, transform(load_first(x + i, n)).logit); });
}

// Scratch memory of a block. It has room for one more vector: the last one may be partly filled.
template <typename A>
struct BlockScratch {
  alignas(64) A values[kBlock + kLanes<A>];
};

// The sum of e * (z - max).
template <typename A>
XENT_INLINE double block_moment(const A* z, const A* e, int count, A max) {
  LongSum<A> sum;
  for_lanes<A>(0, count, [&](int64_t i, int n) {
    const Vec<A> power = load_first(e + i, n), d = load_first(z + i, n) - max;
    sum.add(power == 0 ? Vec<A>{} : power * d);
  });
  return sum_lanes(sum.value());
}

// Updates top and argmax by a block from class begin on. Its maximum and its sum, which is NaN if a
// logit is, tell whether the block has to be searched.
template <typename A>
void raise_top(FullStats<double>& stats, const A* z, int64_t begin, int count, A max, double sum) {
  const auto take_first = [&](const auto& is_it) {
    int i = 0;
    while (i < count && !is_it(z[i])) ++i;
    if (i < count && is_above<double>(stats, z[i], begin + i)) {
      stats.top = z[i];
      stats.argmax = begin + i;
    }
  };
  if (sum != sum) take_first([](A value) { return value != value; });
  if (stats.argmax < 0 || max > stats.top) take_first([=](A value) { return value == max; });
}

// A spread in which class j of a block is class begin + j of the row.
template <typename Spread>
struct SpreadFrom {
  static constexpr bool kExists = Spread::kExists;
  const Spread& spread;
  int64_t begin;

  XENT_INLINE auto pair(int64_t j) const { return spread.pair(begin + j); }
  XENT_INLINE auto first(int64_t j, int n) const { return spread.first(begin + j, n); }
};

template <typename T, typename Target>
SegmentStats general_stats(const Params& p, int64_t row, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Exp = SubtractingExp<A>;
  const T* x = logits_row<T>(p, row);
  const Transform<A> transform(p);
  const int64_t apart = class_apart(p, row);
  constexpr double kLowest = std::numeric_limits<A>::lowest();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  FullStats<double> all{{kLowest, 0, 0, 0}, 0, -kInfinity, -1};
  with_spread<A, Target>(p, row, [&](const auto& spread) {
    BlockScratch<A> z, exponentials;
    for (int64_t j = begin; j < end; j += kBlock) {
      const int count = static_cast<int>(end - j < kBlock ? end - j : kBlock);
      transform_block(x + j, count, transform, z.values);
      if (j <= apart && apart < j + count) z.values[apart - j] = static_cast<A>(-kInfinity);
      const A max = block_max(z.values, 0, count, -kInfinity);
      const Exp exp(max > kLowest ? max : kLowest);
      const SpreadFrom<std::decay_t<decltype(spread)>> of_block{spread, j};
      const RowStats<double> block =
          block_stats(z.values, exp, of_block, 0, count, -1, exponentials.values);
      const double moment =
          Exp::kScale * block_moment(z.values, exponentials.values, count, exp.max);
      raise_top(all, z.values, j, count, max, block.sum);
      merge_stats(all, {{exp.origin(), block.sum, block.mass, block.dot}, moment, -kInfinity, -1});
    }
  });
  return {all, all.max};
}

template <typename T, typename Target>
void general_gradient(const Params& p, const RowBatch& batch, int i, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Exp = SubtractingExp<A>;
  const int64_t row = batch.begin + i;
  const FullGradient<double> gradient = batch.gradient(i);
  const T* x = logits_row<T>(p, row);
  T* out = gradient_row<T>(p, row);
  const Transform<A> transform(p);
  const Exp exp(gradient.max);
  const A factor = static_cast<A>(gradient.factor * Exp::kScale);
  const A shifted_factor = static_cast<A>(gradient.shifted_factor * Exp::kScale);
  const A scale = static_cast<A>(gradient.spread);
  with_spread<A, Target>(p, row, [&](const auto& spread) {
    using Spread = std::decay_t<decltype(spread)>;
    for_lanes<A>(begin, end, [&](int64_t j, int n) {
      const auto lanes = transform(load_first(x + j, n));
      const Vec<A> d = lanes.logit - exp.max, e = exp.power(exp.exponent(lanes.logit));
      Vec<A> value = e * factor + (e == 0 ? Vec<A>{} : e * d * shifted_factor);
      if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;
      store_first(out + j, value * lanes.slope, n);
    });
  });
  write_target(batch, i, begin, end, out);
}
