"""The errors that the theorems compare, and the constant C^D of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import check_kind
from ..modes import outside_modes
from ..ops.logit_divergence import logit_divergence
from ..posteriors.base import Posterior
from ..threat_model import ThreatModel
from .estimates import Estimate, estimate
from .search import Ascent, Problem, clean_values, explore


class RobustErrors(NamedTuple):
    """What one model, one p_d and one D give at each sample, all maxima over the same points of B(x).

    p = p_d(y|·) and q = p_θ(y|·). The values are [N], in nats for KL; a mean over p_d(x) makes the error of the paper.

    Attributes:
        divergence: name of D.
        standard: D(p(x) ‖ q(x)), Eq. (1).
        madry: max_{x'} D(p(x) ‖ q(x')), Eq. (3) for KL and Eq. (5).
        score: max_{x'} D(p(x') ‖ q(x')), Eq. (4) for KL and Eq. (6).
        constant: max_{x'} D(p(x) ‖ p(x')), whose mean is C^D (Theorem 1; Eq. 39 for KL); it does not depend on the
            model.
        invariance: max_{x'} D(q(x) ‖ q(x')), the second term of TRADES (Eq. 21) before β.
    """

    divergence: str
    standard: Tensor
    madry: Tensor
    score: Tensor
    constant: Tensor
    invariance: Tensor

    def trades(self, beta: float) -> Tensor:
        """D(p(x) ‖ q(x)) + β max_{x'} D(q(x) ‖ q(x')), the objective of TRADES (Eq. 21), [N].

        Args:
            beta: β ≥ 0.

        Raises:
            ValueError: β is negative.
        """
        if not beta >= 0.0:
            raise ValueError(f"beta must not be negative, got {beta}")
        return self.standard + beta * self.invariance


@outside_modes
def robust_errors(
    model: Callable[[Tensor], Tensor],
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    divergences: str | Sequence[str],
    candidates: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, RobustErrors]:
    """All errors of Theorems 1 to 3 and Corollary 1, for one or several divergences, at common points of B(x).

    Without candidates, gradient ascents look for each maximum of each divergence, and every point that any of them
    visits counts for all. What is found is then a **lower bound** of each maximum over B(x). The inequalities between
    the errors hold for the visited points as they do for B(x). A violation is therefore a mistake in the code or comes
    from a D that is not a metric; a weak search cannot cause it. But the gap between the two sides of an inequality may
    differ from the gap over B(x).

    With candidates the maxima are those over the candidates and x, exactly. On a grid in one dimension they are the
    maxima over B(x), up to the spacing.

    Args:
        model: maps [N, …] to logits [N, L] of the posterior's dtype; differentiable where there are no candidates;
            used in eval mode and left as found.
        posterior: p_d, in closed form; an estimate gives the errors against that estimate.
        x: [N, …] clean inputs inside the box, draws or quadrature nodes of p_d(x).
        y: int64 [N] labels; read only by posteriors that are anchored at labels.
        threat_model: B(x) and the step size.
        divergences: names of D, see :data:`scorematch.divergences.KINDS`; for Corollary 1 ``("l1", "kl")``.
        candidates: [N, M, …] points x' of each sample, in B(x), like x; repeat some where samples have fewer. They
            need a posterior with a value at every point by itself.
        steps: steps of each ascent, ≥ 1.
        restarts: random starts of each, ≥ 1, each also mirrored at x.
        generator: their randomness, on the device of x.

    Returns:
        :class:`RobustErrors` by the name of D.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    kinds = _checked(divergences)
    problem = Problem(model, posterior, x, y, threat_model)
    log_p, logits = clean_values(problem)
    judge = _Judge(kinds, log_p, logits)
    ascents = [ascent for kind in kinds for ascent in _ascents(kind, log_p, logits)]
    explore(problem, ascents, judge.look, candidates=candidates, steps=steps, restarts=restarts, generator=generator)
    return judge.found


class DataConstant(NamedTuple):
    """C^D: how much p_d(y|x) itself changes within B(x).

    Attributes:
        values: [N] max_{x'} D(p_d(·|x) ‖ p_d(·|x')), ≥ 0, in nats for KL.
        mean: C^D, their mean over p_d(x).
    """

    values: Tensor
    mean: Estimate


@outside_modes
def data_constant(
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    divergence: str = "kl",
    candidates: Tensor | None = None,
    weights: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> DataConstant:
    """C^D = E max_{x' ∈ B(x)} D(p_d(·|x) ‖ p_d(·|x')) (Theorem 1; Eq. 39 for KL).

    It is the robust error R_Madry of p_d itself. Where D is not symmetric the order matters: p_d(·|x) comes first.
    Found by gradient ascent it is a lower bound; with candidates it is exact over these.

    On the toy of Fig. 1, C^KL = 0.0771 nats, C^l1 = 0.244, C^l2 = 0.173 and C^linf = 0.122. Fig. 3 gives 0.12 for
    C^l2, which fits the distance of the single numbers p_d(y=1|x): over both classes l2 is √2 times as much.

    Args:
        divergence: name of D, see :data:`scorematch.divergences.KINDS`.
        weights: [N] quadrature weights of p_d(x), see :func:`scorematch.bounds.estimate`; None: x are draws.

    The other arguments are those of :func:`robust_errors`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def indifferent(points: Tensor) -> Tensor:
        return points.new_zeros(len(points), posterior.num_classes)

    check_kind(divergence)
    problem = Problem(indifferent, posterior, x, y, threat_model)
    log_p, _ = clean_values(problem)
    worst = log_p.new_zeros(len(x))

    def look(found: Tensor, _: Tensor) -> None:
        torch.maximum(worst, _largest(divergence, log_p, found), out=worst)

    climb = Ascent(lambda found, _: logit_divergence(found, log_p, kind=divergence), from_clean=False)
    explore(problem, [climb], look, candidates=candidates, steps=steps, restarts=restarts, generator=generator)
    return DataConstant(worst, estimate(worst, weights))


def _checked(divergences: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(divergences, str | Sequence) or not divergences:
        raise ValueError(f"divergences must name at least one, got {divergences!r}")
    kinds = (divergences,) if isinstance(divergences, str) else tuple(divergences)
    return tuple(check_kind(kind, "divergences") for kind in kinds)


def _ascents(kind: str, log_p: Tensor, logits: Tensor) -> list[Ascent]:
    """One for each maximum of :class:`RobustErrors`; log_p and logits [N, L] are those at clean x."""
    return [
        Ascent(lambda _, z: logit_divergence(z, log_p, kind=kind)),
        Ascent(lambda found, z: logit_divergence(z, found, kind=kind)),
        Ascent(lambda found, _: logit_divergence(found, log_p, kind=kind), from_clean=False),
        Ascent(lambda _, z: logit_divergence(z, logits, kind=kind), from_clean=False),
    ]


class _Judge:
    """The largest value of each error so far, beginning with x' = x."""

    def __init__(self, kinds: Sequence[str], log_p: Tensor, logits: Tensor) -> None:
        self.log_p, self.logits = log_p, logits
        self.found: dict[str, RobustErrors] = {}
        for kind in kinds:
            here = logit_divergence(logits, log_p, kind=kind)
            none = torch.zeros_like(here)
            self.found[kind] = RobustErrors(kind, here, here, here, none, none)

    def look(self, log_p: Tensor, logits: Tensor) -> None:
        """log p and logits [N, M, L] at M points of each sample."""
        for kind, before in self.found.items():
            self.found[kind] = before._replace(
                madry=torch.maximum(before.madry, _largest(kind, self.log_p, logits)),
                score=torch.maximum(before.score, _largest(kind, log_p, logits)),
                constant=torch.maximum(before.constant, _largest(kind, self.log_p, log_p)),
                invariance=torch.maximum(before.invariance, _largest(kind, self.logits, logits)),
            )


def _largest(kind: str, target: Tensor, found: Tensor) -> Tensor:
    """max over M points of D(softmax(target) ‖ softmax(found)) [N]; target [N, L] or [N, M, L], found [N, M, L]."""
    count, points, classes = found.shape
    target = target if target.dim() == 3 else target[:, None].expand_as(found)
    values = logit_divergence(found.reshape(-1, classes), target.reshape(-1, classes), kind=kind)
    return values.reshape(count, points).amax(1)
