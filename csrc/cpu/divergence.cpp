#include "../divergence_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

[[noreturn]] void refuse_label(int64_t row, int64_t label, int64_t classes) {
  refuse("target[", row, "] is ", label, ", but logits has ", classes, " classes: allowed are 0 to ", classes - 1);
}

template <typename T>
[[noreturn]] void refuse_probabilities(int64_t row, const T* p, int64_t classes) {
  double sum = 0, lowest = p[0];
  for (int64_t j = 0; j < classes; ++j) {
    sum += p[j];
    lowest = std::min<double>(lowest, p[j]);
  }
  refuse("target[", row, "] is not a probability distribution: its sum is ", sum, " (1 ± 0.001 is allowed) and its smallest entry ",
         lowest, " (at least 0)");
}

template <TargetForm form>
std::tuple<Tensor, Tensor, Tensor> divergence_of_form(const Tensor& logits_, const Tensor& target_, int64_t kind, double clip,
                                       bool want_logit_gradient, bool want_target_gradient) {
  check_divergence(logits_, target_, form, kind);
  const Tensor logits = as_contiguous(logits_), target = as_contiguous(target_);
  const LossAndGradients out(logits, want_logit_gradient, want_target_gradient);
  dispatch(logits.scalar_type(), "divergence", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    std::atomic<int64_t> refused{-1};
    Divergence<T, form> job{};
    job.logits = logits.const_data_ptr<T>();
    if constexpr (form == TargetForm::classes)
      job.labels = target.const_data_ptr<int64_t>();
    else
      job.target = target.const_data_ptr<T>();
    job.loss = out.loss.mutable_data_ptr<T>();
    job.logit_gradient = want_logit_gradient ? out.logit_gradient.mutable_data_ptr<T>() : nullptr;
    job.target_gradient = want_target_gradient ? out.target_gradient.mutable_data_ptr<T>() : nullptr;
    job.refused = &refused;
    job.classes = logits.size(1);
    job.kind = static_cast<Kind>(kind);
    job.clip = T(clip);
    job.mass_tolerance = T(mass_tolerance<T>);
    run_parallel(job, logits.size(0), worth_a_thread(8192, job.classes));
    if (const int64_t row = refused; row >= 0) {
      if constexpr (form == TargetForm::classes) refuse_label(row, job.labels[row], job.classes);
      if constexpr (form == TargetForm::probabilities) refuse_probabilities(row, job.target + row * job.classes, job.classes);
    }
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor> divergence_cpu(const Tensor& logits, const Tensor& target, int64_t kind, double clip,
                                                  bool want_logit_gradient, bool want_target_gradient) {
  const auto run_form = checked_target_form(target, want_target_gradient) == TargetForm::classes
                            ? &divergence_of_form<TargetForm::classes>
                            : &divergence_of_form<TargetForm::probabilities>;
  return run_form(logits, target, kind, clip, want_logit_gradient, want_target_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("divergence", TORCH_BOX(&divergence_cpu));
  m.impl("logit_divergence", TORCH_BOX(&divergence_of_form<TargetForm::logits>));
}

}  // namespace scorematch
