"""The data gradient of direct SCORE: a weighted sum of class scores."""

import torch
from torch import Tensor

from ._checks import accumulator, check_same_device, check_tensor, in_accumulator, shape, without_graph


def check_scores(scores_name: str, scores: Tensor, feature_name: str, per_feature: Tensor) -> None:
    """`scores` [N, L, ...] and one value a feature, [N, ...], in the scores' dtype or the one it is computed in."""
    check_tensor(scores_name, scores)
    if scores.dim() < 2:
        raise ValueError(f"{scores_name} has shape {shape(scores)}, but must be [N, L, ...]")
    if not isinstance(per_feature, Tensor):
        raise TypeError(f"{feature_name} must be a torch.Tensor, got {type(per_feature).__name__}")
    if per_feature.dtype != scores.dtype:
        raise TypeError(f"{feature_name} is {per_feature.dtype} but {scores_name} is {scores.dtype}")
    check_same_device(feature_name, per_feature, scores_name, scores)
    samples, _, *features = scores.shape
    if per_feature.shape != (samples, *features):
        raise ValueError(
            f"{feature_name} has shape {shape(per_feature)} but {scores_name} has shape {shape(scores)}: "
            f"expected {[samples, *features]}"
        )


def check_per_class(name: str, t: Tensor, scores_name: str, scores: Tensor) -> None:
    """One value a class, [N, L], in the scores' dtype or, for half precision, float32."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != scores.dtype and t.dtype != accumulator(scores.dtype):
        raise TypeError(f"{name} is {t.dtype} but {scores_name} is {scores.dtype}")
    check_same_device(name, t, scores_name, scores)
    if t.shape != scores.shape[:2]:
        raise ValueError(
            f"{name} has shape {shape(t)} but {scores_name} has shape {shape(scores)}: "
            f"expected {list(scores.shape[:2])}"
        )


def score_step(weights: Tensor, scores: Tensor, grad: Tensor) -> Tensor:
    r"""The ascent direction of direct SCORE: the model's gradient plus the data's.

    .. math:: grad + \sum_y w_y s_y, \qquad s_y = \nabla_x \log p_d(x|y)

    By the chain rule a divergence D(p ‖ q) changes through the data posterior p = p_d(·|x) by
    Σ_y c_y ∇ log p_y, c = ∂D/∂log p. With ∇ log p_y = s_y - Σ_k p_k s_k (Eq. 34; the unconditional score is the
    posterior mean of the class scores) this is Σ_y w_y s_y for **w = c - p Σ c**, which is what `logit_divergence`
    returns as its gradient with respect to `target_logits` = log p. For kl, it is Eq. 33's data gradient as the
    covariance of log p - log q and s. Because Σ w = 0, a field common to all classes changes nothing.

    Contiguous scores are read once, and nothing of their size is made; others are copied first. No gradient passes
    through.

    Args:
        weights: `[N, L]`, in the scores' dtype (float32 is also allowed with half precision).
        scores: class scores, `[N, L, ...]`; float32 or float64, on CUDA also float16 or bfloat16 (summed in float32).
        grad: the gradient through the model's logits, `[N, ...]`, in the scores' dtype.

    Returns:
        A new contiguous tensor `[N, ...]`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Pang et al., Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, ICML 2022, Eqs. 33 and 34.
    """
    check_scores("scores", scores, "grad", grad)
    check_per_class("weights", weights, "scores", scores)
    return torch.ops.scorematch.score_step.default(
        in_accumulator(weights, scores.dtype), without_graph(scores), without_graph(grad)
    )


@torch.library.register_fake("scorematch::score_step")
def _(weights: Tensor, scores: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)
