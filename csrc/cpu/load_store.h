// Loads and stores: whole vectors, the first lanes of one, single numbers. Those of 16-bit numbers
// convert from float and to it. Included like simd.h.

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
  Narrow<A> value{};
  if (n >= kLanes<double>) {
    value = load_bits<Narrow<A>>(from);
  } else {
    for (int i = 0; i < n; ++i) value[i] = from[i];
  }
  return __builtin_convertvector(value, F64);
}
template <typename A>
XENT_INLINE void store_narrow(A* to, F64 value, int n) {
  const auto narrow = __builtin_convertvector(value, Narrow<A>);
  if (n >= kLanes<double>) return store_bits(to, narrow);
  for (int i = 0; i < n; ++i) to[i] = narrow[i];
}
#endif

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
