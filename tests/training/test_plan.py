"""The counted cost of a run, against sums done by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from training import data, models, plan
from training.engine import hardware
from training.engine.loop import Trainer
from training.plan import PlanSettings
from training.settings import config
from training.settings.config import RunSettings
from training.settings.errors import run_program


def parsed(options: str) -> RunSettings:
    return config.parse(options.split())


class Operations(TorchDispatchMode):
    """Counts floating-point operations like FlopCounterMode, whose hooks of modules some attacks do not allow."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


def forward_operations(name: str) -> int:
    model = models.build(name, (3, 32, 32), 10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    return int(counter.get_total_flops())


# Passes of 10 attack steps, in forward passes: each step is one forward and one backward pass to the input (of the same
# cost); the loss one forward and two such backward passes, to inputs and weights; TRADES has two of these and one
# forward pass for the clean prediction.
@pytest.mark.parametrize(
    ("objective", "passes"),
    [
        ("standard", 3),
        ("gaussian", 3),
        ("gaussian --gamma 0.5 --antithetic", 9),
        ("pgd_at", 20 + 3),
        ("pgd_at --attack fgsm_rs", 2 + 3),
        ("trades", 20 + 1 + 6),
        ("pgd_at --free-replays 4", 3),
    ],
)
def test_operations(objective: str, passes: int) -> None:
    run = parsed(f"--recipe cifar10 --objective {objective} --model wrn-10-1")
    cost = plan.plan(run, 48_976, PlanSettings())
    # the first layer has no backward pass to its input when its weights are trained on x itself
    assert cost.operations == pytest.approx(passes * forward_operations("wrn-10-1"), rel=0.05)
    assert cost.parameters == sum(p.numel() for p in models.build("wrn-10-1", (3, 32, 32), 10).parameters())
    assert cost.steps == 383
    assert cost.samples == 383 * 128 * (run.free_replays or 1)
    assert cost.state == 4 * cost.parameters * 3


def test_parts_of_a_batch_share_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for parts in ("1", "4"):
        options = "--recipe cifar10 --objective pgd_at --attack n_fgsm --model wrn-10-1 --batch-size 1024 --accumulate"
        assert run_program(plan.main, [*options.split(), parts]) == 0
        printed = capsys.readouterr().out
        assert "attack of 1 steps" in printed
        found.append(float(re.search(r"([\d.]+) GiB a GPU\n", printed)[1]))  # type: ignore[index]
    assert found[0] == pytest.approx(4 * found[1], abs=0.21)


@pytest.mark.parametrize(
    "objective",
    [
        "standard",
        "pgd_at",
        "trades",
        "pgd_at --attack fgsm_rs",
        "pgd_at --free-replays 3",
        "pgd_at --awp 0.01",
        "trades --awp 0.01",
    ],
)
def test_a_run_makes_the_operations_that_are_counted(objective: str, tmp_path: Path) -> None:
    run = parsed(f"--objective {objective} --model digits_cnn_bn --limit 100 --batch-size 20 --steps 4 --device cpu")
    loaded = data.load(run.data_settings)
    model = models.build(run.model, loaded.input_shape, loaded.num_classes)
    trainer = Trainer(run, loaded, model, None, tmp_path)
    with Operations() as counter:
        metrics = trainer._step(torch.arange(20))
    cost = plan.plan(run, 80, PlanSettings(hardware="cpu"))
    samples = int(metrics["samples"])
    assert samples * cost.steps == cost.samples
    assert counter.count == pytest.approx(samples * cost.operations, rel=0.01)


def test_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 32 * 32, 10))

    monkeypatch.setattr(models, "build", lambda name, shape, classes, **options: network(shape, classes))
    run = parsed("--recipe cifar10 --objective standard --precision float32")
    # kept: the input of the convolution, the output of ReLU (which the linear layer takes too), logits and less
    floats = 3 * 32 * 32 + 8 * 32 * 32
    assert plan.plan(run, 48_976, PlanSettings()).activations == pytest.approx(4 * floats, rel=0.02)


def test_free_adversarial_training_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--recipe cifar10 --objective pgd_at --free-replays 4 --model wrn-10-1 --samples-per-second 1000"
    assert run_program(plan.main, [*arguments.split(), "--gpus", "2", "--bandwidth", "0.0001"]) == 0
    printed = capsys.readouterr().out
    assert "383 steps of 4 updates, 196096 samples" in printed
    assert "attack of" not in printed
    ring = float(re.search(r"([\d.]+) ms in each update where", printed)[1]) / 1000  # type: ignore[index]
    assert float(re.search(r"([\d.]+) s an epoch", printed)[1]) == pytest.approx(98 + 4 * 383 * ring, rel=1e-3)  # type: ignore[index]


def test_time(capsys: pytest.CaptureFixture[str]) -> None:
    machines = "--samples-per-second 1000 --gpus 2 --bandwidth 10"
    arguments = f"--recipe cifar10 --objective pgd_at --model wrn-10-1 --epochs 10 {machines}"
    assert run_program(plan.main, arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "383 steps, 49024 samples" in printed
    assert "24.5 s an epoch, 0.1 h in all" in printed  # 49,024 / 2,000, and 383 sums of a hundred thousand gradients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0", "gpus: 0 is out of range, allowed: above 0"),
        ("--recipe toy --objective standard", "data: 'toy', allowed: cifar10, cifar100, svhn, digits"),
        ("--recipe cifar10 --objective score_direct", "whose cost depends on its posterior"),
        ("--recipe cifar10 --objective trades --posterior kernel_density", "whose cost depends on its posterior"),
        ("--data digits --objective pgd_at --generated more.npz --original-share 0.001", "is 0 originals a step"),
        ("--recipe table3 --betta 3", "--betta: unknown option, did you mean --beta"),
        ("--recipe none", "recipe: 'none' is unknown"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(plan.main, arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps", "capped"),
    [
        ("--recipe cifar10-cpu --objective pgd_at --limit 20000 --batch-size 64", 313, False),
        ("--recipe cifar10 --objective standard --validation-size 10000", 313, False),
        ("--data digits --objective standard", 36, False),
        ("--data digits --objective standard --steps-per-epoch 1000", 36, True),
        ("--recipe table3", 98, False),  # with generated images, whose file is not needed
        ("--recipe table3 --originals-only", 96, True),
    ],
)
def test_steps_of_an_epoch_are_those_of_the_run(
    options: str, steps: int, capped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "digits" in options else ["--model", "wrn-10-1"]
    assert run_program(plan.main, [*options.split(), *model, "--hardware", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f" {steps} steps, " in printed
    assert ("is more than the training images fill" in printed) == capped


def test_the_plan_is_of_the_run_that_would_be_launched() -> None:
    small = "--recipe table2 --objective pgd_at --model wrn-10-1"
    run = parsed(f"{small} --epochs 50")
    on_gpus = plan.plan(run, 48_976, PlanSettings(gpus=8)).speed
    assert (on_gpus.precision, on_gpus.compile, on_gpus.graph) == ("bfloat16", True, True)
    here = plan.plan(run, 48_976, PlanSettings(hardware="cpu")).speed
    assert here.precision == hardware.precision_of("auto", hardware.hardware_of(torch.device("cpu")))
    assert not here.graph
    as_told = parsed(f"{small} --precision float32 --compile off --graph off")
    told = plan.plan(as_told, 48_976, PlanSettings(gpus=8)).speed
    assert (told.precision, told.compile, told.graph) == ("float32", False, False)
    assert plan.plan(as_told, 48_976, PlanSettings()).activations > plan.plan(run, 48_976, PlanSettings()).activations
