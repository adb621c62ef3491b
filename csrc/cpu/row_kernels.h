// Row kernels without per-class options: one row, or a segment of one, whose classes are adjacent
// in memory. Their logits are not transformed: z is x. Included like simd.h.
//
// This is the online softmax of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, by
// blocks. The exponentials of a block are summed relative to a guess of its maximum, which may be
// a little too low. The sum so far is rescaled once a block. So each logit costs one load and one
// exponential, and the lanes need no maxima of their own. Meanwhile the next block is prefetched.

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

// Prefetches each cache line of the pair of vectors that is one block after x.
template <typename T>
XENT_INLINE void fetch_ahead(const T* x) {
  constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kLanes<Acc<T>>; i += kLine) __builtin_prefetch(x + kBlock + i);
}

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
