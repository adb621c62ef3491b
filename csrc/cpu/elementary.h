// Exponentials, logarithms and long sums of vectors. Included like simd.h.

// exp(x) for x up to a little above 0. NaN stays NaN; results below the smallest normal number are
// 0.
//
// x = (n + f) log 2 with integer n and |f| <= 1/2. Adding 1.5 * 2^23 + 127 leaves n + 127 in the
// low bits, which shifted by 23 are the number 2^n. For 2^f: the polynomial of degree 5 with
// p(0) = 1 and the smallest relative error, 9.3e-8. The total error is 2.2e-7 for x > -5 and grows
// with |x| to 1e-6.
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

// The polynomial with coefficients at(first) to at(first + count - 1), count <= 16. powers are x,
// x^2, x^4 and x^8. It adds up halves, which do not wait for each other (Estrin's scheme): each
// step of Horner's scheme would wait for the one before.
template <typename Coefficients, int count, int first = 0>
XENT_INLINE F64 polynomial(const F64 (&powers)[4]) {
  if constexpr (count == 1) {
    constexpr double kCoefficient = Coefficients::at(first);
    return kCoefficient - F64{};
  } else {
    constexpr int kLog2 = std::bit_width(count - 1u) - 1, kHalf = 1 << kLog2;
    return polynomial<Coefficients, count - kHalf, first + kHalf>(powers) * powers[kLog2] +
           polynomial<Coefficients, kHalf, first>(powers);
  }
}
template <typename Coefficients, int count>
XENT_INLINE F64 polynomial(F64 x) {
  const F64 x2 = x * x, x4 = x2 * x2;
  return polynomial<Coefficients, count>({x, x2, x4, x4 * x4});
}

constexpr double factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }

// The Taylor series of (e^x - 1) / x up to x^n.
struct Expm1Series {
  static constexpr double at(int i) { return 1 / factorial(i + 1); }
};
template <int n>
XENT_INLINE F64 expm1_over_x(F64 x) {
  return polynomial<Expm1Series, n + 1>(x);
}

// The same with log 2 in two parts, and the Taylor series of e^r up to r^13, |r| <= log(2) / 2.
XENT_INLINE F64 exp_nonpositive(F64 x) {
  constexpr double kShifter = 6755399441055744.0 + 1023;
  x = vmax(-709.0895657128241 - F64{}, x);
  const F64 shifted = x * 1.4426950408889634 + kShifter;
  const F64 n = shifted - kShifter;
  const F64 r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  return (expm1_over_x<12>(r) * r + 1) * (F64)((U64)shifted << 52);
}

// exp(a - b) for a <= b, as exact far below 0 as near 0: with the rounding error of a - b, and log
// 2 in two parts.
XENT_INLINE F32 exp_of_difference(F32 a, F32 b) {
  constexpr float kShifter = 12582912.0f + 127;
  F32 lost{};
  add_to(a, lost, -b);
  const F32 x = vmax(-88.03f - F32{}, a);
  const F32 shifted = x * 1.44269504f + kShifter, n = shifted - kShifter;
  const F32 r = (x - n * 6.93145752e-1f) - n * 1.42860677e-6f;
  // Far below, lost may be large, or NaN: the result is 0 anyway.
  return exp_nonpositive(a > -88.03f ? r + lost : r) * (F32)((U32)shifted << 23);
}
XENT_INLINE F64 exp_of_difference(F64 a, F64 b) { return exp_nonpositive(a - b); }

// power(t) is 2^t / kScale, by the polynomial of exp_nonpositive, divided by its highest
// coefficient: that saves an instruction.
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

// exp(x - m) is kScale * power(exponent(x)). These are two steps because the loss of soft labels
// also needs x - m, which is kUnit * exponent(x).
//
// x - max is exact for all x whose exponential matters: adding one number to all logits changes no
// bit.
template <typename A>
struct SubtractingExp {
  static constexpr bool kIsFloat = std::is_same_v<A, float>;
  static constexpr double kScale = kIsFloat ? Power::kScale : 1, kUnit = 1;
  A max;

  XENT_INLINE explicit SubtractingExp(double m) : max(static_cast<A>(m)) {}
  XENT_INLINE double origin() const { return max; }
  XENT_INLINE Vec<A> exponent(Vec<A> x) const { return x - max; }
  XENT_INLINE static Vec<A> power(Vec<A> d) {
    if constexpr (kIsFloat) {
      return Power::power(d * Power::kLog2e);
    } else {
      return exp_nonpositive(d);
    }
  }
};

// One instruction instead of two: x * log2(e) + shift, which must be rounded only once. shift is
// rounded too, but is the same for all x. So the results are exponentials relative to origin(), the
// number that the rounded shift stands for, which is near m if |m| < kMaxOrigin.
struct FusedExp : Power {
  static constexpr double kUnit = 1 / double{kLog2e};
  float shift;

  // FusedExp(origin()).origin() is the same number.
  XENT_INLINE explicit FusedExp(double m) : shift(-static_cast<float>(m * kLog2e)) {}
  XENT_INLINE double origin() const { return kUnit * -shift; }
  // The same for vectors of m.
  XENT_INLINE static F64 origin_of(F64 m) { return kUnit * rounded_to<float>(m * kLog2e); }
  XENT_INLINE F32 exponent(F32 x) const { return fused_multiply_add(x, kLog2e, shift); }
};

// Where labels are spread over the classes, the gradient is a difference of numbers that may be
// nearly equal. So x - max has to be exact, which costs an instruction.
template <typename A, typename Spread>
using RowExp =
    std::conditional_t<kHasFusedMultiplyAdd && std::is_same_v<A, float> && !Spread::kExists,
                       FusedExp, SubtractingExp<A>>;

// factor * exp(x - max), rounded to bfloat16 in the low half of each lane. The factor must be
// finite, and |max| <= kMaxRounded: beyond, the exponent would be too inexact.
//
// The result is 2^n * c 2^f with integer n, |f| <= 1/2 and c = 181 / 128, a little below sqrt(2).
// So c 2^f is in [1, 2], and its 8 bits are always at the same place: the last step of the
// polynomial adds 1.5 * 2^16, which leaves them, rounded, in the low bits. Adding n above them
// gives the number. Results below the smallest normal number are between 0 and that number.
struct RoundedExp {
  static constexpr double kMaxRounded = 1024;
  static constexpr double kLog2C = 0.4998458870832054;
  float shift, shifter;

  XENT_INLINE RoundedExp(double max, double log2_factor, bool is_negative)
      : shift(static_cast<float>(log2_factor - max * 1.4426950408889634 - kLog2C)),
        shifter(12582912.0f + 126 + (is_negative ? 256 : 0)) {}

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

// 2 (atanh(t) - t) / t^3 as a series of t^2.
struct AtanhSeries {
  static constexpr double at(int i) { return 2.0 / (2 * i + 3); }
};

// log(x) in double, for all normal x > 0, with more terms and log 2 in two parts; NaN for x < 0.
XENT_INLINE F64 log_positive(F64 x) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e667f3bcd;
  const U64 exponent = ((U64)x + (kOne - kSqrtHalf)) >> 52;  // n + 1023
  const F64 n = (F64)(exponent | 0x4330000000000000) - (0x1p52 + 1023);
  const F64 m = (F64)((U64)x - ((exponent << 52) - kOne));
  const F64 t = (m - 1) / (m + 1), t2 = t * t;
  const F64 p = polynomial<AtanhSeries, 10>(t2);
  // 2 t is m - 1 - t (m - 1), whose first part is exact.
  const F64 log_m = (m - 1) - t * ((m - 1) - p * t2);
  const F64 log = n * 6.93147180369123816490e-01 + (log_m + n * 1.90821492927058770002e-10);
  const F64 other = x == 0 ? -__builtin_inf() - F64{} : __builtin_nan("") - F64{};
  return x > 0 ? log : other;
}

// exp(x) - 1 for x <= 0: the Taylor series where exp(x) - 1 would cancel.
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
  return x > -0.5 ? expm1_over_x<15>(x) * x : exp_nonpositive(x) - 1;
}

// The functions that focal_loss calls. exp(x) is NaN for x > 0.
struct LaneMath {
  XENT_INLINE static F64 exp(F64 x) {
    return x > 0 ? __builtin_nan("") - F64{} : exp_nonpositive(x);
  }
  XENT_INLINE static F64 expm1(F64 x) { return expm1_nonpositive(x); }
  XENT_INLINE static F64 log(F64 x) { return log_positive(x); }
};

// A sum of many vectors, with the rounding errors of its additions kept apart: its own error does
// not grow with the number of additions.
template <typename A>
struct LongSum {
  Vec<A> sum{}, lost{};

  XENT_INLINE void add(Vec<A> value) { add_to(sum, lost, value); }
  XENT_INLINE Vec<A> value() const { return with_lost(sum, lost); }
};
