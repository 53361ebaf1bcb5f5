#include "../fab_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

Tensor fab_step_cpu(const Tensor& x_, const Tensor& x0_, const Tensor& normal_, const Tensor& difference_, int64_t norm,
                    double alpha_max, double overshoot, double lower, double upper) {
  check_fab({"x", x_}, {"x0", x0_}, {"normal", normal_}, {"difference", difference_});
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), x0 = in_format(x0_, format), normal = in_format(normal_, format);
  const Tensor difference = as_contiguous(difference_);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  dispatch(x.scalar_type(), "fab_step", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const FabOptions<T> options{T(alpha_max), T(overshoot), {T(lower), T(upper)}};
    const int64_t features = elements_per_row(x);
    run_parallel(FabStep<T>{x.const_data_ptr<T>(), x0.const_data_ptr<T>(), normal.const_data_ptr<T>(),
                            difference.const_data_ptr<T>(), out.mutable_data_ptr<T>(), features, static_cast<Norm>(norm), options},
                 rows_of(x), worth_a_thread(4096, features));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("fab_step", TORCH_BOX(&fab_step_cpu));
}

}  // namespace scorematch
