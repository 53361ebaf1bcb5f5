"""Divergences between two distributions that are both given by logits."""

import torch
from torch import Tensor

from ._checks import check_alike, check_tensor, shape
from .divergence import check_kind_and_clip, differentiable, fake_divergence, register_gradients


def logit_divergence(logits: Tensor, target_logits: Tensor, *, kind: str = "se", clip: float = 0.0) -> Tensor:
    r"""relu(D(P ‖ Q) - clip) of every sample, with P = softmax(target_logits) and Q = softmax(logits).

    `divergence` with a target that is itself a softmax: TRADES (P is the model's prediction at x), and direct SCORE
    (`target_logits` = log p, the data posterior). One kernel gives the loss and both gradients. For kl and
    r = log P - log Q they are

    .. math:: \nabla_{logits} = Q - P, \qquad \nabla_{target\_logits} = P \odot (r - \langle P, r \rangle),

    The second gives the weights of `score_step` (Pang et al., Eq. 33). Computed through probabilities instead, it would
    become NaN as soon as a float32 softmax underflows. Entries of -inf in either argument are classes of probability 0
    and get no gradient. The exception is kl where Q is 0 and P is not: it is infinite, and its gradient is still Q - P.

    Args:
        logits: `[N, L]`; float32 or float64, on CUDA also float16 or bfloat16 (computed in float32).
        target_logits: like `logits`.
        kind, clip: as for `divergence`.

    Returns:
        `[N]`, in the logits' dtype, but float32 for half precision. NaN logits give NaN.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device; or on a second differentiation, as for `divergence`.

    References:
        Pang et al., Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, ICML 2022, Table 1, Eq. 33.
        Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019.
    """
    check_tensor("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {shape(logits)}, but must be [N, L]")
    check_alike("target_logits", target_logits, "logits", logits)
    number = check_kind_and_clip(kind, clip)
    return differentiable(torch.ops.scorematch.logit_divergence.default, logits, target_logits, number, clip)


torch.library.register_fake("scorematch::logit_divergence", fake_divergence)
register_gradients("scorematch::logit_divergence")
