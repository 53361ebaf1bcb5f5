"""The mean of several posteriors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..inputs import check_instance, check_posterior
from .base import PointwisePosterior, Posterior, Trace, check_pull


class Ensemble(Posterior):
    """p(y|x) = (1/M) Σ_m p_m(y|x): the mean of the probabilities of M posteriors.

    Members that were trained on different folds of the data, or from different seeds, err in different directions; the
    mean errs less. The gradient of log p(y|x) is the mean of the members' gradients, weighted by their
    responsibilities p_m(y|x) / Σ_k p_k(y|x). It needs as many evaluations as it has members.

    Args:
        members: posteriors over the same classes, at least one, all with ``centering="posterior"``.

    Raises:
        TypeError: one is no posterior; the message says which.
        ValueError: there is none, their numbers of classes differ, or one has another ``centering``.
    """

    def __init__(self, members: Sequence[Posterior]) -> None:
        super().__init__()
        listed = list(members) if isinstance(members, Iterable) else [members]
        for index, member in enumerate(listed):
            check_posterior(f"members[{index}]", member)
            check_instance(f"members[{index}]", member, Posterior)
        members = listed
        if not members:
            raise ValueError("members must be at least one posterior, got none")
        classes = {member.num_classes for member in members}
        if len(classes) > 1:
            raise ValueError(f"members must have equally many classes each, got {sorted(classes)}")
        centerings = [member.centering for member in members]
        if any(centering != "posterior" for centering in centerings):
            raise ValueError(f"members must have centering='posterior', got {centerings}")
        self.members = nn.ModuleList(members)
        (self.num_classes,) = classes

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        return _EnsembleTrace([member.trace(x, y) for member in cast("list[Posterior]", list(self.members))])

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`log_prob`, so that an ensemble can be attacked like a model."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y|x) [N, L] for x [N, …], differentiable in x.

        Raises:
            TypeError: a member has no value at a point by itself, such as a score network.
        """
        values = []
        for member in self.members:
            if not isinstance(member, (PointwisePosterior, Ensemble)):
                raise TypeError(f"{type(member).__name__} has values along a path only: use trace")
            values.append(member.log_prob(x))
        stacked = torch.stack(values)  # [M, N, L]
        impossible = stacked.isneginf().all(0)  # with every member: the gradient of logsumexp would be NaN
        total = stacked.masked_fill(impossible, 0.0).logsumexp(0) - math.log(len(values))
        return total.masked_fill(impossible, -torch.inf)


class _EnsembleTrace(Trace):
    def __init__(self, members: list[Trace]) -> None:
        self.members = members
        self._vote()

    def move(self, x: Tensor) -> None:
        for member in self.members:
            member.move(x)
        self._vote()

    def _vote(self) -> None:
        self.x = self.members[0].x
        values = torch.stack([member.log_p for member in self.members])  # [M, N, L]
        # A class that has no probability with any member is equally that of all of them.
        self.responsibility = values.clamp(min=torch.finfo(values.dtype).min).softmax(0)
        self.log_p = values.logsumexp(0).log_softmax(1)

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        check_pull(weights, grad, self)
        for member, share in zip(self.members, self.responsibility, strict=True):
            grad = member.pull_back(weights * share, grad)
        return grad
