#include "../apgd_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

void apgd_step_cpu(const Tensor& x, const Tensor& x_prev, const Tensor& x0_, const Tensor& grad_, const Tensor& best_x,
                   const Tensor& best_grad, const Tensor& step_size_, const Tensor& improved_, const Tensor& restart_,
                   int64_t norm, double eps, double momentum, double lower, double upper) {
  check_apgd({{{"x", x}, {"x_prev", x_prev}, {"best_x", best_x}, {"best_grad", best_grad}}}, {{{"x0", x0_}, {"grad", grad_}}},
             {"step_size", step_size_}, {{{"improved", improved_}, {"restart", restart_}}});
  if (x.numel() == 0) return;
  const auto format = memory_format(x);
  const Tensor x0 = in_format(x0_, format), grad = in_format(grad_, format);
  const Tensor step_size = as_contiguous(step_size_), improved = as_contiguous(improved_), restart = as_contiguous(restart_);
  dispatch(x.scalar_type(), "apgd_step", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const ApgdOptions<T> options{T(eps), T(momentum), T(1 - momentum), {T(lower), T(upper)}};
    const int64_t features = elements_per_row(x);
    run_parallel(ApgdStep<T>{x.mutable_data_ptr<T>(), x_prev.mutable_data_ptr<T>(), best_x.mutable_data_ptr<T>(),
                             best_grad.mutable_data_ptr<T>(), x0.const_data_ptr<T>(), grad.const_data_ptr<T>(),
                             step_size.const_data_ptr<T>(), improved.const_data_ptr<bool>(), restart.const_data_ptr<bool>(),
                             features, static_cast<Norm>(norm), options},
                 x.size(0), worth_a_thread(16384, features));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("apgd_step", TORCH_BOX(&apgd_step_cpu));
}

}  // namespace scorematch
