// Scalar arithmetic under the names that row bodies use. A row body is generic in its value type A: float, double, or
// a SIMD pack with the same functions (cpu/pack.h). Comparisons yield a mask (bool for scalars); branches that depend
// on data are written with select(mask, if_true, if_false). No function here turns NaN into a number.
#pragma once
#include <cmath>

#include "lanes.h"

namespace scorematch {

template <typename A>
struct ScalarOf {
  using type = A;
};
template <typename A>
using scalar_of = typename ScalarOf<A>::type;

template <typename A>
using mask_of = decltype(A(0) < A(0));

template <typename A>
SCOREMATCH_INLINE A select(bool mask, A if_true, A if_false) {
  return mask ? if_true : if_false;
}

// v itself. The compiler cannot see that it is, so it cannot simplify what is computed from it.
template <typename V>
SCOREMATCH_INLINE V opaque(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

SCOREMATCH_INLINE float exponential(float v) { return std::exp(v); }
SCOREMATCH_INLINE double exponential(double v) { return std::exp(v); }
SCOREMATCH_INLINE float exponential_minus_1(float v) { return std::expm1(v); }
SCOREMATCH_INLINE double exponential_minus_1(double v) { return std::expm1(v); }
SCOREMATCH_INLINE float logarithm(float v) { return std::log(v); }
SCOREMATCH_INLINE double logarithm(double v) { return std::log(v); }
SCOREMATCH_INLINE float logarithm_of_1_plus(float v) { return std::log1p(v); }  // for v in [0, 1]
SCOREMATCH_INLINE double logarithm_of_1_plus(double v) { return std::log1p(v); }
SCOREMATCH_INLINE float square_root(float v) { return std::sqrt(v); }
SCOREMATCH_INLINE double square_root(double v) { return std::sqrt(v); }

// a b, rounded: in a sum with another value it is not contracted into a fused multiply-add.
SCOREMATCH_INLINE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return opaque(a * b);
#endif
}
SCOREMATCH_INLINE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return opaque(a * b);
#endif
}

// A value that is the same for every row and lane, as a scalar: what a loop may depend on.
SCOREMATCH_INLINE float uniform(float v) { return v; }
SCOREMATCH_INLINE double uniform(double v) { return v; }

template <typename A>
SCOREMATCH_INLINE A magnitude(A v) {
  return select(v < A(0), -v, v);
}

// sign(0) = 0, sign(NaN) = NaN
template <typename A>
SCOREMATCH_INLINE A sign(A v) {
  return select(v > A(0), A(1), select(v < A(0), A(-1), v));
}

// NaN in v stays; a NaN bound is ignored.
template <typename A>
SCOREMATCH_INLINE A clamp(A v, A lower, A upper) {
  const A raised = select(v < lower, lower, v);
  return select(raised > upper, upper, raised);
}

// Σ_k coefficients[k] v^k by Horner's rule
template <typename A, int count>
SCOREMATCH_INLINE A polynomial(A v, const double (&coefficients)[count]) {
  using T = scalar_of<A>;
  A sum(static_cast<T>(coefficients[count - 1]));
  SCOREMATCH_UNROLL
  for (int k = count - 2; k >= 0; --k) sum = sum * v + A(static_cast<T>(coefficients[k]));
  return sum;
}

}  // namespace scorematch
