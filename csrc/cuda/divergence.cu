#include "../divergence_tensors.h"
#include "launch.h"

#include "../divergence.h"

namespace scorematch {
namespace {

template <typename A>
struct ClassNumber {
  __device__ A operator()(int64_t j) const { return static_cast<A>(j); }
};

// A warp for each row. Values are not checked on the host, which would wait for the GPU: a label that is not a
// class and a row that is not a distribution give NaN.
template <typename S, typename A, TargetForm form>
__global__ void divergence_kernel(const S* logits, const S* target, const int64_t* labels, A* loss, A* logit_gradient,
                                  A* target_gradient, int64_t rows, int64_t classes, Kind kind, A clip) {
  const WarpLanes lanes{};
  for (int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; n < rows; n += int64_t(gridDim.x) * kWarps) {
    const int64_t at = n * classes;
    const ClassNumber<A> number{};
    using Row = DeviceRow<A, const S>;
    const auto body = [&](auto row_target) {
      return divergence_row<A>(lanes, kind, Row{logits + at}, row_target, number, classes, clip, A(mass_tolerance<S>),
                               logit_gradient != nullptr, DeviceRow<A, A>{logit_gradient + at}, target_gradient != nullptr,
                               DeviceRow<A, A>{target_gradient + at});
    };
    DivergenceOfRow<A> result;
    if constexpr (form == TargetForm::classes) {
      const int64_t label = labels[n];
      const ClassTarget<A, ClassNumber<A>> row_target{static_cast<A>(label), number, A(classes)};
      if (kind == Kind::kl) {
        const A label_logit = row_target.known() ? static_cast<A>(logits[at + label]) : A(0);
        result = cross_entropy_row<A>(lanes, Row{logits + at}, row_target, label_logit, classes, clip, logit_gradient != nullptr,
                                      DeviceRow<A, A>{logit_gradient + at});
      } else {
        result = body(row_target);
      }
    } else if constexpr (form == TargetForm::probabilities) {
      result = body(ProbabilityTarget<A, Row>{{target + at}});
    } else {
      result = body(LogitTarget<A, Row>{{target + at}});
    }
    if (lanes.lane() == 0) loss[n] = result.loss;
  }
}

template <TargetForm form>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& logits_, const Tensor& target_, int64_t kind, double clip,
                                       bool want_logit_gradient, bool want_target_gradient) {
  check_divergence(logits_, target_, form, kind);
  const DeviceGuard guard(logits_.get_device_index());
  const Tensor logits = as_contiguous(logits_), target = as_contiguous(target_);
  const LossAndGradients out(logits, want_logit_gradient, want_target_gradient);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  if (rows == 0) return out.tuple();
  dispatch(logits.scalar_type(), "divergence", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const S* target_values = nullptr;
    const int64_t* labels = nullptr;
    if constexpr (form == TargetForm::classes)
      labels = target.const_data_ptr<int64_t>();
    else
      target_values = target.const_data_ptr<S>();
    launch(divergence_kernel<S, A, form>, blocks_for(rows, kWarps), current_stream(logits), logits.const_data_ptr<S>(),
           target_values, labels, out.loss.mutable_data_ptr<A>(),
           want_logit_gradient ? out.logit_gradient.mutable_data_ptr<A>() : nullptr,
           want_target_gradient ? out.target_gradient.mutable_data_ptr<A>() : nullptr, rows, classes, static_cast<Kind>(kind),
           A(clip));
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor> divergence_cuda(const Tensor& logits, const Tensor& target, int64_t kind, double clip,
                                                   bool want_logit_gradient, bool want_target_gradient) {
  const auto run_form = checked_target_form(target, want_target_gradient) == TargetForm::classes
                            ? &run<TargetForm::classes>
                            : &run<TargetForm::probabilities>;
  return run_form(logits, target, kind, clip, want_logit_gradient, want_target_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("divergence", TORCH_BOX(&divergence_cuda));
  m.impl("logit_divergence", TORCH_BOX(&run<TargetForm::logits>));
}

}  // namespace scorematch
