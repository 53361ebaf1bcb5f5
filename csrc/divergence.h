// Value and gradients of every divergence D(P‖Q) of one row, Q = softmax(logits). Torch-free.
//
// Everything is computed from log-probabilities, so that logits of ±1e4, one-hot targets and probabilities that
// underflow are exact. With c_j = ∂D/∂ log q_j the gradient to the logits is c_j - q_j Σ_k c_k; the same holds for P
// when it is the softmax of target logits.
#pragma once
#include "arithmetic.h"
#include "options.h"

namespace scorematch {

// log softmax(z)_j = (z_j - largest) - log_sum. A probability is the same number whether its exponential was kept or is
// computed again, and is rounded before another one is subtracted, so that distributions that coincide do so to the last
// bit.
template <typename A>
struct LogSoftmax {
  A largest, log_sum, inverse_sum;
  SCOREMATCH_INLINE A operator()(A z) const { return (z - largest) - log_sum; }
  SCOREMATCH_INLINE A from_exponential(A e) const { return rounded_product(e, inverse_sum); }
  SCOREMATCH_INLINE A probability(A z) const { return from_exponential(exponential(z - largest)); }
};

// Keeps nothing: for where no exponentials are to be kept.
struct NoRow {
  template <typename A>
  SCOREMATCH_INLINE void put(int64_t, A) const {}
};

// `kept` receives exp(z_j - largest) of each element where `keep` is set.
template <typename A, typename Lanes, typename Row, typename Kept = NoRow>
SCOREMATCH_INLINE LogSoftmax<A> log_softmax_of(Lanes lanes, Row z, int64_t classes, bool keep = false, Kept kept = {}) {
  A largest(-INFINITY);
  for (int64_t j = lanes.lane(); j < classes; j += lanes.width()) {
    const A v = z(j);
    largest = select(v > largest, v, largest);
  }
  largest = lanes.max(largest);
  A sum(0);
  for (int64_t j = lanes.lane(); j < classes; j += lanes.width()) {
    const A e = exponential(z(j) - largest);
    sum += e;
    if (keep) kept.put(j, e);
  }
  sum = lanes.sum(sum);
  return {largest, logarithm(sum), A(1) / sum};
}

// The three forms of P. Each gives log p_j and p_j; `through_softmax`: its gradient is to logits, else to p itself;
// `checked`: whether the values are a distribution must be found out; known(): its label is a class. normalize() is
// called first.
template <typename A, typename ClassNumber>
struct ClassTarget {
  static constexpr bool through_softmax = false, checked = false;
  A label;
  ClassNumber number;  // number(j): the class numbers of element j, as A
  scalar_of<A> classes;
  template <typename Lanes, typename Kept>
  SCOREMATCH_INLINE void normalize(Lanes, int64_t, bool, Kept) {}
  SCOREMATCH_INLINE mask_of<A> known() const { return (label >= A(0)) & (label < A(classes)); }
  SCOREMATCH_INLINE A from_exponential(A e) const { return e; }
  SCOREMATCH_INLINE A probability(int64_t j) const { return select(number(j) == label, A(1), A(0)); }
  SCOREMATCH_INLINE A log_probability(int64_t j) const { return select(number(j) == label, A(0), A(-INFINITY)); }
};

template <typename A, typename Row>
struct ProbabilityTarget {
  static constexpr bool through_softmax = false, checked = true;
  Row p;
  template <typename Lanes, typename Kept>
  SCOREMATCH_INLINE void normalize(Lanes, int64_t, bool, Kept) {}
  SCOREMATCH_INLINE mask_of<A> known() const { return A(0) == A(0); }
  SCOREMATCH_INLINE A from_exponential(A e) const { return e; }
  SCOREMATCH_INLINE A probability(int64_t j) const { return p(j); }
  SCOREMATCH_INLINE A log_probability(int64_t j) const { return logarithm(p(j)); }
};

template <typename A, typename Row>
struct LogitTarget {
  static constexpr bool through_softmax = true, checked = false;
  Row z;
  LogSoftmax<A> log_softmax{};
  template <typename Lanes, typename Kept>
  SCOREMATCH_INLINE void normalize(Lanes lanes, int64_t classes, bool keep, Kept kept) {
    log_softmax = log_softmax_of<A>(lanes, z, classes, keep, kept);
  }
  SCOREMATCH_INLINE mask_of<A> known() const { return A(0) == A(0); }
  SCOREMATCH_INLINE A from_exponential(A e) const { return log_softmax.from_exponential(e); }
  SCOREMATCH_INLINE A probability(int64_t j) const { return log_softmax.probability(z(j)); }
  SCOREMATCH_INLINE A log_probability(int64_t j) const { return log_softmax(z(j)); }
};

// One class's share: of the divergence before its outer function (a square root for l2), of ∂/∂ log q, and of
// ∂/∂ log p (LogitTarget) or ∂/∂p (other targets).
template <typename A>
struct Terms {
  A value, by_log_q, by_target;
};

// KL: p (log p - log q)
template <bool through_softmax, typename A>
SCOREMATCH_INLINE Terms<A> kl_terms(A log_p, A p, A log_q, A q) {
  const auto none = p == A(0);
  const A ratio = log_p - log_q;
  const A weighted = select(none, A(0), p * ratio);
  if constexpr (!through_softmax) return {weighted, -p, select(none, A(0), ratio + A(1))};
  // Both sum to 1, so Σ p r = Σ p r - p + q, and p r - p + q = p (r + e^-r - 1) >= 0: no cancellation between
  // classes, and so no lost sign, where P and Q nearly coincide.
  static constexpr double series[] = {1. / 2,     -1. / 6,    1. / 24,     -1. / 120,   1. / 720,
                                      -1. / 5040, 1. / 40320, -1. / 362880, 1. / 3628800};
  const scalar_of<A> near = sizeof(scalar_of<A>) == 4 ? 0.5 : 0.0625;
  const A close = p * (ratio * ratio * polynomial(ratio, series));
  return {select(magnitude(ratio) < A(near), close, weighted + (q - p)), -p, weighted};
}

// SE and l2: (q - p)²
template <bool through_softmax, typename A>
SCOREMATCH_INLINE Terms<A> squared_terms(A p, A q) {
  const A difference = q - p, twice = difference + difference;
  return {difference * difference, twice * q, through_softmax ? -twice * p : select(p == A(0), A(0), -twice)};
}

// l1: |q - p|
template <bool through_softmax, typename A>
SCOREMATCH_INLINE Terms<A> absolute_terms(A p, A q) {
  const A difference = q - p, direction = sign(difference);
  return {magnitude(difference), direction * q, through_softmax ? -direction * p : select(p == A(0), A(0), -direction)};
}

// JS: ½ [p log(p/m) + q log(q/m)], m = (p + q)/2. With d = |log p - log q| and t = tanh(d/2) = |p - q|/(p + q), the
// larger of p/m, q/m is 1 + t and the smaller 1 - t, with logarithms log(1 + t) and log(1 + t) - d.
template <bool through_softmax, typename A>
SCOREMATCH_INLINE Terms<A> js_terms(A log_p, A p, A log_q, A q) {
  using T = scalar_of<A>;
  const A half(T(0.5));
  const A d = select(log_p == log_q, A(0), magnitude(log_p - log_q));  // equal: also both -inf
  const A e = exponential_minus_1(-d);
  const A t = -e / (A(2) + e);
  const A larger = logarithm_of_1_plus(t), smaller = larger - d;
  const auto p_is_larger = log_p > log_q;
  const A log_p_m = select(p_is_larger, larger, smaller), log_q_m = select(p_is_larger, smaller, larger);
  const A p_part = select(p == A(0), A(0), p * log_p_m), q_part = select(q == A(0), A(0), q * log_q_m);
  // Near t = 0 the two parts cancel to first order: m [(1+t) log(1+t) + (1-t) log(1-t)] = m Σ_k t^2k / (k (2k - 1)).
  static constexpr double series[] = {1., 1. / 6, 1. / 15, 1. / 28, 1. / 45, 1. / 66, 1. / 91, 1. / 120};
  const T near = sizeof(T) == 4 ? 0.25 : 0.1;
  const A squared = t * t;
  const A close = half * (p + q) * squared * polynomial(squared, series);
  return {half * select(t < A(near), close, p_part + q_part), half * q_part,
          half * (through_softmax ? p_part : select(p == A(0), A(0), log_p_m))};
}

// D = outer(S) for S = Σ values, and dD/dS; where D = 0 for l2 and js_distance the derivative is 0.
template <typename A>
struct Outer {
  A value, slope;
};

template <typename A>
SCOREMATCH_INLINE Outer<A> outer_function(Kind kind, A sum) {
  if (kind == Kind::l2 || kind == Kind::js_distance) {
    const A root = square_root(sum);
    return {root, select(root == A(0), A(0), A(scalar_of<A>(0.5)) / root)};
  }
  if (kind == Kind::l1_squared) return {sum * sum, sum + sum};
  return {sum, A(1)};
}

// relu(D - clip), with NaN kept. Without clipping relu changes nothing, and must not stop the gradient of a KL divergence
// that rounding left below 0; with clipping the subgradient at and below the threshold is 0.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE Outer<A> clipped(Outer<A> d, T clip) {
  const A loss = select(d.value <= A(clip), A(0), d.value - A(clip));
  const auto stopped = d.value <= A(clip > T(0) ? clip : T(-INFINITY));
  return {loss, select(d.value == d.value, select(stopped, A(0), d.slope), d.value)};
}

template <bool through_softmax, typename A, typename Target>
SCOREMATCH_INLINE Terms<A> terms_of(Kind kind, const Target& target, int64_t j, A p, A log_q, A q) {
  switch (kind) {
    case Kind::kl:
      return kl_terms<through_softmax>(target.log_probability(j), p, log_q, q);
    case Kind::js:
    case Kind::js_distance:
      return js_terms<through_softmax>(target.log_probability(j), p, log_q, q);
    case Kind::l1:
    case Kind::l1_squared:
    case Kind::linf:
      return absolute_terms<through_softmax>(p, q);
    default:
      return squared_terms<through_softmax>(p, q);
  }
}

template <typename A>
struct DivergenceOfRow {
  A loss;
  mask_of<A> valid;  // false: the target is not a distribution or not a class, and the row is NaN
};

// relu(D - clip) of one row, and its gradients to the logits and to the target where wanted.
//
// A lane also uses the gradient row as memory, in the precision of A, for what it will need again of its own elements.
// For js these are the terms, which cost the most to compute. Otherwise they are the exponentials, if the lanes say that
// memory is cheaper than arithmetic.
template <typename A, typename Lanes, typename Logits, typename Target, typename LogitGradient, typename TargetGradient,
          typename ClassNumber, typename T = scalar_of<A>>
SCOREMATCH_INLINE DivergenceOfRow<A> divergence_row(Lanes lanes, Kind kind, Logits z, Target target, ClassNumber number,
                                                    int64_t classes, T clip, T tolerance, bool want_logit_gradient,
                                                    LogitGradient logit_gradient, bool want_target_gradient,
                                                    TargetGradient target_gradient) {
  constexpr bool through_softmax = Target::through_softmax;
  const bool keep_terms = kind == Kind::js || kind == Kind::js_distance;
  const bool keep_q = Lanes::keeps_exponentials && want_logit_gradient;
  const bool keep_p = Lanes::keeps_exponentials && through_softmax && want_target_gradient;
  const LogSoftmax<A> log_softmax = log_softmax_of<A>(lanes, z, classes, keep_q, logit_gradient);
  target.normalize(lanes, classes, keep_p, target_gradient);

  A sum(0), sum_by_log_q(0), sum_by_log_p(0), mass(0), lowest(0);
  A farthest(-1), farthest_class(0), farthest_by_log_q(0), farthest_by_target(0);  // of this lane, for linf
  for (int64_t j = lanes.lane(); j < classes; j += lanes.width()) {
    const A log_q = log_softmax(z(j));
    const A q = keep_q ? log_softmax.from_exponential(logit_gradient.get(j)) : log_softmax.probability(z(j));
    const A p = keep_p ? target.from_exponential(target_gradient.get(j)) : target.probability(j);
    const Terms<A> terms = terms_of<through_softmax>(kind, target, j, p, log_q, q);
    sum += terms.value;
    sum_by_log_q += terms.by_log_q;
    sum_by_log_p += terms.by_target;
    if (want_logit_gradient && keep_terms) logit_gradient.put(j, terms.by_log_q);
    if (want_target_gradient && (keep_terms || !through_softmax)) target_gradient.put(j, terms.by_target);
    if (kind == Kind::linf) {
      const auto farther = terms.value > farthest;
      farthest = select(farther, terms.value, farthest);
      farthest_class = select(farther, number(j), farthest_class);
      farthest_by_log_q = select(farther, terms.by_log_q, farthest_by_log_q);
      farthest_by_target = select(farther, terms.by_target, farthest_by_target);
    }
    if constexpr (Target::checked) {
      mass += p;
      lowest = select(p < lowest, p, lowest);
    }
  }
  sum = lanes.sum(sum);

  if (kind == Kind::linf) {
    const A distance = lanes.max(farthest);
    sum = select(sum == sum, distance, sum);
    // Of equally far classes the first carries the gradient.
    const A nearest_number = -lanes.max(select(farthest == distance, -farthest_class, A(-INFINITY)));
    const mask_of<A> chosen = (farthest == distance) & (farthest_class == nearest_number);
    sum_by_log_q = select(chosen, farthest_by_log_q, A(0));
    sum_by_log_p = select(chosen, farthest_by_target, A(0));
    farthest_class = nearest_number;
  }
  sum_by_log_q = lanes.sum(sum_by_log_q);
  sum_by_log_p = lanes.sum(sum_by_log_p);
  if (kind == Kind::kl && !Target::checked) sum_by_log_q = A(-1);  // -Σ p without its rounding: the gradient is q - p

  mask_of<A> valid = target.known();
  if constexpr (Target::checked) {
    mass = lanes.sum(mass);
    lowest = -lanes.max(-lowest);
    // A NaN passes and makes the loss NaN: it is a sign of a model that diverged, not of a wrong argument.
    valid = !((lowest < A(0)) | (magnitude(mass - A(1)) > A(tolerance)));
  }
  const Outer<A> divergence = clipped(outer_function(kind, select(valid, sum, A(NAN))), clip);

  if (want_logit_gradient || want_target_gradient)
    for (int64_t j = lanes.lane(); j < classes; j += lanes.width()) {
      const A log_q = log_softmax(z(j));
      const A q = keep_q && !keep_terms ? log_softmax.from_exponential(logit_gradient.get(j)) : log_softmax.probability(z(j));
      const A p = keep_p && !keep_terms ? target.from_exponential(target_gradient.get(j)) : target.probability(j);
      Terms<A> terms;
      if (keep_terms)
        terms = {A(0), want_logit_gradient ? logit_gradient.get(j) : A(0), want_target_gradient ? target_gradient.get(j) : A(0)};
      else
        terms = terms_of<through_softmax>(kind, target, j, p, log_q, q);
      if (!through_softmax && want_target_gradient) terms.by_target = target_gradient.get(j);
      if (kind == Kind::linf) {
        const auto chosen = number(j) == farthest_class;
        terms.by_log_q = select(chosen, terms.by_log_q, A(0));
        terms.by_target = select(chosen, terms.by_target, A(0));
      }
      if (want_logit_gradient) logit_gradient.put(j, divergence.slope * (terms.by_log_q - q * sum_by_log_q));
      if (want_target_gradient) target_gradient.put(j, divergence.slope * (through_softmax ? terms.by_target - p * sum_by_log_p : terms.by_target));
    }
  return {divergence.value, valid};
}

// divergence_row for kl and a class index, which is the cross-entropy log Σ exp(z) - z_label, in half the passes.
// `label_logit` is z_label, or anything if the label is not a class.
template <typename A, typename Lanes, typename Logits, typename ClassNumber, typename Gradient, typename T = scalar_of<A>>
SCOREMATCH_INLINE DivergenceOfRow<A> cross_entropy_row(Lanes lanes, Logits z, ClassTarget<A, ClassNumber> target, A label_logit,
                                                       int64_t classes, T clip, bool want_gradient, Gradient gradient) {
  const bool keep = Lanes::keeps_exponentials && want_gradient;
  const LogSoftmax<A> log_softmax = log_softmax_of<A>(lanes, z, classes, keep, gradient);
  const mask_of<A> valid = target.known();
  const A loss = log_softmax.log_sum - (label_logit - log_softmax.largest);
  const Outer<A> divergence = clipped(Outer<A>{select(valid, loss, A(NAN)), A(1)}, clip);
  if (want_gradient)
    for (int64_t j = lanes.lane(); j < classes; j += lanes.width()) {
      const A q = keep ? log_softmax.from_exponential(gradient.get(j)) : log_softmax.probability(z(j));
      gradient.put(j, divergence.slope * (q - target.probability(j)));
    }
  return {divergence.value, valid};
}

}  // namespace scorematch
