"""Fig. 3: R_SCORE^l2 falls and rises again while R_Madry^l2 is minimised, on the toy of Fig. 1.

l2 is taken of the single number p(y=1|x), the paper's sigmoid output, so that C^l2 is the paper's. Over both classes
every error is √2 times as large; the steps of Adam are the same.

Claims, for every seed:

1. C^l2 is about 0.12: between 0.115 and 0.125.
2. At the step where R_SCORE^l2 is smallest, R_Madry^l2 is within 15 % of C^l2.
3. Overfitting: from there to the end R_SCORE^l2 rises by at least 10 % while R_Madry^l2 falls.
4. Theorem 1 holds at every step measured: |R_Madry − C| ≤ R_SCORE ≤ R_Madry + C, to 1e-6.

2 and 3 also with what the paper leaves open chosen in other ways: exact search, batches of 512, rate 0.01.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from training.data import toy
from training.figures import overfitting
from training.figures.claims import Claim, Result, mapped
from training.reports.plots import COLOURS, INK

NAMES = ("R_Madry^l2", "R_SCORE^l2", "C^l2")
PAPER, TOLERANCE = 0.12, 0.005  # C^l2
ROUNDING = 1e-6
SCALE = 1 / math.sqrt(2)  # from both classes to the single number


def make(seeds: tuple[int, ...], steps: int, jobs: int) -> Result:
    """The figure.

    Args:
        seeds: of training points and initialisation.
        steps: of each training.
        jobs: processes.
    """
    fits = [fit for seed in seeds for fit in overfitting.choices("l2", seed, steps)]
    runs = [scaled(run) for run in mapped(overfitting.followed, fits, jobs, "fig3")]
    grid = overfitting.GRID
    constant = SCALE * grid.mean(toy.constant("l2", grid)).item()
    groups = overfitting.grouped(runs)
    slack = [least_slack(run["curves"], constant) for run in runs]
    claims = [
        Claim(
            f"C^l2 is about {PAPER}: within {TOLERANCE} of it",
            f"{constant:.4f} for the single number p(y=1|x), {constant / SCALE:.4f} over both classes",
            abs(constant - PAPER) <= TOLERANCE,
            "single number",
        ),
        *(claim for group in groups for claim in overfitting.claims_of(group, "madry", constant, NAMES)),
        Claim(
            "Theorem 1: |R_Madry - C| <= R_SCORE <= R_Madry + C at every step measured",
            f"smallest slack {min(slack):.3g}",
            min(slack) >= -ROUNDING,
            "all of the above",
        ),
    ]
    numbers = {
        "constant_l2": constant,
        "constant_l2_both_classes": constant / SCALE,
        "turns": overfitting.turns(runs, "madry"),
        "runs": groups[0],
    }
    return Result(draw(groups, constant), claims, numbers)


def scaled(run: dict[str, Any]) -> dict[str, Any]:
    """A run with its errors those of the single number."""
    curves = {
        name: values if name == "step" else [SCALE * value for value in values]
        for name, values in run["curves"].items()
    }
    return {**run, "curves": curves}


def least_slack(curves: dict[str, list[float]], constant: float) -> float:
    """How far the closer bound of Theorem 1 is away, the smallest over the steps; negative if it is violated."""
    pairs = list(zip(curves["madry"], curves["score"], strict=True))
    return min(min(score - abs(madry - constant), madry + constant - score) for madry, score in pairs)


def lines(axes: Axes, run: dict[str, Any], styles: dict[str, tuple[str, str, str]], first: bool = True) -> None:
    """The curves of one run; ``styles`` gives colour, dashes and label of each key. All but the first are thin."""
    for key, (colour, dashes, name) in styles.items():
        axes.plot(
            run["curves"]["step"],
            run["curves"][key],
            linestyle=dashes,
            color=colour,
            linewidth=2.0 if first else 0.8,
            alpha=1.0 if first else 0.7,
            label=name if first else None,
        )


def mark(axes: Axes, run: dict[str, Any], madry: str) -> None:
    """A dot where R_SCORE is smallest, and a line from it to R_Madry at that step."""
    turn = overfitting.turning(run["curves"], madry)
    ends = [turn["score"], turn["madry"]]
    axes.plot([turn["step"]] * 2, ends, color=INK, linewidth=0.8, marker="o", markersize=4, zorder=4)


def draw(groups: list[list[dict[str, Any]]], constant: float) -> plt.Figure:
    """One panel for each choice, its first seed thick and the others thin."""
    styles = {
        "madry": (COLOURS["pgd_at"], "-", r"$R_\mathrm{Madry}^{\ell_2}$ (minimised)"),
        "score": (COLOURS["score_network"], "-", r"$R_\mathrm{SCORE}^{\ell_2}$"),
        "standard": (COLOURS["standard"], "--", r"$R_\mathrm{Standard}^{\ell_2}$"),
    }
    rows = -(-len(groups) // 2)
    figure, panels = plt.subplots(rows, 2, figsize=(9.0, 3.0 * rows), sharex=True, sharey=True, squeeze=False)
    for axes, group in zip(panels.flat, groups, strict=True):
        for run in group:
            lines(axes, run, styles, first=run is group[0])
            mark(axes, run, "madry")
        axes.axhline(constant, color=INK, linestyle=":", linewidth=1.4, label=rf"$C^{{\ell_2}}$ = {constant:.3f}")
        axes.set_title(group[0]["choices"])
        axes.set(ylim=(0, 0.3))
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    for axes in panels[:, 0]:
        axes.set_ylabel("error, in probability of y = 1")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.01))
    return figure
