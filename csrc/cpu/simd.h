// Vectors of one instruction set, and the functions on them that the kernels need.
//
// Included by instruction_set.h, in a target region and an unnamed namespace, so that no other file
// can link to what is compiled here: see ../README.md. XENT_VECTOR_BYTES tells the instruction set,
// because the compiler's own macros do not have to follow a target region. Arithmetic is written
// once, with the compiler's vector types. Only conversions of 16-bit numbers are written for each
// instruction set.

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

template <typename V>
XENT_INLINE V load_bits(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
XENT_INLINE void store_bits(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
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
    using Half = typename VectorOf<std::remove_cvref_t<decltype(v[0])>, kCount / 2>::type;
    Half halves[2];
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

// ---- loads and stores -------------------------------------------------------------------------

XENT_INLINE F32 load(const float* from) { return load_bits<F32>(from); }
XENT_INLINE F64 load(const double* from) { return load_bits<F64>(from); }
XENT_INLINE void store(float* to, F32 value) { store_bits(to, value); }
XENT_INLINE void store(double* to, F64 value) { store_bits(to, value); }

// Rounds to nearest even, in the high half of each lane. NaN becomes 0xffff, which is a NaN;
// without kMayBeNan it may become anything.
template <bool kMayBeNan = true, typename V>
XENT_INLINE auto round_to_bfloat16(V value) {
  using Bits = typename VectorOf<uint32_t, sizeof(V) / 4>::type;
  const Bits bits = (Bits)value;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return kMayBeNan ? rounded | (Bits)(value != value) : rounded;
}

#if XENT_VECTOR_BYTES >= 32
// Eight numbers, for any vector size.
using F32x8 = VectorOf<float, 8>::type;

XENT_INLINE F32x8 load8(const float* from) { return load_bits<F32x8>(from); }
XENT_INLINE void store8(float* to, F32x8 value) { store_bits(to, value); }
XENT_INLINE F32x8 load8(const BFloat16* from) {
  return (F32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits<__m128i>(from)), 16);
}
XENT_INLINE void store8(BFloat16* to, F32x8 value) {
  const __m256i bits = (__m256i)(round_to_bfloat16(value) >> 16);
  store_bits(to, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
XENT_INLINE F32x8 load8(const Half* from) {
  return (F32x8)_mm256_cvtph_ps(load_bits<__m128i>(from));
}
XENT_INLINE void store8(Half* to, F32x8 value) {
  store_bits(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

#if XENT_VECTOR_BYTES == 64

XENT_INLINE F32 load(const BFloat16* from) {
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits<__m256i>(from)), 16);
}
XENT_INLINE F32 load(const Half* from) { return (F32)_mm512_cvtph_ps(load_bits<__m256i>(from)); }
XENT_INLINE void store(Half* to, F32 value) {
  store_bits(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#if defined(XENT_HAS_BF16)
// The instruction turns subnormal numbers into 0.
XENT_INLINE void store(BFloat16* to, F32 value) {
  store_bits(to, _mm512_cvtneps_pbh((__m512)value));
}
#else
XENT_INLINE void store(BFloat16* to, F32 value) {
  store_bits(to, _mm512_cvtepi32_epi16((__m512i)(round_to_bfloat16(value) >> 16)));
}
#endif

#elif XENT_VECTOR_BYTES == 32

XENT_INLINE F32 load(const BFloat16* from) { return load8(from); }
XENT_INLINE F32 load(const Half* from) { return load8(from); }
XENT_INLINE void store(BFloat16* to, F32 value) { store8(to, value); }
XENT_INLINE void store(Half* to, F32 value) { store8(to, value); }

#else

XENT_INLINE F32 load(const BFloat16* from) {
  return (F32)(__builtin_convertvector(load_bits<U16>(from), U32) << 16);
}
XENT_INLINE void store(BFloat16* to, F32 value) {
  store_bits(to, __builtin_convertvector(round_to_bfloat16(value) >> 16, U16));
}

// With its bits shifted into place, a float16 is a float of 2^-112 times its value, also if it is
// subnormal.
XENT_INLINE F32 load(const Half* from) {
  const U32 half = __builtin_convertvector(load_bits<U16>(from), U32);
  const U32 magnitude = (half & 0x7fff) << 13;
  const U32 special = magnitude | 0x7f800000;
  const U32 scaled = (U32)((F32)magnitude * 0x1p112f);
  return (F32)((half & 0x8000) << 16 | (magnitude >= (0x7c00 << 13) ? special : scaled));
}
XENT_INLINE void store(Half* to, F32 value) {
  const U32 bits = (U32)value;
  const U32 magnitude = bits & 0x7fffffff;
  // Normal numbers are rounded by adding half a unit and the even bit, subnormal ones by adding
  // 0.5: the units of float in [0.5, 1) are those of subnormal float16, 2^-24.
  const U32 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000;
  U32 half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 - U32{} : half;
  half = magnitude > 0x7f800000 ? 0x7e00 - U32{} : half;
  store_bits(to, __builtin_convertvector(half | (bits >> 16 & 0x8000), U16));
}

#endif

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

// 0, 1 and so on, integers of the same size as A.
template <typename A>
XENT_INLINE auto lane_numbers() {
  Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>> lanes{};
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i;
  return lanes;
}

// Loads and stores of the first n lanes. The others are `fill`; their memory is not accessed.
#if XENT_VECTOR_BYTES == 64
XENT_INLINE F32 load_first(const float* from, int n, float fill = 0) {
  const __mmask16 lanes = (1u << n) - 1;
  return (F32)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes, from);
}
XENT_INLINE F64 load_first(const double* from, int n, double fill = 0) {
  const __mmask8 lanes = (1u << n) - 1;
  return (F64)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), lanes, from);
}
template <typename T>
XENT_INLINE F32 load_first(const T* from, int n, float fill = 0) {
  const __mmask16 lanes = (1u << n) - 1;
  T bits[16];
  store_bits(bits, _mm256_maskz_loadu_epi16(lanes, from));
  return (F32)_mm512_mask_blend_ps(lanes, _mm512_set1_ps(fill), (__m512)load(bits));
}
XENT_INLINE void store_first(float* to, F32 value, int n) {
  _mm512_mask_storeu_ps(to, (1u << n) - 1, (__m512)value);
}
XENT_INLINE void store_first(double* to, F64 value, int n) {
  _mm512_mask_storeu_pd(to, (1u << n) - 1, (__m512d)value);
}
template <typename T>
XENT_INLINE void store_first(T* to, F32 value, int n) {
  T bits[16];
  store(bits, value);
  _mm256_mask_storeu_epi16(to, (1u << n) - 1, load_bits<__m256i>(bits));
}
#else
template <typename T>
XENT_INLINE Vec<Acc<T>> load_first(const T* from, int n, Acc<T> fill = 0) {
  using A = Acc<T>;
  if (n == kLanes<A>) return load(from);
  T lanes[kLanes<A>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = from[i];
  return lane_numbers<A>() < n ? load(lanes) : fill - Vec<A>{};
}

template <typename T>
XENT_INLINE void store_first(T* to, Vec<Acc<T>> value, int n) {
  if (n == kLanes<Acc<T>>) return store(to, value);
  T lanes[kLanes<Acc<T>>];
  store(lanes, value);
  for (int i = 0; i < n; ++i) to[i] = lanes[i];
}
#endif
#if XENT_VECTOR_BYTES == 32
XENT_INLINE F32 load_first(const float* from, int n, float fill = 0) {
  const auto lanes = lane_numbers<float>() < n;
  return lanes ? (F32)_mm256_maskload_ps(from, (__m256i)lanes) : fill - F32{};
}
XENT_INLINE void store_first(float* to, F32 value, int n) {
  _mm256_maskstore_ps(to, (__m256i)(lane_numbers<float>() < n), (__m256)value);
}
#endif

// As many numbers as F64 has lanes, from A and to A, of which only the first n are accessed.
#if XENT_VECTOR_BYTES == 64
XENT_INLINE __mmask8 first_of_wide(int n) { return n < 8 ? (1u << n) - 1 : 0xff; }
XENT_INLINE F64 load_wide(const float* from, int n) {
  return (F64)_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_of_wide(n), from));
}
XENT_INLINE F64 load_wide(const double* from, int n) {
  return (F64)_mm512_maskz_loadu_pd(first_of_wide(n), from);
}
XENT_INLINE void store_narrow(float* to, F64 value, int n) {
  _mm256_mask_storeu_ps(to, first_of_wide(n), _mm512_cvtpd_ps((__m512d)value));
}
XENT_INLINE void store_narrow(double* to, F64 value, int n) {
  _mm512_mask_storeu_pd(to, first_of_wide(n), (__m512d)value);
}
#else
template <typename A>
XENT_INLINE F64 load_wide(const A* from, int n) {
  using Narrow = typename VectorOf<A, kLanes<double>>::type;
  Narrow value{};
  if (n >= kLanes<double>) {
    value = load_bits<Narrow>(from);
  } else {
    for (int i = 0; i < n; ++i) value[i] = from[i];
  }
  return __builtin_convertvector(value, F64);
}
template <typename A>
XENT_INLINE void store_narrow(A* to, F64 value, int n) {
  const auto narrow = __builtin_convertvector(value, typename VectorOf<A, kLanes<double>>::type);
  if (n >= kLanes<double>) return store_bits(to, narrow);
  for (int i = 0; i < n; ++i) to[i] = narrow[i];
}
#endif

// Rounded to A and back.
template <typename A>
XENT_INLINE F64 rounded_to(F64 value) {
  using Narrow = typename VectorOf<A, kLanes<double>>::type;
  return __builtin_convertvector(__builtin_convertvector(value, Narrow), F64);
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

XENT_INLINE float load_one(const float* from) { return *from; }
XENT_INLINE double load_one(const double* from) { return *from; }
XENT_INLINE float load_one(const BFloat16* from) {
  return std::bit_cast<float>(static_cast<uint32_t>(from->bits) << 16);
}
XENT_INLINE float load_one(const Half* from) {
#if XENT_VECTOR_BYTES >= 32
  return _cvtsh_ss(from->bits);
#else
  return load_first(from, 1)[0];
#endif
}

template <typename T>
XENT_INLINE void store_one(T* to, Acc<T> value) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    *to = value;
  } else {
    store_first(to, value - Vec<Acc<T>>{}, 1);
  }
}
