"""What a run at scale costs: ``python -m training.plan``, from counted operations and a measured speed.

    python -m training.plan --gpus 8 --recipe table3 --model wrn-70-16-silu --beta 3
    python -m training.plan --gpus 8 --samples-per-second 900 --recipe table3 --model wrn-70-16-silu

It takes the options of training.run beside its own, and plans the run that they would launch on that hardware. Nothing
is trained and no data is read (only a function of your own is called): one step runs on fake tensors, which have shapes
and no values. It counts the floating-point operations of convolutions and matrix products, and the bytes that automatic
differentiation keeps from the forward to the backward pass. The speed of a GPU is not guessed: give what
benchmarks.training measured on it.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scorematch import ThreatModel, divergence
from training import data as data_sets
from training import models
from training.data.batches import fewer_steps, steps_of_epoch
from training.engine import hardware
from training.engine.forward import Forward
from training.engine.hardware import Speed
from training.engine.loop import speed_of
from training.settings import command_line, config
from training.settings.config import RunSettings
from training.settings.errors import InputError, run_program

# Of the official data sets with those that validate.
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "digits": 1_150}
GIB = 2**30
COUNTED = 2  # samples of the counted step, and of a second one twice as many: what both keep is no sample's


@dataclass(frozen=True)
class PlanSettings:
    """The machines for a run; the settings of the run itself are the options of training.run."""

    gpus: int = 1  # in all, on however many nodes
    hardware: Literal["gpu", "cpu"] = "gpu"  # gpu: of the kind that multiplies bfloat16; cpu: this machine
    samples_per_second: float | None = None  # of one GPU, for this model and objective, as training.run prints
    bandwidth: float | None = None  # GB/s between two GPUs (the slowest link of the ring), for the sum of gradients
    train_images: int | None = None  # original training images; None is those of the data set


@dataclass(frozen=True)
class Plan:
    """What a run costs."""

    parameters: int
    operations: int  # floating-point operations of one sample in one update of the weights
    activations: int  # bytes kept for one sample between the forward and the backward pass
    state: int  # bytes of weights, gradients, momentum and averaged weights
    samples: int  # one epoch; free adversarial training counts a sample in each of its passes, as training.run does
    steps: int  # one epoch
    speed: Speed  # how the network is called


def main(arguments: list[str]) -> None:
    settings, rest = command_line.parse_known(
        PlanSettings,
        arguments,
        program="python -m training.plan",
        description="Count what a run costs, and how long it takes at a measured speed. Takes every option of "
        "training.run beside these.",
        default=PlanSettings(),
    )
    for name in ("gpus", "samples_per_second", "bandwidth", "train_images"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{name}: {value} is out of range, allowed: above 0")
    named = {"--generated", "--originals-only"} & {option.split("=")[0] for option in rest}
    run = config.parse(rest if named else [*rest, "--originals-only"])
    if not named and run.original_share is not None:  # the plan of a recipe with generated images needs no file
        run = dataclasses.replace(run, originals_only=False, generated=(Path("generated.npz"),))
    if run.posterior is not None:
        raise InputError(
            f"objective: {run.objective!r}, whose cost depends on its posterior, allowed: standard, gaussian, "
            "pgd_at and trades without one; python -m benchmarks.training measures score_direct"
        )
    count = settings.train_images or training_images(run)
    cost = plan(run, count, settings)
    show(settings, run, cost)


def updates_of_step(run: RunSettings) -> int:
    """How often a step updates the weights: free adversarial training does so in each pass over a batch."""
    return run.free_replays or 1


def training_images(run: RunSettings) -> int:
    """How many images there are to train on."""
    count = TRAINING_IMAGES.get(run.data)
    if count is not None and run.data in data_sets.OFFICIAL:
        count -= data_sets.CIFAR_VALIDATION if run.validation_size is None else run.validation_size
    if count is None and data_sets.is_own(run.data):
        count = data_sets.format_of(run.data_settings).train
    if count is None:
        raise InputError(f"data: {run.data!r}, allowed: {', '.join(TRAINING_IMAGES)}, folder, module:function")
    return min(run.limit, count) if run.limit else count


def plan(run: RunSettings, train_images: int, settings: PlanSettings) -> Plan:
    """Count one step of ``run`` as it would be launched on that hardware."""
    steps = steps_of_epoch(run, train_images)
    device = hardware.GPU if settings.hardware == "gpu" else hardware.hardware_of(torch.device("cpu"))
    speed = speed_of(run, device, run.epochs * steps, settings.gpus)
    form = data_sets.format_of(run.data_settings)
    shape, num_classes, lower, upper = form.input_shape, form.num_classes, form.lower, form.upper
    own = models.build(run.model, shape, num_classes) if models.is_own(run.model) else None  # lazy layers need values
    with FakeTensorMode(allow_non_fake_inputs=own is not None):
        model = own
        if model is None:
            model = models.build(run.model, shape, num_classes, pretrained=run.pretrained, weights=False)
        parameters = sum(p.numel() for p in model.parameters())
        forward = Forward(model, speed.precision)
        kept = []
        for count in (COUNTED, 2 * COUNTED):
            x, y = torch.rand(count, *shape), torch.zeros(count, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter:
                kept.append(_step(run, forward, x, y, run.threat_model(lower, upper)))
    copies = 2 + (run.optimizer == "sgd" and run.momentum > 0) + 2 * (run.optimizer == "adam") + (run.averaging > 0)
    return Plan(
        parameters,
        counter.get_total_flops() // (2 * COUNTED),
        (kept[1] - kept[0]) // COUNTED,
        4 * parameters * copies,
        steps * updates_of_step(run) * run.batch_size,
        steps,
        speed,
    )


def _step(run: RunSettings, model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel) -> int:
    """One update; the bytes that its loss keeps, each storage once, parameters not counted."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    before_the_loss = True

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if not before_the_loss and storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return value

    def loss(x_adv: Tensor) -> Tensor:
        # Of Gaussian augmentation: the noisy pass, that with the other sign, and the clean one.
        passes = 1 + run.antithetic + (run.gamma != 0 or run.held_alignment is not None)
        count = {"trades": 2, "gaussian": passes}.get(run.objective, 1)
        logits = [model(point) for point in ([x] * (count - 1) + [x_adv])]
        return torch.stack([divergence(z, y, kind=run.divergence).mean() for z in logits]).sum()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        x_adv = x
        if run.free_replays:
            x_adv = x.detach().requires_grad_()  # no attack: the backward pass of the loss moves the perturbation too
        elif run.searches:
            x_adv = _attacked(run, model, x, y, threat_model)
        if run.awp:
            loss(x_adv).backward()  # moves the weights; left out in the epochs of awp_warmup, which the plan ignores
        before_the_loss = False
        loss(x_adv).backward()
    return sum(kept.values())


def _attacked(run: RunSettings, model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel) -> Tensor:
    trainable = list(model.parameters())
    for parameter in trainable:
        parameter.requires_grad_(False)
    if run.objective == "trades":
        with torch.no_grad():
            model(x)
    x_adv = x
    for _ in range(run.attack_steps):
        point = x_adv.detach().requires_grad_()
        divergence(model(point), y, kind=run.divergence).sum().backward()
        assert point.grad is not None
        x_adv = threat_model.step(x_adv, point.grad, x)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return x_adv


def show(settings: PlanSettings, run: RunSettings, cost: Plan) -> None:
    if told := fewer_steps(run, cost.steps):
        print(told)
    share = -(-run.batch_size // (settings.gpus * run.accumulate))
    epoch = cost.samples * cost.operations
    print(f"{run.objective} ({run.divergence}), {run.model}, {run.data}, batch {run.batch_size}")
    print(f"as it would run on {'GPUs' if settings.hardware == 'gpu' else 'this CPU'}: {cost.speed}")
    updates = updates_of_step(run)
    unit, of, attack = "step", "", f", attack of {run.attack_steps} steps" if run.searches else ""
    if run.free_replays:
        unit, of, attack = "update", f" of {updates} updates", ""
    rows = [
        ("parameters", f"{cost.parameters / 1e6:.1f} M"),
        (f"operations a sample and {unit}", f"{cost.operations / 1e9:.1f} GFLOP{attack}"),
        ("an epoch", f"{cost.steps} steps{of}, {cost.samples} samples, {epoch / 1e15:.2f} PFLOP"),
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
            rows.append(("sum of gradients", f"{1e3 * ring:.1f} ms in each {unit} where nothing hides it"))
            seconds += cost.steps * updates * ring
        hours = run.epochs * seconds / 3600
        rows.append(
            (f"on {settings.gpus} of them", f"{seconds:.1f} s an epoch, {hours:.1f} h in all, evaluation not counted")
        )
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(run_program(main))
