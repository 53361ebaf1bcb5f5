// Checks of the arguments of score_step and score_line_integral, the same on both devices.
#pragma once
#include "tensor.h"

namespace scorematch {

// per_class [N, L] in the accumulator's dtype, scores [N, L, ...], per_feature [N, ...]
inline void check_scores(const Argument& per_class, const Argument& scores, const Argument& per_feature) {
  const int64_t dims = scores.tensor.dim();
  if (dims < 2) refuse(scores.name, " has shape ", shape_text(scores.tensor.sizes()), ", expected [N, L, ...]");
  check_same_device(scores, per_class);
  check_dtype(per_class, accumulator_dtype(scores.tensor.scalar_type()));
  check_shape(per_class, {scores.tensor.size(0), scores.tensor.size(1)});
  check_same_kind(scores, per_feature);
  bool fits = per_feature.tensor.dim() == dims - 1 && per_feature.tensor.size(0) == scores.tensor.size(0);
  for (int64_t d = 2; fits && d < dims; ++d) fits = per_feature.tensor.size(d - 1) == scores.tensor.size(d);
  if (!fits)
    refuse(per_feature.name, " has shape ", shape_text(per_feature.tensor.sizes()), ", which does not fit ", scores.name,
           " of shape ", shape_text(scores.tensor.sizes()));
}

}  // namespace scorematch
