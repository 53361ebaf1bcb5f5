// Checks of the arguments of square_linf and square_l2, the same on both devices.
#pragma once
#include "options.h"
#include "tensor.h"

namespace scorematch {

inline void check_square(const Argument& best, const Argument& x0, const Argument& corner, int64_t corners, const Argument& sign,
                         int64_t side) {
  if (best.tensor.dim() != 4) refuse("best has shape ", shape_text(best.tensor.sizes()), ", expected [N, C, H, W]");
  check_alike(best, x0);
  check_same_device(best, corner);
  check_dtype(corner, ScalarType::Long);
  check_shape(corner, {best.tensor.size(0), corners});
  check_same_kind(best, sign);
  check_shape(sign, {best.tensor.size(0), best.tensor.size(1)});
  const int64_t most = std::min(best.tensor.size(2), best.tensor.size(3));
  if (side < 1 || side > most) refuse("side must be between 1 and the image's ", most, ", got ", side);
}

inline void check_square_pattern(const Argument& best, const Argument& pattern, const Argument& transpose) {
  check_same_kind(best, pattern);
  check_shape(pattern, {rows_of(pattern.tensor), rows_of(pattern.tensor)});
  check_same_device(best, transpose);
  check_dtype(transpose, ScalarType::Bool);
  check_shape(transpose, {best.tensor.size(0)});
}

// Room for a SquareChannel<A> of each channel of each sample.
template <typename A>
Tensor square_scratch(const Tensor& best) {
  static_assert(sizeof(SquareChannel<A>) == 2 * sizeof(A));
  const std::array<int64_t, 3> shape{best.size(0), best.size(1), 2};
  return torch::stable::new_empty(best, {shape.data(), shape.size()}, torch::headeronly::CppTypeToScalarType<A>::value);
}

inline Image image_of(const Tensor& t) {
  const int64_t channels = t.size(1), rows = t.size(2), columns = t.size(3);
  const bool channels_last = memory_format(t) == torch::headeronly::MemoryFormat::ChannelsLast;
  if (channels_last) return {channels, rows, columns, 1, columns * channels, channels};
  return {channels, rows, columns, rows * columns, columns, 1};
}

}  // namespace scorematch
