#include "../l1_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

Tensor l1_step_cpu(const Tensor& x_, const Tensor& grad_, const Tensor& x0_, const Tensor& step_size_, const Tensor& moving_,
                   double eps, double lower, double upper) {
  check_l1({"x", x_}, {"grad", grad_}, {"x0", x0_}, {"step_size", step_size_}, {"moving", moving_});
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), grad = in_format(grad_, format), x0 = in_format(x0_, format);
  const Tensor step_size = as_contiguous(step_size_), moving = as_contiguous(moving_);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  dispatch(x.scalar_type(), "l1_step", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const int64_t features = elements_per_row(x);
    run_parallel(L1Step<T>{x.const_data_ptr<T>(), grad.const_data_ptr<T>(), x0.const_data_ptr<T>(),
                           step_size.const_data_ptr<T>(), moving.const_data_ptr<int64_t>(), out.mutable_data_ptr<T>(), features,
                           T(eps), {T(lower), T(upper)}},
                 rows_of(x), worth_a_thread(4096, features));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("l1_step", TORCH_BOX(&l1_step_cpu));
}

}  // namespace scorematch
