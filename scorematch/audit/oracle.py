"""How far an estimate is from p_d, where p_d is known."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import check_posterior, check_samples, check_tensor
from ..modes import outside_modes
from ..posteriors.base import Posterior, begin_trace


@outside_modes
def posterior_gradients(posterior: Posterior, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y|x) [N, L] and ĝ_y = ∇ₓ log p(y|x) of every class [N, L, …] at clean x, as an attack sees them.

    With ``centering="network"`` the gradients are the paper's literal Eq. (34), s_y − s_∅.

    Args:
        posterior: the estimate.
        x: [N, …] points, N at least 1.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("posterior", posterior)
    check_samples(x, y, posterior.num_classes, least=1)
    trace = begin_trace(posterior, x, y, nan=True)
    one_hot = torch.eye(posterior.num_classes, dtype=x.dtype, device=x.device)
    rows = [trace.pull_back(row.expand(len(x), -1).contiguous(), torch.zeros_like(x)) for row in one_hot]
    return trace.log_p, torch.stack(rows, 1)


class GradientError(NamedTuple):
    """Errors of ĝ_y against the true g_y = ∇ₓ log p(y|x), weighted with the true p(y|x).

    Attributes:
        relative: E Σ_y p_y ‖ĝ_y − g_y‖² / E Σ_y p_y ‖g_y‖², ≥ 0; 0 is exact, 1 is as good as ĝ = 0. Where p_d is sure
            at all points, so that its gradients are 0, it is infinite, or 0 if those of the estimate are 0, too.
        cosine: E Σ_y p_y ⟨ĝ_y, g_y⟩ / √(E Σ_y p_y ‖ĝ_y‖² · E Σ_y p_y ‖g_y‖²), in [−1, 1].
        amplitude: E Σ_y p_y ⟨ĝ_y, g_y⟩ / E Σ_y p_y ‖ĝ_y‖², the factor on ĝ that would make ``relative`` smallest.

    ``cosine`` and ``amplitude`` are 0 where the gradients of one of the two are.
    """

    relative: float
    cosine: float
    amplitude: float


@outside_modes
def gradient_error(posterior: Posterior, oracle: Posterior, x: Tensor, y: Tensor) -> GradientError:
    """How wrong the gradients of a posterior are.

    Args:
        posterior: the estimate.
        oracle: the truth. Against p_σ the error is that of estimation alone, against p_d it includes the smoothing.
        x: [N, …] points, a sample of the density on which the error is to be averaged.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("oracle", oracle)
    log_p, truth = posterior_gradients(oracle, x, y)
    _, estimate = posterior_gradients(posterior, x, y)
    p = log_p.double().exp()

    def product(a: Tensor, b: Tensor) -> float:
        return float((p * (a.double() * b.double()).flatten(2).sum(2)).sum())

    norm, own, inner = product(truth, truth), product(estimate, estimate), product(estimate, truth)
    relative = ratio(product(estimate - truth, estimate - truth), norm)
    return GradientError(relative, inner / (norm * own) ** 0.5 if norm * own else 0.0, inner / own if own else 0.0)


def ratio(part: float, whole: float) -> float:
    """part / whole, both ≥ 0; 0 / 0 is 0, as nothing is missing there."""
    if whole:
        return part / whole
    return math.inf if part else 0.0


@outside_modes
def kl_error(posterior: Posterior, oracle: Posterior, x: Tensor, y: Tensor, moved: Tensor | None = None) -> Tensor:
    """KL(p_d(·|x') ‖ p̂(·|x')) in nats, [N]; infinite where p̂ rules out a class that p_d does not; NaN where one is.

    Args:
        posterior: the estimate p̂.
        oracle: the truth p_d.
        x: [N, …] clean points, from which paths start.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.
        moved: [N, …] x'; None is x itself.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("posterior", posterior)
    check_posterior("oracle", oracle)
    check_samples(x, y, posterior.num_classes)
    if moved is not None:
        check_tensor("moved", moved)
        if moved.shape != x.shape or moved.dtype != x.dtype:
            given, expected = (f"{t.dtype} {list(t.shape)}" for t in (moved, x))
            raise ValueError(f"moved must be as x, {expected}, got {given}")
        if not bool(moved.isfinite().all()):
            raise ValueError("moved must be finite")
    values = []
    for one in (oracle, posterior):
        trace = begin_trace(one, x, y, nan=True)
        if moved is not None:
            trace.move(moved)
        values.append(trace.log_p)
    truth, estimate = values
    p = truth.exp()
    return torch.where(p == 0, 0.0, p * (truth - estimate)).sum(1)  # 0 log 0 is 0
