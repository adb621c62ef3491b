// Row kernels: one row, or a segment of one, whose classes are adjacent in memory. Included like
// simd.h.
//
// The online softmax of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, by blocks: the
// maximum of a block is found while it comes from memory, its exponentials are summed from the
// first level cache, and the sum so far is rescaled once a block. That is one exponential a logit,
// and lanes that need no maxima of their own. The next block is fetched meanwhile.

template <typename T>
XENT_INLINE const T* logits_row(const Params& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row_offset(p.logits_layout, row);
}

template <typename T>
XENT_INLINE T* gradient_row(const Params& p, int64_t row) {
  return static_cast<T*>(p.grad_logits) + row_offset(p.grad_layout, row);
}

// Calls pair(j) for whole pairs of vectors in [begin, end), then rest(j, n) for n lanes at a time.
template <typename A, typename OnPair, typename OnRest>
XENT_INLINE void for_pairs(int64_t begin, int64_t end, const OnPair& pair, const OnRest& rest) {
  constexpr int kWidth = kLanes<A>;
  int64_t j = begin;
#pragma GCC unroll 2
  for (; j + 2 * kWidth <= end; j += 2 * kWidth) pair(j);
  for (; j < end; j += kWidth) rest(j, static_cast<int>(end - j < kWidth ? end - j : kWidth));
}

// NaN is passed over here and found in the sum.
template <typename T>
XENT_INLINE Acc<T> block_max(const T* x, int64_t begin, int64_t end, double at_least) {
  using A = Acc<T>;
  Vec<A> first = Vec<A>{} + static_cast<A>(at_least), second = first;
  for_pairs<A>(
      begin, end,
      [&](int64_t j) {
        const Pair<A> logits = load_pair<T>(x + j);
        first = vmax(logits.first, first);
        second = vmax(logits.second, second);
      },
      [&](int64_t j, int n) {
        first = vmax(load_first(x + j, n, -std::numeric_limits<A>::infinity()), first);
      });
  return max_lane(vmax(first, second));
}

// Sums over one run of a block, short enough to be added up plainly.
template <typename A>
struct RunSums {
  Vec<A> sum[2] = {}, mass[2] = {}, dot[2] = {};

  template <bool kHasSpread>
  XENT_INLINE Vec<A> add(int i, Vec<A> d, Vec<A> t) {
    const Vec<A> e = exp_nonpositive(d);
    sum[i] += e;
    if (kHasSpread) {
      mass[i] += t;
      dot[i] += t == 0 ? Vec<A>{} : t * d;
    }
    return e;
  }
};

// Adds a block to stats, whose maximum is the block's or above. With saved, writes exp(x_j - max)
// there, in load_pair's order; saved may be x.
template <typename T, typename Spread>
XENT_INLINE void add_block(RowStats<double>& stats, const T* x, const Spread& spread, int64_t begin,
                           int64_t end, Acc<T>* saved) {
  using A = Acc<T>;
  constexpr int64_t kRun = 16 * 2 * kLanes<A>;
  const A max = static_cast<A>(stats.max);
  LongSum<A> sum, mass, dot;
  for (int64_t run = begin; run < end; run += kRun) {
    RunSums<A> sums;
    for_pairs<A>(
        run, run + kRun < end ? run + kRun : end,
        [&](int64_t j) __attribute__((always_inline)) {
          __builtin_prefetch(x + j + kBlock);
          const Pair<A> logits = load_pair<T>(x + j);
          Pair<A> t{};
          if constexpr (Spread::kExists) t = spread.pair(j);
          const Vec<A> first = sums.template add<Spread::kExists>(0, logits.first - max, t.first);
          const Vec<A> second =
              sums.template add<Spread::kExists>(1, logits.second - max, t.second);
          if (saved == nullptr) return;
          store(saved + j, first);
          store(saved + j + kLanes<A>, second);
        },
        [&](int64_t j, int n) __attribute__((always_inline)) {
          const Vec<A> logits = load_first(x + j, n, -std::numeric_limits<A>::infinity());
          Vec<A> t{};
          if constexpr (Spread::kExists) t = spread.first(j, n);
          const Vec<A> e = sums.template add<Spread::kExists>(0, logits - max, t);
          if (saved != nullptr) store_first(saved + j, e, n);
        });
    sum.add(sums.sum[0] + sums.sum[1]);
    if (!Spread::kExists) continue;
    mass.add(sums.mass[0] + sums.mass[1]);
    dot.add(sums.dot[0] + sums.dot[1]);
  }
  stats.sum += sum_lanes(sum.value());
  stats.mass += sum_lanes(mass.value());
  stats.dot += sum_lanes(dot.value());
}

// saved and its blocks' maxima: see add_block. Null: not wanted.
template <typename T, typename Spread>
RowStats<double> sweep(const T* x, const Spread& spread, int64_t begin, int64_t end, Acc<T>* saved,
                       double* block_maxima) {
  RowStats<double> stats{std::numeric_limits<Acc<T>>::lowest(), 0, 0, 0};
  for (int64_t j = begin; j < end; j += kBlock) {
    const int64_t block_end = j + kBlock < end ? j + kBlock : end;
    const double max = block_max(x, j, block_end, stats.max);
    if (max > stats.max) shift_stats(stats, max);
    add_block(stats, x, spread, j, block_end, saved);
    if (block_maxima != nullptr) block_maxima[(j - begin) / kBlock] = max;
  }
  return stats;
}

template <typename T, typename Target>
RowStats<double> segment_stats(const Params& p, int64_t row, int64_t begin, int64_t end) {
  return with_spread<T, Target>(p, row, [&](const auto& spread) {
    return sweep(logits_row<T>(p, row), spread, begin, end, static_cast<Acc<T>*>(nullptr), nullptr);
  });
}

// Stores the softmax part of the gradient, which pair(j) and rest(j, n) give, less the labels'
// part.
template <typename T, typename Spread, typename OnPair, typename OnRest>
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
        store_pair(out + j, value);
      },
      [&](int64_t j, int n) __attribute__((always_inline)) {
        Vec<A> value = rest(j, n);
        if constexpr (Spread::kExists) value -= spread.first(j, n) * scale;
        store_first(out + j, value, n);
      });
}

template <typename T, typename Target>
void segment_gradient(const Params& p, int64_t row, int64_t begin, int64_t end,
                      RowGradient gradient) {
  using A = Acc<T>;
  const T* x = logits_row<T>(p, row);
  const A max = static_cast<A>(gradient.max), factor = static_cast<A>(gradient.logit_factor);
  const auto softmax = [=](Vec<A> logits) __attribute__((always_inline)) {
    return exp_nonpositive(logits - max) * factor;
  };
  with_spread<T, Target>(p, row, [&](const auto& spread) {
    write_gradient(
        gradient_row<T>(p, row), spread, begin, end, static_cast<A>(gradient.spread),
        [&](int64_t j) __attribute__((always_inline)) {
          const Pair<A> logits = load_pair<T>(x + j);
          return Pair<A>{softmax(logits.first), softmax(logits.second)};
        },
        [&](int64_t j, int n)
            __attribute__((always_inline)) { return softmax(load_first(x + j, n)); });
  });
}

// Both of a whole row without a second exponential. They are saved as acc: over the logits where
// these are of that type, and the gradient overwrites them, or in scratch.
template <typename T>
XENT_INLINE Acc<T>* saved_row(const Params& p, int64_t row, const RowScratch& scratch) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return gradient_row<T>(p, row);
  } else {
    return scratch.exponentials;
  }
}

template <typename T, typename Target>
RowStats<double> row_stats_saving(const Params& p, int64_t row, const RowScratch& scratch) {
  return with_spread<T, Target>(p, row, [&](const auto& spread) {
    return sweep(logits_row<T>(p, row), spread, 0, p.vocab_size, saved_row<T>(p, row, scratch),
                 scratch.block_maxima);
  });
}

template <typename T, typename Target>
void row_gradient_of_saved(const Params& p, int64_t row, const RowScratch& scratch,
                           RowGradient gradient) {
  using A = Acc<T>;
  const A* saved = saved_row<T>(p, row, scratch);
  with_spread<T, Target>(p, row, [&](const auto& spread) {
    for (int64_t begin = 0; begin < p.vocab_size; begin += kBlock) {
      const double shift = scratch.block_maxima[begin / kBlock] - gradient.max;
      const A factor = static_cast<A>(gradient.logit_factor * std::exp(shift));
      write_gradient(
          gradient_row<T>(p, row), spread, begin,
          begin + kBlock < p.vocab_size ? begin + kBlock : p.vocab_size,
          static_cast<A>(gradient.spread),
          [&](int64_t j) __attribute__((always_inline)) {
            return Pair<A>{load(saved + j) * factor, load(saved + j + kLanes<A>) * factor};
          },
          [&](int64_t j, int n)
              __attribute__((always_inline)) { return load_first(saved + j, n) * factor; });
    }
  });
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

template <typename T>
double logit(const Params& p, int64_t row, int64_t index) {
  return load_one(logits_row<T>(p, row) + index);
}

template <typename T>
void set_gradient(const Params& p, int64_t row, int64_t index, double value) {
  store_one(gradient_row<T>(p, row) + index, static_cast<Acc<T>>(value));
}
