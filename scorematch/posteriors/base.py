"""What every data posterior offers.

A posterior stands for p(y|x') of one density p_σ, the data convolved with Gaussian noise of standard deviation σ.
An attack asks two things of it, again and again along its path: the value log p(y|x'), and the pull-back of weights
w_y to Σ_y w_y ∇ₓ log p(y|x'). :class:`Trace` answers both, and remembers the path for estimators that need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.score_step import score_step


class Trace(ABC):
    """log p(y|x') followed along one attack that starts at clean x.

    Attributes:
        x: [N, …] the current point.
        log_p: [N, L] log p(y|x) there, normalised, without a graph.
    """

    x: Tensor
    log_p: Tensor

    @abstractmethod
    def move(self, x: Tensor) -> None:
        """Go on to x [N, …]; updates ``x`` and ``log_p``."""

    @abstractmethod
    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        """grad + Σ_y c_y ∇ₓ log p(y|x) at the current point.

        Args:
            weights: [N, L], c_y = ∂D/∂ log p_y. With centring by the posterior, adding λ p_y to them changes nothing.
            grad: [N, …] what is added to, usually the model gradient.

        Returns:
            [N, …].
        """


class Posterior(nn.Module, ABC):
    """Estimate of p_d(y|x) over ``num_classes`` classes; a module, so it moves between devices and saves its state.

    It is fixed before robust training begins, and never trained on adversarial examples.
    """

    num_classes: int
    centering: str = "posterior"

    @abstractmethod
    def trace(self, x: Tensor, y: Tensor) -> Trace:
        """Begin a trace at clean inputs.

        Args:
            x: [N, …] clean inputs.
            y: their labels, int64 [N], or probabilities [N, L]; only estimators that anchor at labels read them.

        Returns:
            A trace whose current point is x.
        """

    def clean_log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y|x) [N, L] at clean inputs, without a graph: where :meth:`trace`, of the same arguments, begins."""
        return self.trace(x, y).log_p


class PointwisePosterior(Posterior):
    """A posterior that has a value at every point, whatever the path. Calling it gives log p(y|x) [N, L]."""

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        del y
        return self._trace_at(x)

    @abstractmethod
    def _trace_at(self, x: Tensor) -> Trace: ...

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """log p(y|x), [N, L]; its gradient is that of the posterior, so that it can be attacked like a model."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y|x) [N, L] for x [N, …], differentiable in x."""
        log_p: Tensor = self(x)
        return log_p


class ClassScorePosterior(PointwisePosterior):
    """A posterior known by its values and by its class scores s_y = ∇ₓ log p(x|y)."""

    @abstractmethod
    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and class scores, without a graph.

        Args:
            x: [N, …].

        Returns:
            log p(y|x) [N, L], and s_y(x) [N, L, …] up to a field that is the same for all classes.
        """

    def _trace_at(self, x: Tensor) -> Trace:
        return _ClassScoreTrace(self, x)

    def forward(self, x: Tensor) -> Tensor:
        log_p: Tensor = _LogPosterior.apply(x, self)
        return log_p


class _ClassScoreTrace(Trace):
    def __init__(self, posterior: ClassScorePosterior, x: Tensor) -> None:
        self.posterior = posterior
        self.move(x)

    def move(self, x: Tensor) -> None:
        self.x = x.detach()
        self.log_p, self.scores = self.posterior.log_prob_and_scores(self.x)

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        return score_step(centred(weights, self.log_p), self.scores, grad)


class _LogPosterior(torch.autograd.Function):
    """Forward: log p(y|x). Backward: c ↦ Σ_y w_y s_y with w = c − p Σ c, so the unconditional score cancels.

    ∇ₓ log p(y|x) = s_y − Σ_k p_k s_k (Eq. 34 with the unconditional score written as the posterior mean of s).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, posterior: ClassScorePosterior) -> Tensor:
        log_p, scores = posterior.log_prob_and_scores(x.detach())
        ctx.save_for_backward(log_p, scores)
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_p, scores = ctx.saved_tensors
        return score_step(centred(grad, log_p), scores, torch.zeros_like(scores[:, 0])), None


def centred(weights: Tensor, log_p: Tensor) -> Tensor:
    """w = c − p Σ c for c [N, L] and log p [N, L]: the weights of the class scores in ∇ₓ of a function of log p."""
    return weights - log_p.exp() * weights.sum(1, keepdim=True)
