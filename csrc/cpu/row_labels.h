// The labels t_j of xent_math.h for the row kernels: none, 1 for all classes, class weights, or
// probabilities. Included like simd.h.
//
// pair(j) has the t of the same classes as load_pair<T> of the logits at j. first(j, n) has the t
// of n classes from j on, in order, and then zeros.

struct NoSpread {
  static constexpr bool kExists = false;
};

template <typename T>
struct UniformSpread {
  using A = Acc<T>;
  static constexpr bool kExists = true;

  XENT_INLINE Pair<A> pair(int64_t) const { return {Vec<A>{} + 1, Vec<A>{} + 1}; }
  XENT_INLINE Vec<A> first(int64_t, int n) const {
    const A one = 1;
    Vec<A> t{};
    for (int i = 0; i < n; ++i) t[i] = one;
    return t;
  }
};

template <typename T>
struct WeightSpread {
  using A = Acc<T>;
  static constexpr bool kExists = true;
  const A* weight;

  XENT_INLINE Pair<A> pair(int64_t j) const { return load_pair<T>(weight + j); }
  XENT_INLINE Vec<A> first(int64_t j, int n) const { return load_first(weight + j, n); }
};

// Probabilities of type Target, smoothed and weighted.
template <typename T, typename Target>
struct ProbabilitySpread {
  using A = Acc<T>;
  static constexpr bool kExists = true;
  const Target* target;
  const A* weight;  // null: all ones
  A scale, offset;

  ProbabilitySpread(const Params& p, int64_t row)
      : target(static_cast<const Target*>(p.target) + row_offset(p.target_layout, row)),
        weight(static_cast<const A*>(p.weight)),
        scale(static_cast<A>(smoothing_of(p).keep)),
        offset(static_cast<A>(smoothing_of(p).uniform)) {}

  XENT_INLINE Pair<A> pair(int64_t j) const {
    Pair<A> t = load_pair<T>(target + j);
    t = {t.first * scale + offset, t.second * scale + offset};
    if (weight == nullptr) return t;
    const Pair<A> w = load_pair<T>(weight + j);
    return {t.first * w.first, t.second * w.second};
  }

  XENT_INLINE Vec<A> first(int64_t j, int n) const {
    Vec<A> t = load_first(target + j, n) * scale + offset;
    if (weight != nullptr) t *= load_first(weight + j, n);
    for (int i = n; i < kLanes<A>; ++i) t[i] = 0;
    return t;
  }
};

// Calls body with the labels of a row.
template <typename T, typename Target, typename Body>
XENT_INLINE auto with_spread(const Params& p, int64_t row, const Body& body) {
  if constexpr (!std::is_void_v<Target>) {
    return body(ProbabilitySpread<T, Target>(p, row));
  } else {
    if (p.label_smoothing == 0) return body(NoSpread{});
    if (p.weight == nullptr) return body(UniformSpread<T>{});
    return body(WeightSpread<T>{static_cast<const Acc<T>*>(p.weight)});
  }
}
