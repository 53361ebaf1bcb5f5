"""How an objective finds x': where its attack starts, what it runs, and as what."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..attacks.pgd import ascend
from ..attacks.single_step import SINGLE_STEP, single_step, single_step_start
from ..divergences import check_kind
from ..graphs import Attack, AttackGraphs
from ..inputs import check_attack, check_inputs, check_like
from ..noise import normal_like
from ..ops._checks import check_number
from ..threat_model import Perturbations, ThreatModel
from ..weight_perturbation import WeightPerturbation
from .outcome import Outcome

ATTACKS = ("pgd", *SINGLE_STEP)
STARTS = ("uniform", "gaussian")
GAUSSIAN_START = 1e-3  # standard deviation, in input units, of the start of TRADES as published


def check_search(
    model: nn.Module, x: Tensor, y: Tensor, threat_model: Perturbations, steps: int, divergence: str, clip: float
) -> None:
    """What every objective with an attack checks before it; see :func:`scorematch.inputs.check_inputs` for x, y.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
    """
    check_kind(divergence)
    check_attack(threat_model, steps)
    check_number("clip", clip)
    check_inputs(model, x, y, threat_model)


def first_iterate(
    x: Tensor,
    threat_model: Perturbations,
    start: str = "uniform",
    generator: torch.Generator | None = None,
    attack: str = "pgd",
) -> Tensor:
    """Where an attack during training starts.

    Args:
        x: [N, …] clean inputs.
        threat_model: B(x).
        start: of PGD: ``"uniform"`` in B(x), or ``"gaussian"``, x + 0.001 ω projected to B(x).
        generator: randomness, on the device of x.
        attack: ``"pgd"``; ``"fgsm_rs"`` and ``"n_fgsm"`` have a start of their own and ignore ``start``.

    Returns:
        [N, …] inside B(x), but for ``"n_fgsm"``: within 2 eps.

    Raises:
        ValueError: ``start`` or ``attack`` is none of these.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}")
    if attack in SINGLE_STEP:
        return single_step_start(x, _ball(threat_model, attack), attack, generator)
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, or a tensor like x, got {start!r}")
    with torch.no_grad():
        if start == "uniform":
            return threat_model.random_start(x, generator)
        noise = normal_like(x, generator)
        return threat_model.project(x + GAUSSIAN_START * noise, x)


def start_of(
    x: Tensor, threat_model: Perturbations, start: str | Tensor, generator: torch.Generator | None, attack: str
) -> Tensor:
    if not isinstance(start, Tensor):
        return first_iterate(x, threat_model, start, generator, attack)
    check_like("start", start, x)
    return start.detach()


def attacked(
    x: Tensor, gradient: Callable[[Tensor], Tensor], threat_model: Perturbations, attack: str, steps: int, first: Tensor
) -> Tensor:
    if attack == "pgd":
        return ascend(x, gradient, threat_model, steps=steps, start=first)
    return single_step(x, gradient, _ball(threat_model, attack), attack=attack, start=first)


def _ball(threat_model: Perturbations, attack: str) -> ThreatModel:
    """The threat model of a single-step attack, whose lengths are multiples of eps."""
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(f"threat_model must be a ThreatModel for attack {attack!r}, got {type(threat_model).__name__}")
    return threat_model


def found_by(
    graphs: AttackGraphs | None, search: Attack, modules: Sequence[object], *inputs: Tensor
) -> dict[str, Tensor]:
    return search(*inputs) if graphs is None else graphs(search, *inputs, modules=modules)


def at_perturbed_weights(weights: WeightPerturbation | None, outcome: Callable[[], Outcome]) -> Outcome:
    """The outcome, at perturbed weights where asked for."""

    def loss() -> Tensor:
        return outcome().loss.sum()

    if weights is not None:
        weights.perturb(loss)
    return outcome()


class Watched:
    """A gradient whose last value is looked at once the attack is through."""

    def __init__(self, gradient: Callable[[Tensor], Tensor]) -> None:
        self.gradient = gradient
        self.last: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.last = self.gradient(x)
        return self.last

    def metrics(self) -> dict[str, Tensor]:
        return {} if self.last is None else {"zero_gradient_share": (self.last == 0).float().mean()}
