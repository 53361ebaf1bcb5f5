"""The set B(x) of allowed perturbations, and the moves inside it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from . import l1_ball
from .noise import normal_like, uniform_like
from .ops._checks import check_number
from .ops.l1_step import l1_project
from .ops.pgd_step import pgd_step, project
from .ops.random_start import random_start

ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
DUAL_ORDERS = {"linf": 1.0, "l2": 2.0, "l1": math.inf}  # of the norm that says how much a gradient can raise a loss
NORMS = tuple(ORDERS)


def largest_radius(norm: str, features: int, width: float) -> float:
    """The radius at which a ball around any point of a box holds all of the box, in the units of the input.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        features: number of features of one sample.
        width: of the box.
    """
    return width * {"linf": 1.0, "l2": math.sqrt(features), "l1": features}[norm]


@runtime_checkable
class Perturbations(Protocol):
    """What :class:`scorematch.PGD` and the objectives ask of B(x): a class of your own needs these and nothing else.

    PGD-AT, TRADES and direct SCORE therefore take any B(x) with a projection and a step (section 6).
    :class:`ThreatModel` is the class for balls; AutoAttack, single-step attacks, :func:`scorematch.consistency` and
    :mod:`scorematch.bounds` need it. An example of another B(x) is ``examples/l1_ball.py``.

    Attributes:
        lower, upper: the smallest and the largest value that a feature of clean x may have; may be infinite.
    """

    @property
    def lower(self) -> float: ...

    @property
    def upper(self) -> float: ...

    def check_radius(self, features: int) -> None:
        """Refuse inputs of a size for which B(x) makes no sense. A B(x) that suits every size does nothing.

        Args:
            features: number of features of one sample.

        Raises:
            ValueError: B(x) makes no sense for so many features.
        """

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of B(x) for each sample of x [N, …], same shape and dtype, without a graph."""

    def step(self, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        """The next point of an ascent, inside B(x0): from x [N, …] along grad [N, …]; a zero gradient does not move."""

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """A point of B(x0) near x, both [N, …]: x itself where it already lies in B(x0)."""


@dataclass(frozen=True)
class ThreatModel:
    """B(x) = {x' : ‖x' − x‖ ≤ eps, lower ≤ x' ≤ upper}, section 2.2.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"`` (over all features of a sample).
        eps: radius, in the units of the input (pixels in [0, 1] for images); > 0. In l1 it is a sum over the features:
            12 is common for CIFAR-10 (Croce & Hein, ICML 2021).
        step_size: length of one step of an attack, same units; None takes eps / 4.
        lower: smallest allowed feature value; may be −inf.
        upper: largest allowed feature value; may be inf.
        share: for l1 only, the share of the features that one step of PGD moves, in (0, 1]; see
            :func:`scorematch.l1_ball.sparse_step`.

    Raises:
        TypeError: eps, a length or a bound is not a number.
        ValueError: an argument is outside its range, or an Linf ball or step is larger than the box (a step may always
            be 2 eps long); the message names it.
    """

    norm: str
    eps: float
    step_size: float | None = None
    lower: float = 0.0
    upper: float = 1.0
    share: float = 0.01

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        for name in ("eps", "step_size", "lower", "upper", "share"):
            if (value := getattr(self, name)) is not None or name != "step_size":
                check_number(name, value)
                object.__setattr__(self, name, float(value))  # of NumPy's numbers and fractions, too
        if not (self.eps > 0.0 and math.isfinite(self.eps)):
            raise ValueError(f"eps must be positive and finite, got {self.eps}")
        if self.step_size is not None and not (self.step_size > 0.0 and math.isfinite(self.step_size)):
            raise ValueError(f"step_size must be positive and finite, or None for eps / 4, got {self.step_size}")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")
        if not self.lower < self.upper:
            raise ValueError(f"the box is empty: lower = {self.lower} is not below upper = {self.upper}")
        if self.norm == "linf" and self.eps > self.upper - self.lower:
            hint = "" if self.upper - self.lower != 1.0 else f"; for 8-bit pixels write {self.eps:g}/255"
            box = f"[{self.lower:g}, {self.upper:g}]"
            raise ValueError(f"eps must not be larger than the box {box} is wide, got {self.eps:g}{hint}")
        if self.norm == "linf":
            self._check_step(self.upper - self.lower, "the box is wide")

    def check_radius(self, features: int) -> None:
        """Refuse an L2 or L1 radius or step that is larger than the box of inputs of this size.

        Args:
            features: number of features of one sample.

        Raises:
            ValueError: eps is larger than the diagonal (L2) or the L1 width of the box, or a step is, and than 2 eps.
        """
        if self.norm == "linf":  # refused when made
            return
        width = self.upper - self.lower
        name, longest = {"l2": "diagonal", "l1": "L1 width"}[self.norm], largest_radius(self.norm, features, width)
        if self.eps > longest * (1 + 1e-6):
            hint = "" if width != 1.0 else f"; for 8-bit pixels write {self.eps:g}/255"
            raise ValueError(
                f"eps must not be larger than the {name} of the box, {longest:.4g} for {features} features, "
                f"got {self.eps:g}{hint}"
            )
        self._check_step(longest, f"the {name} of the box, {longest:.4g} for {features} features")

    def _check_step(self, longest: float, what: str) -> None:
        """Refuse steps that jump across the box and the ball, as those in 8-bit pixels do: the attack would be weak."""
        if self.step_size is not None and self.step_size > max(longest, 2 * self.eps) * (1 + 1e-6):
            hint = "" if self.upper - self.lower != 1.0 else f"; for 8-bit pixels write {self.step_size:g}/255"
            raise ValueError(f"step_size must not be larger than {what}, got {self.step_size:g}{hint}")

    @property
    def step_length(self) -> float:
        """The length of one step: ``step_size``, or eps / 4 where that is None."""
        return self.eps / 4 if self.step_size is None else self.step_size

    @property
    def unit(self) -> float:
        """The factor for lengths that papers give for the box [0, 1]: the width of this box, or 1 if it is infinite."""
        width = self.upper - self.lower
        return width if math.isfinite(width) else 1.0

    def replace(self, **changes: float | str | None) -> ThreatModel:
        """A copy with some fields changed.

        Raises:
            ValueError: a new value is outside its range.
        """
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball around each sample, clipped to the box.

        Args:
            x: [N, …] clean inputs.
            generator: source of randomness on the device of x.

        Returns:
            A new tensor of the shape and dtype of x.
        """
        if self.norm == "l1":
            return l1_ball.random_start(x, generator, eps=self.eps, lower=self.lower, upper=self.upper)
        if self.norm == "linf":
            noise = uniform_like(x, generator)
            return random_start(x, noise, norm="linf", eps=self.eps, lower=self.lower, upper=self.upper)
        noise = normal_like(x, generator)
        features = max(1, x[0].numel()) if x.shape[0] else 1
        radius = torch.rand(x.shape[0], generator=generator, dtype=x.dtype, device=x.device) ** (1.0 / features)
        return random_start(x, noise, norm="l2", eps=self.eps, lower=self.lower, upper=self.upper, radius=radius)

    def step(self, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        """One step of projected gradient ascent from x [N, …] along grad, inside B(x0).

        In l1 a share of the features moves, see :func:`scorematch.l1_ball.sparse_step`.
        """
        if self.norm == "l1":
            ball = {"eps": self.eps, "lower": self.lower, "upper": self.upper}
            return l1_ball.sparse_step(x, grad, x0, step_size=self.step_length, share=self.share, **ball)
        return pgd_step(
            x,
            grad,
            x0,
            norm=self.norm,
            step_size=self.step_length,
            eps=self.eps,
            lower=self.lower,
            upper=self.upper,
        )

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """x [N, …] projected to the ball of x0, then clipped to the box; in l1 to the ball and the box at once."""
        if self.norm == "l1":
            ball: dict[str, float] = {"eps": self.eps, "lower": self.lower, "upper": self.upper}
            # From far away rounding of x is large beside eps; the second projection sees a point that is near.
            return l1_project(l1_project(x, x0, **ball), x0, **ball)
        return project(x, x0, norm=self.norm, eps=self.eps, lower=self.lower, upper=self.upper)
