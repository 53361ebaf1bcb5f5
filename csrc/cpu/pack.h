// A SIMD register of T as a value type for the row bodies, with polynomial exponentials and logarithms.
//
// `bytes` is the register width of the instruction set that the file is compiled for (simd_*.cpp). GCC and Clang vector
// extensions; no intrinsics.
#pragma once
#include <cstring>
#include <type_traits>

#include "../arithmetic.h"

namespace scorematch {

template <typename T>
struct Bits;

template <>
struct Bits<float> {
  using integer = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float exp_underflow = -87.3f, exp_overflow = 88.7f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float smallest_normal = 0x1p-126f, denormal_scale = 0x1p24f, denormal_exponent = 24;
  // (e^r - 1 - r) / r² for |r| <= ln2 / 2
  static constexpr double exp_series[] = {5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2,
                                          8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4};
  // (atanh(s) / s - 1) / s² for |s| <= 0.172
  static constexpr double atanh_series[] = {1. / 3, 1. / 5, 1. / 7, 1. / 9, 1. / 11};
};

template <>
struct Bits<double> {
  using integer = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_underflow = -708., exp_overflow = 709.;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double smallest_normal = 0x1p-1022, denormal_scale = 0x1p54, denormal_exponent = 54;
  static constexpr double exp_series[] = {1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,       1. / 5040,
                                          1. / 40320,  1. / 362880,  1. / 3628800,  1. / 39916800,  1. / 479001600, 1. / 6227020800};
  static constexpr double atanh_series[] = {1. / 3,  1. / 5,  1. / 7,  1. / 9,  1. / 11,
                                            1. / 13, 1. / 15, 1. / 17, 1. / 19, 1. / 21};
};

template <typename T, int bytes>
struct Register;
#define SCOREMATCH_REGISTER(T, bytes)                                         \
  template <>                                                                 \
  struct Register<T, bytes> {                                                 \
    typedef T Vector __attribute__((vector_size(bytes)));                     \
    typedef Bits<T>::integer Integers __attribute__((vector_size(bytes)));    \
  };
SCOREMATCH_REGISTER(float, 16)
SCOREMATCH_REGISTER(float, 32)
SCOREMATCH_REGISTER(float, 64)
SCOREMATCH_REGISTER(double, 16)
SCOREMATCH_REGISTER(double, 32)
SCOREMATCH_REGISTER(double, 64)
#undef SCOREMATCH_REGISTER

template <typename T, int bytes>
struct Pack {
  static constexpr int size = bytes / sizeof(T);
  using Vector = typename Register<T, bytes>::Vector;
  using Integers = typename Register<T, bytes>::Integers;
  using Mask = Integers;  // all bits set where true

  Vector v;

  Pack() = default;
  SCOREMATCH_INLINE Pack(Vector values) : v(values) {}
  SCOREMATCH_INLINE explicit Pack(T value) : v(value - Vector{}) {}  // x - 0 is x for every x, -0 and NaN too
  template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number> && !std::is_same_v<Number, T>>>
  SCOREMATCH_INLINE explicit Pack(Number value) : Pack(static_cast<T>(value)) {}

  static SCOREMATCH_INLINE Pack load(const T* p) {
    Pack r;
    std::memcpy(&r.v, p, bytes);
    return r;
  }
  static SCOREMATCH_INLINE Pack load_first(const T* p, int64_t count, T rest) {
    Pack r(rest);
    for (int64_t i = 0; i < count; ++i) r.v[i] = p[i];
    return r;
  }
  static SCOREMATCH_INLINE Pack counting_from(T first) {
    Pack r(first);
    for (int i = 0; i < size; ++i) r.v[i] += static_cast<T>(i);
    return r;
  }
  SCOREMATCH_INLINE void store(T* p) const { std::memcpy(p, &v, bytes); }
  SCOREMATCH_INLINE void store_first(T* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }

  friend SCOREMATCH_INLINE Pack operator+(Pack a, Pack b) { return a.v + b.v; }
  friend SCOREMATCH_INLINE Pack operator-(Pack a, Pack b) { return a.v - b.v; }
  friend SCOREMATCH_INLINE Pack operator*(Pack a, Pack b) { return a.v * b.v; }
  friend SCOREMATCH_INLINE Pack operator/(Pack a, Pack b) { return a.v / b.v; }
  friend SCOREMATCH_INLINE Pack operator-(Pack a) { return -a.v; }
  SCOREMATCH_INLINE Pack& operator+=(Pack b) {
    v += b.v;
    return *this;
  }
  friend SCOREMATCH_INLINE Mask operator<(Pack a, Pack b) { return a.v < b.v; }
  friend SCOREMATCH_INLINE Mask operator<=(Pack a, Pack b) { return a.v <= b.v; }
  friend SCOREMATCH_INLINE Mask operator>=(Pack a, Pack b) { return a.v >= b.v; }
  friend SCOREMATCH_INLINE Mask operator>(Pack a, Pack b) { return a.v > b.v; }
  friend SCOREMATCH_INLINE Mask operator==(Pack a, Pack b) { return a.v == b.v; }
  friend SCOREMATCH_INLINE Pack select(Mask mask, Pack a, Pack b) { return mask ? a.v : b.v; }

  static SCOREMATCH_INLINE Integers bits(Pack a) { return reinterpret_cast<Integers>(a.v); }
  static SCOREMATCH_INLINE Pack from_bits(Integers i) { return reinterpret_cast<Vector>(i); }
};

template <typename T, int bytes>
struct ScalarOf<Pack<T, bytes>> {
  using type = T;
};

template <typename T, int bytes>
SCOREMATCH_INLINE Pack<T, bytes> rounded_product(Pack<T, bytes> a, Pack<T, bytes> b) {
  return opaque(a.v * b.v);
}

template <typename T, int bytes>
SCOREMATCH_INLINE T uniform(Pack<T, bytes> v) {
  return v.v[0];
}

// x = n ln2 + r with |r| <= ln2 / 2; returns 2^n and e^r - 1. Beyond the range of T the result is unspecified.
template <typename T, int bytes>
SCOREMATCH_INLINE void reduced_exponential(Pack<T, bytes> x, Pack<T, bytes>& power, Pack<T, bytes>& minus_1) {
  using P = Pack<T, bytes>;
  using B = Bits<T>;
  const P shifted = x * P(T(1.4426950408889634)) + P(B::round);
  const P n = shifted - P(B::round);
  const P r = x - n * P(B::ln2_high) - n * P(B::ln2_low);
  minus_1 = r + r * r * polynomial(r, B::exp_series);
  power = P::from_bits((P::bits(shifted) - P::bits(P(B::round)) + B::bias) << B::mantissa);
}

template <typename T, int bytes>
SCOREMATCH_INLINE Pack<T, bytes> exponential(Pack<T, bytes> x) {
  using P = Pack<T, bytes>;
  P power, minus_1;
  reduced_exponential(x, power, minus_1);
  const P inside = power + power * minus_1;
  const P above = select(x > P(Bits<T>::exp_overflow), P(T(INFINITY)), inside);
  const P both = select(x < P(Bits<T>::exp_underflow), P(T(0)), above);
  return select(x == x, both, x);
}

template <typename T, int bytes>
SCOREMATCH_INLINE Pack<T, bytes> exponential_minus_1(Pack<T, bytes> x) {
  using P = Pack<T, bytes>;
  P power, minus_1;
  reduced_exponential(x, power, minus_1);
  const P inside = power * minus_1 + (power - P(T(1)));
  const P above = select(x > P(Bits<T>::exp_overflow), P(T(INFINITY)), inside);
  const P both = select(x < P(Bits<T>::exp_underflow), P(T(-1)), above);
  return select(x == x, both, x);
}

// log(1 + f) = 2 atanh(f / (2 + f)) for 1 + f in [√½, √2]
template <typename P>
SCOREMATCH_INLINE P logarithm_near_1(P f) {
  using T = scalar_of<P>;
  const P s = f / (P(T(2)) + f), squared = s * s;
  return f - s * (f - (squared + squared) * polynomial(squared, Bits<T>::atanh_series));
}

template <typename T, int bytes>
SCOREMATCH_INLINE Pack<T, bytes> logarithm(Pack<T, bytes> x) {
  using P = Pack<T, bytes>;
  using B = Bits<T>;
  using integer = typename B::integer;
  const auto denormal = x < P(B::smallest_normal);
  const P normal = select(denormal, x * P(B::denormal_scale), x);
  // normal = 2^e (1 + f) with 1 + f in [√½, √2)
  integer root_half;
  const T value_of_root_half = T(0.70710678118654752440);
  std::memcpy(&root_half, &value_of_root_half, sizeof(T));
  const auto e = (P::bits(normal) - root_half) >> B::mantissa;
  const P f = P::from_bits(P::bits(normal) - (e << B::mantissa)) - P(T(1));
  const P exponent = P(__builtin_convertvector(e, typename P::Vector)) - select(denormal, P(B::denormal_exponent), P(T(0)));
  const P inside = exponent * P(B::ln2_high) + (exponent * P(B::ln2_low) + logarithm_near_1(f));
  const P with_zero = select(x == P(T(0)), P(T(-INFINITY)), select(x < P(T(0)), P(T(NAN)), inside));
  return select(x < P(T(INFINITY)), with_zero, x);  // ∞ and NaN are their own logarithms
}

template <typename T, int bytes>
SCOREMATCH_INLINE Pack<T, bytes> logarithm_of_1_plus(Pack<T, bytes> t) {  // for t in [0, 1]
  using P = Pack<T, bytes>;
  const auto above = t > P(T(0.41421356237309504880));
  const P f = select(above, (t - P(T(1))) * P(T(0.5)), t);  // 1 + t = 2 (1 + f)
  return logarithm_near_1(f) + select(above, P(T(0.69314718055994530942)), P(T(0)));
}

template <typename T, int bytes>
SCOREMATCH_INLINE Pack<T, bytes> square_root(Pack<T, bytes> x) {
  Pack<T, bytes> r;
  for (int i = 0; i < Pack<T, bytes>::size; ++i) r.v[i] = std::sqrt(x.v[i]);
  return r;
}

// One row spread over the elements of a pack: element i of the pack is lane i of the contract in lanes.h.
template <typename P>
struct PackLanes {
  static constexpr bool keeps_exponentials = true;
  SCOREMATCH_INLINE int64_t lane() const { return 0; }
  SCOREMATCH_INLINE int64_t width() const { return P::size; }
  SCOREMATCH_INLINE P sum(P a) const {
    return reduce(a, [](auto x, auto y) { return x + y; });
  }
  SCOREMATCH_INLINE P max(P a) const {
    return reduce(a, [](auto x, auto y) { return y > x ? y : x; });
  }

 private:
  template <typename Combine>
  SCOREMATCH_INLINE P reduce(P a, Combine combine) const {
    scalar_of<P> values[P::size];
    a.store(values);
    for (int half = P::size / 2; half != 0; half /= 2)
      for (int i = 0; i < half; ++i) values[i] = combine(values[i], values[i + half]);
    return P(values[0]);
  }
};

// A contiguous row read a pack at a time; beyond its end it continues with `rest`, a value without effect.
template <typename P, typename T = scalar_of<P>>
struct PackedRow {
  const T* data;
  int64_t count;
  T rest;
  SCOREMATCH_INLINE P operator()(int64_t j) const {
    return j + P::size <= count ? P::load(data + j) : P::load_first(data + j, count - j, rest);
  }
};

template <typename P, typename T = scalar_of<P>>
struct PackedOutput {
  T* data;
  int64_t count;
  SCOREMATCH_INLINE void put(int64_t j, P value) const {
    if (j + P::size <= count)
      value.store(data + j);
    else
      value.store_first(data + j, count - j);
  }
  SCOREMATCH_INLINE void operator()(int64_t j, P value) const { put(j, value); }
  SCOREMATCH_INLINE P get(int64_t j) const { return PackedRow<P>{data, count, T(0)}(j); }
};

}  // namespace scorematch
