"""How accurate a classifier is, clean and under attack: the measures, and the program ``python -m training.evaluate``.

python -m training.evaluate --run runs/digits-pgd_at-kl-seed0 --attack pgd --steps 100 --restarts 5
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import binomtest
from torch import Generator, Tensor, nn
from tqdm import tqdm

from scorematch import PGD, ThreatModel
from scorematch.posteriors import Posterior
from training import checkpoint, command_line, config, data, models
from training.errors import InputError, run_program

BATCH = 512  # samples at a time; decides memory, not the numbers


def pgd(threat_model: ThreatModel, *, steps: int, restarts: int, losses: Sequence[str]) -> PGD:
    return PGD(threat_model, steps=steps, restarts=restarts, losses=tuple(losses))


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each sample of x [N, ...] is classified as y [N], [N] bool."""
    training_mode = model.training
    model.eval()
    parts = [model(xs).argmax(dim=1) == ys for xs, ys in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    model.train(training_mode)
    return torch.cat(parts)


def robust(
    model: nn.Module, x: Tensor, y: Tensor, attack: PGD, generator: Generator, progress: tqdm | None = None
) -> Tensor:
    """Whether each sample stays classified as y [N] under ``attack``, [N] bool."""
    parts = []
    for xs, ys in zip(x.split(BATCH), y.split(BATCH), strict=True):
        parts.append(correct(model, attack(model, xs, ys, generator=generator), ys))
        if progress is not None:
            progress.update(len(xs))
    return torch.cat(parts)


def per_cent(hits: Tensor) -> float:
    return 100.0 * hits.double().mean().item()


def wilson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, in per cent."""
    interval = binomtest(hits, count).proportion_ci(level, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)


def scaled(threat_model: ThreatModel, eps: float) -> ThreatModel:
    """The threat model with another radius and its step in proportion."""
    step = threat_model.step_size
    return threat_model.replace(eps=eps, step_size=None if step is None else step * eps / threat_model.eps)


def posteriors_along_attack(
    model: nn.Module, posterior: Posterior, x: Tensor, y: Tensor, threat_model: ThreatModel, steps: int
) -> dict[str, list]:
    """p(y|x') of the posterior and of the model along a cross-entropy attack on the model, from clean x.

    Returns ``posterior`` and ``model``, both [T, N, L] as lists, and the ``clean`` and ``final`` inputs.
    """
    training_mode = model.training
    model.eval()
    trace = posterior.trace(x, y)
    rows: dict[str, list] = {"posterior": [], "model": []}
    moved = x
    for step in range(steps + 1):
        point = moved.detach().requires_grad_()
        logits = model(point)
        gradient = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), point)[0]
        rows["posterior"].append(trace.log_p.exp().tolist())
        rows["model"].append(logits.detach().softmax(dim=1).tolist())
        if step < steps:
            moved = threat_model.step(point.detach(), gradient, x)
            trace.move(moved)
    model.train(training_mode)
    return {**rows, "clean": x.tolist(), "final": moved.tolist(), "label": y.tolist()}


@dataclass(frozen=True)
class EvaluateSettings:
    """What to evaluate, and how. Lengths are in the units of the input: pixels in [0, 1]."""

    checkpoint: Path | None = None  # best.pt or checkpoint.pt of a run
    run: Path | None = None  # folder of a run, instead of --checkpoint: its selected weights
    attack: Literal["clean", "pgd"] = "pgd"  # clean accuracy alone, or also PGD
    split: Literal["test", "validation"] = "test"  # samples to evaluate on
    norm: Literal["linf", "l2"] | None = None  # norm of the perturbation; None is the run's
    eps: float | None = None  # radius in input units; None is the run's
    step_size: float | None = None  # length of a step in input units; None is eps / 4
    steps: int = 40  # PGD steps per restart
    restarts: int = 2  # random starts per loss
    losses: tuple[str, ...] = ("ce", "margin")  # what PGD ascends; a sample must withstand all
    seed: int = 0  # of the random starts
    threads: int = 0  # CPU threads; 0 is all available
    device: str = "auto"  # torch device; auto is cuda where there is one
    out: Path | None = None  # JSON file to write


def selected_checkpoint(run: Path) -> Path:
    """The file with the weights that the run's final numbers are about."""
    path = run / "config.toml"
    if not path.is_file():
        raise InputError(f"run: {run} holds no config.toml, expected the folder of a run")
    settings = config.from_table(config.read_toml(path), str(path))
    return run / ("best.pt" if settings.selection == "best" else "checkpoint.pt")


def restore(path: Path, device: torch.device) -> tuple[nn.Module, config.RunSettings, data.Data]:
    """The classifier of a checkpoint, the settings of its run, and the run's data."""
    state = checkpoint.load(path, device)
    settings = config.from_table(state["settings"], str(path))
    loaded = data.load(settings.data_settings).to(device)
    model = models.build(settings.model, loaded.input_shape, loaded.num_classes).to(device)
    checkpoint.load_weights(model, state, path)
    return model.eval(), settings, loaded


def _check(settings: EvaluateSettings) -> None:
    if (settings.checkpoint is None) == (settings.run is None):
        raise InputError("checkpoint, run: give exactly one of --checkpoint FILE and --run DIR")
    ranges: dict[str, config.Check] = {
        "eps": (lambda v: v is None or v > 0, "a finite number above 0"),
        "step_size": (lambda v: v is None or v > 0, "a finite number above 0"),
        "steps": config.RANGES["eval_steps"],
        "restarts": config.RANGES["eval_restarts"],
        "losses": config.RANGES["eval_losses"],
        "seed": config.RANGES["seed"],
        "threads": config.RANGES["threads"],
    }
    config.check_ranges(settings, ranges)


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        EvaluateSettings,
        arguments,
        program="python -m training.evaluate",
        description="Evaluate a trained classifier, clean and under attack, with 95 % intervals.",
    )
    _check(settings)
    device = config.resolve_device(settings.device)
    torch.set_num_threads(config.resolve_threads(settings.threads))
    path = settings.checkpoint or selected_checkpoint(settings.run or Path())
    model, run, loaded = restore(path, device)
    if settings.norm not in (None, run.norm) and settings.eps is None:
        raise InputError(f"eps: none given, needed since --norm {settings.norm} differs from the run's {run.norm}")
    x, y = getattr(loaded, f"x_{settings.split}"), getattr(loaded, f"y_{settings.split}")
    threat_model = ThreatModel(
        settings.norm or run.norm, settings.eps or run.eps, settings.step_size, loaded.lower, loaded.upper
    )

    begin = time.perf_counter()
    masks = {"clean": correct(model, x, y)}
    if settings.attack == "pgd":
        attack = pgd(threat_model, steps=settings.steps, restarts=settings.restarts, losses=settings.losses)
        start = Generator(device).manual_seed(settings.seed)
        with tqdm(total=len(x), desc="pgd", unit="sample", disable=not sys.stderr.isatty()) as progress:
            masks["pgd"] = robust(model, x, y, attack, start, progress)
    results: dict[str, Any] = {
        "checkpoint": str(path),
        "data": run.data,
        "objective": run.objective,
        "threat_model": {k: v for k, v in dataclasses.asdict(threat_model).items() if k in ("norm", "eps")},
        **{k: getattr(settings, k) for k in ("split", "attack", "steps", "restarts", "losses", "seed")},
        "samples": len(x),
        "seconds": time.perf_counter() - begin,
    }
    print(f"{path}: {run.objective} on {run.data}, {len(x)} {settings.split} samples")
    print(f"{threat_model.norm}, eps {threat_model.eps:g}, step {threat_model.step_length:g}")
    print(f"{'attack':<8}{'accuracy':>10}{'95 % interval':>18}")
    for name, mask in masks.items():
        accuracy, (low, high) = per_cent(mask), wilson(int(mask.sum()), len(mask))
        results[f"{name}_acc"], results[f"{name}_interval"] = accuracy, [low, high]
        print(f"{name:<8}{accuracy:>8.1f} %{f'{low:.1f} to {high:.1f} %':>18}")
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(settings.out, results)


if __name__ == "__main__":
    sys.exit(run_program(main))
