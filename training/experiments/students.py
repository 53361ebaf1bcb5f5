"""What is trained: one small classifier, by one objective, always with the same budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from scorematch import PGD, objectives
from scorematch.objectives import Outcome
from scorematch.posteriors import Posterior
from scorematch.self_consistency import consistency
from training.experiments.problems import Problem

Objective = Callable[[nn.Module, Tensor, Tensor, Generator], Outcome]
LOOKS = 8  # checkpoints among which the oracle picks the weights of a surrogate


@dataclass(frozen=True)
class Budget:
    """The training of every student."""

    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-3
    attack_steps: int = 5


QUICK = Budget(steps=8, batch_size=32, attack_steps=2)


def objective_of(name: str, problem: Problem, posterior: Posterior | None, budget: Budget) -> Objective:
    """``standard:kl``, ``pgd_at:kl``, ``trades:kl:4`` (β third) or ``direct:kl``, and further words.

    ``soft`` gives TRADES the posterior at clean x instead of labels, ``moved`` moves its clean prediction by the
    posterior (κ = 1). Of direct SCORE ``fixed`` compares with the posterior at clean x, ``model-only`` leaves the data
    gradient out, ``noise`` replaces it by noise of the same norm.
    """
    kind, divergence, *more = name.split(":")
    attack: dict[str, Any] = {"threat_model": problem.threat_model, "steps": budget.attack_steps}
    if kind == "standard":
        return lambda model, x, y, g: objectives.standard(model, x, y, divergence=divergence)
    if kind == "pgd_at":
        return lambda model, x, y, g: objectives.pgd_at(model, x, y, divergence=divergence, generator=g, **attack)
    if kind == "trades":
        beta, *words = more
        moving = posterior if "moved" in words else None

        def trades(model: nn.Module, x: Tensor, y: Tensor, g: Generator) -> Outcome:
            if "soft" in words:
                assert posterior is not None
                y = objectives.soft_targets(posterior, x, y)
            return objectives.trades(
                model, x, y, divergence=divergence, beta=float(beta), posterior=moving, generator=g, **attack
            )

        return trades
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
    """A trained classifier: its last weights, and for a surrogate those that the oracle likes best."""

    last: nn.Module
    best: nn.Module | None  # of the checkpoint with the lowest R_SCORE on the sample for choices
    data_gradient_ratio: float | None


def train(problem: Problem, objective: Objective, seed: int, budget: Budget, *, picked: bool) -> Student:
    """Train a student on all of the data; ``picked`` lets the oracle look for its best weights."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    model = problem.student()
    optimizer = torch.optim.Adam(model.parameters(), lr=budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    best, lowest, ratios = copy.deepcopy(model), float("inf"), []
    for step in range(1, budget.steps + 1):
        index = torch.randint(len(problem.x), (budget.batch_size,), generator=generator)
        model.train()
        outcome = objective(model, problem.x[index], problem.y[index], generator)
        optimizer.zero_grad()
        outcome.loss.mean().backward()
        optimizer.step()
        schedule.step()
        if "data_gradient_ratio" in outcome.metrics:
            ratios.append(float(outcome.metrics["data_gradient_ratio"]))
        if picked and step % max(1, budget.steps // LOOKS) == 0:
            model.eval()
            found = consistency(
                model,
                problem.oracle,
                problem.x_choice,
                problem.y_choice,
                problem.threat_model,
                steps=10,
                restarts=0,
            )
            value = found.r_score.mean().item()
            if value < lowest:
                best, lowest = copy.deepcopy(model), value
    return Student(model.eval(), best.eval() if picked else None, sum(ratios) / len(ratios) if ratios else None)


def measure(problem: Problem, model: nn.Module, seed: int) -> dict[str, float]:
    """What is compared, on the test sample: KL and R_SCORE in nats, the others in per cent."""
    generator = Generator().manual_seed(seed)
    x, y = problem.x_test, problem.y_test
    found = consistency(model, problem.oracle, x, y, problem.threat_model, steps=20, restarts=1, generator=generator)
    attack = PGD(problem.threat_model, steps=20, restarts=2, losses=("ce", "margin"))
    moved = attack(model, x, y, generator=generator)
    with torch.no_grad():
        clean, robust = ((model(points).argmax(1) == y).double().mean().item() for points in (x, moved))
    return {
        "kl": found.divergence.mean().item(),
        "r_score": found.r_score.mean().item(),
        "disagrees": 100 * found.disagrees.double().mean().item(),
        "clean": 100 * clean,
        "robust": 100 * robust,
    }
