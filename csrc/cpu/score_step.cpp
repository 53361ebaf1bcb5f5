#include "../score_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

Tensor score_step_cpu(const Tensor& weights_, const Tensor& scores_, const Tensor& grad_) {
  check_scores({"weights", weights_}, {"scores", scores_}, {"grad", grad_});
  const Tensor weights = as_contiguous(weights_), scores = as_contiguous(scores_), grad = as_contiguous(grad_);
  Tensor out = torch::stable::empty_like(grad);
  const int64_t samples = grad.size(0), classes = scores.size(1), features = elements_per_row(grad);
  if (grad.numel() == 0) return out;
  dispatch(scores.scalar_type(), "score_step", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const int64_t blocks = (features + kScoreBlock - 1) / kScoreBlock;
    run_parallel(ScoreStep<T>{weights.const_data_ptr<T>(), scores.const_data_ptr<T>(), grad.const_data_ptr<T>(),
                              out.mutable_data_ptr<T>(), classes, features, blocks},
                 samples * blocks, worth_a_thread(65536, kScoreBlock * classes));
  });
  return out;
}

Tensor score_line_integral_cpu(const Tensor& log_p_, const Tensor& scores0_, const Tensor& scores1_, const Tensor& move_) {
  check_scores({"log_p", log_p_}, {"scores0", scores0_}, {"move", move_});
  check_alike({"scores0", scores0_}, {"scores1", scores1_});
  const Tensor log_p = as_contiguous(log_p_), scores0 = as_contiguous(scores0_), scores1 = as_contiguous(scores1_),
               move = as_contiguous(move_);
  Tensor out = torch::stable::empty_like(log_p);
  const int64_t samples = log_p.size(0), classes = log_p.size(1), features = elements_per_row(move);
  dispatch(scores0.scalar_type(), "score_line_integral", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    T* integrals = out.mutable_data_ptr<T>();
    run_parallel(Trapezoid<T>{scores0.const_data_ptr<T>(), scores1.const_data_ptr<T>(), move.const_data_ptr<T>(), integrals,
                              classes, features},
                 samples * classes, worth_a_thread(65536, features));
    run_parallel(Normalize<T>{log_p.const_data_ptr<T>(), integrals, classes}, samples, worth_a_thread(16384, classes));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("score_step", TORCH_BOX(&score_step_cpu));
  m.impl("score_line_integral", TORCH_BOX(&score_line_integral_cpu));
}

}  // namespace scorematch
