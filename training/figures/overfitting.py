"""Errors along a training on the toy, and whether R_SCORE rises again where R_Madry falls below C^D.

What Figs. 3 and 6 (a) share.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training.data import toy
from training.figures.claims import Claim, spread
from training.figures.toy_fits import Fit, train

EVERY = 5  # steps between two measurements
GRID = toy.Grid(points_per_eps=100)
NEAR = 0.15  # how close to C^D, relative to it, R_Madry must be where R_SCORE is smallest
RISE = 0.10  # by how much of its minimum R_SCORE must have risen at the end


def choices(objective_divergence: str, seed: int, steps: int) -> list[Fit]:
    """Trainings with R_Madry, one for each way to fill what the paper leaves open; the first is the figure's."""
    ways: list[dict[str, Any]] = [
        {},
        {"search": "grid"},
        {"search": "grid", "batch": 512},
        {"search": "grid", "lr": 0.01},
    ]
    return [Fit("madry", objective_divergence, seed=seed, points=seed, steps=steps, **way) for way in ways]


def measured(model: nn.Module, divergence: str, kl: bool) -> dict[str, float]:
    """Means over p_d(x) of the errors of a model in a divergence, and R_Madry with KL if asked for."""
    found = toy.errors(model, divergence, GRID)
    values = {name: GRID.mean(getattr(found, name)).item() for name in ("standard", "madry", "score")}
    if kl:
        values["madry_kl"] = GRID.mean(toy.errors(model, "kl", GRID).madry).item()
    return values


def slope(model: nn.Module, grid: toy.Grid) -> float:
    """E |∇ₓ p_d(Y_d|x) − ∇ₓ p_θ(Y_d|x)|, in inverse units of x. With two classes it is the same for either class."""
    exact = copy.deepcopy(model).double()
    x = grid.x.clone().requires_grad_()
    difference = toy.posterior(x)[:, 1] - exact(x[:, None]).softmax(1)[:, 1]
    (gradient,) = torch.autograd.grad(difference.sum(), x)
    return grid.mean(gradient.abs()).item()


def followed(fit: Fit) -> dict[str, Any]:
    """The errors along one training: lists by step, with those of Fig. 6 where D is KL (l1 beside R_Madry)."""
    corollary = fit.divergence == "kl"
    divergence = "l1" if corollary else fit.divergence
    rows: list[dict[str, float]] = []

    def watch(step: int, model: nn.Module) -> None:
        if step % EVERY == 0:
            row = {"step": float(step), **measured(model, divergence, corollary)}
            if corollary:
                row["alignment"] = 2 * toy.EPS * slope(model, GRID)
            rows.append(row)

    model = train(fit, watch)
    curves = {name: [row[name] for row in rows] for name in rows[0]}
    return {"choices": fit.choices, "seed": fit.seed, "curves": curves, "limit": limit(model) if corollary else None}


def limit(model: nn.Module, eps: float = 0.02) -> dict[str, float]:
    """Both sides of Theorem 4 for a small ball, where o(ε) is small."""
    grid = toy.Grid(eps=eps, points_per_eps=20)
    found = toy.errors(copy.deepcopy(model).double(), "l1", grid)
    left = grid.mean(found.score - found.standard).item()
    return {"eps": eps, "increase": left, "alignment": 2 * eps * slope(model, grid)}


def turning(curves: dict[str, list[float]], madry: str) -> dict[str, float]:
    """Where R_SCORE is smallest: the step, both errors there, and both at the end."""
    score = curves["score"]
    at = min(range(len(score)), key=score.__getitem__)
    return {
        "step": curves["step"][at],
        "score": score[at],
        "madry": curves[madry][at],
        "score_end": score[-1],
        "madry_end": curves[madry][-1],
    }


def turns(runs: Sequence[dict[str, Any]], madry: str) -> list[dict[str, Any]]:
    """:func:`turning` of each run, with its choices and seed."""
    return [{"choices": run["choices"], "seed": run["seed"], **turning(run["curves"], madry)} for run in runs]


def claims_of(runs: Sequence[dict[str, Any]], madry: str, constant: float, names: tuple[str, str, str]) -> list[Claim]:
    """The two claims about overfitting, for runs that differ in their seeds alone.

    Args:
        runs: what :func:`followed` gives.
        madry: key of the R_Madry that is minimised.
        constant: its C^D.
        names: of R_Madry, R_SCORE and C^D.
    """
    turned = turns(runs, madry)
    ratios = [turn["madry"] / constant for turn in turned]
    rises = [turn["score_end"] / turn["score"] - 1 for turn in turned]
    falls = all(turn["madry_end"] < turn["madry"] for turn in turned)
    r_madry, r_score, c = names
    return [
        Claim(
            f"Where {r_score} is smallest, {r_madry} is within {NEAR:.0%} of {c}",
            f"{r_madry} / {c} is {spread(ratios, 3)}, at step {spread([turn['step'] for turn in turned], 3)}",
            all(abs(ratio - 1) <= NEAR for ratio in ratios),
            runs[0]["choices"],
        ),
        Claim(
            f"Overfitting: from there to the end {r_score} rises by at least {RISE:.0%} while {r_madry} falls",
            f"{r_score} changes by {spread([100 * rise for rise in rises], 3)} %, {r_madry} "
            f"{'falls' if falls else 'does not fall'} in every run",
            falls and all(rise >= RISE for rise in rises),
            runs[0]["choices"],
        ),
    ]


def grouped(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs of the same choices together, in the order of the first of each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["choices"], []).append(run)
    return list(groups.values())
