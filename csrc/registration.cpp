// Every op's schema. Kernels register themselves in cpu/ and cuda/; fake kernels and autograd are in scorematch/ops/.
#include "stable_abi.h"

STABLE_TORCH_LIBRARY(scorematch, m) {
  // norm: 0 linf, 1 l2 (threat_model.h). All tensors [N, ...] of one shape; radius [N].
  m.def("pgd_step(Tensor x, Tensor grad, Tensor x0, int norm, float step_size, float eps, float lower, float upper) -> Tensor");
  m.def("random_start(Tensor x, Tensor noise, Tensor? radius, int norm, float eps, float lower, float upper) -> Tensor");

  // As pgd_step; step_size in the accumulator's dtype, moving int64, both [N].
  m.def("l1_step(Tensor x, Tensor grad, Tensor x0, Tensor step_size, Tensor moving, float eps, float lower, float upper) -> Tensor");

  // As pgd_step; step_size in the accumulator's dtype, improved and restart bool, all [N].
  m.def("apgd_step(Tensor(a!) x, Tensor(b!) x_prev, Tensor x0, Tensor grad, Tensor(c!) best_x, Tensor(d!) best_grad, Tensor step_size,"
        " Tensor improved, Tensor restart, int norm, float eps, float momentum, float lower, float upper) -> ()");
  // norm: also 2 l1. difference [N] in the accumulator's dtype.
  m.def("fab_step(Tensor x, Tensor x0, Tensor normal, Tensor difference, int norm, float alpha_max, float overshoot, float lower,"
        " float upper) -> Tensor");
  // best, x0 [N, C, H, W]; corner int64 [N, 2] or [N, 4]; sign [N, C]; pattern [side, side]; transpose bool [N].
  m.def("square_linf(Tensor best, Tensor x0, Tensor corner, Tensor sign, int side, float eps, float lower, float upper) -> Tensor");
  m.def("square_l2(Tensor best, Tensor x0, Tensor corner, Tensor sign, Tensor pattern, Tensor transpose, float eps, float lower,"
        " float upper) -> Tensor");
  // samples int64 [N]; [N, count]
  m.def("keyed_uniform(Tensor samples, int count, int seed, int stream, ScalarType dtype) -> Tensor");

  // kind: divergence.h. loss [N]; the gradients [N, L] of each row's loss, or [0] where not wanted.
  m.def("divergence(Tensor logits, Tensor target, int kind, float clip, bool want_logit_gradient, bool want_target_gradient)"
        " -> (Tensor loss, Tensor logit_gradient, Tensor target_gradient)");
  m.def("logit_divergence(Tensor logits, Tensor target_logits, int kind, float clip, bool want_logit_gradient, bool want_target_gradient)"
        " -> (Tensor loss, Tensor logit_gradient, Tensor target_gradient)");

  // weights, log_p [N, L]; scores [N, L, ...]; grad, move [N, ...].
  m.def("score_step(Tensor weights, Tensor scores, Tensor grad) -> Tensor");
  m.def("score_line_integral(Tensor log_p, Tensor scores0, Tensor scores1, Tensor move) -> Tensor");
}
