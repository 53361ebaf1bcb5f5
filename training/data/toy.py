"""The one-dimensional problem of Fig. 1, where p_d(y|x) is known, and both robust errors of a model on it.

Class 0 is N(-1, 2²) with prior 5/6, class 1 is N(1, 1²) with prior 1/6, and B(x) = {x' : |x' - x| <= 1}.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import maximum_filter1d
from torch import Tensor, nn

from scorematch import logit_divergence
from scorematch.bounds import RobustErrors
from scorematch.model_state import borrowed
from scorematch.posteriors import GaussianMixture

PRIORS = (5 / 6, 1 / 6)
MEANS = (-1.0, 1.0)
DEVIATIONS = (2.0, 1.0)
TRAINING_POINTS = 60_000
EPS = 1.0


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` points (x [N, 1] float32, y [N] int64) of p_d(x, y)."""
    random = np.random.default_rng(seed)
    y = random.choice(2, size=count, p=PRIORS)
    x = np.asarray(MEANS)[y] + np.asarray(DEVIATIONS)[y] * random.standard_normal(count)
    return torch.from_numpy(x).float()[:, None], torch.from_numpy(y)


def log_joint(x: Tensor) -> Tensor:
    """log p_d(x, y) [N, 2] of points x [N, 1] or [N]."""
    x = x.reshape(-1, 1)
    mean, deviation, prior = (x.new_tensor(values) for values in (MEANS, DEVIATIONS, PRIORS))
    return prior.log() - 0.5 * ((x - mean) / deviation) ** 2 - deviation.log() - 0.5 * math.log(2 * math.pi)


def posterior(x: Tensor) -> Tensor:
    """p_d(y|x) [N, 2] of points x [N, 1] or [N]."""
    return log_joint(x).softmax(dim=1)


def oracle() -> GaussianMixture:
    """p_d as the library's closed-form posterior."""
    means, deviations, priors = (torch.tensor(values)[:, None] for values in (MEANS, DEVIATIONS, PRIORS))
    return GaussianMixture(means[..., None], deviations**2, priors)


@dataclass(frozen=True)
class Grid:
    """Points that cover p_d(x) to 1e-8 of its mass and the ball around each of them.

    One eps has ``points_per_eps`` points. The maximum over B(x) is then taken over the grid's points in it. For a
    maximum in the interior the error is of second order in the spacing; the ends of B(x) are points of the grid, so a
    maximum there is exact.
    """

    eps: float = EPS
    points_per_eps: int = 500
    reach: float = 13.0

    @property
    def x(self) -> Tensor:
        """The points [G], float64."""
        count = round((self.reach + self.eps) * self.points_per_eps / self.eps)
        return torch.arange(-count, count + 1, dtype=torch.float64) * self.eps / self.points_per_eps

    def maximum(self, values: Tensor) -> Tensor:
        """max over |x' - x| <= eps of ``values`` [G] at x', for each x of the grid [G]."""
        width = 2 * self.points_per_eps + 1
        return torch.from_numpy(maximum_filter1d(values.numpy(), width, mode="nearest"))

    def mean(self, values: Tensor) -> Tensor:
        """E over p_d(x) of ``values`` [G], by the trapezoid rule."""
        density = log_joint(self.x).exp().sum(dim=1)
        return torch.trapezoid(density * values, self.x) / torch.trapezoid(density, self.x)


@torch.no_grad()
def log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """log p_θ(y|x) [G, 2] in float64 of a classifier evaluated in its own precision, at points x [G]."""
    parameter = next(model.parameters())
    logits = model(x.to(parameter)[:, None])
    return logits.to("cpu", torch.float64).log_softmax(dim=1)


def errors(model: nn.Module, divergence: str = "kl", grid: Grid | None = None) -> RobustErrors:
    """All errors of a classifier at each point of the grid, [G] float64, exact up to its spacing.

    R_SCORE maximises D(p_d(·|x') ‖ p_θ(·|x')), a function of x' alone, so it is a running maximum. The other maxima are
    of D(P ‖ Q(x')) with a fixed P. With two classes each divergence falls as the logit of Q comes closer to that of P,
    and rises beyond it. So such a maximum lies at the smallest or the largest logit in the ball: two running maxima.

    Args:
        model: maps [N, 1] to logits [N, 2]; its mode is left as it is.
        divergence: name of D, see :data:`scorematch.divergences.KINDS`.
        grid: the points; None is the default :class:`Grid`.

    Raises:
        ValueError: no such divergence.
    """
    grid = grid or Grid()
    with borrowed(model):
        log_q = log_probabilities(model, grid.x)
    log_p = log_joint(grid.x).log_softmax(dim=1)
    standard = logit_divergence(log_q, log_p, kind=divergence)
    return RobustErrors(
        divergence,
        standard=standard,
        madry=_largest(divergence, log_p, log_q, grid),
        score=grid.maximum(standard),
        constant=constant(divergence, grid),
        invariance=_largest(divergence, log_q, log_q, grid),
    )


def constant(divergence: str = "kl", grid: Grid | None = None) -> Tensor:
    """max over x' of D(p_d(·|x) ‖ p_d(·|x')) at each point of the grid, [G]; its mean is C^D (Theorem 1, Eq. 39).

    Args:
        divergence: name of D, see :data:`scorematch.divergences.KINDS`.
        grid: the points; None is the default :class:`Grid`.

    Raises:
        ValueError: no such divergence.
    """
    grid = grid or Grid()
    log_p = log_joint(grid.x).log_softmax(dim=1)
    return _largest(divergence, log_p, log_p, grid)


def _largest(divergence: str, target: Tensor, found: Tensor, grid: Grid) -> Tensor:
    """max over x' of D(target(x) ‖ found(x')) [G] for log-probabilities [G, 2]."""
    logit = found[:, 1] - found[:, 0]
    values = []
    for extreme in (grid.maximum(logit), -grid.maximum(-logit)):
        logits = torch.stack([torch.zeros_like(extreme), extreme], dim=1)
        values.append(logit_divergence(logits, target, kind=divergence))
    return torch.maximum(*values)


def robust_errors(model: nn.Module, grid: Grid | None = None) -> dict[str, float]:
    """R_Standard, R_SCORE (Eq. 4) and R_Madry (Eq. 3) of a classifier, all with KL, exact up to the grid.

    R_Standard is the mean of KL(p_d(·|x) ‖ p_θ(·|x)), without an adversary: the error that standard training minimises.
    """
    grid = grid or Grid()
    found = errors(model, "kl", grid)
    means = {"r_standard": found.standard, "r_score": found.score, "r_madry": found.madry}
    return {name: grid.mean(values).item() for name, values in means.items()}


def curves(model: nn.Module, points: int = 241, reach: float = 6.0) -> dict[str, list[float]]:
    """What Fig. 1 shows on [-reach, reach]: p_d(x, y) of both classes, p_d(y=1|x) and p_θ(y=1|x)."""
    x = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return {**exact_curves(points, reach), "p_theta": log_probabilities(model, x)[:, 1].exp().tolist()}


def exact_curves(points: int = 241, reach: float = 6.0) -> dict[str, list[float]]:
    """The same without a model."""
    x = torch.linspace(-reach, reach, points, dtype=torch.float64)
    joint = log_joint(x).exp()
    return {
        "x": x.tolist(),
        "joint_0": joint[:, 0].tolist(),
        "joint_1": joint[:, 1].tolist(),
        "p_d": posterior(x)[:, 1].tolist(),
    }
