"""The numbers of an evaluation, and the lines that say them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..intervals import wilson
from . import inspection
from .accounting import Cost
from .evaluation_state import EARLIER, EvaluationState
from .fab import distance
from .schedule import Stage

SMALLER = "smaller radius"  # what the report calls EARLIER


def accuracy(hits: int, count: int) -> dict[str, Any]:
    """The share, and its 95 % interval (Wilson)."""
    return {"accuracy": hits / count, "interval": list(wilson(hits, count))}


def standing_after(state: EvaluationState, index: int) -> Tensor:
    """Which samples were robust after a stage, bool [N]; later stages may have fooled more."""
    return state.clean & ~(state.has_fallen & (state.fallen_by <= index))


def nan_samples(state: EvaluationState) -> dict[str, Tensor]:
    """Samples at whose points the model returned NaN, int64 [K]: at the clean ones, and at those that attacks found."""
    nan, fallen = (state.finished >= 0) & (state.labels < 0), state.has_fallen
    return {"clean": (nan & ~fallen).nonzero().squeeze(1), "attacked": (nan & fallen).nonzero().squeeze(1)}


def report_of(state: EvaluationState, stages: Sequence[Stage]) -> dict[str, Any]:
    """Accuracies and costs, clean, after each attack and at the end."""
    count = len(state.robust)
    attacks: dict[str, Any] = {}
    for index, stage in enumerate(stages):
        name = stage.attack.name
        after = accuracy(int(standing_after(state, index).sum()), count)
        pending = int((state.robust & (state.finished <= index)).sum())
        attacks[name] = {**after, **asdict(state.costs.get(name, Cost())), "pending": pending}
    clean, robust = accuracy(int(state.clean.sum()), count), accuracy(int(state.robust.sum()), count)
    return {
        "clean_accuracy": clean["accuracy"],
        "clean_interval": clean["interval"],
        "robust_accuracy": robust["accuracy"],
        "robust_interval": robust["interval"],
        "complete": not any(attack["pending"] for attack in attacks.values()),
        "attacks": attacks,
        "samples": count,
        "robust": state.robust.tolist(),
        "fallen_by": [_fallen_by(stages, index) for index in state.fallen_by.tolist()],
        "nearest": lengths(state.nearest),
        "nan_samples": {name: samples.tolist() for name, samples in nan_samples(state).items()},
        "seconds": sum(cost.seconds for cost in state.costs.values()),
    }


def lengths(nearest: Tensor) -> list[float | None]:
    """Distances [N] for JSON, which has no word for ∞: None where no point was found."""
    return [length if math.isfinite(length) else None for length in nearest.tolist()]


def _fallen_by(stages: Sequence[Stage], index: int) -> str | None:
    if index == EARLIER:
        return SMALLER
    return stages[index].attack.name if index >= 0 else None


def doubts_of(report: dict[str, Any], state: EvaluationState) -> list[str | None]:
    """What about a finished evaluation makes it doubtful."""
    doubts = [inspection.nan_samples(nan_samples(state)["attacked"], "attacked")]
    names = list(report["attacks"])
    if "square" in names and len(names) > 1:
        place = names.index("square")
        before = report["attacks"][names[place - 1]]["accuracy"] if place else report["clean_accuracy"]
        doubts.append(inspection.masking(before, report["attacks"]["square"]["accuracy"]))
    return doubts


def stage_line(state: EvaluationState, index: int, name: str, mine: Tensor) -> str:
    """The accuracy after a stage on the samples ``mine`` of rank 0, which are all where it is alone."""
    robust, count = int(standing_after(state, index)[mine].sum()), len(mine)
    low, high = wilson(robust, count)
    where = f" (rank 0's {count} samples)" if count < len(state.robust) else ""
    return (
        f"robust accuracy after {name}: {100 * robust / count:.2f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}), {state.costs[name].seconds:.1f} s{where}"
    )


def result_line(report: dict[str, Any], state: EvaluationState, x: Tensor, norm: str, norm_name: str) -> str:
    """The result, with the largest perturbation of x [N, …]."""
    largest = distance(state.adversarial, x, norm).max()
    low, high = report["robust_interval"]
    bound = "" if report["complete"] else ", at most"
    return (
        f"robust accuracy{bound}: {100 * report['robust_accuracy']:.2f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}); "
        f"largest {norm_name} perturbation {float(largest):.5f}; {report['seconds']:.1f} s"
    )


def table(report: dict[str, Any], form: str) -> str:
    """A report as a table, one line for the clean samples and one for each attack.

    Args:
        form: ``"markdown"``, or ``"latex"``: a tabular that needs no package.

    Raises:
        ValueError: there is no such form.
    """
    rows = [["clean", *shares(report["clean_accuracy"], report["clean_interval"]), "", "", ""]]
    for name, attack in report["attacks"].items():
        rows.append([name, *shares(attack["accuracy"], attack["interval"]), *costs(attack)])
    return tabular("after", rows, form)


def tabular(first: str, rows: Sequence[Sequence[str]], form: str) -> str:
    """Rows of accuracies and costs under their heads.

    Args:
        first: head of the first column; the others are accuracy, interval, forward and backward passes, seconds.
        form: as for :func:`table`.

    Raises:
        ValueError: there is no such form.
    """
    if form not in ("markdown", "latex"):
        raise ValueError(f"form must be markdown or latex, got {form!r}")
    percent = "%" if form == "markdown" else r"\%"
    head = [first, f"accuracy, {percent}", f"95 {percent} interval", "forward passes", "backward passes", "seconds"]
    if form == "markdown":
        rule = ["---", *["---:"] * (len(head) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
    lines = [" & ".join(line) + r" \\" for line in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    )


def shares(accuracy: float, interval: Sequence[float]) -> list[str]:
    low, high = (100 * end for end in interval)
    return [f"{100 * accuracy:.2f}", f"{low:.1f} to {high:.1f}"]


def costs(attack: dict[str, Any]) -> list[str]:
    return [f"{attack['forwards']:,}", f"{attack['backwards']:,}", f"{attack['seconds']:.1f}"]
