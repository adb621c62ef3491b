// The statistics of a row, or of a segment of one, whose classes are adjacent in memory. Without
// per-class options: the logits are not transformed, z is x. Included like simd.h.
//
// This is the online softmax of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, by
// blocks. The exponentials of a block are summed relative to a guess of its maximum, which may be
// a little too low. The sum so far is rescaled once a block. So each logit costs one load and one
// exponential, and the lanes need no maxima of their own. Meanwhile the next block is prefetched.

// The maximum ignores NaN, which makes the sum NaN later.
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

// Sums over one run of a block, which is so short that rounding errors do not matter.
template <typename A>
struct RunSums {
  Vec<A> sum[2] = {}, mass[2] = {}, dot[2] = {};

  template <bool kHasSpread, typename Exp>
  XENT_INLINE Vec<A> add(int i, const Exp& exp, Vec<A> x, Vec<A> t) {
    const Vec<A> exponent = exp.exponent(x), e = exp.power(exponent);
    sum[i] += e;
    if (kHasSpread) {
      mass[i] += t;
      dot[i] += t == 0 ? Vec<A>{} : t * exponent;
    }
    return e;
  }
};

// The maximum of a block, and its sums relative to exp.origin(). The powers of exp are written to
// saved, in load_pair's order, if it is not null; it may be x. Class `apart`, if it is in the block
// and there is no spread, counts as a logit of -inf: see finish_batch.
template <typename T, typename Exp, typename Spread>
XENT_INLINE RowStats<double> block_stats(const T* x, const Exp& exp, const Spread& spread,
                                         int64_t begin, int64_t end, int64_t apart, Acc<T>* saved) {
  using A = Acc<T>;
  constexpr int64_t kPair = 2 * kLanes<A>, kRun = 16 * kPair;
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  Vec<A> top[2] = {Vec<A>{} + kLowest, Vec<A>{} + kLowest};
  LongSum<A> sum, mass, dot;
  // The pair of vectors with class `apart` is read from a copy: a loop that stops for it is slower.
  T without[kPair];
  int64_t pair_apart = -1;
  if (!Spread::kExists && begin <= apart && apart < end) {
    const int64_t pair = apart - (apart - begin) % kPair;
    if (pair + kPair <= end) {
      pair_apart = pair;
      __builtin_memcpy(without, x + pair, sizeof without);
      store_one(without + (apart - pair), kLowest);
    }
  }
  for (int64_t run = begin; run < end; run += kRun) {
    const int64_t run_end = run + kRun < end ? run + kRun : end;
    RunSums<A> sums;
    const auto add_pair = [&](int64_t j, const Pair<A>& logits) __attribute__((always_inline)) {
      fetch_ahead(x + j);
      Pair<A> t{};
      if constexpr (Spread::kExists) t = spread.pair(j);
      top[0] = vmax(logits.first, top[0]);
      top[1] = vmax(logits.second, top[1]);
      const Vec<A> first = sums.template add<Spread::kExists>(0, exp, logits.first, t.first);
      const Vec<A> second = sums.template add<Spread::kExists>(1, exp, logits.second, t.second);
      if (saved == nullptr) return;
      store(saved + j, first);
      store(saved + j + kLanes<A>, second);
    };
    const auto add_rest = [&](int64_t j, int n) __attribute__((always_inline)) {
      Vec<A> logits = load_first(x + j, n, kLowest), t{};
      if constexpr (Spread::kExists) {
        t = spread.first(j, n);
      } else {
        const int64_t i = apart - j;
        logits = with_lane<A>(logits, 0 <= i && i < n ? static_cast<int>(i) : -1, kLowest);
      }
      top[0] = vmax(logits, top[0]);
      const Vec<A> e = sums.template add<Spread::kExists>(0, exp, logits, t);
      if (saved != nullptr) store_first(saved + j, e, n);
    };
    for_pairs<A>(
        run, run_end,
        [&](int64_t j) __attribute__((always_inline)) {
          add_pair(j, load_pair<T>(!Spread::kExists && j == pair_apart ? without : x + j));
        },
        add_rest);
    sum.add(sums.sum[0] + sums.sum[1]);
    if (!Spread::kExists) continue;
    mass.add(sums.mass[0] + sums.mass[1]);
    dot.add(sums.dot[0] + sums.dot[1]);
  }
  return {max_lane(vmax(top[0], top[1])), Exp::kScale * sum_lanes(sum.value()),
          sum_lanes(mass.value()), Exp::kUnit * sum_lanes(dot.value())};
}

XENT_INLINE void add_block(RowStats<double>& stats, const RowStats<double>& block, double origin) {
  if (stats.max != origin) shift_stats(stats, origin);
  add_sums(stats, block);
}

// Stats without an entropy and an argmax.
XENT_INLINE SegmentStats as_full(const RowStats<double>& sums, double max) {
  return {{sums, 0, 0, -1}, max};
}

// Reads the row once. Each block is summed relative to a guess of its maximum, and again if the
// guess was far too low. No guess is below those before it, and none is of class `apart`: far below
// it, the exponentials of the others would lose their digits. saved: see block_stats; origins: the
// origin of each block's exponentials. Both may be null.
template <typename T, typename Spread>
XENT_INLINE SegmentStats sweep(const T* x, const Spread& spread, int64_t begin, int64_t end,
                               int64_t apart, Acc<T>* saved, double* origins) {
  constexpr int64_t kSample = 64;  // the guess is the maximum of so many classes
  constexpr double kSlack = 8;     // how far a maximum may be above its guess: costs 4 bits
  RowStats<double> stats{-kMaxOrigin, 0, 0, 0};
  double max = -kMaxOrigin, guess = max;
  for (int64_t j = begin; j < end; j += kBlock) {
    const int64_t block_end = j + kBlock < end ? j + kBlock : end;
    const bool is_apart = !Spread::kExists && j <= apart && apart < j + kSample;
    const int64_t sample = is_apart ? j + kSample : j;
    const int64_t sample_end = sample + kSample < block_end ? sample + kSample : block_end;
    guess = block_max(x, sample, sample_end, max);
    while (true) {
      const RowExp<Acc<T>, Spread> exp(guess);
      const RowStats<double> block = block_stats(x, exp, spread, j, block_end, apart, saved);
      if (block.max > max) max = block.max;
      if (block.max > guess + kSlack) {
        guess = block.max;
        continue;
      }
      add_block(stats, block, exp.origin());
      if (origins != nullptr) origins[(j - begin) / kBlock] = exp.origin();
      break;
    }
  }
  return as_full(stats, max);
}

// The same, with exponentials that overwrite the logits: a block cannot be summed again, so its
// maximum is computed first. Class `apart` has been read already.
template <typename A, typename Spread>
SegmentStats sweep_in_place(A* x, const Spread& spread, int64_t end, int64_t apart,
                            double* origins) {
  RowStats<double> stats{std::numeric_limits<A>::lowest(), 0, 0, 0};
  if (apart >= 0) x[apart] = -std::numeric_limits<A>::infinity();
  for (int64_t j = 0; j < end; j += kBlock) {
    const int64_t block_end = j + kBlock < end ? j + kBlock : end;
    const SubtractingExp<A> exp(block_max(x, j, block_end, stats.max));
    add_block(stats, block_stats(x, exp, spread, j, block_end, -1, x), exp.origin());
    origins[j / kBlock] = exp.origin();
  }
  return as_full(stats, stats.max);
}

template <typename T, typename Target>
SegmentStats segment_stats(const Params& p, int64_t row, int64_t begin, int64_t end) {
  return with_spread<T, Target>(p, row, [&](const auto& spread) {
    Acc<T>* saved = nullptr;
    return sweep(logits_row<T>(p, row), spread, begin, end, class_apart(p, row), saved, nullptr);
  });
}

// Forward and backward of a whole row with one exponential a class. The exponentials are saved in
// the accumulation type: over the logits if these are of that type, otherwise in scratch memory.
template <typename T, typename Target>
SegmentStats row_stats_saving(const Params& p, int64_t row, const RowScratch& scratch) {
  const int64_t apart = class_apart(p, row);
  return with_spread<T, Target>(p, row, [&](const auto& spread) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      T* x = gradient_row<T>(p, row);
      return sweep_in_place(x, spread, p.vocab_size, apart, scratch.origins);
    } else {
      return sweep(logits_row<T>(p, row), spread, 0, p.vocab_size, apart, scratch.exponentials,
                   scratch.origins);
    }
  });
}
