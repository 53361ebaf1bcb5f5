"""Gaussian kernel density of the training set."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ClassScorePosterior


class KernelDensity(ClassScorePosterior):
    """p_σ(x, y) = (1/M) Σ_{i: y_i = y} N(x; x_i, σ² I): the exact p_σ of the empirical distribution.

    In high dimension and for small σ its gradient is that of the nearest neighbours. A query of N points needs an
    [N, M] matrix of distances.

    Args:
        x: [M, …] training inputs.
        y: int64 [M] labels in [0, num_classes).
        num_classes: L; every class needs a sample.
        sigma: standard deviation of the kernel, in input units; > 0.

    Raises:
        ValueError: an argument is outside its range, or a class has no sample.
    """

    points: Tensor
    log_counts: Tensor

    def __init__(self, x: Tensor, y: Tensor, *, num_classes: int, sigma: float) -> None:
        super().__init__()
        if not sigma > 0.0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples but y has {len(y)}")
        counts = torch.bincount(y, minlength=num_classes)
        if len(counts) > num_classes:
            raise ValueError(f"labels must lie in [0, {num_classes}), got {int(y.max())}")
        if not (counts > 0).all():
            raise ValueError(f"class {int((counts == 0).nonzero()[0])} has no sample")
        self.num_classes = num_classes
        self.sigma = sigma
        self.counts: list[int] = counts.tolist()
        self.register_buffer("points", x.flatten(1)[y.argsort(stable=True)].clone())  # sorted by class

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            flat = x.flatten(1)
            points = self.points.to(flat.dtype)
            # ‖x‖² is common to all points and cancels in the posterior and in every softmax below.
            exponents = (flat @ points.T - 0.5 * points.square().sum(1)) / self.sigma**2  # [N, M]
            log_joint = flat.new_empty(len(flat), self.num_classes)
            scores = flat.new_empty(len(flat), self.num_classes, flat.shape[1])
            for label, (e, p) in enumerate(
                zip(exponents.split(self.counts, dim=1), points.split(self.counts), strict=True)
            ):
                log_joint[:, label] = e.logsumexp(1)
                scores[:, label] = (e.softmax(1) @ p - flat) / self.sigma**2
        return log_joint.log_softmax(1), scores.reshape(len(x), self.num_classes, *x.shape[1:])
