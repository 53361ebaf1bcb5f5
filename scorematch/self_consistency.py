"""How self-consistent a model is, where p_d(y|x) is known: measures of what the SCORE objective minimises.

Robust accuracy asks whether a model keeps the label of x within B(x), even where p_d(y|x') does not. These measures ask
whether the model agrees with p_d at every point of B(x) (Eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attacks.classifier import gradient_of
from .attacks.pgd import ascend
from .divergences import check_kind
from .inputs import check_callable, check_count, check_instance, check_points, check_posterior
from .model_state import as_found
from .modes import outside_modes
from .objectives.moving_target import direct_weights
from .objectives.outcome import check_comparable, training_logits
from .ops.logit_divergence import logit_divergence
from .posteriors.base import Posterior, Trace, begin_trace, check_known, check_scores
from .threat_model import ThreatModel


class Consistency(NamedTuple):
    """How far a model is from p_d; one value a sample, [N], on the device of x.

    Attributes:
        divergence: D(p_d(·|x) ‖ q(x)) at clean x, in nats for KL.
        r_score: the largest D(p_d(·|x') ‖ q(x')) found in B(x); its mean is R_SCORE (Eq. 4, Eq. 6).
        disagrees: bool, whether at some point of these searches the class of the model is not the most likely class of
            p_d there; a NaN among the logits disagrees. They look for divergence: of a model that is close to p_d they
            miss many points where the class differs, which :func:`scorematch.bounds.zero_one_errors` searches for by
            itself.
        x_score: [N, …] the points at which ``r_score`` was found.

    A NaN among the logits makes the divergence there NaN, and NaN counts as larger than any number.
    """

    divergence: Tensor
    r_score: Tensor
    disagrees: Tensor
    x_score: Tensor


@outside_modes
def consistency(
    model: Callable[[Tensor], Tensor],
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    divergence: str = "kl",
    steps: int = 20,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Consistency:
    """Search B(x) for the point where the model is furthest from the posterior, with the gradient of Eq. (33).

    One search starts at clean x, ``restarts`` more at random points, and a last one, with a quarter of the step size,
    at the worst point so far; every iterate is judged. What it finds is a lower bound of the maximum.

    Args:
        model: maps [N, …] to logits [N, L]; used in eval mode, outside of autocast, and left as found.
        posterior: p_d, in closed form; an estimate gives the distance to that estimate.
        x: [N, …] clean inputs inside the box.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.
        threat_model: B(x) and the step size.
        divergence: name of D, see :data:`scorematch.divergences.KINDS`.
        steps: steps of each search, ≥ 1.
        restarts: random starts beside the clean one, ≥ 0.
        generator: their randomness, on the device of x.

    Returns:
        One value for each sample, see :class:`Consistency`.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or values or scores of the posterior are NaN at
            clean x; the message names it.
    """
    check_callable("model", model)
    check_posterior("posterior", posterior)
    check_kind(divergence)
    check_points(x, y, threat_model)
    check_instance("threat_model", threat_model, ThreatModel)
    check_count("steps", steps)
    check_count("restarts", restarts, least=0)
    with as_found(model):
        return _searched(model, posterior, x, y, threat_model, divergence, steps, restarts, generator)


def _searched(
    model: Callable[[Tensor], Tensor],
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    divergence: str,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> Consistency:
    """:func:`consistency` of arguments that are checked."""
    judge = _Judge(model, divergence, x)
    at_clean = begin_trace(posterior, x, y)
    check_known(at_clean.log_p)
    check_scores(at_clean, x)
    judge.look(at_clean, x)
    clean = judge.worst.clone()
    for search in range(restarts + 2):
        trace = begin_trace(posterior, x, y)

        def gradient(point: Tensor, trace: Trace = trace) -> Tensor:
            trace.move(point)
            return judge.look(trace, point)

        start, moves = x, threat_model
        if search == restarts + 1:
            start, moves = judge.x_worst.clone(), threat_model.replace(step_size=0.25 * threat_model.step_length)
        elif search > 0:
            start = threat_model.random_start(x, generator)
        last = ascend(x, gradient, moves, steps=steps, start=start)
        trace.move(last)
        judge.look(trace, last)
    return Consistency(clean, judge.worst, judge.disagrees, judge.x_worst)


class _Judge:
    """The worst point of each sample so far."""

    def __init__(self, model: Callable[[Tensor], Tensor], kind: str, x: Tensor) -> None:
        self.model = model
        self.kind = kind
        self.worst = x.new_full((len(x),), -torch.inf)
        self.disagrees = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.x_worst = x.detach().clone()

    def look(self, trace: Trace, x: Tensor) -> Tensor:
        """Judge x [N, …], where the trace is; the gradient there of D in x."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            logits = training_logits(self.model, point)
        check_comparable(logits, trace.log_p)
        weights, grad_logits = direct_weights(logits.detach(), trace.log_p, self.kind)
        model_gradient = gradient_of(logits, point, grad_logits, self.model)
        values = logit_divergence(logits.detach(), trace.log_p, kind=self.kind)
        worse = (values > self.worst) | (values.isnan() & ~self.worst.isnan())
        self.worst = torch.where(worse, values, self.worst)
        self.x_worst[worse] = x.detach()[worse]
        self.disagrees |= (logits.argmax(1) != trace.log_p.argmax(1)) | logits.isnan().any(1)
        return trace.pull_back(weights, model_gradient).nan_to_num(nan=0.0)  # a feature of NaN stays where it is
