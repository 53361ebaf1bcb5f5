"""A sparse step inside the L1 ball and a box, and the projection alone."""

import torch
from torch import Tensor

from ._checks import (
    accumulator,
    check_alike,
    check_ball_and_box,
    check_batch,
    check_companion,
    check_tensor,
    in_accumulator,
    in_dense_format,
    without_graph,
)
from .apgd_step import check_per_sample


def l1_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: Tensor,
    moving: Tensor,
    *,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    r"""A step from `x` along the signs of the largest gradients, to the nearest point of the L1 ball and the box.

    .. math::
        v & = x + step\_size \, m / \|m\|_1, \qquad m_i = \operatorname{sign}(grad_i) \text{ for the } moving
            \text{ largest } |grad_i|, \text{ else } 0 \\
        u & = \operatorname{argmin} \{\|u - v\|_2 : \|u - x_0\|_1 \le eps,\; lower \le u \le upper\}

    Element i of u differs from that of x0, in the direction of v, by min(max(abs(v - x0) - t, 0), room). Here room is
    the distance from x0 to the end of the box, and t >= 0 is the smallest number for which the differences add up to at
    most eps. t is found by Newton's method on that sum, and the largest gradients by bisection, without sorting.
    Elements of equal abs(grad) move together, even if that makes more than `moving`. An element whose difference is 0
    keeps exactly the value of x0. A NaN or an infinite value in `x` or `x0` makes the sample NaN; an element with a NaN
    in `grad` does not move. No gradient passes through.

    Args:
        x: the current point, `[N, ...]`; float32 or float64, on CUDA also float16 or bfloat16.
        grad: the gradient of the loss to increase, like `x`.
        x0: the centre of the ball, like `x`, inside the box.
        step_size: length of the step of each sample, `[N]`, at least 0 and finite, in the dtype of `x` (float32 is also
            allowed with half precision).
        moving: how many elements move, int64 `[N]`; 0 is the projection alone.
        eps: radius of the ball, greater than 0; may be infinite.
        lower, upper: the box, `lower < upper`; either may be infinite.

    Returns:
        A new tensor like `x`, contiguous or channels_last as `x` is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Croce and Hein, Mind the box: l1-APGD for sparse adversarial attacks on image classifiers, ICML 2021.
    """
    check_tensor("x", x)
    check_batch("x", x)
    check_alike("grad", grad, "x", x)
    check_alike("x0", x0, "x", x)
    check_per_sample("step_size", step_size, x)
    check_companion("moving", moving, torch.int64, "x", x, (x.shape[0],))
    check_ball_and_box(eps, lower, upper)
    return torch.ops.scorematch.l1_step.default(
        without_graph(x),
        without_graph(grad),
        without_graph(x0),
        in_accumulator(step_size, x.dtype),
        moving,
        eps,
        lower,
        upper,
    )


def l1_project(x: Tensor, x0: Tensor, *, eps: float, lower: float = 0.0, upper: float = 1.0) -> Tensor:
    """The point of the L1 ball around `x0` and of the box that is nearest to `x`: `l1_step` in which nothing moves.

    Args, Returns, Raises: as for `l1_step`.
    """
    check_tensor("x", x)
    check_batch("x", x)
    none = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
    return l1_step(x, x, x0, none.to(accumulator(x.dtype)), none, eps=eps, lower=lower, upper=upper)


@torch.library.register_fake("scorematch::l1_step")
def _(
    x: Tensor, grad: Tensor, x0: Tensor, step_size: Tensor, moving: Tensor, eps: float, lower: float, upper: float
) -> Tensor:
    return torch.empty_like(in_dense_format(x))
