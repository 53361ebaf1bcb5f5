#include "launch.h"

#include "../divergence.h"
#include "../score_step.h"
#include "../score_tensors.h"

namespace scorematch {
namespace {

// weights [N, L], scores [N, L, D], grad and out [N, D]. A thread sums one feature; neighbouring threads read
// neighbouring scores.
template <typename S, typename A>
__global__ void score_step_kernel(const A* weights, const S* scores, const S* grad, S* out, int64_t samples, int64_t classes,
                                  int64_t features) {
  for (int64_t i = first_index(); i < samples * features; i += index_stride()) {
    const int64_t n = i / features, f = i - n * features;
    const A* w = weights + n * classes;
    const S* s = scores + n * classes * features + f;
    A total[] = {static_cast<A>(grad[i])};
    add_weighted_scores(total, [=](int64_t y) { return w[y]; }, [=](int64_t y, int) { return static_cast<A>(s[y * features]); },
                        classes);
    out[i] = static_cast<S>(total[0]);
  }
}

// integrals [N * L] = ½ Σ_f move (scores0 + scores1), a block for each.
template <typename S, typename A>
__global__ void trapezoid_kernel(const S* scores0, const S* scores1, const S* move, A* integrals, int64_t rows, int64_t classes,
                                 int64_t features) {
  __shared__ A warp_results[kWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const A integral = trapezoid<A>(BlockLanes<A>{warp_results}, DeviceRow<A, const S>{move + row / classes * features},
                                    DeviceRow<A, const S>{scores0 + row * features},
                                    DeviceRow<A, const S>{scores1 + row * features}, features);
    if (threadIdx.x == 0) integrals[row] = integral;
  }
}

// log softmax(log_p + integrals), in place of the integrals; a warp for each sample.
template <typename A>
__global__ void normalize_kernel(const A* log_p, A* integrals, int64_t samples, int64_t classes) {
  const WarpLanes lanes{};
  for (int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; n < samples; n += int64_t(gridDim.x) * kWarps) {
    const A* start = log_p + n * classes;
    A* row = integrals + n * classes;
    const auto moved = [=](int64_t j) { return start[j] + row[j]; };
    const auto log_softmax = log_softmax_of<A>(lanes, moved, classes);
    for (int64_t j = lanes.lane(); j < classes; j += lanes.width()) row[j] = log_softmax(moved(j));
  }
}

Tensor score_step_cuda(const Tensor& weights_, const Tensor& scores_, const Tensor& grad_) {
  check_scores({"weights", weights_}, {"scores", scores_}, {"grad", grad_});
  const DeviceGuard guard(scores_.get_device_index());
  const Tensor weights = as_contiguous(weights_), scores = as_contiguous(scores_), grad = as_contiguous(grad_);
  Tensor out = torch::stable::empty_like(grad);
  const int64_t samples = grad.size(0), classes = scores.size(1), features = elements_per_row(grad);
  if (grad.numel() == 0) return out;
  dispatch(scores.scalar_type(), "score_step", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    launch(score_step_kernel<S, A>, blocks_for(grad.numel(), kThreads), current_stream(scores), weights.const_data_ptr<A>(),
           scores.const_data_ptr<S>(), grad.const_data_ptr<S>(), out.mutable_data_ptr<S>(), samples, classes, features);
  });
  return out;
}

Tensor score_line_integral_cuda(const Tensor& log_p_, const Tensor& scores0_, const Tensor& scores1_, const Tensor& move_) {
  check_scores({"log_p", log_p_}, {"scores0", scores0_}, {"move", move_});
  check_alike({"scores0", scores0_}, {"scores1", scores1_});
  const DeviceGuard guard(scores0_.get_device_index());
  const Tensor log_p = as_contiguous(log_p_), scores0 = as_contiguous(scores0_), scores1 = as_contiguous(scores1_),
               move = as_contiguous(move_);
  Tensor out = torch::stable::empty_like(log_p);
  const int64_t samples = log_p.size(0), classes = log_p.size(1), features = elements_per_row(move);
  if (log_p.numel() == 0) return out;
  const cudaStream_t stream = current_stream(log_p);
  dispatch(scores0.scalar_type(), "score_line_integral", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    A* integrals = out.mutable_data_ptr<A>();
    launch(trapezoid_kernel<S, A>, blocks_for(samples * classes, 1), stream, scores0.const_data_ptr<S>(),
           scores1.const_data_ptr<S>(), move.const_data_ptr<S>(), integrals, samples * classes, classes, features);
    launch(normalize_kernel<A>, blocks_for(samples, kWarps), stream, log_p.const_data_ptr<A>(), integrals, samples, classes);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("score_step", TORCH_BOX(&score_step_cuda));
  m.impl("score_line_integral", TORCH_BOX(&score_line_integral_cuda));
}

}  // namespace scorematch
