// Checks and outputs of divergence and logit_divergence, the same on both devices.
#pragma once
#include "options.h"
#include "tensor.h"

namespace scorematch {

inline TargetForm checked_target_form(const Tensor& target, bool want_target_gradient) {
  if (target.scalar_type() != ScalarType::Long) return TargetForm::probabilities;
  if (want_target_gradient) refuse("class indices have no gradient");
  return TargetForm::classes;
}

constexpr int64_t kMostClasses = int64_t(1) << 24;

inline void check_divergence(const Tensor& logits, const Tensor& target, TargetForm form, int64_t kind) {
  if (kind < 0 || kind >= kKinds) refuse("kind must be 0 to ", kKinds - 1, ", got ", kind);
  if (logits.dim() != 2) refuse("logits has shape ", shape_text(logits.sizes()), ", expected [N, L]");
  if (logits.size(1) == 0) refuse("logits has shape ", shape_text(logits.sizes()), ", expected at least one class");
  if (logits.size(1) > kMostClasses && logits.scalar_type() != ScalarType::Double)
    refuse("logits has ", logits.size(1), " classes, expected at most ", kMostClasses, " in float32, which counts them");
  const Argument logits_argument{"logits", logits};
  const Argument target_argument{form == TargetForm::logits ? "target_logits" : "target", target};
  if (form != TargetForm::classes) return check_alike(logits_argument, target_argument);
  check_same_device(logits_argument, target_argument);
  check_shape(target_argument, {logits.size(0)});
}

// How far the sum of a row of probabilities may be from 1; half precision rounds each of them.
template <typename S>
constexpr float mass_tolerance = sizeof(S) == 2 ? 1e-2f : 1e-3f;

struct LossAndGradients {
  Tensor loss;             // [N]
  Tensor logit_gradient;   // [N, L], or [0] where not wanted
  Tensor target_gradient;  // [N, L], or [0] where not wanted

  LossAndGradients(const Tensor& logits, bool want_logit_gradient, bool want_target_gradient)
      : loss(empty(logits, {logits.size(0)})),
        logit_gradient(gradient(logits, want_logit_gradient)),
        target_gradient(gradient(logits, want_target_gradient)) {}

  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {loss, logit_gradient, target_gradient}; }

 private:
  static Tensor empty(const Tensor& logits, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(logits, sizes, accumulator_dtype(logits.scalar_type()));
  }
  static Tensor gradient(const Tensor& logits, bool wanted) {
    return wanted ? empty(logits, {logits.size(0), logits.size(1)}) : empty(logits, {0});
  }
};

}  // namespace scorematch
