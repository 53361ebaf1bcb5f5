"""Proposals of the Square Attack: a random square, in the ball and the box."""

import math

import torch
from torch import Tensor

from ._checks import (
    check_alike,
    check_ball_and_box,
    check_companion,
    check_same_kind,
    check_tensor,
    in_dense_format,
    shape,
    without_graph,
)
from .apgd_step import check_flags


def _check_images(best: Tensor, x0: Tensor, corner: Tensor, corners: int, sign: Tensor, side: int) -> None:
    check_tensor("best", best)
    if best.dim() != 4:
        raise ValueError(f"best has shape {shape(best)}, expected [N, C, H, W]")
    check_alike("x0", x0, "best", best)
    check_companion("corner", corner, torch.int64, "best", best, (best.shape[0], corners))
    check_same_kind("sign", sign, "best", best)
    if sign.shape != best.shape[:2]:
        raise ValueError(
            f"sign has shape {shape(sign)} but best has shape {shape(best)}: expected {list(best.shape[:2])}"
        )
    if not 1 <= side <= min(best.shape[2:]):
        raise ValueError(f"side must be between 1 and the image's {min(best.shape[2:])}, got {side}")


def _check_finite_radius(eps: float) -> None:
    if not math.isfinite(eps):
        raise ValueError(f"eps must be finite, got {eps}")


def square_linf(
    best: Tensor,
    x0: Tensor,
    corner: Tensor,
    sign: Tensor,
    *,
    side: int,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """`best` with a square window of each image moved by 2 `eps` `sign`, then in the ball around `x0` and in the box.

    The candidate is clip(clip(best + 2 eps sign, x0 - eps, x0 + eps), lower, upper) inside the window; outside, `best`
    with the same clips. A NaN stays NaN. No gradient passes through.

    Args:
        best: `[N, C, H, W]`; float32 or float64, on CUDA also float16 or bfloat16.
        x0: the centre of the ball, like `best`.
        corner: first row and column of the window, int64 `[N, 2]`; clamped to 0 … H - side and 0 … W - side.
        sign: 1 or -1 for each channel, `[N, C]`, like `best` (only its sign is used).
        side: rows and columns of the window, 1 … min(H, W).
        eps: radius of the ball, greater than 0 and finite.
        lower, upper: the box, `lower < upper`; either may be infinite.

    Returns:
        A new tensor like `best`, contiguous or channels_last as `best` is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random search,
        ECCV 2020, Algorithm 2.
    """
    if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
        raise TypeError(f"side must be an int, got {type(side).__name__}")
    _check_images(best, x0, corner, 2, sign, side)
    check_ball_and_box(eps, lower, upper)
    _check_finite_radius(eps)
    return torch.ops.scorematch.square_linf.default(
        without_graph(best), without_graph(x0), corner, without_graph(sign), side, eps, lower, upper
    )


def square_l2(
    best: Tensor,
    x0: Tensor,
    corner: Tensor,
    sign: Tensor,
    pattern: Tensor,
    transpose: Tensor,
    *,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    r"""`best` with the perturbation moved from one square window into another, on the sphere around `x0`, in the box.

    With the perturbation δ = best - x0, the windows W₁ and W₂, and in each channel c

    .. math::
        \eta & = pattern \cdot sign_c + \delta_{c, W_1} / (10^{-12} + \|\delta_{c, W_1}\|) \\
        \eta & \leftarrow \eta / (10^{-12} + \|\eta\|)
            \sqrt{\max(eps^2 - \|\delta\|^2, 0) / C + \|\delta_{c, W_1 \cup W_2}\|^2}

    δ is set to 0 in W₂, then to η in W₁, and the candidate is clip(x0 + eps δ / (10⁻¹² + ‖δ‖), lower, upper). A NaN
    makes the sample NaN. No gradient passes through.

    Args:
        best: `[N, C, H, W]`; float32 or float64, on CUDA also float16 or bfloat16.
        x0: the centre of the ball, like `best`.
        corner: first row and column of W₁, then of W₂, int64 `[N, 4]`; clamped to 0 … H - side and 0 … W - side. The
            windows may overlap.
        sign: 1 or -1 for each channel, `[N, C]`, in the dtype of `best`.
        pattern: what is added to W₁, `[side, side]` with 1 <= side <= min(H, W), in the dtype of `best`.
        transpose: whether a sample takes the pattern transposed, bool `[N]`.
        eps: radius of the ball, greater than 0 and finite.
        lower, upper: the box, `lower < upper`; either may be infinite.

    Returns:
        A new tensor like `best`, contiguous or channels_last as `best` is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random search,
        ECCV 2020, Algorithm 3.
    """
    if not isinstance(pattern, Tensor):
        raise TypeError(f"pattern must be a torch.Tensor, got {type(pattern).__name__}")
    if pattern.dim() != 2 or pattern.shape[0] != pattern.shape[1]:
        raise ValueError(f"pattern has shape {shape(pattern)}, expected [side, side]")
    _check_images(best, x0, corner, 4, sign, pattern.shape[0])
    check_same_kind("pattern", pattern, "best", best)
    check_flags("transpose", transpose, "best", best)
    check_ball_and_box(eps, lower, upper)
    _check_finite_radius(eps)
    return torch.ops.scorematch.square_l2.default(
        without_graph(best),
        without_graph(x0),
        corner,
        without_graph(sign),
        without_graph(pattern),
        transpose,
        eps,
        lower,
        upper,
    )


@torch.library.register_fake("scorematch::square_linf")
def _(
    best: Tensor, x0: Tensor, corner: Tensor, sign: Tensor, side: int, eps: float, lower: float, upper: float
) -> Tensor:
    return torch.empty_like(in_dense_format(best))


@torch.library.register_fake("scorematch::square_l2")
def _(
    best: Tensor,
    x0: Tensor,
    corner: Tensor,
    sign: Tensor,
    pattern: Tensor,
    transpose: Tensor,
    eps: float,
    lower: float,
    upper: float,
) -> Tensor:
    return torch.empty_like(in_dense_format(best))
