"""Robust accuracy as a function of the radius: what several evaluations of the same samples found together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor

from ..intervals import wilson
from ..threat_model import ThreatModel
from .fab import FAB
from .parts import Attack
from .report import costs, lengths, shares, tabular
from .settings import AttackSettings


@dataclass(frozen=True)
class AccuracyCurve:
    """Robust accuracy at several radii.

    A misclassified point at distance d counts at every radius from d on. So one number describes a sample, and the
    accuracy never rises with the radius.

    Attributes:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        radii: in ascending order, in units of the input.
        nearest: float64 [N], distance of the nearest misclassified point that was found: 0 for a sample that is
            misclassified without an attack, ∞ where none was found. If rounding put a point just outside the ball in
            which it was found, the radius of the ball is given. FAB finds some points above the largest radius. It is
            an upper bound of the distance to the decision boundary.
        adversarial: [N, …] the misclassified points within the largest radius, the original where none was found.
        reports: the report of the evaluation at each radius, as ``AutoAttack.report``, with the costs of that radius;
            fewer than radii if the budget was spent. A point found later, at a larger radius, may lower the curve below
            what an earlier report says.
    """

    norm: str
    radii: tuple[float, ...]
    nearest: Tensor
    adversarial: Tensor
    reports: tuple[dict[str, Any], ...]

    @property
    def clean_accuracy(self) -> float:
        return self.accuracy_at(0.0)

    @property
    def robust_accuracy(self) -> dict[float, float]:
        """The robust accuracy in [0, 1], by the radius."""
        return {radius: self.accuracy_at(radius) for radius in self.radii}

    @property
    def intervals(self) -> dict[float, tuple[float, float]]:
        """95 % intervals over samples (Wilson), by the radius."""
        return {radius: self._interval(radius) for radius in self.radii}

    @property
    def complete(self) -> dict[float, bool]:
        """Whether all attacks were completed, by the radius; where not, the robust accuracy is an upper bound."""
        through = [bool(report["complete"]) for report in self.reports]
        return dict(zip(self.radii, [*through, *[False] * (len(self.radii) - len(through))], strict=True))

    def accuracy_at(self, radius: float) -> float:
        """Share of samples near which no misclassified point within ``radius`` was found.

        Between two of the radii no attack was run, so there this is a looser upper bound than at the radii.

        Raises:
            ValueError: the radius is negative or above the largest that was attacked.
        """
        if not 0 <= radius <= self.radii[-1]:
            raise ValueError(f"radius must lie in [0, {self.radii[-1]:g}], the largest attacked, got {radius}")
        return float((self.nearest > radius).double().mean())

    def table(self, form: str = "markdown") -> str:
        """The curve as a table, with a line for each radius: accuracy with its interval, passes and seconds.

        Args:
            form: ``"markdown"``, or ``"latex"``: a tabular that needs no package.

        Raises:
            ValueError: there is no such form.
        """
        rows = [["0", *shares(self.clean_accuracy, self._interval(0.0)), "", "", ""]]
        for radius, (known, through) in zip(self.radii, self._costs(), strict=True):
            accuracy, interval = shares(self.accuracy_at(radius), self._interval(radius))
            rows.append([f"{radius:g}", accuracy if through else f"at most {accuracy}", interval, *known])
        return tabular(f"{self.norm} eps", rows, form)

    def as_dict(self) -> dict[str, Any]:
        """All but the points, for ``json.dumps``; ``nearest`` is None where no point was found."""
        return {
            "norm": self.norm,
            "radii": list(self.radii),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": list(self.robust_accuracy.values()),
            "intervals": [list(interval) for interval in self.intervals.values()],
            "complete": list(self.complete.values()),
            "nearest": lengths(self.nearest),
            "reports": list(self.reports),
        }

    def _interval(self, radius: float) -> tuple[float, float]:
        return wilson(int((self.nearest > radius).sum()), len(self.nearest))

    def _costs(self) -> list[tuple[list[str], bool]]:
        """The cells of a radius that tell costs, and whether it is complete."""
        cells = []
        for index, through in enumerate(self.complete.values()):
            attacks = self.reports[index]["attacks"].values() if index < len(self.reports) else []
            total = {name: sum(attack[name] for attack in attacks) for name in ("forwards", "backwards", "seconds")}
            cells.append((costs(total), through))
        return cells


def ascending(radii: Iterable[float]) -> tuple[float, ...]:
    """Radii in their order, each once.

    Raises:
        TypeError: they are not several.
        ValueError: there are none, or some are not positive and finite numbers.
    """
    if not isinstance(radii, Iterable):
        raise TypeError(f"radii must be a list of numbers, got {radii!r}")
    given: list[float] = radii.tolist() if isinstance(radii, Tensor) else list(radii)
    if not given or not all(isinstance(r, Real) and not isinstance(r, bool) and 0 < r < math.inf for r in given):
        raise ValueError(f"radii must be positive and finite numbers, at least one, got {given!r}")
    return tuple(sorted({float(radius) for radius in given}))


def at_radius(attacks: Sequence[Attack], ball: ThreatModel, of: ThreatModel) -> list[Attack]:
    """The same attacks in another ball.

    Args:
        of: the threat model of the evaluation that they were made for.

    Raises:
        ValueError: one of them has a radius of its own, or is not an attack of scorematch, so that its radius cannot be
            changed.
    """
    moved: list[Attack] = []
    for attack in attacks:
        if not isinstance(attack, AttackSettings):
            raise ValueError(
                f"attacks_to_run: {attack.name} is not an attack of scorematch, so its radius cannot be changed for a "
                "curve"
            )
        if attack.eps != of.eps:
            raise ValueError(
                f"{attack.name}.eps is {attack.eps}: a curve sets the radius of every attack, leave it at {of.eps}"
            )
        moved.append(replace(attack, threat_model=ball))  # type: ignore[type-var]
    return moved


def depends_on_radius(attack: Attack) -> bool:
    """Whether a run of an attack at a larger radius may find new points.

    FAB that starts at the sample itself takes the same path for every radius, and all that it has found is known.
    """
    return not (isinstance(attack, FAB) and attack.n_restarts == 1)
