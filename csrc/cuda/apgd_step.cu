#include "launch.h"

#include "../apgd_step.h"
#include "../apgd_tensors.h"

namespace scorematch {
namespace {

template <typename S, typename A>
struct Apgd {
  S *x, *x_prev, *best_x, *best_grad;  // [N, D]
  const S *x0, *grad;                  // [N, D]
  const A* step_size;                  // [N]
  const bool *improved, *restart;      // [N]
  int64_t rows, features;
  ApgdOptions<A> options;
};

template <typename S, typename A>
__global__ void apgd_linf_kernel(Apgd<S, A> apgd) {
  for (int64_t i = first_index(); i < apgd.rows * apgd.features; i += index_stride()) {
    const int64_t n = i / apgd.features;
    const S x = apgd.x[i], grad = apgd.grad[i];
    if (apgd.improved[n]) {
      apgd.best_x[i] = x;
      apgd.best_grad[i] = grad;
    }
    const bool restart = apgd.restart[n];
    const S start = restart ? apgd.best_x[i] : x, start_grad = restart ? apgd.best_grad[i] : grad;
    const A next = apgd_linf(static_cast<A>(start), static_cast<A>(start_grad), static_cast<A>(apgd.x_prev[i]),
                             static_cast<A>(apgd.x0[i]), apgd.step_size[n], apgd.options);
    apgd.x_prev[i] = start;
    apgd.x[i] = static_cast<S>(next);
  }
}

// A block is one sample; a thread reads and writes elements of its own only.
template <typename S, typename A>
__global__ void apgd_l2_kernel(Apgd<S, A> apgd) {
  __shared__ A warp_results[kWarps];
  const BlockLanes<A> lanes{warp_results};
  for (int64_t n = blockIdx.x; n < apgd.rows; n += gridDim.x) {
    const int64_t at = n * apgd.features;
    if (apgd.improved[n])
      for (int64_t j = lanes.lane(); j < apgd.features; j += lanes.width()) {
        apgd.best_x[at + j] = apgd.x[at + j];
        apgd.best_grad[at + j] = apgd.grad[at + j];
      }
    const bool restart = apgd.restart[n];
    const DeviceRow<A, const S> start{(restart ? apgd.best_x : apgd.x) + at}, grad{(restart ? apgd.best_grad : apgd.grad) + at},
        x0{apgd.x0 + at}, previous{apgd.x_prev + at};
    apgd_l2_row<A>(lanes, start, grad, x0, previous, DeviceRow<A, S>{apgd.x + at}, DeviceRow<A, S>{apgd.x_prev + at},
                   apgd.features, apgd.step_size[n], apgd.options);
  }
}

void apgd_step_cuda(const Tensor& x, const Tensor& x_prev, const Tensor& x0_, const Tensor& grad_, const Tensor& best_x,
                    const Tensor& best_grad, const Tensor& step_size_, const Tensor& improved_, const Tensor& restart_,
                    int64_t norm, double eps, double momentum, double lower, double upper) {
  check_apgd({{{"x", x}, {"x_prev", x_prev}, {"best_x", best_x}, {"best_grad", best_grad}}}, {{{"x0", x0_}, {"grad", grad_}}},
             {"step_size", step_size_}, {{{"improved", improved_}, {"restart", restart_}}});
  if (x.numel() == 0) return;
  const DeviceGuard guard(x.get_device_index());
  const auto format = memory_format(x);
  const Tensor x0 = in_format(x0_, format), grad = in_format(grad_, format);
  const Tensor step_size = as_contiguous(step_size_), improved = as_contiguous(improved_), restart = as_contiguous(restart_);
  const cudaStream_t stream = current_stream(x);
  dispatch(x.scalar_type(), "apgd_step", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const Apgd<S, A> apgd{x.mutable_data_ptr<S>(),
                          x_prev.mutable_data_ptr<S>(),
                          best_x.mutable_data_ptr<S>(),
                          best_grad.mutable_data_ptr<S>(),
                          x0.const_data_ptr<S>(),
                          grad.const_data_ptr<S>(),
                          step_size.const_data_ptr<A>(),
                          improved.const_data_ptr<bool>(),
                          restart.const_data_ptr<bool>(),
                          x.size(0),
                          elements_per_row(x),
                          {A(eps), A(momentum), A(1 - momentum), {A(lower), A(upper)}}};
    if (static_cast<Norm>(norm) == Norm::linf)
      launch(apgd_linf_kernel<S, A>, blocks_for(x.numel(), kThreads), stream, apgd);
    else
      launch(apgd_l2_kernel<S, A>, blocks_for(apgd.rows, 1), stream, apgd);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("apgd_step", TORCH_BOX(&apgd_step_cuda));
}

}  // namespace scorematch
