// The output of keyed_uniform and the checks of its arguments, the same on both devices.
#pragma once
#include "philox.h"
#include "tensor.h"

namespace scorematch {

inline Tensor keyed_output(const Tensor& samples, int64_t count, int64_t seed, int64_t stream, ScalarType dtype) {
  check_dtype({"samples", samples}, ScalarType::Long);
  if (samples.dim() != 1) refuse("samples has shape ", shape_text(samples.sizes()), ", expected [N]");
  if (count < 0 || count > 4 * kCounters) refuse("count must be between 0 and ", 4 * kCounters, ", got ", count);
  if (seed < 0) refuse("seed must be at least 0, got ", seed);
  if (stream < 0) refuse("stream must be at least 0, got ", stream);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    refuse("dtype must be float32 or float64, got ", torch::headeronly::toString(dtype));
  const std::array<int64_t, 2> shape{samples.size(0), count};
  return torch::stable::new_empty(samples, {shape.data(), shape.size()}, dtype);
}

}  // namespace scorematch
