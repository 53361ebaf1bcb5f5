#include "launch.h"

#include "../threat_model.h"

#include <optional>

namespace scorematch {
namespace {

template <typename S, typename A>
__global__ void linf_step_kernel(const S* x, const S* grad, const S* x0, S* out, int64_t count, A step_size, A eps, Box<A> box) {
  for (int64_t i = first_index(); i < count; i += index_stride())
    out[i] = static_cast<S>(linf_step(static_cast<A>(x[i]), static_cast<A>(grad[i]), static_cast<A>(x0[i]), step_size, eps, box));
}

// A block is one sample.
template <typename S, typename A>
__global__ void l2_step_kernel(const S* x, const S* grad, const S* x0, S* out, int64_t rows, int64_t count, A step_size, A eps,
                               Box<A> box) {
  __shared__ A warp_results[kWarps];
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t at = n * count;
    l2_step_row<A>(BlockLanes<A>{warp_results}, DeviceRow<A, const S>{x + at}, DeviceRow<A, const S>{grad + at},
                   DeviceRow<A, const S>{x0 + at}, DeviceRow<A, S>{out + at}, count, step_size, eps, box);
  }
}

template <typename S, typename A>
__global__ void linf_random_start_kernel(const S* x, const S* noise, S* out, int64_t count, A eps, Box<A> box) {
  for (int64_t i = first_index(); i < count; i += index_stride())
    out[i] = static_cast<S>(linf_random_start(static_cast<A>(x[i]), static_cast<A>(noise[i]), eps, box));
}

template <typename S, typename A>
__global__ void l2_random_start_kernel(const S* x, const S* noise, const S* radius, S* out, int64_t rows, int64_t count, A eps,
                                       Box<A> box) {
  __shared__ A warp_results[kWarps];
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t at = n * count;
    const A length = radius == nullptr ? eps : eps * clamp(static_cast<A>(radius[n]), A(0), A(1));
    l2_random_start_row<A>(BlockLanes<A>{warp_results}, DeviceRow<A, const S>{x + at}, DeviceRow<A, const S>{noise + at},
                           DeviceRow<A, S>{out + at}, count, length, box);
  }
}

Tensor pgd_step_cuda(const Tensor& x_, const Tensor& grad_, const Tensor& x0_, int64_t norm, double step_size, double eps,
                     double lower, double upper) {
  check_alike({"x", x_}, {"grad", grad_});
  check_alike({"x", x_}, {"x0", x0_});
  const DeviceGuard guard(x_.get_device_index());
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), grad = in_format(grad_, format), x0 = in_format(x0_, format);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const cudaStream_t stream = current_stream(x);
  dispatch(x.scalar_type(), "pgd_step", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const S *xp = x.const_data_ptr<S>(), *gp = grad.const_data_ptr<S>(), *cp = x0.const_data_ptr<S>();
    S* op = out.mutable_data_ptr<S>();
    const Box<A> box{A(lower), A(upper)};
    const int64_t rows = rows_of(x), count = elements_per_row(x);
    if (static_cast<Norm>(norm) == Norm::linf)
      launch(linf_step_kernel<S, A>, blocks_for(x.numel(), kThreads), stream, xp, gp, cp, op, x.numel(), A(step_size), A(eps),
             box);
    else
      launch(l2_step_kernel<S, A>, blocks_for(rows, 1), stream, xp, gp, cp, op, rows, count, A(step_size), A(eps), box);
  });
  return out;
}

Tensor random_start_cuda(const Tensor& x_, const Tensor& noise_, std::optional<Tensor> radius_, int64_t norm, double eps,
                         double lower, double upper) {
  check_alike({"x", x_}, {"noise", noise_});
  const DeviceGuard guard(x_.get_device_index());
  const auto format = memory_format(x_);
  const Tensor x = in_format(x_, format), noise = in_format(noise_, format);
  std::optional<Tensor> radius;
  if (radius_.has_value()) {
    check_same_kind({"x", x_}, {"radius", *radius_});
    check_shape({"radius", *radius_}, {rows_of(x)});
    radius = as_contiguous(*radius_);
  }
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const cudaStream_t stream = current_stream(x);
  dispatch(x.scalar_type(), "random_start", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const S *xp = x.const_data_ptr<S>(), *np = noise.const_data_ptr<S>();
    S* op = out.mutable_data_ptr<S>();
    const Box<A> box{A(lower), A(upper)};
    const int64_t rows = rows_of(x), count = elements_per_row(x);
    if (static_cast<Norm>(norm) == Norm::linf)
      launch(linf_random_start_kernel<S, A>, blocks_for(x.numel(), kThreads), stream, xp, np, op, x.numel(), A(eps), box);
    else
      launch(l2_random_start_kernel<S, A>, blocks_for(rows, 1), stream, xp, np,
             radius ? radius->const_data_ptr<S>() : nullptr, op, rows, count, A(eps), box);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("pgd_step", TORCH_BOX(&pgd_step_cuda));
  m.impl("random_start", TORCH_BOX(&random_start_cuda));
}

}  // namespace scorematch
