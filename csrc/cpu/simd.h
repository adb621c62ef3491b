// Vectors of one instruction set, and the functions of them that the kernels need.
//
// Included by each instruction set's file inside its target region and unnamed namespace, with
// XENT_VECTOR_BYTES defined (and not the compiler's own macros, which a target region need not
// set): nothing here may be emitted where another file could link to it. Arithmetic is written
// once, on the compiler's vector types. Only what turns 16-bit numbers into lanes and back is
// written per instruction set.

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

// b where either is NaN: x86's max. Compilers do not always find it in the comparison.
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

template <typename V>
XENT_INLINE auto max_lane(V v) {
  auto max = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof v[0]; ++i) max = v[i] > max ? v[i] : max;
  return max;
}

template <typename V>
XENT_INLINE double sum_lanes(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof v[0]; ++i) sum += v[i];
  return sum;
}

// ---- loads and stores, 16-bit numbers among them ---------------------------------------------

XENT_INLINE F32 load(const float* from) { return load_bits<F32>(from); }
XENT_INLINE F64 load(const double* from) { return load_bits<F64>(from); }
XENT_INLINE void store(float* to, F32 value) { store_bits(to, value); }
XENT_INLINE void store(double* to, F64 value) { store_bits(to, value); }

// To nearest even, in the high half of each lane; NaN, where there may be one, gives 0xffff, which
// is one too.
template <bool kMayBeNan = true, typename V>
XENT_INLINE auto round_to_bfloat16(V value) {
  using Bits = typename VectorOf<uint32_t, sizeof(V) / 4>::type;
  const Bits bits = (Bits)value;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return kMayBeNan ? rounded | (Bits)(value != value) : rounded;
}

#if XENT_VECTOR_BYTES >= 32
// Eight numbers, whatever the width of a vector.
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

// Exponent and mantissa shifted into place are 2^-112 of the value, subnormal or not.
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
  // Rounded by addition: of half a unit and the even bit, or of 0.5, whose unit is 2^-24.
  const U32 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000;
  U32 half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 - U32{} : half;
  half = magnitude > 0x7f800000 ? 0x7e00 - U32{} : half;
  store_bits(to, __builtin_convertvector(half | (bits >> 16 & 0x8000), U16));
}

#endif

// Two vectors of adjacent numbers. 16-bit ones may be dealt out by turns, even places to the first
// vector and odd to the second: that needs a shift and a mask where the order of memory needs
// shuffles. Whatever meets them lane by lane is loaded in T's order.
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

// T is the logits' type, From that of the numbers.
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

// The low half of each lane of first, and above it that of second.
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

// The first n lanes; the others are fill.
template <typename T>
XENT_INLINE Vec<Acc<T>> load_first(const T* from, int n, Acc<T> fill = 0) {
  if (n == kLanes<Acc<T>>) return load(from);
  T lanes[kLanes<Acc<T>>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = from[i];
  Vec<Acc<T>> value = load(lanes);
  for (int i = n; i < kLanes<Acc<T>>; ++i) value[i] = fill;
  return value;
}

template <typename T>
XENT_INLINE void store_first(T* to, Vec<Acc<T>> value, int n) {
  if (n == kLanes<Acc<T>>) return store(to, value);
  T lanes[kLanes<Acc<T>>];
  store(lanes, value);
  for (int i = 0; i < n; ++i) to[i] = lanes[i];
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

// ---- elementary functions --------------------------------------------------------------------

// exp(x) for x <= 0, and a few above, and NaN for NaN. Below the smallest normal number the result
// is 0.
//
// x = (n + f) log 2 with integer n and |f| <= 1/2. Adding 1.5 * 2^23 + 127 leaves n + 127 in the
// low bits, which, shifted by 23, are the number 2^n. 2^f is the polynomial of degree 5 with p(0) =
// 1 and the least relative error, 9.3e-8; all in all 2.2e-7 for x > -5, growing with |x| to 1e-6.
XENT_INLINE F32 exp_nonpositive(F32 x) {
  constexpr float kShifter = 12582912.0f + 127;
  constexpr float kLog2e = 1.44269504f;
  x = vmax(-88.03f - F32{}, x);  // there n = -127, and 2^n is 0
  const F32 shifted = x * kLog2e + kShifter;
  const F32 f = x * kLog2e - (shifted - kShifter);
  F32 p = 1.32695213e-3f * f + 9.67129134e-3f;
  p = p * f + 5.55071086e-2f;
  p = p * f + 2.40222469e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return p * (F32)((U32)shifted << 23);
}

// As above, with log 2 in two parts and Taylor's series of e^r to r^13, |r| <= log(2) / 2.
XENT_INLINE F64 exp_nonpositive(F64 x) {
  constexpr double kShifter = 6755399441055744.0 + 1023;
  x = vmax(-709.0895657128241 - F64{}, x);
  const F64 shifted = x * 1.4426950408889634 + kShifter;
  const F64 n = shifted - kShifter;
  const F64 r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  F64 p = 1.0 / 6227020800 * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1;
  p = p * r + 1;
  return p * (F64)((U64)shifted << 52);
}

// exp(x - m) of a row's logits is kScale * power(exponent(x)): two steps, because the loss of soft
// labels needs x - m, which is kUnit * exponent(x), too.
template <typename A>
struct SubtractingExp {
  static constexpr double kScale = 1, kUnit = 1;
  A max;

  XENT_INLINE explicit SubtractingExp(double m) : max(static_cast<A>(m)) {}
  XENT_INLINE double origin() const { return max; }
  XENT_INLINE Vec<A> exponent(Vec<A> x) const { return x - max; }
  XENT_INLINE static Vec<A> power(Vec<A> d) { return exp_nonpositive(d); }
};

// exp_nonpositive's polynomial, divided by its highest coefficient: that would be copied each time.
struct Power {
  static constexpr float kLog2e = 1.44269504f;
  static constexpr double kScale = 1 / 753.606689453125;

  XENT_INLINE static F32 power(F32 t) {
    constexpr float kShifter = 12582912.0f + 127;
    t = vmax(-127.0f - F32{}, t);  // 2^n is 0 there
    const F32 shifted = t + kShifter;
    const F32 f = t - (shifted - kShifter);
    F32 p = f + 7.28834963f;
    p = p * f + 41.8305283f;
    p = p * f + 181.033264f;
    p = p * f + 522.360229f;
    p = p * f + 753.606689f;
    return p * (F32)((U32)shifted << 23);
  }
};

// x - max is exact for the x that matter, so that the same number added to all changes no bit.
template <>
struct SubtractingExp<float> : Power {
  static constexpr double kUnit = 1;
  float max;

  XENT_INLINE explicit SubtractingExp(double m) : max(static_cast<float>(m)) {}
  XENT_INLINE double origin() const { return max; }
  XENT_INLINE F32 exponent(F32 x) const { return x - max; }
  XENT_INLINE static F32 power(F32 d) { return Power::power(d * kLog2e); }
};

// One instruction instead of two. x log2(e) + shift is rounded once (this rests on that), and what
// shift was rounded to is the same for all x: so they are right around the origin() that it stands
// for, which is near m where |m| < kMaxOrigin.
struct FusedExp : Power {
  static constexpr double kUnit = 1 / double{kLog2e};
  float shift;

  XENT_INLINE explicit FusedExp(double m) : shift(-static_cast<float>(m * kLog2e)) {}
  XENT_INLINE double origin() const { return -kUnit * shift; }
  XENT_INLINE F32 exponent(F32 x) const { return fused_multiply_add(x, kLog2e, shift); }
};

// Where labels are spread over the classes, their gradient is a difference of numbers that may be
// near each other: there, x - max is worth its instruction.
template <typename A, typename Spread>
using RowExp =
    std::conditional_t<kHasFusedMultiplyAdd && std::is_same_v<A, float> && !Spread::kExists,
                       FusedExp, SubtractingExp<A>>;

// factor * exp(x - max), rounded to bfloat16 in the low half of each lane, for finite factors and
// |max| <= kMaxRounded, beyond which the exponent would lose too much.
//
// It is 2^n * c 2^f with integer n, |f| <= 1/2 and c = 181 / 128, a little below sqrt(2). So c 2^f
// is in [1, 2] and has its 8 bits at one place: the addition of 1.5 * 2^16, part of the
// polynomial's last step, leaves them, rounded, in the low bits. Adding n above them makes the
// number. Below the smallest normal number results are between 0 and that.
struct RoundedExp {
  static constexpr double kMaxRounded = 1024;
  static constexpr double kLog2C = 0.4998458870832054;
  float shift, shifter;

  XENT_INLINE RoundedExp(double max, double factor)
      : shift(static_cast<float>(std::log2(std::fabs(factor)) - max * 1.4426950408889634 - kLog2C)),
        shifter(12582912.0f + 126 + (factor < 0 ? 256 : 0)) {}

  XENT_INLINE static bool can_do(double max, double factor) {
    return kHasFusedMultiplyAdd && std::fabs(max) <= kMaxRounded && std::fabs(factor) < 0x1p100;
  }
  XENT_INLINE U32 operator()(F32 x) const {
    const F32 t = vmax(-127.5f - F32{}, fused_multiply_add(x, 1.44269504f, shift));  // 0 there
    const F32 shifted = t + shifter;
    const F32 f = t - (shifted - shifter);
    F32 p = 0.00187639325f * f + 0.0136758104f;
    p = p * f + 0.0784905208f;
    p = p * f + 0.339689585f;
    p = p * f + 0.980153185f;
    p = p * f + (1.4140625f + 98304.0f);
    return (U32)p + ((U32)shifted << 7);
  }
};

// log(x) for x >= 1, x = 0 (-inf) and NaN. x = 2^n m with m in [sqrt(1/2), sqrt(2)) and
// log(m) = 2 atanh((m - 1) / (m + 1)), by the series of atanh.
XENT_INLINE F32 log_positive(F32 x) {
  const U32 bits = (U32)x - 0x3f3504f3;  // of sqrt(1/2)
  const F32 n = __builtin_convertvector((Vec<int32_t>)bits >> 23, F32);
  const F32 m = (F32)((bits & 0x7fffff) + 0x3f3504f3);
  const F32 t = (m - 1) / (m + 1);
  const F32 t2 = t * t;
  F32 p = 2.0f / 9 * t2 + 2.0f / 7;
  p = p * t2 + 2.0f / 5;
  p = p * t2 + 2.0f / 3;
  p = p * t2 + 2.0f;
  const F32 log = n * 6.93147181e-1f + t * p;
  return x == 0 ? -__builtin_inff() - F32{} : log + (x - x);
}

XENT_INLINE F64 log_positive(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// exp(x) - 1 for x <= 0: Taylor's series where exp would cancel.
XENT_INLINE F32 expm1_nonpositive(F32 x) {
  F32 p = x * (1.0f / 40320) + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  return x > -0.5f ? (p * x) * x + x : exp_nonpositive(x) - 1;
}

XENT_INLINE F64 expm1_nonpositive(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::expm1(x[i]);
  return x;
}

// A sum of many numbers, a vector of them at a time, and apart from it what its additions lost
// (Knuth's two-sum): the error no longer grows with the number of additions.
template <typename A>
struct LongSum {
  Vec<A> sum{}, lost{};

  XENT_INLINE void add(Vec<A> value) {
    const Vec<A> total = sum + value, added = total - sum;
    lost += (sum - (total - added)) + (value - added);
    sum = total;
  }
  XENT_INLINE Vec<A> value() const {
    return lost - lost == 0 ? sum + lost : sum;  // what an infinite sum lost is not a number
  }
};
