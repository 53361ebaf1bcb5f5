"""Certified accuracy on the digits: Gaussian training with γ of both signs (Eqs. 36, 37) beside plain augmentation.

The paper has no such figure; its Appendix C derives the objective. Each model is trained by ``training.run`` with
σ = 0.25 for 15 epochs, and the classifier smoothed with the same σ is certified (Cohen et al., ICML 2019) on the first
200 test images: 100 votes choose the class, 1,000 bound its probability, α = 0.001.

Claims, ours, written before anything but one seed of γ = 0 and of γ = 3 with KL had been seen:

- Noise in training is needed: at L2 radius 0.25 plain augmentation (γ = 0) certifies more than standard training.
- The sign of Eq. (36) is the one that helps: there γ = 0.5 certifies more than γ = 3 (Eq. 37), both with KL.
- A larger weight of the alignment helps: γ = 0.5 certifies more than γ = 0.
- With a bounded divergence Eq. (37) can be trained: γ = 3 with squared error certifies more than with KL, whose noisy
  term grows without bound.

Each is about the difference in points, paired over seeds: its 95 % interval (Student's t) lies above 0.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

from training import run as training_run
from training.figures.claims import Claim, Result, interval, mapped
from training.figures.figure_4 import QUICK, Source
from training.measures.certification import certify
from training.measures.seeds import estimate
from training.reports import plots
from training.settings.errors import StopError

SIGMA = 0.25
RADIUS = 0.25  # at which the claims are judged, L2, in input units
SEEDS = 3  # at most
IMAGES = 200
CHOICES = f"8×8 digits, σ = {SIGMA:g}, {IMAGES} test images"
BRIEF = ["--epochs", "15", "--autoattack", "none", "--curve-points", "2", "--eval-steps", "10", "--eval-restarts", "1"]
NOISY = ["--objective", "gaussian", "--sigma", str(SIGMA)]
METHODS = {
    "standard, no noise": ["--objective", "standard"],
    "γ = 0, plain": NOISY,
    "γ = 0.5, Eq. (36)": [*NOISY, "--gamma", "0.5"],
    "γ = 3, Eq. (37)": [*NOISY, "--gamma", "3"],
    "γ = 3, squared error": [*NOISY, "--gamma", "3", "--divergence", "se"],
}
STANDARD, PLAIN, MAGNIFIED, REVERSED, REVERSED_SE = METHODS
STYLES = {
    STANDARD: ("#767676", ":"),
    PLAIN: ("#0072b2", "-"),
    MAGNIFIED: ("#009e73", "--"),
    REVERSED: ("#d55e00", "-."),
    REVERSED_SE: ("#cc79a7", (0, (5, 1, 1, 1, 1, 1))),
}


class Fit(NamedTuple):
    """One model: how it is trained, and whether in full."""

    method: str
    seed: int
    quick: bool


def certified(fit: Fit) -> dict[str, Any]:
    """Train and certify one model: ``radius`` and ``accuracy`` (per cent) of the curve, ``at`` RADIUS, ``clean``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = [*METHODS[fit.method], "--seed", str(fit.seed), "--out", str(out), *BRIEF]
        # Its lines name a folder that is deleted soon. If a loss is not finite, the best weights so far are kept.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(StopError):
            training_run.main([*arguments, *(QUICK if fit.quick else [])])
        subject = Source(run=out).read()
    count, votes = (20, (10, 50)) if fit.quick else (IMAGES, (100, 1000))
    x, y = subject.data.x_test[:count], subject.data.y_test[:count]
    found = certify(
        subject.model,
        x,
        y,
        sigma=SIGMA,
        n0=votes[0],
        n=votes[1],
        alpha=0.001,
        radii=[RADIUS],
        seed=fit.seed,
        batch=2000,
    )
    curve = found["curve"]
    return {
        "radius": [point["radius"] for point in curve],
        "accuracy": [point["acc"] for point in curve],
        "at": found["certified"][0]["acc"],
        "clean": found["clean_acc"],
    }


def make(seeds: tuple[int, ...], *, jobs: int, quick: bool) -> Result:
    """The figure.

    Args:
        seeds: of the trainings.
        jobs: models side by side.
        quick: train for a few steps only, to see that it runs.
    """
    fits = [Fit(method, seed, quick) for method in METHODS for seed in seeds]
    made = dict(zip(fits, mapped(certified, fits, jobs, "certified"), strict=True))
    by_method = {method: [made[Fit(method, seed, quick)] for seed in seeds] for method in METHODS}
    return Result(draw(by_method), claims(by_method), {"sigma": SIGMA, "methods": by_method})


def claims(by_method: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    """The verdicts."""

    def more(first: str, second: str, text: str) -> Claim:
        pairs = list(zip(by_method[first], by_method[second], strict=True))
        difference = estimate([one["at"] - other["at"] for one, other in pairs])
        means = [sum(pair[side]["at"] for pair in pairs) / len(pairs) for side in (0, 1)]
        found = f"{means[0]:.1f} against {means[1]:.1f} %, difference {interval(difference)} points"
        return Claim(text, found, difference.low is not None and difference.low > 0, CHOICES)

    at = f"at radius {RADIUS:g}"
    return [
        more(PLAIN, STANDARD, f"Noise in training is needed: {at} γ = 0 certifies more than standard training"),
        more(MAGNIFIED, REVERSED, f"The sign of Eq. (36) helps: {at} γ = 0.5 certifies more than γ = 3"),
        more(MAGNIFIED, PLAIN, f"A larger weight of the alignment helps: {at} γ = 0.5 certifies more than γ = 0"),
        more(
            REVERSED_SE,
            REVERSED,
            f"Eq. (37) needs a bounded divergence: {at} γ = 3 certifies more with squared error than with KL",
        ),
    ]


def draw(by_method: dict[str, list[dict[str, Any]]]) -> plt.Figure:
    """The mean curve of each method over its seeds, thick, and every seed, thin."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for method, found in by_method.items():
        colour, dashes = STYLES[method]
        radius = found[0]["radius"]
        columns = list(zip(*(one["accuracy"] for one in found), strict=True))
        for one in found:
            axes.plot(radius, one["accuracy"], color=colour, linestyle=dashes, linewidth=0.7, alpha=0.6)
        mean = [sum(column) / len(column) for column in columns]
        axes.plot(radius, mean, color=colour, linestyle=dashes, linewidth=2.2, label=method)
    axes.axvline(RADIUS, color=plots.FAINT, linewidth=1.2, zorder=0)
    axes.set(xlabel="certified radius (L2, input units)", ylabel="certified accuracy (% of samples)", ylim=(0, 102))
    axes.set_xlim(left=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3.2)
    return figure
