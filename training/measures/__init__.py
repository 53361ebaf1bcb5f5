"""How accurate a classifier is, clean and under attack: what the programs measure."""

import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from scorematch import PGD, AutoAttack, ThreatModel, audit, consistency, intervals
from scorematch.attacks import AccuracyCurve, AutoAttackWarning
from scorematch.attacks.precision import full_precision
from scorematch.model_state import borrowed
from scorematch.posteriors import Posterior
from training.engine import distributed
from training.engine.hardware import sizes_vary
from training.settings.errors import InputError

BATCH = 512  # samples at a time; decides memory, not the numbers of AutoAttack


def correct(model: nn.Module, x: Tensor, y: Tensor, batch: int = BATCH) -> Tensor:
    """Whether each sample of x [N, ...] is classified as y [N], [N] bool, without TF32."""
    with full_precision(x.device):
        return _classified(model, x, y, batch)


@torch.no_grad()
def _classified(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> Tensor:
    with borrowed(model):
        return torch.cat([model(xs).argmax(dim=1) == ys for xs, ys in zip(x.split(batch), y.split(batch), strict=True)])


@torch.no_grad()
def calibration(model: nn.Module, x: Tensor, y: Tensor, batch: int = BATCH) -> dict[str, float | None]:
    """How good the probabilities of a classifier are at x [N, ...] with labels y [N], without TF32.

    ``nll`` is the mean −log p of the label, in nats; ``calibration_error`` the expected calibration error, in
    percentage points, and ``calibration_error_by_chance`` what it would be on average if the probabilities were right,
    see :func:`scorematch.audit.reliability`. All are None where a logit is not finite.
    """
    with borrowed(model), full_precision(x.device):
        logits = torch.cat([model(xs).double() for xs in x.split(batch)])
    if not logits.isfinite().all():
        return {"nll": None, "calibration_error": None, "calibration_error_by_chance": None}
    log_p = logits.log_softmax(1)
    found = audit.reliability(log_p, y)
    return {
        "nll": -log_p.gather(1, y[:, None]).mean().item(),
        "calibration_error": 100.0 * found.error,
        "calibration_error_by_chance": 100.0 * found.chance,
    }


@sizes_vary()
def robust(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD,
    generator: Generator,
    progress: tqdm | None = None,
    batch: int = BATCH,
    search: nn.Module | None = None,
) -> Tensor:
    """Whether each sample stays classified as y [N] under ``attack``, [N] bool.

    ``search`` is the same classifier made faster, by lower precision or compiled, and is what the attack runs on. The
    verdict is that of ``model``: points that fool ``search`` alone do not count, and their samples are attacked again.
    What is doubtful about the model is for the programs to tell.
    """
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
            found = attack(search or model, xs, ys, generator=generator)
            stands = correct(model, found, ys)
            if search is not None:
                again = (stands & ~_classified(search, found, ys, batch)).nonzero().flatten()
                if len(again):
                    stands[again] = correct(model, attack(model, xs[again], ys[again], generator=generator), ys[again])
            parts.append(stands)
            if progress is not None:
                progress.update(len(xs))
    return torch.cat(parts)


@sizes_vary()
def autoattack(
    adversary: AutoAttack, x: Tensor, y: Tensor, *, batch: int = BATCH, state: Path | None = None
) -> dict[str, Any]:
    """The report of ``adversary`` on x [N, ...] and y [N]. It goes on from the file ``state``, if that exists.

    Warnings are printed as lines, like everything else that AutoAttack says. It searches without TF32, which torch
    allows in convolutions unless it is told otherwise.

    Raises:
        InputError: data, model or state file are not what AutoAttack takes.
    """
    with _told_by_autoattack(), full_precision(x.device):
        adversary.run_standard_evaluation(x, y, bs=batch, state_path=state)
    return adversary.report


@sizes_vary()
def accuracy_curve(
    adversary: AutoAttack,
    x: Tensor,
    y: Tensor,
    radii: Sequence[float],
    *,
    batch: int = BATCH,
    state: Path | None = None,
) -> AccuracyCurve:
    """The same at several radii, each with a state file of its own.

    Raises:
        InputError: as for :func:`autoattack`.
    """
    with _told_by_autoattack(), full_precision(x.device):
        return adversary.accuracy_curve(x, y, radii=radii, bs=batch, state_path=state)


@contextmanager
def _told_by_autoattack() -> Iterator[None]:
    """Its lines as they come, its warnings as lines like all else, its errors as those of a program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # hours may pass between two lines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        try:
            yield
        except ValueError as error:
            raise InputError(f"autoattack: {error}") from None


def share_of(count: int) -> int:
    """How many of ``count`` samples :func:`shared` gives to this process."""
    return len(distributed.own_samples(count))


def shared(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The verdicts [N] bool of ``measure`` on x [N, ...] and y [N], with the samples shared among torchrun's processes.

    Every rank returns all verdicts. ``measure`` is never called without samples.
    """
    mine = distributed.own_samples(len(x)).to(x.device)
    part = measure(x[mine], y[mine]) if len(mine) else torch.zeros(0, dtype=torch.bool, device=x.device)
    return distributed.interleaved(part)


def per_cent(hits: Tensor) -> float:
    return 100.0 * hits.double().mean().item()


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in per cent."""
    low, high = intervals.wilson(hits, count)
    return 100.0 * low, 100.0 * high


def interval(hits: Tensor) -> list[float]:
    """The same of hits [N] bool, as a list for JSON."""
    return list(wilson(int(hits.sum()), len(hits)))


def accuracy(name: str, hits: Tensor) -> dict[str, Any]:
    """The share of hits [N] bool in per cent and its 95 % interval, as ``{name}_acc`` and ``{name}_interval``."""
    return {f"{name}_acc": per_cent(hits), f"{name}_interval": interval(hits)}


def self_consistency(
    model: nn.Module,
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    steps: int,
    restarts: int = 1,
    seed: int,
    batch: int = BATCH,
) -> dict[str, Any]:
    """How far a classifier is from a known p_d, with 95 % intervals over the samples, which one sample does not have.

    Both are computed without TF32.

    ``kl`` and ``r_score`` are in nats, see :class:`scorematch.Consistency`. ``disagrees`` is the share of samples, in
    per cent, for which the search met a point of B(x) where the model's class is not the most likely one of p_d. Both
    ``r_score`` and ``disagrees`` are lower bounds, of a search with so many ``steps`` and random ``restarts``; the
    intervals do not count what it misses.
    """
    generator = Generator(x.device).manual_seed(seed)
    with full_precision(x.device):
        parts = [
            consistency(model, posterior, xs, ys, threat_model, steps=steps, restarts=restarts, generator=generator)
            for xs, ys in zip(x.split(batch), y.split(batch), strict=True)
        ]
    results: dict[str, Any] = {}
    for name, values in (("kl", [p.divergence for p in parts]), ("r_score", [p.r_score for p in parts])):
        value = torch.cat(values).double()
        mean, ends = value.mean().item(), None
        if len(value) > 1:
            half = 1.96 * value.std().item() / len(value) ** 0.5
            ends = [mean - half, mean + half]
        results |= {name: mean, f"{name}_interval": ends}
    disagrees = torch.cat([p.disagrees for p in parts])
    return {
        **results,
        "disagrees": per_cent(disagrees),
        "disagrees_interval": interval(disagrees),
    }


@sizes_vary()
def fooled(model: nn.Module, x: Tensor, y: Tensor, attack: PGD, generator: Generator, count: int) -> dict[str, Tensor]:
    """The first samples that ``model`` classifies as y [N] and that ``attack`` fools, ``count`` at most.

    Returns ``index`` [n] int64, ``clean`` and ``attacked`` [n, ...], ``label`` [n] int64, and ``before`` and ``after``
    [n, L], the model's probabilities at both.
    """
    parts: list[dict[str, Tensor]] = []
    for index in correct(model, x, y).nonzero().flatten().split(8 * count):
        moved = attack(model, x[index], y[index], generator=generator)
        with borrowed(model), torch.no_grad():
            before, after = model(x[index]).softmax(dim=1), model(moved).softmax(dim=1)
        part = {
            "index": index,
            "clean": x[index],
            "attacked": moved,
            "label": y[index],
            "before": before,
            "after": after,
        }
        fell = after.argmax(dim=1) != y[index]
        parts.append({name: value[fell] for name, value in part.items()})
        if sum(len(part["index"]) for part in parts) >= count:
            break
    return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}


def scaled(threat_model: ThreatModel, eps: float) -> ThreatModel:
    """The threat model with another radius and its step in proportion, at most the width of the ball."""
    step = threat_model.step_size
    share = None if step is None else min(step / threat_model.eps, 2.0)
    return threat_model.replace(eps=eps, step_size=None if share is None else share * eps)


def posteriors_along_attack(
    model: nn.Module, posterior: Posterior, x: Tensor, y: Tensor, threat_model: ThreatModel, steps: int
) -> dict[str, list]:
    """p(y|x') of the posterior and of the model along a cross-entropy attack on the model, from clean x.

    Returns ``posterior`` and ``model``, both [T, N, L] as lists, the ``clean`` and ``final`` inputs, their ``label``,
    and the ``box`` of inputs.
    """
    trace = posterior.trace(x, y)
    rows: dict[str, list] = {"posterior": [], "model": []}
    moved = x
    for step in range(steps + 1):
        point = moved.detach().requires_grad_()
        with borrowed(model):
            logits = model(point)
            gradient = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), point)[0]
        rows["posterior"].append(trace.log_p.exp().tolist())
        rows["model"].append(logits.detach().softmax(dim=1).tolist())
        if step < steps:
            moved = threat_model.step(point.detach(), gradient, x)
            trace.move(moved)
    inputs = {"clean": x.tolist(), "final": moved.tolist(), "label": y.tolist()}
    return {**rows, **inputs, "box": [threat_model.lower, threat_model.upper]}
