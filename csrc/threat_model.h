// Steps, projections and random starts inside a threat model {x : ‖x − x0‖ <= eps, lower <= x <= upper}.
// Torch-free; shared by CPU and CUDA.
#pragma once
#include <limits>

#include "arithmetic.h"
#include "options.h"

namespace scorematch {

// clip(clip(v, x0 - eps, x0 + eps), lower, upper); NaN in any input gives NaN.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A linf_projection(A v, A x0, T eps, Box<T> box) {
  const A near = clamp(v, x0 - A(eps), x0 + A(eps));
  const A inside = clamp(near, A(box.lower), A(box.upper));
  return select(x0 == x0, inside, x0);
}

// x + step_size sign(grad), projected; NaN in any input gives NaN.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A linf_step(A x, A grad, A x0, T step_size, T eps, Box<T> box) {
  return linf_projection(x + A(step_size) * sign(grad), x0, eps, box);
}

// clip(x + eps noise, lower, upper) for noise in [-1, 1]; noise beyond is clipped to it, so that the ball holds. The product
// is rounded, so that an element does not depend on whether it is computed alone or in a pack.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A linf_random_start(A x, A noise, T eps, Box<T> box) {
  return clamp(x + rounded_product(A(eps), clamp(noise, A(-1), A(1))), A(box.lower), A(box.upper));
}

// Powers of two between which squares neither overflow nor vanish, for rows of up to 2^32 elements.
template <typename T>
struct SquareRange;
template <>
struct SquareRange<float> {
  static constexpr float largest = 0x1p48f, smallest = 0x1p-48f, shrink = 0x1p-80f, grow = 0x1p100f;
};
template <>
struct SquareRange<double> {
  static constexpr double largest = 0x1p480, smallest = 0x1p-480, shrink = 0x1p-600, grow = 0x1p600;
};

// (scale, factor) such that (v * scale) * factor = length v / ‖v‖₂, without overflow or underflow on the way (squares
// of 1e-30 vanish in float32). factor is 0 for a zero row.
template <typename A>
struct Rescaling {
  A scale, factor;
};

// A power of two that brings the largest element of a row into SquareRange; 1 where it is there already.
template <typename A, typename Lanes, typename Row>
SCOREMATCH_INLINE A square_range_scale(Lanes lanes, Row v, int64_t count) {
  using Range = SquareRange<scalar_of<A>>;
  A largest(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A m = magnitude(v(j));
    largest = select(m > largest, m, largest);
  }
  largest = lanes.max(largest);
  return select(largest > A(Range::largest), A(Range::shrink), select(largest < A(Range::smallest), A(Range::grow), A(1)));
}

template <typename A, typename Lanes, typename Row>
SCOREMATCH_INLINE Rescaling<A> rescaling_to_length(Lanes lanes, Row v, int64_t count, A length) {
  const A scale = square_range_scale<A>(lanes, v, count);
  A squares(0);
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A scaled = v(j) * scale;
    squares += scaled * scaled;
  }
  squares = lanes.sum(squares);
  return {scale, select(squares == A(0), A(0), length / square_root(squares))};
}

// argmin {‖u - v‖₂ : ‖u - x0‖₂ <= eps} for an element v of a row, then its clip to the box; relative_length is
// ‖row - x0‖₂ / eps. NaN there gives a row of NaN.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A l2_projection(A v, A x0, A relative_length, Box<T> box) {
  const A shrink = A(1) / relative_length;
  const A projected = select(relative_length > A(1), x0 + (v - x0) * shrink, v);
  return select(relative_length == relative_length, clamp(projected, A(box.lower), A(box.upper)), relative_length);
}

// x + step_size grad / ‖grad‖₂, then its projection to the ball, then the clip to the box. A zero gradient adds nothing.
// NaN anywhere gives a row of NaN.
template <typename A, typename Lanes, typename X, typename Grad, typename X0, typename Out, typename T = scalar_of<A>>
SCOREMATCH_INLINE void l2_step_row(Lanes lanes, X x, Grad grad, X0 x0, Out out, int64_t count, T step_size, T eps,
                                   Box<T> box) {
  const Rescaling<A> step = rescaling_to_length<A>(lanes, grad, count, A(step_size));
  const A inverse_eps(T(1) / eps);
  A squares(0);  // of ‖x + step - x0‖ / eps
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A offset = (x(j) + (grad(j) * step.scale) * step.factor - x0(j)) * inverse_eps;
    squares += offset * offset;
  }
  const A relative_length = square_root(lanes.sum(squares));
  if (uniform(relative_length) > std::numeric_limits<T>::max()) {  // the squares overflow: a point that is very far away
    const auto offset = [=](int64_t j) { return x(j) + (grad(j) * step.scale) * step.factor - x0(j); };
    const Rescaling<A> back = rescaling_to_length<A>(lanes, offset, count, A(eps));
    for (int64_t j = lanes.lane(); j < count; j += lanes.width())
      out(j, clamp(x0(j) + (offset(j) * back.scale) * back.factor, A(box.lower), A(box.upper)));
    return;
  }
  for (int64_t j = lanes.lane(); j < count; j += lanes.width())
    out(j, l2_projection(x(j) + (grad(j) * step.scale) * step.factor, x0(j), relative_length, box));
}

// clip(x + eps radius noise / ‖noise‖₂, lower, upper): Gaussian noise and radius = u^(1/count) are uniform in the ball.
template <typename A, typename Lanes, typename X, typename Noise, typename Out, typename T = scalar_of<A>>
SCOREMATCH_INLINE void l2_random_start_row(Lanes lanes, X x, Noise noise, Out out, int64_t count, T length, Box<T> box) {
  const Rescaling<A> start = rescaling_to_length<A>(lanes, noise, count, A(length));
  for (int64_t j = lanes.lane(); j < count; j += lanes.width())
    out(j, clamp(x(j) + (noise(j) * start.scale) * start.factor, A(box.lower), A(box.upper)));
}

}  // namespace scorematch
