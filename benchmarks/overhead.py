"""Where AutoAttack's time goes: in the network's passes, which it cannot do without, or beside them.

    python -m benchmarks.overhead --model digits_cnn --input-shape 1 8 8 --samples 250 --threads 1

An untrained network is attacked within so small a radius that nothing is found, with its own predictions as labels: so
every attack does all of its work for every sample. All passes are counted, with the samples of each. Before every tenth
a bare pass of the same network on the same samples is timed, which does not count for the attack, and floor = Σ count ×
median time of a bare pass. What an attack takes beyond is its own: steps, losses, choices of the best point, books.
The checks of the model, which an evaluation does once on its first batch, are told apart, and so are their passes.
Seconds are those of the processor, which other work on the machine lengthens little; of threads they are the sum.
"""

import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from scorematch import AutoAttack
from scorematch.attacks import classifier, inspection
from scorematch.attacks.autoattack import VERSIONS
from training import models
from training.settings import command_line
from training.settings.errors import run_program

Network = Callable[[Tensor], Tensor]
Pass = tuple[str, int]  # "logits" (forward), "graph" (forward, to go back through) or "back", and the samples


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to attack."""

    model: str = "digits_cnn"  # architecture, untrained
    input_shape: tuple[int, ...] = (1, 8, 8)  # of a sample
    classes: int = 10  # of the network
    samples: int = 250  # how many are attacked, all at once
    eps: float = 1e-6  # radius, so small that nothing is found
    attacks: tuple[str, ...] = VERSIONS["standard"]  # which attacks
    steps: int = 100  # iterations of APGD and FAB
    queries: int = 5000  # of Square
    threads: int = 1  # CPU threads
    out: Path | None = None  # JSON file to write


def bare_pass(network: Network, x: Tensor, with_graph: bool) -> dict[str, float]:
    """Processor seconds of a forward pass, and with a graph of the backward pass to x."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(with_graph)
    with torch.set_grad_enabled(with_graph):
        begin = time.process_time()
        logits = network(x)
        forward = time.process_time() - begin
        if not with_graph:
            return {"logits": forward}
        chosen = logits.sum()
        begin = time.process_time()
        torch.autograd.grad(chosen, x)
        return {"graph": forward, "back": time.process_time() - begin}


@dataclass
class Recorder:
    """Stands for `logits_of`: counts the passes, and times a bare one of the same kind before every tenth."""

    call: Callable[[Network, Tensor], Tensor]
    passes: Counter[Pass] = field(default_factory=Counter)
    bare: dict[Pass, list[float]] = field(default_factory=dict)
    seconds: float = 0.0  # that the bare passes took
    checks: float = 0.0  # seconds of the checks of the model

    def check(self, doubts: Callable[..., Any], *arguments: Any) -> Any:
        """Stands for `doubts`."""
        counted, self.passes = self.passes, Counter()
        begin, bare = time.process_time(), self.seconds
        try:
            return doubts(*arguments)
        finally:
            self.checks = time.process_time() - begin - (self.seconds - bare)
            self.passes = counted

    def __call__(self, network: Network, x: Tensor) -> Tensor:
        with_graph, count = torch.is_grad_enabled() and x.requires_grad, len(x)
        kind = ("graph" if with_graph else "logits", count)
        if self.passes[kind] % 10 == 0:
            begin = time.process_time()
            for name, taken in bare_pass(network, x, with_graph).items():
                self.bare.setdefault((name, count), []).append(taken)
            self.seconds += time.process_time() - begin
        self.passes[kind] += 1
        logits = self.call(network, x)
        if with_graph:
            logits.register_hook(lambda gradient: self.passes.update([("back", count)]))
        return logits

    def floor_seconds(self) -> float:
        """Of the network's passes alone."""
        return sum(count * statistics.median(self.bare[kind]) for kind, count in self.passes.items())


def measure(model: torch.nn.Module, x: Tensor, attack: str, settings: BenchmarkSettings) -> dict[str, Any]:
    adversary = AutoAttack(model, "Linf", settings.eps, 0, False, version="custom", attacks_to_run=[attack], workers=1)
    for part in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
        part.n_iter = settings.steps
    adversary.square.n_queries = settings.queries
    y = classifier.predicted(model(x))
    recorder, doubts = Recorder(classifier.logits_of), inspection.doubts
    vars(classifier)["logits_of"] = recorder
    vars(inspection)["doubts"] = partial(recorder.check, doubts)
    try:
        begin = time.process_time()
        adversary.run_standard_evaluation(x, y, bs=len(x))
        taken = time.process_time() - begin - recorder.seconds - recorder.checks
    finally:
        vars(classifier)["logits_of"] = recorder.call
        vars(inspection)["doubts"] = doubts
    lowest = recorder.floor_seconds()
    counts = {
        kind: sum(n for (k, _), n in recorder.passes.items() if k == kind) for kind in ("logits", "graph", "back")
    }
    return {
        "attack": attack,
        "passes": counts,
        "seconds": taken,
        "floor_seconds": lowest,
        "times_floor": taken / lowest,
        "checks_seconds": recorder.checks,
        "overhead_a_forward_us": (taken - lowest) / (counts["logits"] + counts["graph"]) * 1e6,
    }


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        BenchmarkSettings,
        arguments,
        program="python -m benchmarks.overhead",
        description="Share of AutoAttack's time outside the network's passes.",
    )
    counts = dict.fromkeys(("classes", "samples", "steps", "queries"), record.COUNT)
    device = record.check(settings, {**counts, "input_shape": record.COUNTS, "eps": record.LENGTH})
    record.check_names("attacks", settings.attacks, VERSIONS["plus"])
    torch.manual_seed(0)
    model = models.build(settings.model, settings.input_shape, settings.classes, None).eval().requires_grad_(False)
    x = torch.rand(settings.samples, *settings.input_shape)
    lines = []
    for attack in settings.attacks:
        lines.append(measure(model, x, attack, settings))
        print(json.dumps(lines[-1]), flush=True)
    record.write(settings.out, "overhead", arguments, device, attacks=lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(run_program(main))
