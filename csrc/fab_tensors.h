// Checks of the arguments of fab_step, the same on both devices.
#pragma once
#include "tensor.h"

namespace scorematch {

// x, x0, normal alike; difference [N] in the accumulator's dtype
inline void check_fab(const Argument& x, const Argument& x0, const Argument& normal, const Argument& difference) {
  check_alike(x, x0);
  check_alike(x, normal);
  check_same_device(x, difference);
  check_dtype(difference, accumulator_dtype(x.tensor.scalar_type()));
  check_shape(difference, {rows_of(x.tensor)});
}

}  // namespace scorematch
