"""Certified accuracy of a classifier under Gaussian noise: numbers, table and plot for ``training.evaluate``."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from scorematch.attacks.precision import full_precision
from scorematch.smoothing import ABSTAIN, Certificates, SmoothedClassifier, certified_accuracy, noise_seeds
from training import measures
from training.engine import distributed
from training.reports import plots
from training.settings.errors import InputError

SIGMA = 0.25  # of a model that is no run's
PLOTTED = 101  # radii of the curve


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    radii: Sequence[float] = (),
    seed: int,
    batch: int,
) -> dict[str, Any]:
    """Certify each sample of x [N, …] with labels y [N], without TF32; accuracies in per cent, lengths in input units.

    Without ``radii`` the accuracy is given at multiples of σ/2 up to the largest radius that n votes can give. Under
    torchrun the samples are shared among the processes; the noise of a sample does not depend on that.

    Raises:
        InputError: the model does not return finite logits.
    """
    classes = int(model(x[:1]).shape[1])
    smoothed = SmoothedClassifier(model, num_classes=classes, sigma=sigma, batch=batch)
    largest = float(smoothed.radius(torch.tensor([alpha ** (1 / n)], dtype=torch.float64)))
    radii = tuple(radii) or tuple(0.5 * k * sigma for k in range(1 + int(2 * largest / sigma)))
    mine = distributed.own_samples(len(x))
    seeds = noise_seeds(len(x), Generator().manual_seed(seed))[mine]
    hidden = not sys.stderr.isatty() or distributed.rank() > 0
    with full_precision(x.device), tqdm(total=len(mine), desc="certify", unit="sample", disable=hidden) as progress:
        try:
            own = smoothed.certify(x[mine.to(x.device)], n0=n0, n=n, alpha=alpha, seeds=seeds, progress=progress.update)
        except ValueError as error:
            raise InputError(f"certify: {error}") from None
    found = Certificates(*(distributed.interleaved(values) for values in own))
    clean = measures.shared(lambda xs, ys: measures.correct(model, xs, ys, batch), x, y)
    abstained = found.classes == ABSTAIN
    return {
        "sigma": sigma,
        "n0": n0,
        "n": n,
        "alpha": alpha,
        "largest_radius": largest,
        **measures.accuracy("clean", clean),
        "certified": _points(found, y, radii),
        "curve": _points(found, y, [largest * k / (PLOTTED - 1) for k in range(PLOTTED)]),
        "abstained": measures.per_cent(abstained),
        "abstained_interval": measures.interval(abstained),
        "classes": found.classes.tolist(),
        "radii": found.radius.tolist(),
    }


def _points(found: Certificates, y: Tensor, radii: Sequence[float]) -> list[dict[str, Any]]:
    points = certified_accuracy(found, y, radii)
    return [{"radius": p.radius, "acc": 100 * p.accuracy, "interval": [100 * p.low, 100 * p.high]} for p in points]


def table(results: Mapping[str, Any]) -> str:
    """The certified accuracies as text."""

    def row(name: str, accuracy: float, interval: Sequence[float]) -> str:
        low, high = interval
        return f"{name:>12}{accuracy:>9.1f} %{f'{low:.1f} to {high:.1f} %':>18}"

    largest = results["largest_radius"]
    told = f"  more than {results['n']:,} votes can certify, at most {largest:.4f}"
    return "\n".join(
        [
            f"{'L2 radius':>12}{'certified':>11}{'95 % interval':>18}",
            *(
                row(f"{point['radius']:.4f}", point["acc"], point["interval"])
                + (told if point["radius"] > largest else "")
                for point in results["certified"]
            ),
            row("abstains", results["abstained"], results["abstained_interval"]),
            row("no noise", results["clean_acc"], results["clean_interval"]),
        ]
    )


def plot(results: Mapping[str, Any]) -> bytes:
    """Certified accuracy against the L2 radius with the 95 % band, as PNG."""
    label = f"σ = {results['sigma']:g}"
    line = plots.Series.of_points(label, results["objective"] or "", results["curve"], "radius")
    figure = plots.certified_accuracy([line], largest=results["largest_radius"])
    return plots.rendered(figure, "png")
