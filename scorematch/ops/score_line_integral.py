"""The class posterior at the end of a move, from class scores at both ends."""

import torch
from torch import Tensor

from ._checks import check_alike, check_tensor, in_accumulator, without_graph
from .score_step import check_per_class, check_scores


def score_line_integral(log_p: Tensor, scores0: Tensor, scores1: Tensor, move: Tensor) -> Tensor:
    r"""log p_d(·|x + move) from log p_d(·|x) and the class scores s at both ends of the move (trapezoid rule).

    .. math::
        \log p(y|x + \delta) = \log \operatorname{softmax}_y \big[ \log p(y|x) + \int_0^1 \delta^\top s_y(x + t\delta)\,
        dt \big], \qquad \int \approx \tfrac12 \delta^\top (s_y(x) + s_y(x + \delta))

    The normalisation cancels the unconditional score, as in `score_step`. The error is of third order in the move;
    split a long move. Both score tensors are read once. No gradient passes through.

    Args:
        log_p: `[N, L]` at the start, in the scores' dtype (float32 is also allowed with half precision). Need not be
            normalised; a class of probability 0 (-inf) keeps it.
        scores0: ∇ log p_d(x|y) at the start, `[N, L, ...]`; float32 or float64, on CUDA also float16 or bfloat16
            (summed in float32).
        scores1: the same at the end of the move, like `scores0`.
        move: `[N, ...]`, in the scores' dtype.

    Returns:
        A new tensor `[N, L]`, normalised; float32 for half precision.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Pang et al., Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, ICML 2022, Eq. 34.
    """
    check_scores("scores0", scores0, "move", move)
    check_tensor("scores1", scores1)
    check_alike("scores1", scores1, "scores0", scores0)
    check_per_class("log_p", log_p, "scores0", scores0)
    return torch.ops.scorematch.score_line_integral.default(
        in_accumulator(log_p, scores0.dtype),
        without_graph(scores0),
        without_graph(scores1),
        without_graph(move),
    )


@torch.library.register_fake("scorematch::score_line_integral")
def _(log_p: Tensor, scores0: Tensor, scores1: Tensor, move: Tensor) -> Tensor:
    return torch.empty_like(log_p, memory_format=torch.contiguous_format)
