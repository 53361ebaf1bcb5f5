// One iteration of FAB (Croce and Hein, ICML 2020): the nearest points of a hyperplane inside a box. Torch-free; shared by
// CPU and CUDA.
#pragma once
#include "threat_model.h"

namespace scorematch {

// A move of p to the hyperplane {v : <w, v> = b}: against w if towards is -1, along w if 1. After a time t, element j
// has moved by min(t rate, room), rate = 1 (linf) or |w_j| (l2), room = its distance from the box. t is infinite where
// the box ends before the hyperplane.
template <typename T>
struct Move {
  T towards, time;
};

// The same in l1, where the elements with the largest |w| move first. Those with |w| >= all move as far as the box lets
// them; those with some <= |w| < all move by a share of that. This is the shortest way if the latter all have the same
// |w|, or if there is only one of them.
template <typename T>
struct SparseMove {
  T towards, all, some, share;
};

template <Norm norm, typename A>
SCOREMATCH_INLINE A rate_of(A weight) {
  if constexpr (norm == Norm::linf) return A(1);
  return weight;
}

template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A room_of(A p, A direction, Box<T> box) {
  const A room = select(direction > A(0), A(box.upper) - p, p - A(box.lower));
  return select(room > A(0), room, A(0));
}

template <Norm norm, typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A displacement(A p, A w, Move<T> move, Box<T> box) {
  const A direction = A(move.towards) * sign(w), room = room_of(p, direction, box);
  const A reach = A(move.time) * rate_of<norm>(magnitude(w));  // NaN for an infinite time and w = 0: room
  return direction * select(reach < room, reach, room);
}

template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A sparse_displacement(A p, A w, SparseMove<T> move, Box<T> box) {
  const A direction = A(move.towards) * sign(w), room = room_of(p, direction, box), weight = magnitude(w);
  return direction * select(weight >= A(move.all), room, select(weight >= A(move.some), A(move.share) * room, A(0)));
}

template <Norm norm, typename A, typename AnyMove, typename T = scalar_of<A>>
SCOREMATCH_INLINE A moved_by(A p, A w, AnyMove move, Box<T> box) {
  if constexpr (norm == Norm::l1)
    return sparse_displacement(p, w, move, box);
  else
    return displacement<norm>(p, w, move, box);
}

// The time at which the elements have lowered |<w, p> - b| by `distance`. The decrease is a sum of |w| min(t rate, room),
// which is concave and piecewise linear in t. Newton's method, from the left, rises to the solution in as many steps as
// there are pieces on its way (in practice three to eight). If it meets the limit, the move is a little too short.
template <Norm norm, typename A, typename Lanes, typename P, typename W, typename T = scalar_of<A>>
SCOREMATCH_INLINE T time_to_hyperplane(Lanes lanes, P p, W w, int64_t count, T towards, T distance, T initial_slope, Box<T> box) {
  if (!(initial_slope > T(0))) return T(0);
  T time = distance / initial_slope;
  for (int step = 0; step < 100; ++step) {
    A settled(0), slope(0);
    for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
      const A normal = w(j), weight = magnitude(normal), rate = rate_of<norm>(weight);
      const A room = room_of(p(j), A(towards) * normal, box);
      const auto at_box = A(time) * rate >= room;
      settled += select(at_box, weight * room, A(0));
      slope += select(at_box, A(0), weight * rate);
    }
    const T gained = uniform(lanes.sum(settled)), remaining_slope = uniform(lanes.sum(slope));
    if (!(remaining_slope > T(0))) return T(INFINITY);
    const T next = (distance - gained) / remaining_slope;
    if (!(next > time)) return time;
    time = next;
  }
  return time;
}

// Which elements must move to lower |<w, p> - b| by `distance`, if those with the largest |w| move first. It bisects |w|
// until at most one element is left between the bounds, or all that are left have the same |w|.
template <typename A, typename Lanes, typename P, typename W, typename T = scalar_of<A>>
SCOREMATCH_INLINE SparseMove<T> sparse_move_to_hyperplane(Lanes lanes, P p, W w, int64_t count, T towards, T distance, Box<T> box) {
  T gain, number;  // of the elements of at least some |w|
  const auto evaluate = [&](T bound) {
    A gains(0), numbers(0);
    for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
      const A normal = w(j), weight = magnitude(normal), room = room_of(p(j), A(towards) * normal, box);
      gains += select(weight >= A(bound), weight * room, A(0));
      numbers += select(weight >= A(bound), A(1), A(0));
    }
    gain = uniform(lanes.sum(gains));
    number = uniform(lanes.sum(numbers));
  };
  evaluate(T(0));
  if (!(gain > distance)) return {towards, T(0), T(0), T(0)};
  T low(0), gain_low = gain, number_low = number, gain_high(0), number_high(0);
  A largest(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A weight = magnitude(w(j));
    largest = select(weight > largest, weight, largest);
  }
  T high = uniform(lanes.max(largest)) * T(2);  // above all
  while (number_low - number_high > T(1)) {
    const T middle = low + (high - low) / 2;
    if (!(middle > low && middle < high)) break;
    evaluate(middle);
    if (gain > distance) {
      low = middle, gain_low = gain, number_low = number;
    } else {
      high = middle, gain_high = gain, number_high = number;
    }
  }
  return {towards, high, low, (distance - gain_high) / (gain_low - gain_high)};
}

template <Norm norm, typename A, typename Lanes, typename P, typename W, typename T = scalar_of<A>>
SCOREMATCH_INLINE auto move_to_hyperplane(Lanes lanes, P p, W w, int64_t count, T difference, T slope, Box<T> box) {
  const T towards = -sign(difference), distance = magnitude(difference);
  if constexpr (norm == Norm::l1)
    return sparse_move_to_hyperplane<A>(lanes, p, w, count, towards, distance, box);
  else
    return Move<T>{towards, time_to_hyperplane<norm, A>(lanes, p, w, count, towards, distance, slope, box)};
}

// The smallest length that FAB's weights see.
constexpr double kShortestMove = 1e-8;

// difference is d, its gradient at x is `normal`. NaN or infinity anywhere gives a row of NaN.
template <Norm norm, typename A, typename Lanes, typename X, typename X0, typename Normal, typename Out, typename T = scalar_of<A>>
SCOREMATCH_INLINE void fab_step_row(Lanes lanes, X x, X0 x0, Normal normal, Out out, int64_t count, T difference,
                                    FabOptions<T> options) {
  const Box<T> box = options.box;
  // (d, w) is scaled so that neither w² nor sums over- or underflow; the moves are the same.
  const A scale = square_range_scale<A>(lanes, normal, count);
  const auto w = [=](int64_t j) { return normal(j) * scale; };
  constexpr T largest = std::numeric_limits<T>::max();
  const T scaled = difference * uniform(scale);
  const T here = magnitude(difference) > largest ? scaled : clamp(scaled, -largest, largest);  // <w, x> - b
  A slopes(0), apart(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A weight = magnitude(w(j));
    slopes += weight * rate_of<norm>(weight);
    apart += w(j) * (x0(j) - x(j));
  }
  const T slope = uniform(lanes.sum(slopes));
  const T there = here + uniform(lanes.sum(apart));  // <w, x0> - b
  const T check = slope + there, poison = check - check;  // 0, or NaN

  const auto move = move_to_hyperplane<norm, A>(lanes, x, w, count, here, slope, box);
  const auto move0 = move_to_hyperplane<norm, A>(lanes, x0, w, count, there, slope, box);

  A length(0), length0(0);  // l2: squared
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A by = moved_by<norm>(x(j), w(j), move, box), by0 = moved_by<norm>(x0(j), w(j), move0, box);
    if constexpr (norm == Norm::l1) {
      length += magnitude(by);
      length0 += magnitude(by0);
    } else if constexpr (norm == Norm::linf) {
      length = select(magnitude(by) > length, magnitude(by), length);
      length0 = select(magnitude(by0) > length0, magnitude(by0), length0);
    } else {
      length += by * by;
      length0 += by0 * by0;
    }
  }
  const T shortest = T(kShortestMove);
  T a, a0;
  if constexpr (norm == Norm::linf) {
    a = uniform(lanes.max(length));
    a0 = uniform(lanes.max(length0));
  } else if constexpr (norm == Norm::l1) {
    a = uniform(lanes.sum(length));
    a0 = uniform(lanes.sum(length0));
  } else {
    a = square_root(uniform(lanes.sum(length)));
    a0 = square_root(uniform(lanes.sum(length0)));
  }
  a = a > shortest ? a : shortest;
  a0 = a0 > shortest ? a0 : shortest;
  const T ratio = a / (a + a0), alpha = ratio < options.alpha_max ? ratio : options.alpha_max;

  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A p = x(j) + A(options.overshoot) * moved_by<norm>(x(j), w(j), move, box);
    const A p0 = x0(j) + A(options.overshoot) * moved_by<norm>(x0(j), w(j), move0, box);
    out(j, clamp(p * A(T(1) - alpha) + p0 * A(alpha), A(box.lower), A(box.upper)) + A(poison));
  }
}

}  // namespace scorematch
