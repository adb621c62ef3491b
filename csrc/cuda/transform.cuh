// From input logits x to transformed logits z, scaled and capped (Gemma 2,
// https://arxiv.org/abs/2408.00118), and to exponentials.
#pragma once

#include "../xent_math.h"
#include "launch.h"
#include "memory.cuh"
#include "packed.cuh"

namespace fused_xent::cuda {

constexpr float kLog2E = 1.44269504f;

// 2^x with an error of at most 2 units in the last place; subnormal results are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
// 1 / x, in float with an error of 1 unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
// exp(x) for x <= 0, with an error of 2 units in the last place and |x| roundings; subnormal
// results are 0.
__device__ __forceinline__ float exp_nonpositive(float x) { return exp2_approximate(x * kLog2E); }
__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }

template <typename A>
__device__ __forceinline__ const Transform<A>& transform_of(const Arguments& a) {
  if constexpr (std::is_same_v<A, double>) {
    return a.transform;
  } else {
    return a.transform_float;
  }
}

template <typename A>
__device__ __forceinline__ A transformed(const Transform<A>& t, A x, bool is_capped) {
  return is_capped ? t.softcap * tanh(x * t.inner) : x * t.scale;
}
// dz/dx: scale / cosh^2, since 1 - tanh^2 would cancel.
template <typename A>
__device__ __forceinline__ A slope_at(const Transform<A>& t, A x, bool is_capped) {
  if (!is_capped) return t.scale;
  const A e = exp_nonpositive(-2 * fabs(x * t.inner)), r = reciprocal(1 + e);
  return 4 * t.scale * e * r * r;
}

template <typename A>
__device__ __forceinline__ A transformed(const Transform<A>& t, A x) {
  return transformed(t, x, t.softcap != 0);
}
template <typename A>
__device__ __forceinline__ A slope_at(const Transform<A>& t, A x) {
  return slope_at(t, x, t.softcap != 0);
}

// The exponentials exp(z - max) of a row in a sweep, times a factor that is the same for all z.
// Where z is unit() * y + a constant,
//
//   exponents(x)      turns logits x into exponents, and returns the sum of their y if it is wanted
//   power(exponent)   the exponential of one of them
//
// A sum of powers must be multiplied by to_exact() to be exact, and by to(other) to be relative to
// another maximum. max_of(x) is the z of the greatest x. kIsRelative: y is z - max.
struct NoTransform {
  static constexpr int scale = 1;
};

template <typename A, typename GivenBy = const Transform<A>&>
struct ExactShiftedExp {
  using Real = A;
  using By = GivenBy;
  static constexpr bool kIsRelative = true;
  static constexpr A kShrink = 1;  // keeps sums of y finite
  By by;
  A max;

  __device__ __forceinline__ ExactShiftedExp(By by, A max) : by(by), max(max) {}
  static __device__ __forceinline__ A max_of(By by, A x) { return x * by.scale; }
  template <bool kWantsSum = false, int N>
  __device__ __forceinline__ A exponents(A (&x)[N]) const {
    set_fma(x, x, A(by.scale), -max);
    A sum = 0;
    if constexpr (kWantsSum) sum = sum_of(x);
    if constexpr (sizeof(A) == 4) set_product(x, x, A(kLog2E));
    return sum;
  }
  __device__ __forceinline__ A power(A exponent) const {
    if constexpr (sizeof(A) == 4) return exp2_approximate(exponent);
    return exp(exponent);
  }
  __device__ __forceinline__ A unit() const { return 1; }
  __device__ __forceinline__ A to_exact() const { return 1; }
  __device__ __forceinline__ A to(const ExactShiftedExp& other) const {
    return exp_nonpositive(max - other.max);
  }
};

// One instruction less, for 16-bit logits: 2^(exponent * x + offset), where offset is
// -max * log2(e), rounded once a row. Beyond 2^17, neighbouring 16-bit logits differ by 64 at
// least, so log2(e) is not needed: 2^-64 and e^-64 both add nothing to 1.
struct ShiftedExp16 {
  using Real = float;
  using By = const Transform<float>&;
  static constexpr bool kIsRelative = false;
  static constexpr float kShrink = 0x1p-20f;
  By by;
  float max, exponent, offset;

  __device__ __forceinline__ ShiftedExp16(By by, float max) : by(by), max(max) {
    exponent = is_near() ? by.exponent : by.scale;
    offset = -__fmul_rn(max, per_logit());  // never fused with what is added to it
  }
  static __device__ __forceinline__ float max_of(By by, float x) { return x * by.scale; }
  template <bool kWantsSum = false, int N>
  __device__ __forceinline__ float exponents(float (&x)[N]) const {
    float sum = 0;
    if constexpr (kWantsSum) {
      float shrunk[N];
      set_product(shrunk, x, float(kShrink));
      sum = sum_of(shrunk);
    }
    set_fma(x, x, exponent, offset);
    return sum;
  }
  __device__ __forceinline__ float power(float exponent) const {
    return exp2_approximate(exponent);
  }
  __device__ __forceinline__ float unit() const { return by.scale; }
  __device__ __forceinline__ float to_exact() const {
    return exp2_approximate(-fmaf(max, per_logit(), offset));
  }
  __device__ __forceinline__ float to(const ShiftedExp16& other) const {
    return is_near() == other.is_near() ? exp2_approximate(other.offset - offset) : 0.0f;
  }

 private:
  __device__ __forceinline__ bool is_near() const { return fabsf(max) < 0x1p17f; }
  __device__ __forceinline__ float per_logit() const { return is_near() ? kLog2E : 1.0f; }
};

// Replaces N numbers in [1, 2] by their reciprocals, with one division for four of them.
template <int N>
__device__ __forceinline__ void invert(float (&x)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float first = x[i] * x[i + 1], second = x[i + 2] * x[i + 3];
      const float of_all = reciprocal(first * second);
      const float of_first = of_all * second, of_second = of_all * first, x0 = x[i], x2 = x[i + 2];
      x[i] = of_first * x[i + 1];
      x[i + 1] = of_first * x0;
      x[i + 2] = of_second * x[i + 3];
      x[i + 3] = of_second * x2;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = reciprocal(x[i]);
  }
}

// Of softcapped logits. y is z * log2(e), with an error of some roundings of the softcap, about one
// on average and at most 12: tanh |u| = 2 / (1 + exp(-2 |u|)) - 1.
struct SmallCappedExp;
struct CappedExp {
  using Real = float;
  using By = const Transform<float>&;
  static constexpr bool kIsRelative = false;
  static constexpr float kShrink = 1;
  By by;
  float top;

  __device__ __forceinline__ CappedExp(By by, float max) : by(by), top(max * kLog2E) {}
  static __device__ __forceinline__ float max_of(By by, float x) {
    float y[] = {x};
    CappedExp(by, 0).exponents(y);
    return y[0] * (1 / kLog2E);
  }
  // slopes: dz/dx / (-4 * scale).
  template <bool kWantsSum = false, int N>
  __device__ __forceinline__ float exponents(float (&x)[N], float (&slopes)[N]) const {
    float r[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      slopes[i] = exp2_approximate(fabsf(x[i]) * by.exponent);
      r[i] = 1 + slopes[i];
    }
    invert(r);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = copysignf(fmaf(r[i], 2 * by.cap, -by.cap), x[i]);
      if constexpr (kWantsSum) sum += x[i];
      x[i] -= top;
      slopes[i] *= -r[i] * r[i];
    }
    return sum;
  }
  template <bool kWantsSum = false, int N>
  __device__ __forceinline__ float exponents(float (&x)[N]) const {
    float slopes[N];
    return exponents<kWantsSum>(x, slopes);
  }
  __device__ __forceinline__ float power(float exponent) const {
    return exp2_approximate(exponent);
  }
  __device__ __forceinline__ float unit() const { return 1 / kLog2E; }
  __device__ __forceinline__ float to_exact() const { return 1; }
  __device__ __forceinline__ float to(const CappedExp& other) const {
    return exp2_approximate(top - other.top);
  }
  // The faster one for logits whose absolute value is at most most_of_small().
  __device__ __forceinline__ SmallCappedExp small() const;
  __device__ __forceinline__ float most_of_small() const { return by.most_by_series; }
};

// The same for logits of at most by.most_by_series, where the tanh is an odd polynomial: no MUFU
// operation but that of power.
struct SmallCappedExp : CappedExp {
  __device__ __forceinline__ explicit SmallCappedExp(const CappedExp& other) : CappedExp(other) {}
  template <bool kWantsSum = false, int N>
  __device__ __forceinline__ float exponents(float (&x)[N]) const {
    float factors[N], sum = 0;
    even(by.capped, x, factors);
    if constexpr (kWantsSum) {
      float y[N];
      set_product(y, x, factors);
      sum = sum_of(y);
    }
    set_fma(x, x, factors, -top);
    return sum;
  }
  template <int N>
  __device__ __forceinline__ void exponents(float (&x)[N], float (&slopes)[N]) const {
    float half_tanh[N];
    even(by.half_tanh, x, half_tanh);
    set_product(half_tanh, x, half_tanh);
    set_fma(x, half_tanh, 2 * by.cap, -top);
    set_fma(slopes, half_tanh, half_tanh, -0.25f);
  }

 private:
  // The polynomial of x^2.
  template <int N>
  static __device__ __forceinline__ void even(const float (&terms)[kTanhTerms], const float (&x)[N],
                                              float (&sums)[N]) {
    float squares[N];
    set_product(squares, x, x);
    set_fma(sums, squares, terms[kTanhTerms - 1], terms[kTanhTerms - 2]);
#pragma unroll
    for (int k = kTanhTerms - 3; k >= 0; --k) set_fma(sums, sums, squares, terms[k]);
  }
};

__device__ __forceinline__ SmallCappedExp CappedExp::small() const { return SmallCappedExp(*this); }

// S: see Spread.
template <typename T, typename S>
using ExpOf =
    std::conditional_t<kIsCapped<S>, CappedExp,
                       std::conditional_t<sizeof(T) == 2, ShiftedExp16, ExactShiftedExp<Acc<T>>>>;

}  // namespace fused_xent::cuda
