"""Whether robustness is real or gradients are masked: accuracy against eps, and a list of checks.

Fig. 7 of Pang et al. (ICML 2022) and the checklist of Carlini et al., On Evaluating Adversarial Robustness (2019),
sections 4 and 5; Athalye et al., Obfuscated Gradients (ICML 2018), section 3.1.
"""

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from tqdm import tqdm

from scorematch import PGD, ThreatModel
from scorematch.attacks import Square
from training import measures
from training.engine import distributed
from training.engine.progress import progress_bar
from training.reports import plots

LINF_RADII = tuple(level / 255 for level in (2, 4, 8, 12, 16, 24, 32, 64, 128, 255))
MORE_STEPS, MORE_RESTARTS = 10, 4  # factors
RANDOM_POINTS = 100  # for each sample
QUERIES = 1_000  # of Square
# Thresholds, in points of accuracy.
RISE = 0.5  # from one eps to the next larger one
CONVERGED = 2.0  # what a longer PGD may find beyond the one that is judged
MASKED = 0.2  # what Square may find beyond PGD: the rule of AutoAttack (Croce & Hein, ICML 2020)

Verdict = Callable[[Tensor, Tensor], Tensor]  # x [N, ...] and y [N] to [N] bool
Perturb = Callable[[Tensor, Tensor], Tensor]  # x [N, ...] and y [N] to x' [N, ...]


def radii(threat_model: ThreatModel, features: int) -> list[float]:
    """Where accuracy is measured, in input units: from small to a ball that holds all images."""
    eps, width = threat_model.eps, threat_model.upper - threat_model.lower
    if threat_model.norm == "linf":
        grid = [radius * width for radius in LINF_RADII]
    else:
        diameter, factor = width * (features if threat_model.norm == "l1" else math.sqrt(features)), 2.0
        grid = [eps * part for part in (0.25, 0.5, 0.75, 1.5)]
        while eps * factor < diameter:
            grid.append(eps * factor)
            factor *= 2
        grid = [*(radius for radius in grid if radius < diameter), diameter]
    # A radius of the grid that equals eps up to rounding is eps.
    return sorted([eps, *(radius for radius in grid if not math.isclose(radius, eps, rel_tol=1e-6))])


class _Attacks:
    """The attacks on one classifier. Each returns which samples it does not fool, bool [N], and moves the bar."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, seed: int, batch: int, progress: tqdm) -> None:
        self.model, self.x, self.y = model, x, y
        self.seed, self.batch, self.progress = seed, batch, progress
        self.done = 0  # samples

    def _survivors(self, standing: Tensor, name: str, verdict: Verdict) -> Tensor:
        """Which of the samples ``standing`` are still robust after ``verdict``, bool [N]."""
        self.progress.set_description(name, refresh=sys.stderr.isatty())
        rows = standing.nonzero().squeeze(1)
        after = torch.zeros_like(standing)
        after[rows] = measures.shared(verdict, self.x[rows], self.y[rows])
        self.done += len(standing)
        self.progress.update(self.done - self.progress.n)
        return after

    def _under(self, perturb: Perturb, x: Tensor, y: Tensor) -> Tensor:
        """Which samples are classified correctly at the points of ``perturb``, bool [N]."""
        parts = []
        for xs, ys in zip(x.split(self.batch), y.split(self.batch), strict=True):
            parts.append(measures.correct(self.model, perturb(xs, ys), ys))
            self.progress.update(len(xs))
        return torch.cat(parts)

    def pgd(
        self, standing: Tensor, name: str, attack: PGD, purpose: int = 0, source: nn.Module | None = None
    ) -> Tensor:
        """``attack`` on ``source``, by default the classifier itself."""

        def verdict(x: Tensor, y: Tensor) -> Tensor:
            generator = self._generator(x, purpose)
            return self._under(lambda xs, ys: attack(source or self.model, xs, ys, generator=generator), x, y)

        return self._survivors(standing, name, verdict)

    def random(self, standing: Tensor, threat_model: ThreatModel) -> Tensor:
        def verdict(x: Tensor, y: Tensor) -> Tensor:
            generator = self._generator(x, 1)
            stands = torch.ones(len(x), dtype=torch.bool, device=x.device)
            for _ in range(RANDOM_POINTS):
                stands &= measures.correct(self.model, threat_model.random_start(x, generator), y, self.batch)
            return stands

        return self._survivors(standing, "random points", verdict)

    def square(self, standing: Tensor, threat_model: ThreatModel) -> Tensor:
        attack = Square(threat_model, n_queries=QUERIES)

        def verdict(x: Tensor, y: Tensor) -> Tensor:
            seeds = itertools.count(self.seed)
            return self._under(lambda xs, ys: attack(self.model, xs, ys, seed=next(seeds)), x, y)

        return self._survivors(standing, "square", verdict)

    def _generator(self, x: Tensor, purpose: int) -> Generator:
        return Generator(x.device).manual_seed(self.seed + 1_000_003 * purpose + distributed.rank())


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    steps: int = 40,
    restarts: int = 5,
    losses: Sequence[str] = ("ce", "margin"),
    other: nn.Module | None = None,
    seed: int = 0,
    batch: int = measures.BATCH,
) -> dict[str, Any]:
    """Accuracy under PGD against eps, and the checks at the eps of the threat model.

    Args:
        model: classifier in eval mode, from [N, C, H, W] to logits [N, L].
        x: [N, C, H, W] in the box of the threat model, which is finite.
        y: int64 [N].
        threat_model: norm, eps and box; its step is scaled with eps.
        steps, restarts, losses: of the PGD that is judged.
        other: a second classifier; attacks on it are tried on ``model``.
        seed: of the random starts, points and queries.
        batch: samples at a time.

    Returns:
        ``curve``: a list of eps, acc and interval (per cent). ``checks``: a list of name, status (pass, FAIL or
        not run), value and threshold (points of accuracy), and text.
    """
    grid = radii(threat_model, x[0].numel())
    options: dict[str, Any] = {"restarts": restarts, "losses": losses}
    evaluations = len(grid) + 5 + (other is not None)
    with progress_bar(total=evaluations * len(x), unit="sample") as progress:
        attacks = _Attacks(model, x, y, seed, batch, progress)
        clean = measures.shared(lambda xs, ys: measures.correct(model, xs, ys, batch), x, y)
        curve = {0.0: clean}
        for eps in grid:
            attack = PGD(measures.scaled(threat_model, eps), steps=steps, **options)
            curve[eps] = attacks.pgd(clean, f"pgd, eps {eps:.4g}", attack)
        base = curve[threat_model.eps]

        longer = PGD(threat_model, steps=MORE_STEPS * steps, **options)
        more = PGD(threat_model, steps=steps, restarts=MORE_RESTARTS * restarts, losses=losses)
        single = PGD(threat_model.replace(step_size=threat_model.eps), steps=1, losses=("ce",), random_start=False)
        found = {
            "steps": attacks.pgd(base, f"pgd, {MORE_STEPS * steps} steps", longer),
            "restarts": attacks.pgd(base, f"pgd, {MORE_RESTARTS * restarts} restarts", more, purpose=2),
            "random": attacks.random(clean, threat_model),
            "square": attacks.square(base, threat_model),
            "single": attacks.pgd(clean, "one step", single),
        }
        if other is not None:
            attack = PGD(threat_model, steps=steps, **options)
            found["transfer"] = attacks.pgd(clean, "transfer", attack, source=other)

    accuracies = {eps: measures.per_cent(mask) for eps, mask in curve.items()}
    return {
        "steps": steps,
        "restarts": restarts,
        "losses": list(losses),
        "clean_acc": accuracies[0.0],
        "pgd_acc": accuracies[threat_model.eps],
        "curve": [
            {"eps": eps, "acc": accuracies[eps], "interval": measures.interval(mask)} for eps, mask in curve.items()
        ],
        "checks": checks(accuracies, base, found, steps=steps, restarts=restarts),
    }


def checks(
    accuracies: Mapping[float, float], base: Tensor, found: Mapping[str, Tensor], *, steps: int, restarts: int
) -> list[dict[str, Any]]:
    """What the attacks say.

    Args:
        accuracies: per cent under PGD, from eps 0 to the largest.
        base: bool [N], which samples are robust under PGD at the eps that is judged.
        found: bool [N], which samples are robust under each of the other attacks. Attacks that run on ``base`` alone
            give subsets of it.
        steps, restarts: of that PGD.
    """
    values = list(accuracies.values())
    eps = list(accuracies)[-1]
    rise, at = max(
        (after - before, radius)
        for before, after, radius in zip(values, values[1:], list(accuracies)[1:], strict=False)
    )
    judged = measures.per_cent(base)
    shown = f"PGD with {steps} steps and {restarts} restarts"

    def row(name: str, value: float, threshold: float, text: str) -> dict[str, Any]:
        status = "pass" if value <= threshold else "FAIL"
        return {"name": name, "status": status, "value": value, "threshold": threshold, "text": text}

    def beyond(key: str) -> float:
        """Share of samples that an attack fools and PGD does not, per cent."""
        return measures.per_cent(base & ~found[key])

    def lead(key: str) -> float:
        """By how many points an attack is stronger than PGD."""
        return judged - measures.per_cent(found[key])

    rows = [
        row("no accuracy at the largest eps", values[-1], 0.0, f"{values[-1]:.1f} % at eps {eps:.4g}"),
        row("accuracy falls with eps", rise, RISE, f"largest change {rise:+.1f} points, up to eps {at:.4g}"),
        row(
            "PGD has converged",
            beyond("steps"),
            CONVERGED,
            f"{MORE_STEPS * steps} steps find {beyond('steps'):.1f} points more than {shown}",
        ),
        row(
            "restarts suffice",
            beyond("restarts"),
            CONVERGED,
            f"{MORE_RESTARTS * restarts} more restarts find {beyond('restarts'):.1f} points more",
        ),
        row(
            "random points are weaker than PGD",
            lead("random"),
            0.0,
            f"{RANDOM_POINTS} points for each sample leave {measures.per_cent(found['random']):.1f} %, "
            f"PGD {judged:.1f} %",
        ),
        row(
            "queries find nothing that gradients miss",
            beyond("square"),
            MASKED,
            f"Square, {QUERIES:,} queries, alone fools {beyond('square'):.1f} % of the samples",
        ),
        row(
            "one step is weaker than many",
            lead("single"),
            0.0,
            f"one step of length eps leaves {measures.per_cent(found['single']):.1f} %, PGD {judged:.1f} %",
        ),
    ]
    name = "attacks on another model are weaker"
    if "transfer" in found:
        text = f"transferred attacks leave {measures.per_cent(found['transfer']):.1f} %, PGD {judged:.1f} %"
        return [*rows, row(name, lead("transfer"), 0.0, text)]
    missing = {"status": "not run", "value": None, "threshold": 0.0, "text": "no --transfer-from"}
    return [*rows, {"name": name, **missing}]


def table(results: Mapping[str, Any]) -> str:
    """The curve and the checks as text."""
    lines = [f"{'eps':>10}{'accuracy':>11}{'95 % interval':>18}"]
    for point in results["curve"]:
        low, high = point["interval"]
        lines.append(f"{point['eps']:>10.4f}{point['acc']:>9.1f} %{f'{low:.1f} to {high:.1f} %':>18}")
    width = max(len(check["name"]) for check in results["checks"])
    for check in results["checks"]:
        allowed = f" (allowed: {check['threshold']:g})" if check["status"] != "not run" else ""
        lines.append(f"{check['status']:<8}{check['name']:<{width}}  {check['text']}{allowed}")
    return "\n".join([*lines, verdict(results)])


def verdict(results: Mapping[str, Any]) -> str:
    """The checks in a line. Where PGD leaves no sample, most of them pass for any model."""
    failed = [check["name"] for check in results["checks"] if check["status"] == "FAIL"]
    if failed:
        return f"gradients may be masked: {'; '.join(failed)}"
    if results["pgd_acc"] == 0:
        return f"nothing to judge: no sample is classified correctly{' under PGD' if results['clean_acc'] else ''}"
    ran = sum(check["status"] != "not run" for check in results["checks"])
    return f"no sign of masked gradients in the {ran} checks that ran"


def plot(results: Mapping[str, Any]) -> bytes:
    """Accuracy against eps with the 95 % band, as PNG."""
    return plots.rendered(figure(results), "png")


def figure(results: Mapping[str, Any]) -> Figure:
    """The same, as a figure."""
    label = f"PGD-{results['steps']}"
    line = plots.Series.of_points(label, results["objective"] or "", results["curve"], "eps")
    threat_model = results["threat_model"]
    return plots.accuracy_against_eps(
        [line],
        norm=threat_model["norm"],
        train_eps=threat_model["eps"],
        unit="pixel values in [0, 1]",
        mark="eps of the checks",
        split=results["split"],
    )
