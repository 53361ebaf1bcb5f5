"""One step of projected gradient ascent, and the projection alone."""

import torch
from torch import Tensor

from ._checks import (
    LARGEST,
    check_alike,
    check_ball_and_box,
    check_batch,
    check_number,
    check_tensor,
    choice,
    in_dense_format,
    without_graph,
)

NORMS = {"linf": 0, "l2": 1}  # csrc/threat_model.h


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    r"""One ascent step from `x` along `grad`, kept in the ball of radius `eps` around `x0` and in a box.

    .. math::
        \text{linf:}\quad & \operatorname{clip}_{[lower, upper]} \operatorname{clip}_{[x_0 - eps,\, x_0 + eps]}
            (x + step\_size \cdot \operatorname{sign} grad) \\
        \text{l2:}\quad & \operatorname{clip}_{[lower, upper]} \Pi_{\|\cdot - x_0\|_2 \le eps}
            (x + step\_size \cdot grad / \|grad\|_2)

    A zero gradient adds nothing (per element for linf, per sample for l2); any other gets the full step, however small
    or large. A NaN anywhere makes that element (linf) or sample (l2) NaN. First order: no gradient passes through.

    Args:
        x: the current point, `[N, ...]`; float32 or float64, on CUDA also float16 or bfloat16.
        grad: the gradient of the loss to increase, like `x`.
        x0: the centre of the ball, like `x`.
        norm: `"linf"` or `"l2"` (of each sample).
        step_size: length of the step, at least 0 and finite (in float32).
        eps: radius of the ball, greater than 0; may be infinite.
        lower, upper: the box, `lower < upper`; either may be infinite.

    Returns:
        A new tensor like `x`, contiguous or channels_last as `x` is. Nothing is copied if all arguments have the memory
        format of `x`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    check_tensor("x", x)
    check_batch("x", x)
    check_alike("grad", grad, "x", x)
    check_alike("x0", x0, "x", x)
    number = choice("norm", norm, NORMS)
    check_number("step_size", step_size)
    if not 0 <= step_size <= LARGEST:
        raise ValueError(f"step_size must be at least 0{' and finite' if step_size > 0 else ''}, got {step_size}")
    check_ball_and_box(eps, lower, upper)
    return torch.ops.scorematch.pgd_step.default(
        without_graph(x), without_graph(grad), without_graph(x0), number, step_size, eps, lower, upper
    )


def project(x: Tensor, x0: Tensor, *, norm: str, eps: float, lower: float = 0.0, upper: float = 1.0) -> Tensor:
    """The point of the ball around `x0` nearest to `x`, clipped to the box: `pgd_step` with a step of length 0.

    Args, Returns, Raises: as for `pgd_step`.
    """
    return pgd_step(x, x, x0, norm=norm, step_size=0.0, eps=eps, lower=lower, upper=upper)


@torch.library.register_fake("scorematch::pgd_step")
def _(
    x: Tensor, grad: Tensor, x0: Tensor, norm: int, step_size: float, eps: float, lower: float, upper: float
) -> Tensor:
    return torch.empty_like(in_dense_format(x))
