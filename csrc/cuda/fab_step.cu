#include "launch.h"

#include "../fab_step.h"
#include "../fab_tensors.h"

namespace scorematch {
namespace {

// A block is one sample.
template <Norm norm, typename S, typename A>
__global__ void fab_step_kernel(const S* x, const S* x0, const S* normal, const A* difference, S* out, int64_t rows, int64_t count,
                                FabOptions<A> options) {
  __shared__ A warp_results[kWarps];
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t at = n * count;
    fab_step_row<norm, A>(BlockLanes<A>{warp_results}, DeviceRow<A, const S>{x + at}, DeviceRow<A, const S>{x0 + at},
                          DeviceRow<A, const S>{normal + at}, DeviceRow<A, S>{out + at}, count, difference[n], options);
  }
}

Tensor fab_step_cuda(const Tensor& x_, const Tensor& x0_, const Tensor& normal_, const Tensor& difference_, int64_t norm,
                     double alpha_max, double overshoot, double lower, double upper) {
  check_fab({"x", x_}, {"x0", x0_}, {"normal", normal_}, {"difference", difference_});
  const DeviceGuard guard(x_.get_device_index());
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), x0 = in_format(x0_, format), normal = in_format(normal_, format);
  const Tensor difference = as_contiguous(difference_);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const cudaStream_t stream = current_stream(x);
  dispatch(x.scalar_type(), "fab_step", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const FabOptions<A> options{A(alpha_max), A(overshoot), {A(lower), A(upper)}};
    const int64_t rows = rows_of(x);
    const auto step = [&](auto norm_constant) {
      launch(fab_step_kernel<decltype(norm_constant)::value, S, A>, blocks_for(rows, 1), stream, x.const_data_ptr<S>(),
             x0.const_data_ptr<S>(), normal.const_data_ptr<S>(), difference.const_data_ptr<A>(), out.mutable_data_ptr<S>(), rows,
             elements_per_row(x), options);
    };
    if (static_cast<Norm>(norm) == Norm::linf)
      step(std::integral_constant<Norm, Norm::linf>{});
    else if (static_cast<Norm>(norm) == Norm::l2)
      step(std::integral_constant<Norm, Norm::l2>{});
    else
      step(std::integral_constant<Norm, Norm::l1>{});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("fab_step", TORCH_BOX(&fab_step_cuda));
}

}  // namespace scorematch
