"""Random starting points of attacks, from a noise tensor."""

import torch
from torch import Tensor

from ._checks import (
    LARGEST,
    check_alike,
    check_ball_and_box,
    check_batch,
    check_same_kind,
    check_tensor,
    choice,
    in_dense_format,
    shape,
    without_graph,
)
from .pgd_step import NORMS


def random_start(
    x: Tensor,
    noise: Tensor,
    *,
    norm: str,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
    radius: Tensor | None = None,
) -> Tensor:
    r"""A random point of the ball of radius `eps` around `x`, clipped to a box.

    .. math::
        \text{linf:}\quad & \operatorname{clip}_{[lower, upper]} (x + eps \cdot noise) \\
        \text{l2:}\quad & \operatorname{clip}_{[lower, upper]} (x + eps \cdot radius \cdot noise / \|noise\|_2)

    The noise is an argument, so that a caller's generator decides it and runs can be repeated. No gradient passes
    through.

    Args:
        x: the centre, `[N, ...]`; float32 or float64, on CUDA also float16 or bfloat16.
        noise: like `x`. linf: uniform in [-1, 1] (values beyond are clipped to it). l2: standard normal; a sample of
            zeros adds nothing.
        norm: `"linf"` or `"l2"`.
        eps: radius of the ball, greater than 0 and finite (in float32).
        lower, upper: the box, `lower < upper`; either may be infinite.
        radius: l2 only; `[N]` in [0, 1] (values beyond are clipped to it), the distance from `x` in units of `eps`.
            For D elements a sample, `u ** (1/D)` with uniform u gives points uniform in the ball; None is 1, the
            sphere.

    Returns:
        A new tensor like `x`, contiguous or channels_last as `x` is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.
    """
    check_tensor("x", x)
    check_batch("x", x)
    check_alike("noise", noise, "x", x)
    number = choice("norm", norm, NORMS)
    check_ball_and_box(eps, lower, upper)
    if not eps <= LARGEST:
        raise ValueError(f"eps must be finite, got {eps}")
    if radius is not None:
        if norm != "l2":
            raise ValueError(f"radius is for norm='l2', got norm={norm!r}")
        check_same_kind("radius", radius, "x", x)
        if radius.shape != x.shape[:1]:
            raise ValueError(f"radius has shape {shape(radius)} but x has shape {shape(x)}: expected [{x.shape[0]}]")
        radius = without_graph(radius)
    return torch.ops.scorematch.random_start.default(
        without_graph(x), without_graph(noise), radius, number, eps, lower, upper
    )


@torch.library.register_fake("scorematch::random_start")
def _(x: Tensor, noise: Tensor, radius: Tensor | None, norm: int, eps: float, lower: float, upper: float) -> Tensor:
    return torch.empty_like(in_dense_format(x))
