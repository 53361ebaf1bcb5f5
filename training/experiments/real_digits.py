"""Real images, where only labels are known: the 8×8 digits, all 1,797 of them over five folds.

Hypotheses, written down before the runs (Linf; every objective has its weights chosen on validation images by their
robust accuracy, and among the objectives of a family one is chosen in the same way; test images choose nothing, but for
R4):

R1  Somewhere on the front of clean and robust accuracy direct SCORE is not dominated: no surrogate of the same budget
    is better in one of the two and as good in the other.
R2  With samples drawn from the score network in half of every batch, each objective is more robust than without.
R3  The ablation of H4, judged by robust accuracy by label: B is above A, C above B and D.
R4  A score network that is trained on augmented images, of which it is told, with dropout of .3 remembers less: its
    held-out denoising loss is within 10 % of that on training images at every noise level, and direct SCORE with it is
    more robust than with the plain one. Both settings were chosen by held-out loss and likelihood on fold 0, seed 0,
    by images that the other folds test on.
R5  Trained within a larger ball, direct SCORE trades some of its clean accuracy for robustness on better terms than the
    surrogates do: on the front of all objectives at eps .15 and .2 together, some direct setting is not dominated,
    beyond the interval. Written down after the results at .15, where R1 holds within the interval alone, and before
    any at .2.
R6  Trained within a ball as large as .3, to which the surrogates want their prediction constant, direct SCORE keeps
    more clean accuracy: the best direct setting of each run is ahead of the best surrogate on clean images, beyond the
    interval. Written down after the results at .15 and .2, and before any at .3.

Comparisons are paired over folds and seeds; seeds of a fold share all images, so intervals count folds. A cell is a
fold, a seed and the radius of the training. Two more attacks look for masked gradients: Square alone, and points that
were found on another network. Either of them would have to do better than PGD for that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from scorematch import PGD, AutoAttack, ThreatModel, audit
from scorematch.matching import losses_by_level
from training.experiments import estimators, problems, students
from training.experiments.estimators import Bench, Estimated, Grid
from training.experiments.mixtures import ABLATION
from training.experiments.problems import Task
from training.experiments.runner import Notebook
from training.experiments.students import Budget, accuracy

EPS = 0.15  # at which all are compared, whatever the radius of the training
RADII = (0.1, 0.2, 0.3)  # of further attacks by PGD
QUERIES = 1000  # of Square where it is alone
OTHER_NETWORK = 1000  # added to the seed of the network on which points are found that are shown to the others
POSTERIORS = ("energy_ensemble", "score", "kernel_density_drawn", "score_regular")
# An objective, after a colon how it differs, and after a space the posterior that it asks.
SURROGATES = (
    "standard:kl",
    "pgd_at:kl",
    "pgd_at:se",
    "trades:kl:1",
    "trades:kl:4",
    "trades:se:4",
    "pgd_at:kl:soft energy_ensemble",
    "trades:kl:2:soft energy_ensemble",
    "pgd_at:kl:drawn",
    "trades:kl:4:drawn",
    "pgd_at:kl:soft:drawn energy_ensemble",
)
DIRECT = (
    "direct:kl energy_ensemble",
    "direct:kl score",
    "direct:kl:drawn energy_ensemble",
    "direct:kl:drawn kernel_density_drawn",
    "direct:kl score_regular",
)
ABLATED = tuple(f"{ABLATION[letter]} energy_ensemble" for letter in "ABD")
GRID = Grid(steps=4000, drawn=10_000, kernels=1200)
BUDGET = Budget(steps=800, batch_size=64, lr=2e-3, attack_steps=10)


@dataclass(frozen=True)
class Cell:
    """One fold and seed, trained at one radius."""

    fold: int
    seed: int
    eps: float
    folder: Path
    quick: bool = False

    @property
    def path(self) -> Path:
        return self.folder / f"eps{self.eps:g}-fold{self.fold}-seed{self.seed}.json"

    @property
    def budget(self) -> Budget:
        return students.QUICK if self.quick else BUDGET

    @property
    def grid(self) -> Grid:
        return estimators.QUICK if self.quick else GRID

    @property
    def about(self) -> dict[str, Any]:
        return {
            "problem": "real digits",
            "fold": self.fold,
            "seed": self.seed,
            "eps": self.eps,
            "budget": asdict(self.budget),
            "grid": asdict(self.grid),
        }


def run(cell: Cell) -> None:
    """Every objective on one fold."""
    task = problems.real_digits(cell.fold, cell.eps)
    if cell.quick:
        parts = {name: getattr(task, name)[:40] for name in ("x_test", "y_test", "x_choice", "y_choice")}
        task = dataclasses.replace(task, **parts)
    bench, budget = Bench(task, cell.seed, cell.grid), cell.budget
    notebook = Notebook(cell.path, {**cell.about, "count": len(task.x)})

    def student(form: str) -> dict[str, Any]:
        objective, _, name = form.partition(" ")
        words = objective.split(":")
        seen = with_drawn(task, *bench.drawn(0)) if "drawn" in words else task
        objective = ":".join(word for word in words if word != "drawn")
        trains = students.objective_of(objective, seen, bench.estimated(name).posterior if name else None, budget)
        made = students.train(seen, trains, cell.seed, budget, judge=partial(validation_error, task))
        assert made.best is not None
        measured = measure(task, made.best, cell.seed, quick=cell.quick)
        measured |= masking(task, made.best, transferred(), cell.seed, quick=cell.quick)
        return {**measured, "data_gradient_ratio": made.data_gradient_ratio}

    @cache
    def transferred() -> Tensor:
        """Points that fool a network trained with PGD-AT KL, of an initialisation that no other one has."""
        trains = students.objective_of("pgd_at:kl", task, None, budget)
        made = students.train(task, trains, cell.seed + OTHER_NETWORK, budget, judge=partial(validation_error, task))
        assert made.best is not None
        return attacked(made.best, task.x_test, task.y_test, EPS, cell.seed, quick=cell.quick)

    def recorded(name: str) -> dict[str, Any]:
        return posterior_record(task, bench.estimated(name))

    for form in (*SURROGATES, *DIRECT, *ABLATED):
        notebook.once(f"student {form}", partial(student, form))
    for name in POSTERIORS:
        notebook.once(f"posterior {name}", partial(recorded, name))
    notebook.once("memory", lambda: memory(bench, "denoiser"))
    notebook.once("memory regular", lambda: memory(bench, "denoiser_regular"))


def with_drawn(task: Task, x: Tensor, y: Tensor) -> Task:
    """The task with drawn samples, so that they are about half of every batch."""
    times = max(1, round(len(x) / len(task.x)))
    repeated = task.x.repeat(times, *[1] * (task.x.dim() - 1))
    return dataclasses.replace(task, x=torch.cat([repeated, x]), y=torch.cat([task.y.repeat(times), y]))


def validation_error(task: Task, model: nn.Module) -> float:
    """100 minus the robust accuracy on validation images at the radius of the training; clean errors break ties."""
    x, y = task.x_choice, task.y_choice
    moved = PGD(task.threat_model, steps=10, losses=("ce",))(model, x, y, generator=Generator().manual_seed(0))
    clean, robust = (accuracy(model, points, y) for points in (x, moved))
    return 100 - robust + 1e-3 * (100 - clean)


def attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, *, quick: bool) -> Tensor:
    attack = PGD(ThreatModel("linf", eps), steps=5 if quick else 40, restarts=2, losses=("ce", "margin"))
    return attack(model, x, y, generator=Generator().manual_seed(seed))


def measure(task: Task, model: nn.Module, seed: int, *, quick: bool = False) -> dict[str, float]:
    """Accuracies in per cent; ``nll``, the mean −log p of the label, in nats; ``ece``, the expected calibration error.

    ``validation`` is the robust accuracy under PGD on the validation images, by which objectives are chosen.
    """
    x, y = task.x_test, task.y_test
    found = partial(attacked, model, seed=seed, quick=quick)
    strong = AutoAttack(model, "Linf", EPS, seed=seed, verbose=False)
    if quick:
        strong = AutoAttack(model, "Linf", EPS, verbose=False, version="custom", attacks_to_run=["apgd-ce"])
        strong.apgd.n_iter = 3
    strong.run_standard_evaluation(x, y, bs=500)
    moved = found(x, y, EPS)
    measured = {"clean": accuracy(model, x, y), "pgd": accuracy(model, moved, y)}
    measured["autoattack"] = 100 * strong.report["robust_accuracy"]
    measured |= {f"pgd_{eps:g}": accuracy(model, found(x, y, eps), y) for eps in RADII}
    measured["validation"] = accuracy(model, found(task.x_choice, task.y_choice, EPS), task.y_choice)
    for points, name in ((x, ""), (moved, "_attacked")):
        with torch.no_grad():
            logits = model(points)
        measured[f"nll{name}"] = cross_entropy(logits, y).item()
        measured[f"ece{name}"] = 100 * audit.reliability(logits.log_softmax(1), y).error
    return measured


def masking(task: Task, model: nn.Module, transferred: Tensor, seed: int, *, quick: bool = False) -> dict[str, float]:
    """Accuracies, in per cent, under attacks that need no gradient of this model."""
    x, y = task.x_test, task.y_test
    search = AutoAttack(model, "Linf", EPS, seed=seed, verbose=False, version="custom", attacks_to_run=["square"])
    search.square.n_queries = 3 if quick else QUERIES
    search.run_standard_evaluation(x, y, bs=500)
    return {"square": 100 * search.report["robust_accuracy"], "transfer": accuracy(model, transferred, y)}


def posterior_record(task: Task, estimated: Estimated) -> dict[str, Any]:
    """What was chosen and why, and the posterior's own accuracy on test images."""
    ball = ThreatModel("linf", EPS)
    clean, robust = audit.robust_accuracy(
        estimated.posterior, task.x_test, task.y_test, ball, steps=20, generator=Generator().manual_seed(0)
    )
    return {
        "settings": estimated.settings,
        "evidence": estimated.evidence,
        "clean": 100 * clean,
        "robust": 100 * robust,
    }


def memory(bench: Bench, kind: str) -> dict[str, Any]:
    """Denoising loss of a score network on held-out images over that on as many training images, by noise level."""
    x, y, *_ = bench.problem.fold(0)
    x_held, y_held = bench.held_out(0)
    network, sigmas = bench.network(kind, 0), tuple(bench.sigmas)
    seen = losses_by_level(network, x[: len(x_held)], y[: len(x_held)], sigmas, repeats=4)
    unseen = losses_by_level(network, x_held, y_held, sigmas, repeats=4)
    return {"held_out_over_training": {f"{sigma:g}": unseen[sigma] / seen[sigma] for sigma in sigmas}}
