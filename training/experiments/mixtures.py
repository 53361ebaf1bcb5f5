"""Problems whose p_d is known: every estimator and every objective is compared with it.

Mixtures of Gaussians, and draws from factor analysers that were fitted to the 8×8 digits or to CIFAR-10.

Hypotheses, written down before the runs:

H1  With the oracle as its posterior, direct SCORE is ahead of every surrogate in KL, R_SCORE, clean accuracy and
    robust accuracy by label.
H2  The student's KL follows the KL of its posterior, whatever the estimator.
H3  Some learned posterior, fitted by held-out evidence alone, puts direct SCORE ahead of every surrogate in R_SCORE
    and KL, and not behind in clean and robust accuracy, at d = 16 with 2,000 and with 10,000 labels. The surrogates
    have their weights and their β picked by the oracle itself, which is more than anybody can do.
H4  Following the posterior (target at x') is better than standing still (target at x), and the data gradient is better
    than none and than noise of the same norm: R_SCORE falls from A to B to C, and D is above C.
H5  A score network that trains to its last step is a worse posterior than one that stops by held-out loss.
H6  In every dimension, and with few labels too, H3 holds: the sweep over dimensions and numbers of labels, with fewer
    estimators and surrogates than at d = 16.

H7  A student of direct SCORE is closer to p_d in R_SCORE than the ensemble that it was trained towards, which is a
    classifier, too, of four networks. Added after the others had been seen, and before its runs.
H8  Direct SCORE, its posterior chosen by evidence, is closer to p_d in R_SCORE than four networks of a surrogate
    together: each of them trained on all points by a surrogate as published, the mean of their probabilities judged
    like a model, with their last weights and with those that the oracle picks. So what it gains is more than what an
    ensemble gains anyway. Added after the others had been seen, and before its runs.

H1 to H4 are asked of the digits and of the images, too.

Comparisons are paired over seeds; each seed has means, data, initialisation and batches of its own. H3 is one
comparison for each number of labels; the other tables are descriptions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator

from scorematch import audit
from scorematch.posteriors import FactorAnalysers
from training.experiments import estimators, problems, students
from training.experiments.estimators import ESTIMATORS, OF_IMAGES, Bench, Estimated, Grid
from training.experiments.problems import Problem
from training.experiments.runner import Notebook
from training.experiments.students import Budget

# An objective, and after a space the posterior that it asks, if any.
SOFT_TARGETS = ("classifier", "energy_ensemble")
SURROGATES = (
    "standard:kl",
    "pgd_at:kl",
    "pgd_at:se",
    *(f"trades:kl:{beta}" for beta in (0.25, 0.5, 1, 2, 4)),
    *(f"trades:se:{beta}" for beta in (1, 4)),
    *(f"trades:kl:{beta}:soft {posterior}" for posterior in SOFT_TARGETS for beta in (0.25, 0.5, 1)),
)
MOVED = tuple(f"trades:kl:{beta}:moved {posterior}" for posterior in SOFT_TARGETS for beta in (0.5, 1))
TOGETHER = ("standard:kl", "pgd_at:kl", *(f"trades:kl:{beta}" for beta in (0.25, 0.5, 1)))
MEMBERS = 4  # networks of a surrogate together, as many as there are joint energies in their ensemble
ABLATED = ("oracle", "classifier", "energy_ensemble")
ABLATION = {"A": "direct:kl:fixed", "B": "direct:kl:model-only", "C": "direct:kl", "D": "direct:kl:noise"}


@dataclass(frozen=True)
class Plan:
    """What is trained on a problem."""

    surrogates: tuple[str, ...] = SURROGATES
    estimators: tuple[str, ...] = tuple(name for name in ESTIMATORS if name not in OF_IMAGES)
    ablated: tuple[str, ...] = ABLATED
    moved: tuple[str, ...] = MOVED
    judged: tuple[str, ...] = ("energy_ensemble",)  # posteriors that are measured as if they were students
    together: tuple[str, ...] = TOGETHER  # surrogates of which several networks are measured as one
    grid: Grid = field(default_factory=Grid)
    budget: Budget = field(default_factory=Budget)


SWEPT = Plan(
    surrogates=(
        "standard:kl",
        "pgd_at:kl",
        *(f"trades:kl:{beta}" for beta in (0.25, 0.5, 1, 2)),
        *(f"trades:kl:{beta}:soft energy_ensemble" for beta in (0.25, 0.5, 1)),
    ),
    estimators=("energy_ensemble", "kernel_density"),
    ablated=(),
    moved=(),
    judged=(),
    together=(),
)

Kind = Literal["mixture", "sweep", "digits", "images", "features"]
PLANS: dict[Kind, Plan] = {
    "mixture": Plan(),
    "sweep": SWEPT,
    "digits": Plan(
        surrogates=tuple(form for form in SURROGATES if not form.endswith("soft classifier")),
        estimators=(
            "energy_ensemble",
            "classifier_ensemble",
            "energy",
            "classifier",
            "score",
            "kernel_density",
            "factor_analysers",
        ),
        ablated=("oracle", "energy_ensemble"),
        moved=(),
        judged=(),
        together=(),
    ),
    "features": Plan(
        surrogates=(
            "standard:kl",
            "pgd_at:kl",
            "pgd_at:se",
            *(f"trades:kl:{beta}" for beta in (0.25, 0.5, 1, 2)),
            *(f"trades:kl:{beta}:soft energy_ensemble" for beta in (0.25, 0.5, 1)),
        ),
        estimators=("energy_ensemble", "classifier_ensemble", "factor_analysers", "classifier", "energy", "score"),
        ablated=("oracle", "energy_ensemble"),
        moved=(),
        grid=replace(estimators.IMAGES, energy_weight=100.0),
    ),
    "images": Plan(
        surrogates=(
            "standard:kl",
            "pgd_at:kl",
            *(f"trades:kl:{beta}" for beta in (0.25, 0.5, 1)),
            *(f"trades:kl:{beta}:soft energy_ensemble" for beta in (0.25, 0.5)),
        ),
        estimators=("energy_ensemble", "classifier_ensemble", "factor_analysers", "score"),
        ablated=("oracle", "energy_ensemble"),
        moved=(),
        judged=(),
        together=(),
        grid=estimators.IMAGES,
        budget=Budget(steps=1500),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One problem, and where its results go."""

    kind: Kind
    count: int
    seed: int
    folder: Path
    quick: bool = False
    dimension: int | None = None  # of a mixture or of the sweep
    root: Path | None = None  # of CIFAR-10, for images and features

    @property
    def path(self) -> Path:
        kind = f"d{self.dimension}" if self.dimension is not None else self.kind
        return self.folder / f"{kind}-n{self.count}-seed{self.seed}.json"

    @property
    def budget(self) -> Budget:
        return students.QUICK if self.quick else PLANS[self.kind].budget

    @property
    def grid(self) -> Grid:
        return estimators.QUICK if self.quick else PLANS[self.kind].grid

    @property
    def about(self) -> dict[str, Any]:
        return {
            "problem": self.kind,
            "count": self.count,
            "seed": self.seed,
            "budget": asdict(self.budget),
            "grid": asdict(self.grid),
        }

    def problem(self) -> Problem:
        sizes = problems.QUICK if self.quick else {}
        if self.kind == "digits":
            return problems.known_digits(self.count, self.seed, **sizes)
        if self.kind in ("images", "features"):
            build = problems.known_cifar if self.kind == "images" else problems.known_features
            return build(self.analysers(), self.count, self.seed, **sizes)
        assert self.dimension is not None
        return problems.gaussian_mixture(self.dimension, self.count, self.seed, **sizes)

    def analysers(self) -> FactorAnalysers:
        """Of the images, whose features the others are, too; fitted by the first cell that asks."""
        return problems.image_analysers(self.root, self.folder / "analysers.pt")


def run(cell: Cell) -> None:
    """Everything of one problem."""
    problem = cell.problem()
    plan, budget = PLANS[cell.kind], cell.budget
    bench = Bench(problem, cell.seed, cell.grid)
    notebook = Notebook(cell.path, {**cell.about, "dimension": problem.x[0].numel()})
    notebook.once("problem", lambda: facts(problem))
    oracle = Estimated(problem.oracle, {}, {})

    def estimate(name: str) -> Estimated:
        return oracle if name == "oracle" else bench.estimated(name)

    def student(form: str, picked: bool = False) -> dict[str, Any]:
        objective, _, name = form.partition(" ")
        posterior = estimate(name).posterior if name else None
        trains = students.objective_of(objective, problem, posterior, budget)
        judge = partial(students.r_score, problem) if picked else None
        made = students.train(problem, trains, cell.seed, budget, judge=judge)
        measured = {"last": students.measure(problem, made.last, cell.seed)}
        if made.best is not None:
            measured["best"] = students.measure(problem, made.best, cell.seed)
        return {**measured, "data_gradient_ratio": made.data_gradient_ratio}

    def together(form: str) -> dict[str, Any]:
        """The first network is that of the surrogate by itself; the others differ in initialisation and batches."""
        trains = students.objective_of(form, problem, None, budget)
        judge = partial(students.r_score, problem)
        made = [students.train(problem, trains, cell.seed + 1000 * m, budget, judge=judge) for m in range(MEMBERS)]
        models = {
            "last": students.Together([student.last for student in made]),
            "best": students.Together([student.best for student in made if student.best is not None]),
        }
        return {weights: students.measure(problem, model.eval(), cell.seed) for weights, model in models.items()}

    def recorded(name: str) -> dict[str, Any]:
        return posterior_record(problem, estimate(name))

    def judged(name: str) -> dict[str, Any]:
        return {"last": students.measure(problem, estimate(name).posterior, cell.seed)}

    for form in plan.surrogates:
        notebook.once(f"student {form}", partial(student, form, picked=True))
    for name in ("oracle", *plan.estimators):
        notebook.once(f"posterior {name}", partial(recorded, name))
        for objective in ABLATION.values() if name in plan.ablated else ["direct:kl"]:
            notebook.once(f"student {objective} {name}", partial(student, f"{objective} {name}"))
    for form in plan.moved:
        notebook.once(f"student {form}", partial(student, form))
    for name in plan.judged:
        notebook.once(f"model {name}", partial(judged, name))
    for form in plan.together:
        notebook.once(f"together {form}", partial(together, form))


def facts(problem: Problem) -> dict[str, Any]:
    """Bayes accuracy and the entropy of p_d, on the test sample."""
    with torch.no_grad():
        log_p = problem.oracle(problem.x_test)
    bayes = students.accuracy(problem.oracle, problem.x_test, problem.y_test)
    return {"bayes_accuracy": bayes, "entropy": -(log_p.exp() * log_p).sum(1).mean().item()}


def posterior_record(problem: Problem, estimated: Estimated) -> dict[str, Any]:
    """How far an estimate is from p_d: at clean points, at random ones in the ball, and its gradients."""
    posterior, x, y = estimated.posterior, problem.x_test, problem.y_test
    moved = problem.threat_model.random_start(x, Generator().manual_seed(0))
    error = audit.gradient_error(posterior, problem.oracle, x, y)
    clean, robust = audit.robust_accuracy(
        posterior, x, y, problem.threat_model, steps=20, generator=Generator().manual_seed(0)
    )
    return {
        "settings": estimated.settings,
        "evidence": estimated.evidence,
        "kl": audit.kl_error(posterior, problem.oracle, x, y).mean().item(),
        "kl_in_ball": audit.kl_error(posterior, problem.oracle, x, y, moved).mean().item(),
        "gradient": error._asdict(),
        "clean": 100 * clean,
        "robust": 100 * robust,
    }
