"""The L1 ball around a point, cut by a box: random points, sparse steps and the projection."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .ops._checks import accumulator
from .ops.l1_step import l1_step


def random_start(
    x: Tensor, generator: Generator | None = None, *, eps: float, lower: float = 0.0, upper: float = 1.0
) -> Tensor:
    """A point drawn uniformly from the L1 ball around each sample of x [N, …], clipped to the box.

    Args:
        x: [N, …], the centres.
        generator: source of randomness on the device of x.
        eps: radius of the ball, in input units; > 0.
        lower, upper: the box.

    Returns:
        A new tensor of the shape and dtype of x.
    """
    count, features = len(x), x[0].numel() if len(x) else 0
    # D + 1 exponential variables divided by their sum; without the last one they are uniform in the simplex.
    parts = torch.empty(count, features + 1, dtype=x.dtype, device=x.device).exponential_(generator=generator)
    length = eps * (parts / parts.sum(1, keepdim=True))[:, :-1]
    direction = torch.empty_like(length).uniform_(-1, 1, generator=generator).sign()
    return (x + (length * direction).view(x.shape)).clamp(lower, upper)


def sparse_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    share: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """One sparse step of ascent from x along grad, projected to the ball around x0 and the box.

    In L1 the steepest direction is that of a single feature, and to move one pixel in each step is too slow for an
    image. As in SLIDE (Tramèr & Boneh, Adversarial Training and Robustness for Multiple Perturbations, NeurIPS 2019) a
    share of the features moves instead: those of the largest gradients, all equally far. The share is 1 % there, and by
    default in ``ThreatModel``. A feature that the box stops in the direction of its gradient is not counted.

    Args:
        x: [N, …] in the box.
        grad: like x. A feature whose gradient is 0 or NaN stays.
        x0: like x.
        step_size: the sum of the moves of all features.
        share: of the features that move, in (0, 1]; at least one does.
        eps, lower, upper: as for :func:`scorematch.ops.l1_step`.

    Returns:
        A new tensor of the shape and dtype of x.
    """
    features = x[0].numel() if len(x) else 0
    stopped = ((x >= upper) & (grad > 0)) | ((x <= lower) & (grad < 0))
    moving = torch.full((len(x),), max(1, round(share * features)), device=x.device)
    sizes = torch.full((len(x),), step_size, dtype=accumulator(x.dtype), device=x.device)
    grad = grad.masked_fill(stopped, 0.0)
    return l1_step(x, grad, x0, sizes, moving, eps=eps, lower=lower, upper=upper)
