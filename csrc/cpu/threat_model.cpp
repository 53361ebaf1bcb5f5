#include <optional>

#include "parallel.h"

namespace scorematch {
namespace {

constexpr int64_t kElementsAThread = 32768;  // below this a second thread costs more than it saves

Tensor pgd_step_cpu(const Tensor& x_, const Tensor& grad_, const Tensor& x0_, int64_t norm, double step_size, double eps,
                    double lower, double upper) {
  check_alike({"x", x_}, {"grad", grad_});
  check_alike({"x", x_}, {"x0", x0_});
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), grad = in_format(grad_, format), x0 = in_format(x0_, format);
  Tensor out = torch::stable::empty_like(x);
  dispatch(x.scalar_type(), "pgd_step", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const T *xp = x.const_data_ptr<T>(), *gp = grad.const_data_ptr<T>(), *cp = x0.const_data_ptr<T>();
    T* op = out.mutable_data_ptr<T>();
    const Box<T> box{T(lower), T(upper)};
    const int64_t features = elements_per_row(x);
    if (static_cast<Norm>(norm) == Norm::linf)
      run_parallel(LinfStep<T>{xp, gp, cp, op, T(step_size), T(eps), box}, x.numel(), kElementsAThread);
    else
      run_parallel(L2Step<T>{xp, gp, cp, op, features, T(step_size), T(eps), box}, rows_of(x),
                   worth_a_thread(kElementsAThread, features));
  });
  return out;
}

Tensor random_start_cpu(const Tensor& x_, const Tensor& noise_, std::optional<Tensor> radius_, int64_t norm, double eps,
                        double lower, double upper) {
  check_alike({"x", x_}, {"noise", noise_});
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), noise = in_format(noise_, format);
  std::optional<Tensor> radius;
  if (radius_.has_value()) {
    check_same_kind({"x", x_}, {"radius", *radius_});
    check_shape({"radius", *radius_}, {rows_of(x)});
    radius = as_contiguous(*radius_);
  }
  Tensor out = torch::stable::empty_like(x);
  dispatch(x.scalar_type(), "random_start", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const T *xp = x.const_data_ptr<T>(), *np = noise.const_data_ptr<T>();
    T* op = out.mutable_data_ptr<T>();
    const Box<T> box{T(lower), T(upper)};
    const int64_t features = elements_per_row(x);
    if (static_cast<Norm>(norm) == Norm::linf)
      run_parallel(LinfRandomStart<T>{xp, np, op, T(eps), box}, x.numel(), kElementsAThread);
    else
      run_parallel(L2RandomStart<T>{xp, np, radius ? radius->const_data_ptr<T>() : nullptr, op, features, T(eps), box},
                   rows_of(x), worth_a_thread(kElementsAThread, features));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("pgd_step", TORCH_BOX(&pgd_step_cpu));
  m.impl("random_start", TORCH_BOX(&random_start_cpu));
}

}  // namespace scorematch
