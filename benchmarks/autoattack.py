"""AutoAttack beside the official package, sample by sample and second by second, in one run.

    pip install git+https://github.com/fra31/auto-attack
    python -m benchmarks.autoattack --model-from runs/.../best.pt --data digits --eps 0.15

Each attack runs on the samples that still stand after those before it (by the official package's verdicts): ours with
the official stream of random numbers, ours with numbers of its own, and the official one, so that each line compares
the same work. ``--individual`` starts every attack from all correctly classified samples instead. Where the official
package is not installed, the first of ours is what the others are compared with. ``--seeds 0 1 2`` instead runs all
attacks in one go with each of these seeds: how much chance there is in either package.

The official package computes with ``--threads`` threads, ours shares the samples out to as many workers, as it does by
itself; ``--workers 1`` also runs ours with a single one. Of ``--repeats`` runs, in turn, the median counts.

Under ``torchrun --standalone --nproc-per-node 2`` ours shares the samples out to two processes of ``--threads``
threads, and the official package, which cannot, has the threads of both in one.

Printed and, with --out, written as JSON: how many stand after each attack, where the verdicts differ, seconds, and
seconds of the processor, which say more on a machine with other work.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import record
from scorematch import AutoAttack
from scorematch.attacks.autoattack import VERSIONS
from training import data, measures
from training.data import DataName, DataSettings
from training.engine import distributed
from training.models import loading
from training.settings import command_line
from training.settings.errors import InputError, run_program

Run = Callable[[Tensor, Tensor], Tensor]
INSTALL = "pip install git+https://github.com/fra31/auto-attack"


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to attack and how often."""

    model_from: str  # a checkpoint, a state dict or module:function, as training.evaluate takes it
    eps: float  # radius, pixels in [0, 1]
    data: DataName = "digits"  # data set, its test images
    data_root: Path | None = None  # folder of CIFAR's official files; None is $SCOREMATCH_DATA
    model: str | None = None  # architecture of a bare state dict
    norm: Literal["Linf", "L2", "L1"] = "Linf"  # norm of the perturbation
    samples: int = 0  # the first so many test images; 0 is all
    batch: int = 250  # samples at a time
    seed: int = 0  # of the random numbers
    seeds: tuple[int, ...] = ()  # all attacks in one go with each of these, instead of one attack after the other
    threads: int = 1  # CPU threads
    individual: bool = False  # every attack on all correctly classified samples
    attacks: tuple[str, ...] = VERSIONS["standard"]  # which attacks, in order
    reference_stream: bool = True  # run ours with the official stream of random numbers
    own_stream: bool = True  # also run ours with its own random numbers
    workers: tuple[int, ...] = ()  # also run ours with its own random numbers and so many workers
    repeats: int = 1  # how often each is timed; the median counts
    search_dtype: Literal["none", "bfloat16", "float16"] = "none"  # also run ours with a search in this precision
    compile: bool = False  # also run ours with a compiled model
    device: str = "cpu"  # torch device
    out: Path | None = None  # JSON file to write


def official_class() -> type | None:
    try:
        from autoattack import AutoAttack as Official
    except ImportError:
        return None
    return Official


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        BenchmarkSettings,
        arguments,
        program="python -m benchmarks.autoattack",
        description="Compare AutoAttack with the official package: verdicts and seconds.",
    )
    ranges = {
        "eps": record.LENGTH,
        **dict.fromkeys(("samples", "seed"), record.NUMBER),
        **dict.fromkeys(("batch", "repeats"), record.COUNT),
        "workers": record.COUNTS,
        "seeds": (lambda v: all(seed >= 0 for seed in v), "numbers of 0 or more"),
    }
    record.check_names("attacks", settings.attacks, VERSIONS["plus"])
    device = distributed.device_of_this_process(record.check(settings, ranges))
    with distributed.processes(device):
        compare(settings, arguments, device)


def compare(settings: BenchmarkSettings, arguments: list[str], device: torch.device) -> None:
    first, world, threads = distributed.rank() == 0, distributed.world_size(), torch.get_num_threads()
    loaded = data.load(DataSettings(settings.data, root=settings.data_root))
    x, y = (t[: settings.samples or len(t)].to(device) for t in (loaded.x_test, loaded.y_test))
    count = len(x)
    model = loading.load(settings.model_from, model=settings.model, data=settings.data, device=device)

    def ours(names: Sequence[str], seed: int, **options: Any) -> Run:
        adversary = AutoAttack(model, settings.norm, settings.eps, seed, False, share_samples=True, **options)
        adversary.attacks_to_run = list(names)
        return lambda xs, ys: adversary.run_standard_evaluation(xs, ys, bs=settings.batch)

    def theirs(names: Sequence[str], seed: int, package: type) -> Run:
        adversary = package(model, settings.norm, settings.eps, seed, False, device=device)
        adversary.attacks_to_run = list(names)
        return lambda xs, ys: adversary.run_standard_evaluation(xs, ys, bs=settings.batch)

    variants: dict[str, dict[str, Any]] = {}
    if settings.reference_stream and world == 1:  # one stream for all samples cannot be shared out
        variants["reference stream"] = {"rng": "reference"}
    if settings.own_stream:
        variants["own stream"] = {}
    variants |= {f"workers {count}": {"workers": count} for count in settings.workers}
    if settings.search_dtype != "none":
        variants[settings.search_dtype] = {"search_dtype": getattr(torch, settings.search_dtype)}
    if settings.compile:
        variants["compiled"] = {"compile": True}
    if not variants:
        raise InputError("own_stream: False leaves nothing to run, allowed: with reference_stream in one process")
    official = official_class()
    if official is None and first:
        print(f"without the official package, which is not installed: {INSTALL}")
    baseline = "official" if official is not None else next(iter(variants))

    def runs_of(names: Sequence[str], seed: int) -> dict[str, Run]:
        runs = {label: ours(names, seed, **options) for label, options in variants.items()}
        return runs if official is None else {**runs, "official": theirs(names, seed, official)}

    alive = measures.correct(model, x, y, settings.batch).nonzero().squeeze(1)
    clean, lines = len(alive), []
    if first:
        print(f"{settings.model_from}, {settings.norm} {settings.eps:g}: {clean} of {count} correct", flush=True)
    rounds: list[tuple[tuple[str, ...], int]] = [((name,), settings.seed) for name in settings.attacks]
    if settings.seeds:
        rounds = [(settings.attacks, seed) for seed in settings.seeds]
    total: dict[str, float] = {}
    for names, seed in rounds:
        xs, ys = x[alive], y[alive]
        line: dict[str, Any] = {"attack": ", ".join(names), "seed": seed, "before": len(alive)}
        verdicts = {}
        runs = runs_of(names, seed)
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        processor_seconds: dict[str, list[float]] = {label: [] for label in runs}
        for label, run in [*runs.items()] * settings.repeats:
            distributed.barrier()
            begin, processor = time.perf_counter(), time.process_time()
            if label != "official":
                x_adv = run(xs, ys)
            elif first:  # its verdicts alone count
                torch.set_num_threads(world * threads)
                x_adv = run(xs, ys)
                torch.set_num_threads(threads)
            seconds[label].append(time.perf_counter() - begin)
            processor_seconds[label].append(time.process_time() - processor)
            # On the CPU: what was on the device of the first process would come to that one in all of them.
            verdicts[label] = distributed.from_first(measures.correct(model, x_adv, ys, settings.batch).cpu())
        for label in runs:
            total[label] = total.get(label, 0.0) + statistics.median(seconds[label])
            line[label] = {
                "stand": int(verdicts[label].sum()),
                "seconds": round(statistics.median(seconds[label]), 2),
                # of this process, which other work does not lengthen
                "processor seconds": round(statistics.median(processor_seconds[label]), 2),
            }
        for label, verdict in verdicts.items():
            line[label]["differ"] = alive[verdict != verdicts[baseline]].tolist()
        lines.append(line)
        if first:
            print(json.dumps(line), flush=True)
        if not (settings.individual or settings.seeds):
            alive = alive[verdicts[baseline]]
    if not first:
        return
    ratios = {label: round(total[baseline] / taken, 2) for label, taken in total.items()}
    total = {label: round(taken, 1) for label, taken in total.items()}
    print(f"seconds {total}; times as fast as {baseline} {ratios}")
    counted = {"processes": world, "repeats": settings.repeats, "samples": count, "clean": clean}
    record.write(settings.out, "autoattack", arguments, device, **counted, attacks=lines, seconds=total)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(run_program(main))
