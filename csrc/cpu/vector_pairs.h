// Pairs of vectors of adjacent classes, with which the row kernels loop over a row. Included like
// simd.h.

// Two vectors of adjacent numbers. For 16-bit T, the first may have those at even places and the
// second those at odd places: then unpacking takes a shift and a mask and no shuffles. Labels and
// weights of the same classes are loaded in the same order.
template <typename A>
struct Pair {
  Vec<A> first, second;
};

#if defined(XENT_HAS_BF16)
template <typename T>
constexpr bool kByTurns = false;  // an instruction rounds and packs in memory's order
#else
template <typename T>
constexpr bool kByTurns = std::is_same_v<T, BFloat16>;
#endif

XENT_INLINE Pair<float> by_turns(F32 low, F32 high) {
#if XENT_VECTOR_BYTES == 64
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {(F32)_mm512_permutex2var_ps((__m512)low, even, (__m512)high),
          (F32)_mm512_permutex2var_ps((__m512)low, odd, (__m512)high)};
#elif XENT_VECTOR_BYTES == 32
  const __m256d even = (__m256d)_mm256_shuffle_ps((__m256)low, (__m256)high, 0x88);
  const __m256d odd = (__m256d)_mm256_shuffle_ps((__m256)low, (__m256)high, 0xdd);
  return {(F32)_mm256_permute4x64_pd(even, 0xd8), (F32)_mm256_permute4x64_pd(odd, 0xd8)};
#else
  return {F32{low[0], low[2], high[0], high[2]}, F32{low[1], low[3], high[1], high[3]}};
#endif
}

// Loads a pair of From in the order of logits of type T.
template <typename T, typename From>
XENT_INLINE Pair<Acc<T>> load_pair(const From* from) {
  constexpr int kWidth = kLanes<Acc<T>>;
  if constexpr (kByTurns<T> && std::is_same_v<From, T>) {
    const U32 bits = load_bits<U32>(from);
    return {(F32)(bits << 16), (F32)(bits & 0xffff0000)};
  } else if constexpr (kByTurns<T>) {
    return by_turns(load(from), load(from + kWidth));
  } else {
    return {load(from), load(from + kWidth)};
  }
}

// Each lane: the low half of first's lane, and above it the low half of second's.
XENT_INLINE U32 join_halves(U32 first, U32 second) {
#if XENT_VECTOR_BYTES == 32
  return (U32)_mm256_blend_epi16((__m256i)first, (__m256i)(second << 16), 0xaa);
#else
  return (first & 0xffff) | (second << 16);
#endif
}

template <bool kMayBeNan = true, typename T>
XENT_INLINE void store_pair(T* to, Pair<Acc<T>> pair) {
  if constexpr (kByTurns<T>) {
    const U32 even = round_to_bfloat16<kMayBeNan>(pair.first) >> 16;
    store_bits(to, even | (round_to_bfloat16<kMayBeNan>(pair.second) & 0xffff0000));
  } else {
    store(to, pair.first);
    store(to + kLanes<Acc<T>>, pair.second);
  }
}

// Calls pair(j) for whole pairs of vectors in [begin, end), then rest(j, n) for n lanes at a time.
template <typename A, typename OnPair, typename OnRest>
XENT_INLINE void for_pairs(int64_t begin, int64_t end, const OnPair& pair, const OnRest& rest) {
  constexpr int kWidth = kLanes<A>;
  int64_t j = begin;
#pragma GCC unroll 2
  for (; j + 2 * kWidth <= end; j += 2 * kWidth) pair(j);
  for_lanes<A>(j, end, rest);
}

// Prefetches each cache line of the pair of vectors that is one block after x.
template <typename T>
XENT_INLINE void fetch_ahead(const T* x) {
  constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kLanes<Acc<T>>; i += kLine) __builtin_prefetch(x + kBlock + i);
}
