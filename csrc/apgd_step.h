// One iteration of Auto-PGD (Croce and Hein, ICML 2020, Algorithm 1). Torch-free; shared by CPU and CUDA.
#pragma once
#include "threat_model.h"

namespace scorematch {

// The next point of one element, in the rounding of start + (z - start) * momentum + (start - x_prev) * inertia.
template <typename A, typename T = scalar_of<A>>
SCOREMATCH_INLINE A apgd_linf(A start, A grad, A x_prev, A x0, T step_size, ApgdOptions<T> options) {
  const A z = linf_step(start, grad, x0, step_size, options.eps, options.box);
  const A moved = (start + rounded_product(z - start, A(options.momentum))) +
                  rounded_product(start - x_prev, A(options.inertia));
  return linf_projection(moved, x0, options.eps, options.box);
}

// Writes the next point to x and the start to x_prev. `previous` is x_prev as it was before, and `start` may be x itself.
// NaN anywhere gives a row of NaN.
template <typename A, typename Lanes, typename Point, typename Row, typename T = scalar_of<A>>
SCOREMATCH_INLINE void apgd_l2_row(Lanes lanes, Point start, Point grad, Point x0, Point previous, Row x, Row x_prev,
                                   int64_t count, T step_size, ApgdOptions<T> options) {
  const Rescaling<A> step = rescaling_to_length<A>(lanes, grad, count, A(step_size));
  const A inverse_eps(T(1) / options.eps);
  const auto stepped = [=](int64_t j) { return start(j) + (grad(j) * step.scale) * step.factor; };
  A squares(0);  // of ‖start + step - x0‖ / eps
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A offset = (stepped(j) - x0(j)) * inverse_eps;
    squares += offset * offset;
  }
  const A length = square_root(lanes.sum(squares));
  squares = A(0);  // of ‖moved - x0‖ / eps
  for (int64_t j = lanes.lane(); j < count; j += lanes.width()) {
    const A from = start(j), z = l2_projection(stepped(j), x0(j), length, options.box);
    const A moved = from + (z - from) * A(options.momentum) + (from - previous(j)) * A(options.inertia);
    const A offset = (moved - x0(j)) * inverse_eps;
    squares += offset * offset;
    x_prev.put(j, from);
    x.put(j, moved);
  }
  const A moved_length = square_root(lanes.sum(squares));
  for (int64_t j = lanes.lane(); j < count; j += lanes.width())
    x.put(j, l2_projection(x.get(j), x0(j), moved_length, options.box));
}

}  // namespace scorematch
