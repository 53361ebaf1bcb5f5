"""Does memory stay flat? Train, interrupt, resume and evaluate in one process, for hours.

    python -m benchmarks.endurance --minutes 120 --out build/endurance

Each cycle trains a network with the next objective, is interrupted at a random step, resumes, and evaluates with
AutoAttack (its two APGD), interrupted and resumed as well. Between the cycles the memory of the process, its open
files, threads and objects are counted. A cycle with an objective that ran before must give the same weights and the
same verdicts, to the bit.

Writes memory.jsonl (a line a cycle), endurance.json (how fast memory grows, with an interval) and endurance.png.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

from benchmarks import record
from scorematch.attacks.classifier import Classifier
from training import evaluate, run
from training.engine import checkpoint
from training.engine.loop import Trainer
from training.reports.plots import plt
from training.settings import command_line, config
from training.settings.errors import InputError, StopError, run_program

OBJECTIVES: dict[str, list[str]] = {
    "score_direct": ["--posterior-settings.steps", "60"],
    "pgd_at": [],
    "trades": ["--posterior", "kernel_density", "--soft-targets"],
    "gaussian": ["--gamma", "0.5"],
}
WARM_UP = 0.1  # share of the time in which caches fill, left out of the fit


@dataclass(frozen=True)
class EnduranceSettings:
    """What to repeat, and for how long."""

    minutes: float = 120  # a cycle that has begun is finished
    epochs: int = 4  # of each training
    limit: int = 512  # training samples, of the digits
    samples: int = 64  # test samples under AutoAttack
    threads: int = 2  # CPU threads of AutoAttack; networks of the digits train on one
    seed: int = 0  # of the training, and of the points of interruption
    out: Path = Path("build/endurance")  # new folder for the results


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        EnduranceSettings,
        arguments,
        program="python -m benchmarks.endurance",
        description="Train, interrupt, resume and evaluate in one process, and watch its memory.",
    )
    ranges = {"minutes": record.LENGTH, **dict.fromkeys(("epochs", "limit", "samples"), record.COUNT)}
    config.check_ranges(settings, {**ranges, "threads": config.RANGES["threads"], "seed": config.RANGES["seed"]})
    if settings.out.exists():
        raise InputError(f"out: {settings.out} is there already, give a new folder")
    settings = dataclasses.replace(settings, threads=config.resolve_threads(settings.threads))
    settings.out.mkdir(parents=True)
    points = random.Random(settings.seed)
    first: dict[str, tuple[str, list[bool]]] = {}
    cycles: list[dict[str, Any]] = []
    begin = time.monotonic()
    with tqdm(total=settings.minutes, desc="endurance", unit="min", bar_format="{l_bar}{bar}{postfix}") as progress:
        while not cycles or time.monotonic() - begin < 60 * settings.minutes:
            objective = list(OBJECTIVES)[len(cycles) % len(OBJECTIVES)]
            result = cycle(settings, objective, settings.out / "cycle", points)
            if first.setdefault(objective, result) != result:
                raise StopError(f"cycle {len(cycles)} ({objective}) differs from the first of its objective")
            gc.collect()
            minutes = (time.monotonic() - begin) / 60
            now = {"minutes": minutes, "objective": objective, **held()}
            cycles.append(now)
            with open(settings.out / "memory.jsonl", "a") as file:
                file.write(json.dumps(now) + "\n")
            progress.n = min(minutes, settings.minutes)
            progress.set_postfix_str(f"{len(cycles)} cycles, {now['resident_mb']:.0f} MB")
    summary = {
        "command": shlex.join(["python", "-m", "benchmarks.endurance", *arguments]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "cycles": len(cycles),
        "minutes": cycles[-1]["minutes"],
        "weights": {objective: digest for objective, (digest, _) in first.items()},
        "growth_mb_per_hour": growth(cycles),
        **{name: [cycles[0][name], cycles[-1][name]] for name in ("resident_mb", "files", "threads", "objects")},
    }
    checkpoint.write_json(settings.out / "endurance.json", summary)
    draw(cycles, settings.out / "endurance.png")
    print(json.dumps(summary, indent=2))


def cycle(settings: EnduranceSettings, objective: str, folder: Path, points: random.Random) -> tuple[str, list[bool]]:
    """Train and evaluate once, both interrupted. Returns the digest of the weights, and what withstood AutoAttack."""
    shutil.rmtree(folder, ignore_errors=True)
    state, report = folder / "state.pt", folder / "robust.json"
    options = {"epochs": settings.epochs, "limit": settings.limit, "seed": settings.seed, "threads": 1}
    start = ["--objective", objective, *OBJECTIVES[objective], "--autoattack", "none", "--curve-points", "0"]
    start += [f"--{name}={value}" for name, value in options.items()]
    steps = settings.epochs * (settings.limit // 32)
    with interrupted(Trainer, "_step", points.randint(1, steps)) as happened:
        program(run.main, [*start, "--out", str(folder)], happened)
    program(run.main, ["--resume", str(folder)])
    judge = [
        "--run",
        str(folder),
        "--attack",
        "autoattack",
        "--version",
        "fast",
        "--limit",
        str(settings.samples),
        "--state",
        str(state),
    ]
    judge += ["--threads", str(settings.threads), "--out", str(report)]
    with interrupted(Classifier, "_logits", points.randint(2, 100)) as happened:
        program(evaluate.main, judge, happened)
    program(evaluate.main, judge)
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["network"]
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest(), json.loads(report.read_text())["autoattack"]["robust"]


def program(main: Callable[[list[str]], None], arguments: list[str], interrupted: list[int] | None = None) -> None:
    """One of the programs, in this process, without what it prints."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        status = run_program(main, arguments)
    if status != (1 if interrupted else 0):
        raise StopError(f"{shlex.join(arguments)} ended with {status}")


@contextlib.contextmanager
def interrupted(owner: type, name: str, count: int) -> Iterator[list[int]]:
    """The call ``count`` of a method gets Ctrl-C. Yields a list that is empty until then."""
    original = getattr(owner, name)
    calls, happened = 0, []
    lock = threading.Lock()

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            now = calls == count
        if now:
            happened.append(count)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*given, **options)

    setattr(owner, name, counted)
    try:
        yield happened
    finally:
        setattr(owner, name, original)


def held() -> dict[str, float]:
    """What the process holds: megabytes of resident memory, open files, threads, objects of Python."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
    }


def growth(cycles: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Slope of the resident memory after the warm-up, by least squares, with its 95 % interval (Student's t).

    Cycles of one objective hold about the same, so that each objective has a level of its own and all share the slope.
    What the process holds after one cycle it mostly still holds after the next, so cycles are no independent
    measurements: where the residuals of neighbours have a correlation ρ > 0, the standard error is √((1 + ρ)/(1 − ρ))
    times that of independent ones (those of a process of first order). None for fewer than three cycles an objective.
    """
    kept = [c for c in cycles if c["minutes"] >= WARM_UP * cycles[-1]["minutes"]]
    kinds = sorted({c["objective"] for c in kept})
    if len(kept) < 3 * len(OBJECTIVES):
        return None
    levels = [[float(c["objective"] == kind) for kind in kinds] for c in kept]
    columns = np.column_stack([[c["minutes"] / 60 for c in kept], levels])
    values = np.array([c["resident_mb"] for c in kept])
    solution, *_ = np.linalg.lstsq(columns, values, rcond=None)
    free = len(kept) - columns.shape[1]
    residuals = values - columns @ solution
    squares = float(residuals @ residuals)
    variance = squares / free
    neighbours = max(0.0, float(residuals[1:] @ residuals[:-1]) / squares) if squares else 0.0
    longer = (1 + neighbours) / (1 - neighbours)
    error = float(np.sqrt(longer * variance * np.linalg.inv(columns.T @ columns)[0, 0]))
    half = float(scipy.stats.t.ppf(0.975, free)) * error
    return {"estimate": float(solution[0]), "lower": float(solution[0]) - half, "upper": float(solution[0]) + half}


def draw(cycles: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.2))
    minutes = [c["minutes"] for c in cycles]
    axes.plot(minutes, [c["resident_mb"] for c in cycles], color="#0072b2", marker=".", linewidth=1)
    axes.set(xlabel="minutes", ylabel="resident memory after a cycle, MB", ylim=(0, None))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_program(main))
