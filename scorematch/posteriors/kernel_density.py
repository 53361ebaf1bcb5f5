"""Gaussian kernel density of the training set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import ClassScorePosterior, check_deviation, check_point, class_sizes


class KernelDensity(ClassScorePosterior):
    """p_σ(x, y) = (1/M) Σ_{i: y_i = y} N(x; x_i, σ² I): the exact p_σ of the empirical distribution.

    In high dimension and for small σ its gradient is that of the nearest neighbours. A query of N points needs an
    [N, M] matrix of distances. It is computed in float64 whatever the dtype of x: the log-densities of two classes may
    be thousands of nats each where they differ by one.

    The state holds the points and how many there are of each class. σ is a setting, as it is of the other posteriors.

    Args:
        x: [M, …] training inputs.
        y: int64 [M] labels in [0, num_classes).
        num_classes: L; every class needs a sample.
        sigma: standard deviation of the kernel, in input units; > 0.

    Raises:
        ValueError: an argument is outside its range, or a class has no sample; later, images [N, …] are asked about
            that have another shape than those of x.
    """

    points: Tensor
    class_sizes: Tensor

    def __init__(self, x: Tensor, y: Tensor, *, num_classes: int, sigma: float) -> None:
        super().__init__()
        counts = class_sizes(x, y, num_classes)
        check_deviation(sigma, x)
        if not (counts > 0).all():
            raise ValueError(f"class {int((counts == 0).nonzero()[0])} has no sample")
        self.num_classes = num_classes
        self.sigma = sigma
        self._shape = x.shape[1:]
        self.register_buffer("points", x.detach().flatten(1)[y.argsort(stable=True)])  # sorted by class
        self.register_buffer("class_sizes", counts)
        self._sizes: list[int] = counts.tolist()  # a query must not wait for the device to tell them

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._sizes = self.class_sizes.tolist()

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_point(x, self.points, self._shape)
        with torch.no_grad():
            flat = x.flatten(1)
            wide = flat.double()
            log_joint = wide.new_empty(len(flat), self.num_classes)
            scores = flat.new_empty(len(flat), self.num_classes, flat.shape[1])
            for label, points in enumerate(self.points.split(self._sizes)):
                own = points.double()
                # ‖x‖² is common to all points and cancels in the posterior and in every softmax.
                exponents = (wide @ own.T - 0.5 * own.square().sum(1)) / self.sigma**2  # [N, points of the class]
                log_joint[:, label] = exponents.logsumexp(1)
                # The mean relative to one of the points, or what they have in common would take its last digits.
                share, origin = exponents.softmax(1).to(flat.dtype), points[0].to(flat.dtype)
                scores[:, label] = (share @ (points.to(flat.dtype) - origin) - (flat - origin)) / self.sigma**2
            log_p = log_joint.log_softmax(1).to(x.dtype)
        return log_p, scores.reshape(len(x), self.num_classes, *x.shape[1:])
