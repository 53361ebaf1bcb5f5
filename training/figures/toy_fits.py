"""Models fitted to the errors of the paper on its one-dimensional toy, where p_d(y|x) is known.

The model is the paper's: two hidden layers of 100 tanh units, Adam at its usual rate, 500 steps. Where the paper is
silent, the choices are these. Each step sees all training points (``batch`` = 0). Training points are rounded to
multiples of eps / 50 = 0.02, so that 60,000 of them are about 900 different ones with weights; no point moves by more
than eps / 100. Networks compute in float32, errors are measured in float64 on a finer grid.

The inner maximisation is PGD with 10 steps of eps / 4 from a random start, by the library's own objectives
(``search="pgd"``), or exact, over all multiples of 0.02 in B(x) (``search="grid"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scorematch import ThreatModel, logit_divergence, objectives
from training import models
from training.data import toy

Objective = Literal["standard", "madry", "score", "trades"]
Search = Literal["pgd", "grid"]

OBJECTIVES: tuple[Objective, ...] = ("standard", "madry", "score", "trades")
SEARCHES: tuple[Search, ...] = ("pgd", "grid")
DIVERGENCES = ("kl", "l1", "js", "se")  # with two classes l2 and linf are multiples of l1, of the same gradient to Adam
TITLES = {"standard": "R_Standard", "madry": "R_Madry", "score": "R_SCORE", "trades": "R_TRADES"}
SYMBOLS = {name: rf"$R_\mathrm{{{title[2:]}}}$" for name, title in TITLES.items()}  # the same in a plot

PER_EPS = 50  # nodes in one eps
CLASS_COUNTS = (50_000, 10_000)  # training points of Figs. 1, 3 and 6
FEW_COUNTS = (5, 1)  # and of Fig. 2
PGD_STEPS = 10
STEPS = 500
LEARNING_RATE = 1e-3
BETA = 1.0  # of TRADES: the smallest for which Theorem 3 holds


class Points(NamedTuple):
    """Training points with their weights.

    Attributes:
        x: [N, 1] float32, multiples of eps / 50, each once, in increasing order.
        weights: [N] float32, of sum 1.
    """

    x: Tensor
    weights: Tensor


def draw(counts: tuple[int, int], seed: int) -> Points:
    """``counts`` points of each class, from p_d(x|y), rounded and counted."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat(
        [
            mean + deviation * torch.randn(count, dtype=torch.float64, generator=generator)
            for mean, deviation, count in zip(toy.MEANS, toy.DEVIATIONS, counts, strict=True)
        ]
    )
    nodes, times = (drawn * PER_EPS / toy.EPS).round().unique(return_counts=True)
    return Points((nodes * toy.EPS / PER_EPS).float()[:, None], times.float() / times.sum())


@dataclass(frozen=True)
class Fit:
    """One training. ``points`` is the seed of the training points, ``seed`` that of the initialisation and of PGD."""

    objective: Objective
    divergence: str = "kl"
    search: Search = "pgd"
    seed: int = 0
    points: int = 0
    counts: tuple[int, int] = CLASS_COUNTS
    steps: int = STEPS
    lr: float = LEARNING_RATE
    batch: int = 0  # points that are drawn for each step, with replacement; 0 takes all
    beta: float = BETA  # of TRADES

    @property
    def choices(self) -> str:
        """In words, what the paper leaves open."""
        search = f"PGD-{PGD_STEPS}" if self.search == "pgd" else "exact search"
        return f"{search}, {f'batches of {self.batch:,}' if self.batch else 'full batch'}, rate {self.lr:g}"


Watch = Callable[[int, nn.Module], None]  # step (0 is before the first) and the model


def train(fit: Fit, watch: Watch | None = None) -> nn.Module:
    """The model after the last step.

    Args:
        fit: what is trained.
        watch: called before the first step and after each one.
    """
    points = draw(fit.counts, fit.points)
    torch.manual_seed(fit.seed)
    model = models.build("toy_mlp", (1,), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=fit.lr)
    generator = torch.Generator().manual_seed(fit.seed + 1)
    losses = (_Pgd if fit.search == "pgd" else _Exact)(fit, points, model, generator)
    if watch is not None:
        watch(0, model)
    for step in range(1, fit.steps + 1):
        weights = points.weights
        if fit.batch:
            index = torch.multinomial(weights, fit.batch, replacement=True, generator=generator)
            weights = torch.bincount(index, minlength=len(weights)) / fit.batch
        loss = (weights * losses()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch(step, model)
    return model


class _Pgd:
    """One value a point, by the objectives of the library."""

    def __init__(self, fit: Fit, points: Points, model: nn.Module, generator: torch.Generator) -> None:
        self.fit, self.x, self.model, self.generator = fit, points.x, model, generator
        self.p, self.oracle = toy.posterior(points.x), toy.oracle()
        self.threat_model = ThreatModel("linf", toy.EPS, lower=-math.inf, upper=math.inf)

    def __call__(self) -> Tensor:
        fit, given = self.fit, (self.model, self.x, self.p)
        if fit.objective == "standard":
            return objectives.standard(*given, divergence=fit.divergence).loss
        attack: dict[str, Any] = {
            "threat_model": self.threat_model,
            "steps": PGD_STEPS,
            "divergence": fit.divergence,
            "generator": self.generator,
        }
        if fit.objective == "score":
            return objectives.score_direct(*given, posterior=self.oracle, **attack).loss
        if fit.objective == "trades":
            return objectives.trades(*given, beta=fit.beta, start="uniform", **attack).loss
        return objectives.pgd_at(*given, **attack).loss


class _Exact:
    """One value a point, each maximum taken over all nodes of B(x).

    The nodes are those of all balls, so one pass through the model gives every value. Where a maximum over the second
    argument of D is at the smallest or the largest logit, see :func:`training.data.toy.errors`.
    """

    def __init__(self, fit: Fit, points: Points, model: nn.Module, generator: torch.Generator) -> None:
        del generator  # nothing is random here
        self.fit, self.model = fit, model
        places = (points.x[:, 0].double() * PER_EPS / toy.EPS).round().long()
        first = int(places.min()) - PER_EPS
        count = int(places.max()) + PER_EPS - first + 1
        self.nodes = (torch.arange(count) + first).float()[:, None] * toy.EPS / PER_EPS
        self.log_p = toy.log_joint(self.nodes).log_softmax(1)
        self.center = places - first  # [N], index of each point among the nodes
        self.own_p = self.log_p[self.center]

    def _best(self, values: Tensor) -> Tensor:
        """For each point the index of the node in B(x) with the largest of ``values`` [K], [N]."""
        pooled = nn.functional.max_pool1d(values[None], 2 * PER_EPS + 1, stride=1, return_indices=True)
        return pooled[1][0, self.center - PER_EPS]

    def _farthest(self, logits: Tensor, target: Tensor) -> Tensor:
        """For each point the index of the node x' in B(x) with the largest D(target ‖ q(x')), [N]."""
        logit = logits[:, 1] - logits[:, 0]
        low, high = self._best(-logit), self._best(logit)
        of_low, of_high = (self._distance(logits[index], target) for index in (low, high))
        return torch.where(of_high > of_low, high, low)

    def _distance(self, logits: Tensor, target: Tensor) -> Tensor:
        return logit_divergence(logits, target, kind=self.fit.divergence)

    def __call__(self) -> Tensor:
        objective = self.fit.objective
        logits = self.model(self.nodes)
        if objective == "standard":
            return self._distance(logits[self.center], self.own_p)
        fixed = logits.detach()
        if objective == "score":
            at = self._best(self._distance(fixed, self.log_p))
            return self._distance(logits[at], self.log_p[at])
        if objective == "madry":
            return self._distance(logits[self._farthest(fixed, self.own_p)], self.own_p)
        own = logits[self.center]
        at = self._farthest(fixed, own.detach())
        return self._distance(own, self.own_p) + self.fit.beta * self._distance(logits[at], own)
