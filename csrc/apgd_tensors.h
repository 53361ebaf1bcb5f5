// Checks of the arguments of apgd_step, the same on both devices.
#pragma once
#include "tensor.h"

namespace scorematch {

inline bool is_in_format(const Tensor& t, torch::headeronly::MemoryFormat format) {
  return format == torch::headeronly::MemoryFormat::Contiguous ? t.is_contiguous() : is_channels_last(t);
}

// The address of the first byte of t's elements, and that of the byte after the last.
inline std::array<const char*, 2> extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

inline void check_apart(const Argument& written, const Argument& other) {
  const auto a = extent(written.tensor), b = extent(other.tensor);
  if (a[0] < b[1] && b[0] < a[1]) refuse(written.name, " is written in place and shares memory with ", other.name);
}

// written: x, x_prev, best_x, best_grad; read: x0, grad; all alike. step_size in the accumulator's dtype and two flags, [N].
inline void check_apgd(const std::array<Argument, 4>& written, const std::array<Argument, 2>& read, const Argument& step_size,
                       const std::array<Argument, 2>& flags) {
  const Argument& x = written[0];
  const auto format = memory_format(x.tensor);
  if (x.tensor.dim() == 0) refuse("x has shape [], but must be a batch [N, ...]");
  for (const Argument& t : written) {
    check_alike(x, t);
    if (!is_in_format(t.tensor, format)) refuse(t.name, " is written in place and must be dense, in the memory format of x");
  }
  for (const Argument& t : read) check_alike(x, t);
  check_same_device(x, step_size);
  check_dtype(step_size, accumulator_dtype(x.tensor.scalar_type()));
  check_shape(step_size, {rows_of(x.tensor)});
  for (const Argument& t : flags) {
    check_same_device(x, t);
    check_dtype(t, ScalarType::Bool);
    check_shape(t, {rows_of(x.tensor)});
  }
  if (x.tensor.numel() == 0) return;
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t k = i + 1; k < written.size(); ++k) check_apart(written[i], written[k]);
    for (const Argument& t : read) check_apart(written[i], t);
  }
}

}  // namespace scorematch
