"""Problems whose p_d is known: every estimator and every objective is compared with it.

Mixtures of Gaussians, and draws from factor analysers that were fitted to the 8×8 digits.

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

Comparisons are paired over seeds; each seed has means, data, initialisation and batches of its own. H3 is one
comparison for each number of labels; the other tables are descriptions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from scorematch import audit
from training.experiments import estimators, problems, students
from training.experiments.estimators import ESTIMATORS, Bench, Estimated
from training.experiments.problems import Problem
from training.experiments.runner import Notebook

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
ABLATED = ("oracle", "classifier", "energy_ensemble")
ABLATION = {"A": "direct:kl:fixed", "B": "direct:kl:model-only", "C": "direct:kl", "D": "direct:kl:noise"}


@dataclass(frozen=True)
class Cell:
    """One problem: a mixture of Gaussians of this dimension, or with None the known digits."""

    dimension: int | None
    count: int
    seed: int
    folder: Path
    quick: bool = False

    @property
    def name(self) -> str:
        kind = "digits" if self.dimension is None else f"d{self.dimension}"
        return f"{kind}-n{self.count}-seed{self.seed}"

    def problem(self) -> Problem:
        sizes = problems.QUICK if self.quick else {}
        if self.dimension is None:
            return problems.known_digits(self.count, self.seed, **sizes)
        return problems.gaussian_mixture(self.dimension, self.count, self.seed, **sizes)


def run(cell: Cell) -> None:
    """Everything of one mixture."""
    problem = cell.problem()
    budget = students.QUICK if cell.quick else students.Budget()
    grid = estimators.QUICK if cell.quick else estimators.Grid()
    bench = Bench(problem, cell.seed, grid)
    about = {
        "problem": "digits" if cell.dimension is None else "mixture",
        "dimension": problem.x[0].numel(),
        "count": cell.count,
        "seed": cell.seed,
        "budget": asdict(budget),
        "grid": asdict(grid),
    }
    notebook = Notebook(cell.folder / f"{cell.name}.json", about)
    notebook.once("problem", lambda: facts(problem))
    estimated: dict[str, Estimated] = {"oracle": Estimated(problem.oracle, {}, {})}

    def estimate(name: str) -> Estimated:
        if name not in estimated:
            estimated[name] = ESTIMATORS[name](bench)
        return estimated[name]

    def student(form: str, picked: bool = False) -> dict[str, Any]:
        objective, _, name = form.partition(" ")
        posterior = estimate(name).posterior if name else None
        trains = students.objective_of(objective, problem, posterior, budget)
        made = students.train(problem, trains, cell.seed, budget, picked=picked)
        measured = {"last": students.measure(problem, made.last, cell.seed)}
        if made.best is not None:
            measured["best"] = students.measure(problem, made.best, cell.seed)
        return {**measured, "data_gradient_ratio": made.data_gradient_ratio}

    def recorded(name: str) -> dict[str, Any]:
        return posterior_record(problem, estimate(name))

    for form in SURROGATES:
        notebook.once(f"student {form}", partial(student, form, picked=True))
    for name in ("oracle", *ESTIMATORS):
        notebook.once(f"posterior {name}", partial(recorded, name))
    others = [f"direct:kl {name}" for name in ("oracle", *ESTIMATORS)]
    others += [f"{objective} {name}" for name in ABLATED for objective in ABLATION.values()]
    for form in (*others, *MOVED):
        notebook.once(f"student {form}", partial(student, form))


def facts(problem: Problem) -> dict[str, Any]:
    """Bayes accuracy and the entropy of p_d, on the test sample."""
    with torch.no_grad():
        log_p = problem.oracle(problem.x_test)
    hit = (log_p.argmax(1) == problem.y_test).double().mean().item()
    return {"bayes_accuracy": 100 * hit, "entropy": -(log_p.exp() * log_p).sum(1).mean().item()}


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
