"""Fig. 1: what R_Madry (Eq. 3) and R_SCORE (Eq. 4) are minimised by, on the one-dimensional toy.

A model is fitted to each error, with p_d(y|x) as the target. KL(p_d ‖ p_θ) is the mean over p_d(x), in nats.

Claims, each for every seed:

1. R_SCORE is minimised by p_d: KL(p_d ‖ p_θ) of its model is at most 0.005 nats.
2. R_Madry is not minimised by p_d: KL(p_d ‖ p_θ) of its model is at least 5 times that of R_SCORE's model.
3. p_d is not optimal for R_Madry: its model has a smaller R_Madry than p_d itself, which has C^KL.
4. With every other divergence (l1, JS, squared error), too, R_SCORE's model is closer to p_d in KL than R_Madry's.
   With two classes l2 and linf are l1 divided by √2 and by 2, and Adam trains the same model with them.

1 to 3 with PGD-10 and with the exact search, 4 with the exact search, which also fits R_Standard and R_TRADES (β = 1).
"""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt

from training.data import toy
from training.figures.claims import Claim, Result, mapped, spread
from training.figures.toy_fits import DIVERGENCES, OBJECTIVES, SEARCHES, SYMBOLS, Fit, train
from training.measures.seeds import estimate
from training.reports.plots import COLOURS, FAINT, INK

LARGEST_KL = 0.005  # nats
RATIO = 5.0
LINES = {"standard": "standard", "madry": "pgd_at", "score": "score_network", "trades": "trades"}  # of COLOURS


def fitted(fit: Fit) -> dict[str, Any]:
    """Errors of the fitted model, in its own divergence and in KL, and its curve."""
    model = train(fit)
    grid = toy.Grid(points_per_eps=200)
    kl = toy.robust_errors(model, grid)
    own = toy.errors(model, fit.divergence, grid)
    names = ("standard", "madry", "score", "constant", "invariance")
    return {
        "objective": fit.objective,
        "divergence": fit.divergence,
        "search": fit.search,
        "seed": fit.seed,
        "kl": kl["r_standard"],
        "r_score": kl["r_score"],
        "r_madry": kl["r_madry"],
        "own": {name: grid.mean(getattr(own, name)).item() for name in names},
        "curve": toy.curves(model, points=121)["p_theta"],
    }


def planned(seeds: tuple[int, ...], steps: int) -> list[Fit]:
    """All trainings."""
    fits = [
        Fit(objective, "kl", search, seed, points=seed, steps=steps)
        for seed in seeds
        for search in SEARCHES
        for objective in (("madry", "score") if search == "pgd" else OBJECTIVES)
    ]
    others = [
        Fit(objective, divergence, "grid", seed, points=seed, steps=steps)
        for seed in seeds
        for divergence in DIVERGENCES[1:]
        for objective in ("madry", "score")
    ]
    return [*fits, *others]


def make(seeds: tuple[int, ...], steps: int, jobs: int) -> Result:
    """The figure.

    Args:
        seeds: of training points and initialisation.
        steps: of each training.
        jobs: processes.
    """
    found = mapped(fitted, planned(seeds, steps), jobs, "fig1")
    grid = toy.Grid(points_per_eps=200)
    constant = grid.mean(toy.constant("kl", grid)).item()

    def values(key: str, objective: str, divergence: str = "kl", search: str = "grid") -> list[float]:
        wanted = (objective, divergence, search)
        return [e[key] for e in found if (e["objective"], e["divergence"], e["search"]) == wanted]

    claims = []
    for search in SEARCHES:
        choices = Fit("madry", search=search, steps=steps).choices
        score, madry = (values("kl", objective, search=search) for objective in ("score", "madry"))
        ratios = [m / s for m, s in zip(madry, score, strict=True)]
        own = values("r_madry", "madry", search=search)
        claims += [
            Claim(
                f"R_SCORE is minimised by p_d: KL(p_d ‖ p_θ) at most {LARGEST_KL} nats",
                f"{spread(score)} nats",
                max(score) <= LARGEST_KL,
                choices,
            ),
            Claim(
                f"R_Madry is not minimised by p_d: KL(p_d ‖ p_θ) at least {RATIO:g} times that of R_SCORE's model",
                f"{spread(madry)} nats, {spread(ratios, 3)} times as much",
                min(ratios) >= RATIO,
                choices,
            ),
            Claim(
                "p_d is not optimal for R_Madry: R_Madry of its model is below that of p_d, C^KL",
                f"{spread(own)} against {constant:.4g} nats",
                max(own) < constant,
                choices,
            ),
        ]
    for divergence in DIVERGENCES[1:]:
        score, madry = (values("kl", objective, divergence) for objective in ("score", "madry"))
        claims.append(
            Claim(
                f"With {divergence}, R_SCORE's model is closer to p_d in KL than R_Madry's",
                f"{spread(score)} against {spread(madry)} nats",
                all(s < m for s, m in zip(score, madry, strict=True)),
                Fit("score", search="grid", steps=steps).choices,
            )
        )
    table = {
        f"{objective} {divergence} {search}": {
            key: estimate(values(key, objective, divergence, search))._asdict() for key in ("kl", "r_score", "r_madry")
        }
        for objective, divergence, search in {(e["objective"], e["divergence"], e["search"]): None for e in found}
    }
    numbers = {"constant_kl": constant, "means": table, "fits": found}
    return Result(draw(found, seeds), claims, numbers)


def draw(found: list[dict[str, Any]], seeds: tuple[int, ...]) -> plt.Figure:
    """Data, the two solutions, and the distance from p_d of every objective and divergence."""
    figure, grid = plt.subplots(2, 2, figsize=(8.6, 6.2))
    panels = list(grid.flat)
    base = toy.exact_curves(points=121)
    for key, colour, dashes, shown in (("joint_0", "#0072b2", "-", "y = 0"), ("joint_1", "#d55e00", "--", "y = 1")):
        panels[0].fill_between(base["x"], base[key], color=colour, alpha=0.15, linewidth=0)
        panels[0].plot(base["x"], base[key], dashes, color=colour, label=shown)
    panels[0].set(title="data", xlabel="x", ylabel="density p_d(x, y)")
    panels[0].legend(loc="upper right")
    for axes, objective in zip(panels[1:3], ("madry", "score"), strict=True):
        axes.plot(base["x"], base["p_d"], color=FAINT, linewidth=5, label="p_d(y=1|x)")
        curves = [
            e["curve"]
            for e in found
            if (e["objective"], e["divergence"], e["search"]) == (objective, "kl", SEARCHES[0])
        ]
        for number, curve in enumerate(curves):
            label = f"p_θ(y=1|x), {len(seeds)} seed{'s' * (len(seeds) > 1)}" if number == 0 else None
            axes.plot(base["x"], curve, color=COLOURS[LINES[objective]], linewidth=1.3, label=label)
        axes.set(title=f"after {SYMBOLS[objective]}", xlabel="x", ylabel="probability of y = 1", ylim=(-0.02, 0.8))
        axes.legend(loc="upper left")
        axes.set_ylim(-0.02, 0.75)
    axes = panels[3]
    markers = {"standard": "x", "madry": "o", "score": "^", "trades": "s"}
    for objective, marker in markers.items():
        for offset, search in ((-0.08, "grid"), (0.08, "pgd")):
            points = [
                (DIVERGENCES.index(e["divergence"]) + offset, e["kl"])
                for e in found
                if e["objective"] == objective and e["search"] == search
            ]
            if not points:
                continue
            where, height = zip(*points, strict=True)
            colour = COLOURS[LINES[objective]]
            label = SYMBOLS[objective] if search == "grid" else None
            full = "none" if search == "pgd" else colour
            axes.plot(where, height, marker, markersize=5, color=colour, markerfacecolor=full, label=label)
    axes.set(
        title="distance from p_d",
        yscale="log",
        ylabel="KL(p_d ‖ p_θ), nats",
        xticks=range(len(DIVERGENCES)),
        xticklabels=DIVERGENCES,
        xlabel="divergence (hollow: PGD-10)",
        xlim=(-0.5, len(DIVERGENCES) - 0.5),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
    axes.tick_params(axis="x", colors=INK)
    figure.tight_layout()
    return figure
