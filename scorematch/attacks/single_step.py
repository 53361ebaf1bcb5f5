"""Attacks of one gradient, for training: FGSM from a random start, projected or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.pgd_step import pgd_step
from ..threat_model import ThreatModel


class SingleStep(NamedTuple):
    """Lengths in units of eps."""

    start: float  # radius of the ball from which the start is drawn
    step: float  # length of the step
    projected: bool  # back to B(x) after it; else to the box alone


SINGLE_STEP = {"fgsm_rs": SingleStep(1.0, 1.25, True), "n_fgsm": SingleStep(2.0, 1.0, False)}


def _known(attack: str, threat_model: ThreatModel) -> SingleStep:
    if attack not in SINGLE_STEP:
        raise ValueError(f"attack must be one of {', '.join(SINGLE_STEP)}, got {attack!r}")
    if threat_model.norm == "l1":
        raise ValueError(f"attack {attack!r} is for a threat_model of norm linf or l2, got norm l1: use 'pgd'")
    return SINGLE_STEP[attack]


def single_step_start(
    x: Tensor, threat_model: ThreatModel, attack: str, generator: torch.Generator | None = None
) -> Tensor:
    """Where a single-step attack takes its gradient: uniform in the ball of its radius, clipped to the box.

    Args, Raises: as for :func:`single_step`.

    Returns:
        [N, …]; for ``"n_fgsm"`` up to 2 eps away from x.
    """
    radius = _known(attack, threat_model).start * threat_model.eps
    # The ball of the start may be larger than the box.
    ball = threat_model.replace(eps=radius, lower=-math.inf, upper=math.inf)
    with torch.no_grad():
        return ball.random_start(x, generator).clamp(threat_model.lower, threat_model.upper)


def single_step(
    x: Tensor,
    gradient: Callable[[Tensor], Tensor],
    threat_model: ThreatModel,
    *,
    attack: str,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step along the gradient at a random point.

    Args:
        x: [N, …] clean inputs.
        gradient: maps x' [N, …] to the direction of ascent there, same shape.
        threat_model: eps, norm and box; the attack has its own lengths of steps. Both attacks were published for linf;
            with l2, balls and directions are Euclidean. l1 is refused, since one sparse step is too weak an attack.
        attack: ``"fgsm_rs"``: start in B(x), a step of 1.25 eps, projected to B(x);
            ``"n_fgsm"``: start within 2 eps, a step of eps, clipped to the box alone, so that the point may be up to
            3 eps away from x.
        start: [N, …], the point of the gradient; None draws it, see :func:`single_step_start`.
        generator: randomness of the start, on the device of x.

    Returns:
        [N, …] without a graph.

    Raises:
        ValueError: ``attack`` is neither, or the norm is l1.

    References:
        Wong et al., Fast is better than free, ICLR 2020 (fgsm_rs).
        de Jorge et al., Make some noise: Reliable and efficient single-step adversarial training, NeurIPS 2022 (n_fgsm)
    """
    kind = _known(attack, threat_model)
    with torch.no_grad():
        first = single_step_start(x, threat_model, attack, generator) if start is None else start
        return pgd_step(
            first,
            gradient(first),
            x,
            norm=threat_model.norm,
            step_size=kind.step * threat_model.eps,
            eps=threat_model.eps if kind.projected else math.inf,
            lower=threat_model.lower,
            upper=threat_model.upper,
        )
