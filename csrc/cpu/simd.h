// Vectors of one instruction set, and the arithmetic on them that the kernels need. Most of it is
// written once, with the compiler's vector types.
//
// Included by instruction_set.h, in a target region and an unnamed namespace, so that no other file
// can link to what is compiled here: see ../README.md. XENT_VECTOR_BYTES tells the instruction set,
// because the compiler's own macros do not have to follow a target region.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
constexpr int kLanes = XENT_VECTOR_BYTES / sizeof(A);

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

using F32 = Vec<float>;
using F64 = Vec<double>;
using U32 = Vec<uint32_t>;
using U64 = Vec<uint64_t>;
using I64 = Vec<int64_t>;
using U16 = VectorOf<uint16_t, kLanes<float>>::type;  // as many as F32 has lanes
template <typename A>
using Narrow = typename VectorOf<A, kLanes<double>>::type;  // as many as F64 has lanes
template <typename A>
using BitsOf = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;  // as many bits as A has

// Calls body(j, n) for the next n numbers of [begin, end), a vector of them at a time.
template <typename A, typename Body>
XENT_INLINE void for_lanes(int64_t begin, int64_t end, const Body& body) {
  for (int64_t j = begin; j < end; j += kLanes<A>) {
    body(j, static_cast<int>(end - j < kLanes<A> ? end - j : kLanes<A>));
  }
}

// The maximum as x86 computes it: b if either is NaN. Compilers do not always use that instruction
// for the comparison.
#if XENT_VECTOR_BYTES == 64
XENT_INLINE F32 vmax(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
XENT_INLINE F64 vmax(F64 a, F64 b) { return (F64)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif XENT_VECTOR_BYTES == 32
XENT_INLINE F32 vmax(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
XENT_INLINE F64 vmax(F64 a, F64 b) { return (F64)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__SSE2__)
XENT_INLINE F32 vmax(F32 a, F32 b) { return (F32)_mm_max_ps((__m128)a, (__m128)b); }
XENT_INLINE F64 vmax(F64 a, F64 b) { return (F64)_mm_max_pd((__m128d)a, (__m128d)b); }
#else
template <typename V>
XENT_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
#endif

// x * factor + addend, rounded once where kHasFusedMultiplyAdd.
#if XENT_VECTOR_BYTES == 64
constexpr bool kHasFusedMultiplyAdd = true;
XENT_INLINE F32 fused_multiply_add(F32 x, float factor, float addend) {
  return (F32)_mm512_fmadd_ps((__m512)x, _mm512_set1_ps(factor), _mm512_set1_ps(addend));
}
#elif XENT_VECTOR_BYTES == 32
constexpr bool kHasFusedMultiplyAdd = true;
XENT_INLINE F32 fused_multiply_add(F32 x, float factor, float addend) {
  return (F32)_mm256_fmadd_ps((__m256)x, _mm256_set1_ps(factor), _mm256_set1_ps(addend));
}
#else
constexpr bool kHasFusedMultiplyAdd = false;
XENT_INLINE F32 fused_multiply_add(F32 x, float factor, float addend) {
  return x * factor + addend;
}
#endif

// Combines the halves of a vector until one lane is left, in log2 of its lanes steps.
template <typename V, typename Combine>
XENT_INLINE auto combine_lanes(V v, const Combine& combine) {
  constexpr int kCount = sizeof(V) / sizeof v[0];
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    typename VectorOf<std::remove_cvref_t<decltype(v[0])>, kCount / 2>::type halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return combine_lanes(combine(halves[0], halves[1]), combine);
  }
}

template <typename V>
XENT_INLINE auto max_lane(V v) {
  return combine_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

template <typename V>
XENT_INLINE double sum_lanes(V v) {
  constexpr int kCount = sizeof(V) / sizeof v[0];
  using Double = typename VectorOf<double, kCount>::type;
  return combine_lanes(__builtin_convertvector(v, Double), [](auto a, auto b) { return a + b; });
}

// 0, 1 and so on, integers of the same size as A.
template <typename A>
XENT_INLINE auto lane_numbers() {
  Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>> lanes{};
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i;
  return lanes;
}

// Rounded to A and back.
template <typename A>
XENT_INLINE F64 rounded_to(F64 value) {
  return __builtin_convertvector(__builtin_convertvector(value, Narrow<A>), F64);
}

// get(0), get(1) and so on, one in each lane.
template <typename Get, int... i>
XENT_INLINE F64 lanes_of(const Get& get, std::integer_sequence<int, i...>) {
  return F64{get(i)...};
}
template <typename Get>
XENT_INLINE F64 lanes_of(const Get& get) {
  return lanes_of(get, std::make_integer_sequence<int, kLanes<double>>{});
}

// The vector with another value in one lane; of lane -1, as it is.
template <typename A>
XENT_INLINE Vec<A> with_lane(Vec<A> vector, int lane, A value) {
  return lane_numbers<A>() == lane ? value - Vec<A>{} : vector;
}
