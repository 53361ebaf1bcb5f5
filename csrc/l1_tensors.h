// Checks of the arguments of l1_step, the same on both devices.
#pragma once
#include "tensor.h"

namespace scorematch {

// x, grad, x0 alike; step_size in the accumulator's dtype and moving int64, both [N]
inline void check_l1(const Argument& x, const Argument& grad, const Argument& x0, const Argument& step_size,
                     const Argument& moving) {
  check_alike(x, grad);
  check_alike(x, x0);
  check_same_device(x, step_size);
  check_same_device(x, moving);
  check_dtype(step_size, accumulator_dtype(x.tensor.scalar_type()));
  check_dtype(moving, ScalarType::Long);
  check_shape(step_size, {rows_of(x.tensor)});
  check_shape(moving, {rows_of(x.tensor)});
}

}  // namespace scorematch
