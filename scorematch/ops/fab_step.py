"""One iteration of FAB: to the linearised decision boundary inside the box, biased towards the original point."""

import math

import torch
from torch import Tensor

from ._checks import (
    check_alike,
    check_batch,
    check_number,
    check_tensor,
    choice,
    in_accumulator,
    in_dense_format,
    without_graph,
)
from .apgd_step import check_per_sample
from .pgd_step import NORMS as BALLS

NORMS = {**BALLS, "l1": 2}  # csrc/options.h


def fab_step(
    x: Tensor,
    x0: Tensor,
    normal: Tensor,
    difference: Tensor,
    *,
    norm: str,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    r"""One step of the fast adaptive boundary attack, from `x` towards the boundary and a little towards `x0`.

    .. math::
        \delta(p) & = \operatorname{argmin} \{\|\delta\| : \langle w, p + \delta - x \rangle + d = 0,\;
            lower \le p + \delta \le upper\} \\
        \alpha & = \min(a / (a + a_0),\, alpha\_max), \qquad a = \max(\|\delta(x)\|, 10^{-8}),\;
            a_0 = \max(\|\delta(x_0)\|, 10^{-8}) \\
        x & \leftarrow \operatorname{clip}_{[lower, upper]} \big[ (1 - \alpha)(x + overshoot \, \delta(x))
            + \alpha \, (x_0 + overshoot \, \delta(x_0)) \big]

    with w = `normal` and d = `difference`. The constraint is the hyperplane where the linear model d + ⟨w, · - x⟩ of
    the difference of two logits is 0. Where the hyperplane misses the box, δ leads to the corner of the box nearest to
    it. A sample of w = 0 has δ = 0.

    An element moves in the direction that brings the linear model towards 0, by min(t, room) (linf) or min(t |w|, room)
    (l2), where room is its distance to the end of the box. t is found by Newton's method on a piecewise linear
    function, exactly and without sorting. In l1 the elements of the largest |w| go to the end of the box, one after the
    other. The last of them goes only as far as it must; several of the same |w| go by the same share of their room.
    Neither the norm of w nor the scale of (w, d) matters. A NaN or an infinite value makes the sample NaN. No gradient
    passes through.

    Args:
        x: the current point, `[N, ...]` in the box; float32 or float64, on CUDA also float16 or bfloat16.
        x0: the original point, like `x`.
        normal: the gradient of `difference` at `x`, like `x`.
        difference: logit of the target minus that of the label at `x`, `[N]`, in the dtype of `x` (float32 is also
            allowed with half precision).
        norm: `"linf"`, `"l2"` or `"l1"` (of each sample).
        alpha_max: largest weight of the original point, in [0, 1].
        overshoot: factor on δ, at least 0; above 1 the step crosses the boundary.
        lower, upper: the box, `lower < upper`, both finite.

    Returns:
        A new tensor like `x`, contiguous or channels_last as `x` is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Croce and Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, ICML 2020.
    """
    check_tensor("x", x)
    check_batch("x", x)
    check_alike("x0", x0, "x", x)
    check_alike("normal", normal, "x", x)
    check_per_sample("difference", difference, x)
    number = choice("norm", norm, NORMS)
    for name, value in (("alpha_max", alpha_max), ("overshoot", overshoot), ("lower", lower), ("upper", upper)):
        check_number(name, value)
    if not 0 <= alpha_max <= 1:
        raise ValueError(f"alpha_max must be in [0, 1], got {alpha_max}")
    if not (overshoot >= 0 and math.isfinite(overshoot)):
        raise ValueError(f"overshoot must be finite and at least 0, got {overshoot}")
    if not (lower < upper and math.isfinite(lower) and math.isfinite(upper)):
        raise ValueError(f"the box must be finite with lower less than upper, got lower={lower} and upper={upper}")
    return torch.ops.scorematch.fab_step.default(
        without_graph(x),
        without_graph(x0),
        without_graph(normal),
        in_accumulator(difference, x.dtype),
        number,
        alpha_max,
        overshoot,
        lower,
        upper,
    )


@torch.library.register_fake("scorematch::fab_step")
def _(
    x: Tensor,
    x0: Tensor,
    normal: Tensor,
    difference: Tensor,
    norm: int,
    alpha_max: float,
    overshoot: float,
    lower: float,
    upper: float,
) -> Tensor:
    return torch.empty_like(in_dense_format(x))
