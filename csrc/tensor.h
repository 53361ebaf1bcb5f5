// Tensor checks and dtype dispatch shared by the CPU and CUDA launchers. The wrappers in scorematch/ops validate with
// better messages; these checks keep a direct call through torch.ops from reaching a kernel with a bad pointer.
#pragma once
#include "stable_abi.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace scorematch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises ValueError in Python. torch's own check macro would print paths of the machine that built the library.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

struct Argument {
  const char* name;
  const Tensor& tensor;
};

inline void check_shape(const Argument& a, std::initializer_list<int64_t> expected) {
  const auto sizes = a.tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()))
    refuse(a.name, " has shape ", shape_text(sizes), ", expected ", shape_text(std::vector<int64_t>(expected)));
}

inline void check_same_shape(const Argument& a, const Argument& b) {
  const auto x = a.tensor.sizes(), y = b.tensor.sizes();
  if (!std::equal(x.begin(), x.end(), y.begin(), y.end()))
    refuse(a.name, " has shape ", shape_text(x), " but ", b.name, " has shape ", shape_text(y));
}

inline void check_same_device(const Argument& a, const Argument& b) {
  if (a.tensor.is_cpu() != b.tensor.is_cpu() || a.tensor.get_device_index() != b.tensor.get_device_index())
    refuse(a.name, " and ", b.name, " are on different devices");
}

inline void check_dtype(const Argument& a, ScalarType expected) {
  if (a.tensor.scalar_type() != expected)
    refuse(a.name, " is ", torch::headeronly::toString(a.tensor.scalar_type()), ", expected ",
           torch::headeronly::toString(expected));
}

inline void check_same_kind(const Argument& a, const Argument& b) {
  check_same_device(a, b);
  check_dtype(b, a.tensor.scalar_type());
}

inline void check_alike(const Argument& a, const Argument& b) {
  check_same_kind(a, b);
  check_same_shape(a, b);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Images in channels_last (or channels_last_3d) stay so: all arguments of an elementwise op are brought to the memory
// format of the first, at no cost where they have it.
inline bool is_channels_last(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims != 4 && dims != 5) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    if (sizes[d] == 1) return true;
    const bool ok = strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  if (!matches(1)) return false;
  for (int64_t d = dims - 1; d >= 2; --d)
    if (!matches(d)) return false;
  return matches(0);
}

inline torch::headeronly::MemoryFormat memory_format(const Tensor& t) {
  using torch::headeronly::MemoryFormat;
  if (t.is_contiguous() || !is_channels_last(t)) return MemoryFormat::Contiguous;
  return t.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

inline Tensor in_format(const Tensor& t, torch::headeronly::MemoryFormat format) {
  if (format == torch::headeronly::MemoryFormat::Contiguous) return as_contiguous(t);
  return is_channels_last(t) ? t : torch::stable::contiguous(t, format);
}

inline int64_t rows_of(const Tensor& t) { return t.dim() == 0 ? 1 : t.size(0); }
inline int64_t elements_per_row(const Tensor& t) {
  int64_t count = 1;
  for (int64_t d = 1; d < t.dim(); ++d) count *= t.size(d);
  return count;
}

// float64 accumulates in itself, everything else in float32.
template <typename S>
using accumulator_of = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline ScalarType accumulator_dtype(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(S{}) for the C++ type S of the dtype, out of the types listed.
template <typename... S>
struct Types {};
using CpuTypes = Types<float, double>;

template <typename F>
void dispatch(ScalarType dtype, const char* op, Types<>, F&&) {
  refuse(op, " is not implemented for ", torch::headeronly::toString(dtype), " on this device");
}
template <typename S, typename... Rest, typename F>
void dispatch(ScalarType dtype, const char* op, Types<S, Rest...>, F&& f) {
  if (dtype == torch::headeronly::CppTypeToScalarType<S>::value) return f(S{});
  dispatch(dtype, op, Types<Rest...>{}, f);
}

}  // namespace scorematch
