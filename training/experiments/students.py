"""What is trained: one small classifier, by one objective, always with the same budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from scorematch import PGD, objectives
from scorematch.attacks.classifier import log_mean_probabilities
from scorematch.objectives import Outcome
from scorematch.posteriors import Posterior
from scorematch.self_consistency import consistency
from training.experiments.problems import Problem, Task

Objective = Callable[[nn.Module, Tensor, Tensor, Generator], Outcome]
LOOKS = 8  # checkpoints among which weights are picked
SEARCH_STEPS = 20  # of each search on the test sample; half as many where weights are picked


@dataclass(frozen=True)
class Budget:
    """The training of every student."""

    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-3
    attack_steps: int = 5


QUICK = Budget(steps=8, batch_size=32, attack_steps=2)


def objective_of(name: str, task: Task, posterior: Posterior | None, budget: Budget) -> Objective:
    """``standard:kl``, ``pgd_at:kl``, ``trades:kl:4`` (β third) or ``direct:kl``, and further words.

    ``soft`` gives a surrogate the posterior at clean x instead of labels, ``moved`` moves the clean prediction of
    TRADES by the posterior (κ = 1). Of direct SCORE ``fixed`` compares with the posterior at clean x, ``model-only``
    leaves the data gradient out, ``noise`` replaces it by noise of the same norm.
    """
    kind, divergence, *more = name.split(":")
    attack: dict[str, Any] = {"threat_model": task.threat_model, "steps": budget.attack_steps}

    def targets(x: Tensor, y: Tensor) -> Tensor:
        if "soft" not in more:
            return y
        assert posterior is not None
        return objectives.soft_targets(posterior, x, y)

    if kind == "standard":
        return lambda model, x, y, g: objectives.standard(model, x, targets(x, y), divergence=divergence)
    if kind == "pgd_at":
        return lambda model, x, y, g: objectives.pgd_at(
            model, x, targets(x, y), divergence=divergence, generator=g, **attack
        )
    if kind == "trades":
        moving = posterior if "moved" in more else None
        return lambda model, x, y, g: objectives.trades(
            model,
            x,
            targets(x, y),
            divergence=divergence,
            beta=float(more[0]),
            posterior=moving,
            generator=g,
            **attack,
        )
    assert posterior is not None
    forms: dict[str, dict[str, Any]] = {
        "fixed": {"target_mix": 0.0},
        "model-only": {"data_gradient": "none"},
        "noise": {"data_gradient": "noise"},
    }
    options: dict[str, Any] = {}
    for word in more:
        options |= forms[word]
    return lambda model, x, y, g: objectives.score_direct(
        model, x, y, posterior=posterior, divergence=divergence, generator=g, **attack, **options
    )


@dataclass(frozen=True)
class Student:
    """A trained classifier: its last weights, and those of the best checkpoint, if checkpoints were judged."""

    last: nn.Module
    best: nn.Module | None
    data_gradient_ratio: float | None


def train(
    task: Task, objective: Objective, seed: int, budget: Budget, *, judge: Callable[[nn.Module], float] | None = None
) -> Student:
    """Train a student on all of the data; the best weights are those with the lowest value of ``judge``."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    model = task.student()
    optimizer = torch.optim.Adam(model.parameters(), lr=budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    best, lowest, ratios = copy.deepcopy(model), float("inf"), []
    for step in range(1, budget.steps + 1):
        index = torch.randint(len(task.x), (budget.batch_size,), generator=generator)
        model.train()
        outcome = objective(model, task.x[index], task.y[index], generator)
        optimizer.zero_grad()
        outcome.loss.mean().backward()
        optimizer.step()
        schedule.step()
        if "data_gradient_ratio" in outcome.metrics:
            ratios.append(float(outcome.metrics["data_gradient_ratio"]))
        if judge is not None and step % max(1, budget.steps // LOOKS) == 0:
            value = judge(model.eval())
            if value < lowest:
                best, lowest = copy.deepcopy(model), value
    return Student(model.eval(), best.eval() if judge else None, sum(ratios) / len(ratios) if ratios else None)


class Together(nn.Module):
    """Several classifiers as one: log of the mean of their probabilities, [N, L]."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return log_mean_probabilities([member(x) for member in self.members])


def r_score(problem: Problem, model: nn.Module) -> float:
    """R_SCORE on the sample for choices, in nats: how the oracle picks weights."""
    x, y, ball = problem.x_choice, problem.y_choice, problem.threat_model
    return consistency(model, problem.oracle, x, y, ball, steps=SEARCH_STEPS // 2, restarts=0).r_score.mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent."""
    return 100 * (model(x).argmax(1) == y).double().mean().item()


def measure(problem: Problem, model: nn.Module, seed: int) -> dict[str, float]:
    """What is compared, on the test sample: KL and R_SCORE in nats, the others in per cent."""
    generator = Generator().manual_seed(seed)
    x, y = problem.x_test, problem.y_test
    ball = problem.threat_model
    found = consistency(model, problem.oracle, x, y, ball, steps=SEARCH_STEPS, restarts=1, generator=generator)
    attack = PGD(ball, steps=SEARCH_STEPS, restarts=2, losses=("ce", "margin"))
    moved = attack(model, x, y, generator=generator)
    return {
        "kl": found.divergence.mean().item(),
        "r_score": found.r_score.mean().item(),
        "disagrees": 100 * found.disagrees.double().mean().item(),
        "clean": accuracy(model, x, y),
        "robust": accuracy(model, moved, y),
    }
