"""Points of B(x) at which everything is evaluated: those of gradient ascents, or those that the caller brings.

Every maximum of a theorem is taken over the same points. For finitely many points the theorems hold exactly as they do
for B(x), since their proofs use nothing else. A violated inequality is therefore an error, and never due to a weak
search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks.classifier import check_logits, gradient_of, output_of
from ..attacks.pgd import ascend
from ..inputs import check_callable, check_count, check_instance, check_points, check_posterior, check_tensor, handed
from ..model_state import as_found
from ..posteriors import Ensemble
from ..posteriors.base import PointwisePosterior, Posterior, begin_trace, check_scores
from ..threat_model import ORDERS, ThreatModel

ROWS = 2**15  # candidates that are evaluated at a time
FEATURES = 2**24  # and their features


class Problem(NamedTuple):
    """A model, p_d, and the samples around which they are compared; a module is borrowed with ``as_found``."""

    model: Callable[[Tensor], Tensor]
    posterior: Posterior
    x: Tensor
    y: Tensor
    threat_model: ThreatModel


class Ascent(NamedTuple):
    """What an ascent follows.

    Attributes:
        value: maps log p(y|x') [N, L] and the logits of the model at x' [N, L] to one value a sample, differentiable.
        from_clean: whether it has a direction at clean x; a distance from x itself has none there.
        starts: first iterates, [N, …] each, beside the others.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    from_clean: bool = True
    starts: Sequence[Tensor] = ()


Look = Callable[[Tensor, Tensor], None]  # judges log p [N, M, L] and logits [N, M, L] at M points of each sample


def clean_values(problem: Problem) -> tuple[Tensor, Tensor]:
    """log p(y|x) and the logits of the model at clean x, both [N, L], without a graph.

    Raises:
        ValueError: x and y do not fit each other or the box, or the model does not return logits, or those of other
            classes than the posterior.
        TypeError: the model computes in another dtype than the posterior.
    """
    check_callable("model", problem.model)
    check_posterior("posterior", problem.posterior)
    check_points(problem.x, problem.y, problem.threat_model)
    check_instance("threat_model", problem.threat_model, ThreatModel)
    log_p = begin_trace(problem.posterior, problem.x, problem.y).log_p
    with as_found(problem.model), torch.no_grad():
        logits = output_of(problem.model, problem.x)
    check_logits(logits, problem.x)
    if logits.shape != log_p.shape:
        raise ValueError(f"model must return logits {list(log_p.shape)} as the posterior, got {list(logits.shape)}")
    if logits.dtype != log_p.dtype:
        raise TypeError(f"model and posterior must have the same dtype, got {logits.dtype} and {log_p.dtype}")
    return log_p, logits


def explore(
    problem: Problem,
    ascents: Sequence[Ascent],
    look: Look,
    *,
    candidates: Tensor | None,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> None:
    """Show ``look`` points of B(x): the candidates if there are any, else every iterate of every ascent.

    Each ascent starts at clean x, at its own starts, and at ``restarts`` random points and their mirror images about x,
    so that both sides of x are seen. One more search, with a quarter of the step size, starts at the best point so far.

    Raises:
        ValueError, TypeError: an argument is outside its range, or an ascent meets a model that is not differentiable,
            or a posterior whose gradient at clean x is NaN; the message names it.
    """
    check_count("steps", steps)
    check_count("restarts", restarts)
    with as_found(problem.model):
        if candidates is not None:
            _look_at(problem, candidates, look)
            return
        check_scores(begin_trace(problem.posterior, problem.x, problem.y), problem.x)
        for ascent in ascents:
            _climb(problem, ascent, look, steps, restarts, generator)


def _climb(
    problem: Problem, ascent: Ascent, look: Look, steps: int, restarts: int, generator: torch.Generator | None
) -> None:
    model, posterior, x, y, threat_model = problem
    best = x.new_full((len(x),), -torch.inf)
    x_best = x.detach().clone()

    def search(start: Tensor, moves: ThreatModel) -> None:
        trace = begin_trace(posterior, x, y)

        def gradient(at: Tensor) -> Tensor:
            trace.move(at)
            with torch.enable_grad():
                point = at.detach().requires_grad_()
                logits = model(handed(point))
                log_p, z = trace.log_p.detach().requires_grad_(), logits.detach().requires_grad_()
                value = ascent.value(log_p, z)
                weights, by_logits = torch.autograd.grad(
                    value.sum(), [log_p, z], allow_unused=True, materialize_grads=True
                )
            value = value.detach()
            look(log_p.detach()[:, None], z.detach()[:, None])
            better = value > best
            best[better] = value[better].to(best.dtype)
            x_best[better] = at.detach()[better]
            by_model = gradient_of(logits, point, by_logits, model)
            direction = trace.pull_back(weights.contiguous(), by_model)
            return direction.nan_to_num(nan=0.0)  # a feature of NaN stays where it is

        gradient(ascend(x, gradient, moves, steps=steps, start=start))

    for start in [x] * ascent.from_clean + list(ascent.starts):
        search(start, threat_model)
    for _ in range(restarts):
        start = threat_model.random_start(x, generator)
        search(start, threat_model)
        search(threat_model.project(2 * x - start, x), threat_model)
    search(x_best.clone(), threat_model.replace(step_size=0.25 * threat_model.step_length))


def _look_at(problem: Problem, candidates: Tensor, look: Look) -> None:
    """Evaluate the candidates [N, M, …], a part of the M at a time."""
    posterior, x = problem.posterior, problem.x
    if not isinstance(posterior, PointwisePosterior | Ensemble):
        raise TypeError(
            "candidates need a posterior that has a value at every point by itself, "
            f"got {type(posterior).__name__}, whose values belong to a path"
        )
    _check_candidates(candidates, x, problem.threat_model)
    count = len(x)
    features = max(1, x[0].numel()) if count else 1
    part = max(1, min(ROWS, FEATURES // features) // max(1, count))
    with torch.no_grad():
        for points in candidates.split(part, dim=1):
            rows = points.reshape(-1, *x.shape[1:])
            log_p, logits = posterior.log_prob(rows), problem.model(rows)
            look(log_p.reshape(count, points.shape[1], -1), logits.reshape(count, points.shape[1], -1))


def _check_candidates(candidates: Tensor, x: Tensor, threat_model: ThreatModel) -> None:
    check_tensor("candidates", candidates)
    if candidates.dim() != x.dim() + 1 or candidates.shape[0] != len(x) or candidates.shape[2:] != x.shape[1:]:
        expected = ", ".join(["N", "M", *map(str, x.shape[1:])])
        raise ValueError(
            f"candidates must be [{expected}] with N = {len(x)} and M points for each sample, "
            f"got {list(candidates.shape)}"
        )
    if candidates.dtype != x.dtype or candidates.device != x.device:
        raise ValueError(
            f"candidates must be {x.dtype} on {x.device} as x is, got {candidates.dtype} on {candidates.device}"
        )
    if candidates.numel() == 0:
        raise ValueError(f"candidates must hold at least one point for each sample, got {list(candidates.shape)}")
    offsets = (candidates - x[:, None]).flatten(2)
    lengths = offsets.norm(dim=2, p=ORDERS[threat_model.norm])
    farthest = float(lengths.max())
    rounding = 1e-5 * threat_model.eps + 8 * torch.finfo(x.dtype).eps * float(x.abs().max())
    if not farthest <= threat_model.eps + rounding:
        raise ValueError(f"candidates must lie within eps = {threat_model.eps} of x, got a distance of {farthest:g}")
    low, high = (float(v) for v in torch.aminmax(candidates))
    if not (low >= threat_model.lower and high <= threat_model.upper):
        raise ValueError(
            f"candidates must lie in the box [{threat_model.lower}, {threat_model.upper}] of the threat model, "
            f"got values in [{low:g}, {high:g}]"
        )
