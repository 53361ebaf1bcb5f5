// Sparse steps and projections inside {x : ‖x − x0‖₁ <= eps, lower <= x <= upper} (Croce and Hein, ICML 2021). Torch-free;
// shared by CPU and CUDA.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "threat_model.h"

namespace scorematch {

// How far element x0 may move in the direction of `change`, and where it then is.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A l1_bound(A change, Box<T> box) {
  return select(change > A(0), A(box.upper), A(box.lower));
}
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A l1_room(A change, A x0, Box<T> box) {
  const A room = select(change > A(0), A(box.upper) - x0, x0 - A(box.lower));
  return select(room > A(0), room, A(0));
}

// Whether |v| >= bound, which is above 0. Where denormal numbers count as 0, the bound may be such a number.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE auto reaches(A v, T bound) {
  const A m = magnitude(v);
  return select(m > A(0), m, A(-1)) >= A(bound);
}

// The number in the middle of all floating-point numbers between two positive ones.
template <typename T>
SCOREMATCH_INLINE T halfway_in_bits(T low, T high) {
  using Bits = std::conditional_t<sizeof(T) == sizeof(uint32_t), uint32_t, uint64_t>;
  Bits a, b;
  std::memcpy(&a, &low, sizeof a);
  std::memcpy(&b, &high, sizeof b);
  a += (b - a) / 2;
  std::memcpy(&low, &a, sizeof low);
  return low;
}

// A positive number b such that |v_j| >= b holds for the `wanted` largest elements of a row, and for those that are equal
// to the smallest of them; for all that are not 0 if these are fewer. It bisects until that many elements are found, or
// until no floating-point number is left between the bounds.
template <typename A, typename Lanes, typename V, typename T = scalar_of<A>>
SCOREMATCH_INLINE T magnitude_of_largest(Lanes lanes, V v, int64_t count, T wanted) {
  constexpr T smallest = std::numeric_limits<T>::denorm_min(), finite = std::numeric_limits<T>::max();
  A largest_seen(0), seen(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A m = magnitude(v(j));
    largest_seen = select(m > largest_seen, m, largest_seen);
    seen += select(m > A(0), A(1), A(0));
  }
  const T largest = uniform(lanes.max(largest_seen)), positive = uniform(lanes.sum(seen));
  if (!(positive > wanted)) return smallest;
  const auto at_least = [&](T bound) {
    A number(0);
    for (int64_t j = lanes.lane(); j < count; j += lanes.width())
      number += select(reaches(v(j), bound), A(1), A(0));
    return uniform(lanes.sum(number));
  };
  T few = largest < finite ? largest : finite;  // infinite ones are among the largest
  if (at_least(few) >= wanted) return few;
  T enough = smallest;
  for (int step = 0;; ++step) {
    // Halves of the values soon reach usual gradients. Very small ones, a power of two a step, are better halved in bits.
    const T middle = step < 20 ? enough + (few - enough) / 2 : halfway_in_bits(enough, few);
    if (!(middle > enough && middle < few)) return enough;
    const T number = at_least(middle);
    if (number == wanted) return middle;
    (number > wanted ? enough : few) = middle;
  }
}

// The smallest t >= 0 with Σ min(max(length - t, 0), room) <= eps. The sum falls in t, and is linear between the points
// where an element leaves the box or reaches 0. Newton's method finds it; since the sum is not convex, in a bracket.
template <typename A, typename Lanes, typename Change, typename X0, typename T = scalar_of<A>>
SCOREMATCH_INLINE T l1_shortening(Lanes lanes, Change change, X0 x0, int64_t count, T eps, Box<T> box) {
  constexpr T rounding = 2 * std::numeric_limits<T>::epsilon();
  T sum, slope;
  const auto evaluate = [&](T t) {
    A sums(0), slopes(0);
    for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
      const A moved = change(j), left = magnitude(moved) - A(t), room = l1_room(moved, x0(j), box);
      const auto at_box = left >= room;
      sums += select(left > A(0), select(at_box, room, left), A(0));
      slopes += select(left > A(0), select(at_box, A(0), A(1)), A(0));
    }
    sum = uniform(lanes.sum(sums));
    slope = uniform(lanes.sum(slopes));
  };
  evaluate(T(0));
  if (!(sum > eps)) return T(0);
  A longest_seen(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A m = magnitude(change(j));
    longest_seen = select(m > longest_seen, m, longest_seen);
  }
  T t(0), low(0), high = uniform(lanes.max(longest_seen));
  for (int step = 0; step < 200; ++step) {
    T next = slope > T(0) ? t + (sum - eps) / slope : T(-1);
    if (magnitude(next - t) <= rounding * t) return next;
    if (!(next > low && next < high)) next = low + (high - low) / 2;
    if (!(next > low && next < high)) return high;
    t = next;
    evaluate(t);
    (sum > eps ? low : high) = t;
  }
  return high;
}

// x, moved by step_size / K along the signs of the K largest elements of grad, then the nearest point of the ball and the
// box. `moving` is K (elements equal to the smallest of them move too); 0 is the projection alone. NaN or infinity in x or
// x0 gives a row of NaN; a NaN in grad does not move.
template <typename A, typename Lanes, typename X, typename Grad, typename X0, typename Out, typename T = scalar_of<A>>
SCOREMATCH_INLINE void l1_step_row(Lanes lanes, X x, Grad grad, X0 x0, Out out, int64_t count, T step_size, T moving, T eps,
                                   Box<T> box) {
  T smallest(0), unit(0);
  if (moving > T(0)) {
    smallest = magnitude_of_largest<A>(lanes, grad, count, moving);
    A number(0);
    for (int64_t j = lanes.lane(); j < count; j += lanes.width())
      number += select(reaches(grad(j), smallest), A(1), A(0));
    const T moves = uniform(lanes.sum(number));
    if (moves > T(0)) unit = step_size / moves;
  }
  const auto stepped = [=](int64_t j) {
    const A g = grad(j);
    return x(j) + select(reaches(g, smallest), A(unit) * sign(g), A(0));
  };
  const auto change = [=](int64_t j) { return stepped(j) - x0(j); };
  A changes(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) changes += change(j);
  const T check = uniform(lanes.sum(changes)), poison = check - check;  // 0, or NaN
  const T shorter = l1_shortening<A>(lanes, change, x0, count, eps, box);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A moved = change(j), kept = magnitude(moved) - A(shorter);
    // Far from x0, rounding alone can take the difference out of the box.
    const A shortened = clamp(stepped(j) - sign(moved) * A(shorter), A(box.lower), A(box.upper));
    const A inside = select(kept >= l1_room(moved, x0(j), box), l1_bound(moved, box), shortened);
    out(j, select(kept > A(0), inside, x0(j)) + A(poison));
  }
}

}  // namespace scorematch
