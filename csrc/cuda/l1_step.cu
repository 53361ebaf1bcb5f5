#include "launch.h"

#include "../l1_step.h"
#include "../l1_tensors.h"

namespace scorematch {
namespace {

// A block is one sample.
template <typename S, typename A>
__global__ void l1_step_kernel(const S* x, const S* grad, const S* x0, const A* step_size, const int64_t* moving, S* out,
                               int64_t rows, int64_t count, A eps, Box<A> box) {
  __shared__ A warp_results[kWarps];
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t at = n * count;
    l1_step_row<A>(BlockLanes<A>{warp_results}, DeviceRow<A, const S>{x + at}, DeviceRow<A, const S>{grad + at},
                   DeviceRow<A, const S>{x0 + at}, DeviceRow<A, S>{out + at}, count, step_size[n], static_cast<A>(moving[n]), eps,
                   box);
  }
}

Tensor l1_step_cuda(const Tensor& x_, const Tensor& grad_, const Tensor& x0_, const Tensor& step_size_, const Tensor& moving_,
                    double eps, double lower, double upper) {
  check_l1({"x", x_}, {"grad", grad_}, {"x0", x0_}, {"step_size", step_size_}, {"moving", moving_});
  const DeviceGuard guard(x_.get_device_index());
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), grad = in_format(grad_, format), x0 = in_format(x0_, format);
  const Tensor step_size = as_contiguous(step_size_), moving = as_contiguous(moving_);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const cudaStream_t stream = current_stream(x);
  dispatch(x.scalar_type(), "l1_step", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const int64_t rows = rows_of(x);
    launch(l1_step_kernel<S, A>, blocks_for(rows, 1), stream, x.const_data_ptr<S>(), grad.const_data_ptr<S>(),
           x0.const_data_ptr<S>(), step_size.const_data_ptr<A>(), moving.const_data_ptr<int64_t>(), out.mutable_data_ptr<S>(),
           rows, elements_per_row(x), A(eps), Box<A>{A(lower), A(upper)});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("l1_step", TORCH_BOX(&l1_step_cuda));
}

}  // namespace scorematch
