"""What a run at scale costs: ``python -m training.plan``, from counted operations and a measured speed.

    python -m training.plan --recipe table4 --model wrn-70-16-silu --samples-per-second 900 --gpus 8

Nothing is trained and no data is read: one step runs on fake tensors, which have shapes and no values. Counted are the
floating-point operations of convolutions and matrix products, and the bytes that automatic differentiation keeps from
the forward to the backward pass. The speed of a GPU is not guessed: give what benchmarks.training measured on it.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scorematch import ThreatModel, objectives
from training import command_line, config, models
from training.config import RunSettings
from training.data import FORMATS
from training.errors import InputError, run_program
from training.forward import Forward

TRAINING_IMAGES = {"cifar10": 48_976, "cifar100": 48_976, "svhn": 72_233, "digits": 1_150}  # without validation
GIB = 2**30
COUNTED = 2  # samples of the counted step; more only scales it


@dataclass(frozen=True)
class PlanSettings:
    """A run, and the machines it is to run on."""

    recipe: str = "cifar10"  # name in training/recipes, or path of a TOML file
    objective: Literal["standard", "pgd_at", "trades"] | None = None  # None is the recipe's own, or pgd_at
    model: str | None = None  # architecture; None is the recipe's own
    batch_size: int | None = None  # samples a step, over all GPUs; None is the recipe's own
    epochs: int | None = None  # None is the recipe's own
    precision: Literal["float32", "tf32", "bfloat16"] = "bfloat16"  # of the network in training
    gpus: int = 1  # in all, on however many nodes
    samples_per_second: float | None = None  # of one GPU, for this model and objective, as benchmarks.training prints
    bandwidth: float | None = None  # GB/s between two GPUs (the slowest link of the ring), for the sum of gradients
    train_images: int | None = None  # original training images; None is those of the data set


@dataclass(frozen=True)
class Plan:
    """What a run costs."""

    parameters: int
    operations: int  # floating-point operations of one sample in one step
    activations: int  # bytes kept for one sample between the forward and the backward pass
    state: int  # bytes of weights, gradients, momentum and averaged weights
    samples: int  # one epoch
    steps: int  # one epoch


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        PlanSettings,
        arguments,
        program="python -m training.plan",
        description="Count what a run costs, and how long it takes at a measured speed.",
    )
    for name in ("gpus", "samples_per_second", "bandwidth", "batch_size", "epochs", "train_images"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{name}: {value} is out of range, allowed: above 0")
    run = run_settings(settings)
    if run.data not in TRAINING_IMAGES:
        raise InputError(f"recipe: {settings.recipe} is for {run.data}, allowed: a recipe for images")
    show(settings, run, plan(run, settings.train_images or TRAINING_IMAGES[run.data]))


def run_settings(settings: PlanSettings) -> RunSettings:
    changes = {
        name: value
        for name in ("model", "batch_size", "epochs", "objective", "precision")
        if (value := getattr(settings, name)) is not None
    }
    run = dataclasses.replace(config.from_recipes(None, settings.recipe), **changes)
    return run if run.objective in ("standard", "trades") else dataclasses.replace(run, objective="pgd_at")


def plan(run: RunSettings, train_images: int) -> Plan:
    """Count one step of ``run``."""
    shape, num_classes = FORMATS[run.data]
    with FakeTensorMode():
        model = models.build(run.model, shape, num_classes)
        parameters = sum(p.numel() for p in model.parameters())
        x = torch.rand(COUNTED, *shape)
        y = torch.zeros(COUNTED, dtype=torch.int64)
        forward = Forward(model, run.precision)
        with FlopCounterMode(display=False) as counter:
            activations = _step(run, forward, x, y)
    copies = 2 + (run.optimizer == "sgd" and run.momentum > 0) + 2 * (run.optimizer == "adam") + (run.averaging > 0)
    steps = -(-train_images // run.batch_size)
    return Plan(
        parameters,
        counter.get_total_flops() // COUNTED,
        activations // COUNTED,
        4 * parameters * copies,
        steps * run.batch_size,
        steps,
    )


def _step(run: RunSettings, model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Forward, attack and backward; the bytes that the loss keeps, each storage once, parameters not counted."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    in_attack = True

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if not in_attack and storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return value

    threat_model = ThreatModel(run.norm, run.eps, run.step_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        x_adv = x
        if run.objective != "standard":
            x_adv = _attacked(run, model, x, y, threat_model)
        in_attack = False
        clean = model(x) if run.objective in ("standard", "trades") else None
        logits = model(x_adv) if run.objective != "standard" else None
        terms = [objectives.divergence_of(z, y, kind=run.divergence) for z in (clean, logits) if z is not None]
        sum(term.mean() for term in terms).backward()  # type: ignore[union-attr]
    return sum(kept.values())


def _attacked(run: RunSettings, model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel) -> Tensor:
    trainable = list(model.parameters())
    for parameter in trainable:
        parameter.requires_grad_(False)
    if run.objective == "trades":
        with torch.no_grad():
            model(x)
    x_adv = x
    for _ in range(run.steps):
        point = x_adv.detach().requires_grad_()
        objectives.divergence_of(model(point), y, kind=run.divergence).sum().backward()
        assert point.grad is not None
        x_adv = threat_model.step(x_adv, point.grad, x)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return x_adv


def show(settings: PlanSettings, run: RunSettings, cost: Plan) -> None:
    share = -(-run.batch_size // settings.gpus)
    epoch = cost.samples * cost.operations
    print(f"{run.objective} ({run.divergence}), {run.model}, {run.data}, {run.precision}, batch {run.batch_size}")
    rows = [
        ("parameters", f"{cost.parameters / 1e6:.1f} M"),
        ("operations a sample and step", f"{cost.operations / 1e9:.1f} GFLOP, attack of {run.steps} steps"),
        ("an epoch", f"{cost.steps} steps, {cost.samples} samples, {epoch / 1e15:.2f} PFLOP"),
        (f"all {run.epochs} epochs", f"{run.epochs * epoch / 1e18:.3f} EFLOP"),
        ("weights and what belongs to them", f"{cost.state / GIB:.2f} GiB on each GPU"),
        ("activations", f"{cost.activations / 2**20:.1f} MiB a sample, {share * cost.activations / GIB:.1f} GiB a GPU"),
    ]
    if settings.samples_per_second:
        speed = settings.samples_per_second
        seconds = cost.samples / (speed * settings.gpus)
        rows.append(("at that speed", f"{speed * cost.operations / 1e12:.1f} TFLOP/s a GPU"))
        if settings.bandwidth and settings.gpus > 1:
            ring = 2 * (settings.gpus - 1) / settings.gpus * 4 * cost.parameters / (settings.bandwidth * 1e9)
            rows.append(("sum of gradients", f"{1e3 * ring:.1f} ms a step where nothing hides it"))
            seconds += cost.steps * ring
        hours = run.epochs * seconds / 3600
        rows.append(
            (f"on {settings.gpus} GPUs", f"{seconds:.1f} s an epoch, {hours:.1f} h in all, evaluation not counted")
        )
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(run_program(main))
