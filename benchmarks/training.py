"""Seconds a step of training takes, with each switch for speed alone and all together, in one run.

    python -m benchmarks.training --data cifar10 --data-root DIR --model wrn-10-2 --objectives pgd_at trades --threads 2

Every objective and variant trains the same network on the same batches; rounds of all of them follow each other, and
the median of the rounds counts, so that a machine that slows down slows all. Printed and, with --out, written as JSON.

``--outside`` also repeats the bare passes of the network of each step, forward and backward, and says what share of the
step is neither theirs nor the posterior's: attack, loss, optimiser, data. It is a share of processor seconds, summed
over threads, which other work on the machine lengthens little.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import record
from scorematch.posteriors import Posterior, Trace
from training import data, models
from training.data import DataName, DataSettings
from training.engine import hardware, posteriors
from training.engine.hardware import Speed
from training.engine.loop import Trainer, speed_of
from training.settings import command_line, config
from training.settings.errors import InputError, run_program
from training.settings.posterior import POSTERIORS, PosteriorSettings

PLAIN = {
    "channels-last": "False",
    "fused": "False",
    "fold": "False",
    "precision": "float32",
    "compile": "off",
    "graph": "off",
}
USUAL = {**PLAIN, "channels-last": "True", "fused": "True"}
FOLDED = {**USUAL, "fold": "True"}
BFLOAT16 = {"precision": "bfloat16"}
VARIANTS: dict[str, dict[str, str]] = {
    "plain": PLAIN,
    "fused optimiser": {**PLAIN, "fused": "True"},
    "channels_last": {**PLAIN, "channels-last": "True"},
    "folded": {**PLAIN, "fold": "True"},
    "all three": FOLDED,
    "all three, bfloat16": {**FOLDED, **BFLOAT16},
    "auto": {**FOLDED, "precision": "auto", "compile": "auto", "graph": "auto"},
    "compiled": {**USUAL, "compile": "on"},
    "bfloat16": {**USUAL, **BFLOAT16},
    "tf32": {**USUAL, "precision": "tf32"},
    "bfloat16, compiled": {**USUAL, **BFLOAT16, "compile": "on"},
    "graph": {**FOLDED, "graph": "on"},
    "bfloat16, graph": {**FOLDED, **BFLOAT16, "graph": "on"},
    "bfloat16, compiled, graph": {**USUAL, **BFLOAT16, "compile": "on", "graph": "on"},
}
Case = tuple[str, str]  # an objective and a variant
BEFORE = 5  # steps before the first round: kernels are chosen, networks compiled, graphs recorded
ON_A_CPU = ("plain", "fused optimiser", "channels_last", "folded", "all three", "all three, bfloat16")


def options_of(variant: str) -> list[str]:
    """The options of training.run that a variant stands for."""
    switches = {"True": "--{}", "False": "--no-{}"}
    pairs = ([switches[v].format(k)] if v in switches else [f"--{k}", v] for k, v in VARIANTS[variant].items())
    return [option for pair in pairs for option in pair]


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to time."""

    data: DataName = "cifar10"  # data set
    data_root: Path | None = None  # folder of CIFAR's official files; None is $SCOREMATCH_DATA
    model: str = "wrn-10-2"  # architecture
    # what to train; score_direct may name its posterior, as in score_direct:kernel_density, or score_direct:linear, a
    # score network read at the clean point alone
    objectives: tuple[str, ...] = ("pgd_at",)
    posterior_settings: PosteriorSettings = field(default_factory=PosteriorSettings)  # its networks stay untrained
    variants: tuple[str, ...] = ON_A_CPU  # names of VARIANTS
    batch: int = 128  # samples a step
    steps: int = 4  # timed steps of a round
    rounds: int = 3  # rounds, after one of BEFORE steps that is not counted
    attack_steps: int = 10  # steps of the attack
    threads: int = 2  # CPU threads
    outside: bool = False  # also the share of a step outside the network and the posterior, on a CPU
    device: str = "cpu"  # torch device
    out: Path | None = None  # JSON file to write


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        BenchmarkSettings,
        arguments,
        program="python -m benchmarks.training",
        description="Time the steps of training, with each switch for speed.",
    )
    if not settings.objectives:
        raise InputError(f"objectives: none given, allowed: {', '.join(get_args(config.Objective))}")
    for objective in settings.objectives:
        name, _, kind = objective.partition(":")
        allowed = ("", "linear", *POSTERIORS) if name == "score_direct" else ("",)
        if name not in get_args(config.Objective) or kind not in allowed:
            names = ", ".join([*get_args(config.Objective), "score_direct:linear", "score_direct:POSTERIOR"])
            raise InputError(f"objectives: {objective!r} is unknown, allowed: {names}")
    record.check_names("variants", settings.variants, list(VARIANTS))
    device = record.check(settings, dict.fromkeys(("batch", "steps", "rounds", "attack_steps"), record.COUNT))
    if settings.outside and device.type != "cpu":
        raise InputError(f"outside: is for the CPU, got --device {settings.device}")
    loaded = data.load(DataSettings(settings.data, root=settings.data_root)).to(device)
    if settings.batch > len(loaded.x_train):
        raise InputError(f"batch: {settings.batch} samples, {settings.data} has {len(loaded.x_train)} to train on")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [(objective, variant) for objective in settings.objectives for variant in settings.variants]
        runs = {case: run_of(settings, *case, loaded, Path(folder)) for case in cases}
        seconds: dict[Case, list[float]] = {case: [] for case in cases}
        shares: dict[Case, list[Shares]] = {case: [] for case in cases}
        index = torch.arange(settings.batch, device=loaded.x_train.device)
        for number in tqdm(range(settings.rounds + 1), desc="benchmark", unit="round"):
            for case, run in runs.items():
                taken = time_of(run.trainer, index, settings.steps if number else BEFORE)
                if number:
                    seconds[case].append(taken)
                if number and settings.outside:
                    shares[case].append(shares_of(run, index))
            if number:  # what was measured so far is kept if the benchmark is stopped
                lines = lines_of(settings, runs, seconds, shares)
                record.write(settings.out, "training", arguments, device, rounds=number, lines=lines)
    for line in lines:
        print(json.dumps(line), flush=True)


def lines_of(
    settings: BenchmarkSettings,
    runs: "dict[Case, Run]",
    seconds: dict[Case, list[float]],
    shares: "dict[Case, list[Shares]]",
) -> list[dict[str, Any]]:
    """The medians of the rounds so far, a line for each case."""
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    first_objective = next(iter(medians))[0]
    return [
        {
            "objective": objective,
            "variant": variant,
            "seconds_per_step": round(median, 4),
            "samples_per_second": round(settings.batch / median, 1),
            "seconds_per_epoch": round(median * runs[objective, variant].trainer.course.steps, 1),
            "times_first": round(medians[objective, settings.variants[0]] / median, 2),
            "times_first_objective": round(median / medians[first_objective, variant], 2),
            **per_cent(shares[objective, variant]),
        }
        for (objective, variant), median in medians.items()
    ]


class Run(NamedTuple):
    trainer: Trainer
    posterior: Posterior | None


def run_of(settings: BenchmarkSettings, objective: str, variant: str, loaded: data.Data, folder: Path) -> Run:
    name, _, kind = objective.partition(":")
    out = folder / f"{name}-{kind}-{variant}"
    out.mkdir()
    options = ["--objective", name, "--data", settings.data, "--model", settings.model]
    options += ["--batch-size", str(settings.batch), "--steps", str(settings.attack_steps)]
    if settings.data_root is not None:
        options += ["--data-root", str(settings.data_root)]
    parsed = config.parse([*options, *options_of(variant), "--device", settings.device])
    posterior = None
    if name == "score_direct":
        linear = kind == "linear"
        named = dataclasses.replace(
            settings.posterior_settings, name="score_network" if linear or not kind else kind, linear=linear, steps=1
        )
        posterior = posteriors.build(named, loaded, seed=0, device=loaded.x_train.device, folder=out)
        speed = speed_of(parsed, hardware.hardware_of(loaded.x_train.device), steps=1)
        posterior = posteriors.at_speed(posterior, Speed(speed.precision, speed.compile))
    torch.manual_seed(0)
    model = models.build(settings.model, loaded.input_shape, loaded.num_classes, loaded.statistics)
    return Run(Trainer(parsed, loaded, model.to(loaded.x_train.device), posterior, out), posterior)


def time_of(trainer: Trainer, index: torch.Tensor, steps: int) -> float:
    """Seconds a step."""
    device = index.device
    # Of the process: it is as the run that was made last has left it.
    hardware.prepare(device, trainer.speed.precision, deterministic=trainer.settings.deterministic)
    begin = time.perf_counter()
    for _ in range(steps):
        trainer._step(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / steps


class Pass(NamedTuple):
    """A call of the network in a step: on what, and what its gradient is taken to."""

    x: torch.Tensor
    to_x: bool
    to_weights: bool
    training: bool


class Shares(NamedTuple):
    """Of the processor seconds of a step, in per cent."""

    posterior: float
    outside: float  # neither the network's passes nor the posterior


class Watched:
    """Counts the processor seconds that a posterior takes."""

    def __init__(self, posterior: Posterior) -> None:
        self.seconds = 0.0
        self._posterior = posterior
        self._trace = posterior.trace
        posterior.trace = self._begin  # type: ignore[method-assign]

    def end(self) -> None:
        self._posterior.trace = self._trace  # type: ignore[method-assign]

    def _begin(self, x: torch.Tensor, y: torch.Tensor) -> Trace:
        trace: Trace = self._timed(self._trace)(x, y)
        trace.move = self._timed(trace.move)  # type: ignore[method-assign]
        trace.pull_back = self._timed(trace.pull_back)  # type: ignore[method-assign]
        return trace

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.process_time()
            result = function(*arguments)
            self.seconds += time.process_time() - begin
            return result

        return call


def shares_of(run: Run, index: torch.Tensor) -> Shares:
    """The shares of one step; the passes of the network are timed alone after it."""
    trainer = run.trainer
    passes: list[Pass] = []

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x, graph = inputs[0], torch.is_grad_enabled()
        to_weights = graph and any(parameter.requires_grad for parameter in trainer.model.parameters())
        passes.append(Pass(x.detach(), graph and x.requires_grad, to_weights, trainer.model.training))

    hook = trainer.forward.register_forward_pre_hook(record)
    watched = None if run.posterior is None else Watched(run.posterior)
    begin = time.process_time()
    trainer._step(index)
    whole = time.process_time() - begin
    hook.remove()
    by_posterior = 0.0
    if watched is not None:
        watched.end()
        by_posterior = watched.seconds

    mode, parameters = trainer.model.training, list(trainer.model.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    begin = time.process_time()
    for one in passes:
        trainer.model.train(one.training)
        trainer.model.requires_grad_(one.to_weights)
        x = one.x.clone(memory_format=torch.preserve_format).requires_grad_(one.to_x)
        with torch.set_grad_enabled(one.to_x or one.to_weights):
            total = trainer.forward(x).sum()
        if total.requires_grad:
            torch.autograd.grad(total, [x] if one.to_x else parameters, allow_unused=True)
    bare = time.process_time() - begin
    trainer.model.train(mode)
    for parameter, want in zip(parameters, wanted, strict=True):
        parameter.requires_grad_(want)
    return Shares(100 * by_posterior / whole, 100 * (1 - (bare + by_posterior) / whole))


def per_cent(shares: list[Shares]) -> dict[str, dict[str, float]]:
    return {f"{name}_per_cent": spread([getattr(one, name) for one in shares]) for name in Shares._fields if shares}


def spread(values: list[float]) -> dict[str, float]:
    """The median, and the quartiles around it."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {name: round(value, 1) for name, value in zip(("low", "median", "high"), quarters, strict=True)}


if __name__ == "__main__":
    sys.exit(run_program(main))
