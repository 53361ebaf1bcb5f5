"""Fig. 2: R_Standard, R_Madry and R_SCORE with six training points, five of class 0 and one of class 1.

Everything but the points is as in Fig. 1. Each draw has six points and an initialisation of its own. With the exact
search there are DRAWS draws for each seed; with PGD-10, which takes longer, only the first of them. The first two
errors use p_d(y|x) at the six points, R_SCORE on the balls around them.

Claims, in KL(p_d ‖ p_θ), the mean over p_d(x) in nats, after 500 steps:

1. R_SCORE is more sample-efficient than R_Standard: the 95 % interval (Student's t) of the paired difference, its KL
   minus that of R_Standard, lies below 0.
2. R_SCORE is more sample-efficient than R_Madry: the same against R_Madry.

Both with PGD-10 and with the exact search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from training.data import toy
from training.figures.claims import Claim, Result, interval, mapped
from training.figures.figure_1 import LINES
from training.figures.toy_fits import FEW_COUNTS, SEARCHES, SYMBOLS, TITLES, Fit, Objective, draw, train
from training.measures.seeds import estimate
from training.reports.plots import COLOURS, FAINT, INK

DRAWS = 4  # for each seed; draw number DRAWS * seed is the first of a seed
FIRST = 1000  # number of the first draw, a multiple of DRAWS: other points than those of Fig. 1
COMPARED: tuple[Objective, ...] = ("standard", "madry", "score")


def fitted(fit: Fit) -> dict[str, Any]:
    """KL from p_d and the robust errors of the fitted model, and its curve."""
    model = train(fit)
    errors = toy.robust_errors(model, toy.Grid(points_per_eps=100))
    points = draw(fit.counts, fit.points)
    return {
        "objective": fit.objective,
        "search": fit.search,
        "draw": fit.points,
        "kl": errors["r_standard"],
        "r_score": errors["r_score"],
        "r_madry": errors["r_madry"],
        "points": points.x[:, 0].tolist(),
        "curve": toy.curves(model, points=121)["p_theta"],
    }


def make(seeds: tuple[int, ...], steps: int, jobs: int) -> Result:
    """The figure.

    Args:
        seeds: each stands for DRAWS draws of six points.
        steps: of each training.
        jobs: processes.
    """
    draws = [FIRST + DRAWS * seed + number for seed in seeds for number in range(DRAWS)]
    fits = [
        Fit(objective, "kl", search, seed=number, points=number, counts=FEW_COUNTS, steps=steps)
        for search in SEARCHES
        for number in draws
        for objective in COMPARED
        if search == "grid" or (objective != "standard" and number % DRAWS == 0)
    ]
    found = mapped(fitted, fits, jobs, "fig2")
    # Without an adversary nothing is searched.
    same = [e for e in found if e["objective"] == "standard" and e["draw"] % DRAWS == 0]
    found += [{**entry, "search": "pgd"} for entry in same]

    def values(objective: str, search: str) -> np.ndarray:
        return np.array([e["kl"] for e in found if (e["objective"], e["search"]) == (objective, search)])

    claims, differences = [], {}
    for search in SEARCHES:
        for other in ("standard", "madry"):
            paired = values("score", search) - values(other, search)
            difference = estimate(paired.tolist())
            differences[f"score - {other}, {search}"] = difference._asdict()
            wins = f"{int((paired < 0).sum())} of {len(paired)} draws"
            shown = f"{values('score', search).mean():.3g} against {values(other, search).mean():.3g} nats"
            claims.append(
                Claim(
                    f"R_SCORE is more sample-efficient than {TITLES[other]}: its KL minus the other's is below 0",
                    f"{interval(difference)} nats; means {shown}; smaller in {wins}",
                    difference.high is not None and difference.high < 0,
                    Fit("score", search=search, steps=steps).choices,
                )
            )
    means = {
        f"{objective} {search}": estimate(values(objective, search).tolist())._asdict()
        for search in SEARCHES
        for objective in COMPARED
    }
    return Result(draw_figure(found, draws), claims, {"means": means, "differences": differences, "fits": found})


def draw_figure(found: list[dict[str, Any]], draws: list[int]) -> plt.Figure:
    """The first draw on the left, the distance from p_d of all draws on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), width_ratios=(1.25, 1))
    base = toy.exact_curves(points=121)
    left.plot(base["x"], base["p_d"], color=FAINT, linewidth=5, label="p_d(y=1|x)")
    for objective, dashes in zip(COMPARED, (":", "--", "-"), strict=True):
        (entry,) = (e for e in found if (e["objective"], e["search"], e["draw"]) == (objective, SEARCHES[0], draws[0]))
        left.plot(base["x"], entry["curve"], dashes, color=COLOURS[LINES[objective]], label=SYMBOLS[objective])
    left.scatter(entry["points"], [-0.02] * len(entry["points"]), marker="|", s=90, color=INK, label="training points")
    left.set(title="one draw", xlabel="x", ylabel="probability of y = 1", ylim=(-0.06, 1.0))
    left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for place, objective in enumerate(COMPARED):
        for offset, search in ((-0.14, SEARCHES[0]), (0.14, SEARCHES[1])):
            heights = [e["kl"] for e in found if (e["objective"], e["search"]) == (objective, search)]
            jitter = np.linspace(-0.08, 0.08, len(heights))
            colour = COLOURS[LINES[objective]]
            face = "none" if search == "pgd" else colour
            right.scatter(place + offset + jitter, heights, s=16, facecolors=face, edgecolors=colour)
            right.hlines(np.mean(heights), place + offset - 0.12, place + offset + 0.12, color=INK, linewidth=1.8)
    right.set(
        title=f"{len(draws)} draws of six points, and their mean",
        yscale="log",
        ylabel="KL(p_d ‖ p_θ), nats",
        xticks=range(len(COMPARED)),
        xticklabels=[SYMBOLS[o] for o in COMPARED],
        xlabel="minimised error (hollow: PGD-10)",
    )
    figure.tight_layout()
    return figure
