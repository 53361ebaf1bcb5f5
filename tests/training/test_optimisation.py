"""Parameter groups, schedules, averaging and batch-norm momentum, each against its definition in plain Python."""

import copy
import math

import pytest
import torch
from torch import nn, optim

from training import models
from training.data.smoothing import smoothed
from training.engine.optimisation import (
    batchnorm_momentum,
    build_average,
    build_optimizer,
    build_schedule,
    parameter_groups,
    set_batchnorm_momentum,
)
from training.settings import config
from training.settings.config import RunSettings
from training.settings.errors import InputError


def settings(**values: object) -> RunSettings:
    made = RunSettings(objective="standard", device="cpu", **values)
    config.validate(made)
    return made


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LayerNorm(144),
        nn.Linear(144, 3),
    )
    return nn.Sequential(*layers)


def train_a_step(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# Weight decay


def test_no_decay_on_norms_are_the_parameters_called_batchnorm_in_the_published_networks() -> None:
    for name in ("wrn-10-2-silu", "preact-resnet-18"):
        with torch.device("meta"):
            model = models.build(name, (3, 32, 32), 10)
        decayed, free = parameter_groups(settings(weight_decay_norms=False), model)
        expected = {id(p) for key, p in model.named_parameters() if "batchnorm" in key}
        assert {id(p) for p in free["params"]} == expected
        assert len(free["params"]) + len(decayed["params"]) == len(list(model.parameters()))
        assert free["weight_decay"] == 0.0


def test_norms_are_found_by_type() -> None:
    model = small_net()
    _, free = parameter_groups(settings(weight_decay_norms=False), model)
    assert [id(p) for p in free["params"]] == [id(p) for layer in (1, 2, 4) for p in model[layer].parameters()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_sgd_against_its_definition(norms: bool, nesterov: bool, fused: bool) -> None:
    made = settings(
        optimizer="sgd",
        lr=0.1,
        weight_decay=0.3,
        weight_decay_norms=norms,
        nesterov=nesterov,
        fused=fused,
        momentum=0.8,
    )
    model = small_net().double()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    optimizer = build_optimizer(made, model)
    for step in range(3):
        x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for name, p in model.named_parameters():
            is_norm = name.split(".")[0] in ("1", "2", "4")
            gradient = p.grad + (0.0 if is_norm and not norms else 0.3) * expected[name]
            velocity[name] = gradient if step == 0 else 0.8 * velocity[name] + gradient
            expected[name] = expected[name] - 0.1 * (gradient + 0.8 * velocity[name] if nesterov else velocity[name])
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_fused_reaches_the_optimiser() -> None:
    for optimizer in ("sgd", "adam"):
        assert build_optimizer(settings(optimizer=optimizer, fused=True), small_net()).defaults["fused"] is True
        assert not build_optimizer(settings(optimizer=optimizer), small_net()).defaults["fused"]


# Schedules


def one_cycle(moves: int, rise: float, top: float) -> list[float]:
    """Half a cosine from top / 25 up to the move rise · moves − 1, and another down to top / 250,000 at the last."""
    peak = rise * moves - 1

    def rate(move: int) -> float:
        low, high, at = (top / 25, top, move / peak) if move <= peak else (top / 25e4, top, 1.0)
        if move > peak:
            at = 1.0 - (move - peak) / (moves - 1 - peak)
        return low + (high - low) * (1 - math.cos(math.pi * at)) / 2

    return [rate(move) for move in range(moves)]


def rates(made: RunSettings, steps_per_epoch: int) -> list[tuple[float, float]]:
    """Rate and momentum in each step, as a loop sees them."""
    model = small_net()
    optimizer = build_optimizer(made, model)
    schedule = build_schedule(made, optimizer, steps_per_epoch)
    seen = []
    for step in range(made.epochs * steps_per_epoch):
        assert schedule.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        train_a_step(model, optimizer, step)
        schedule.step()
    return seen


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_one_cycle(by: str) -> None:
    made = settings(optimizer="sgd", lr=0.2, schedule="onecycle", schedule_by=by, epochs=20, warmup=0.25)
    found = [rate for rate, _ in rates(made, 3)]
    expected = (
        one_cycle(60, 0.25, 0.2) if by == "step" else [rate for rate in one_cycle(20, 0.25, 0.2) for _ in range(3)]
    )
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("by", "epochs", "steps"), [("epoch", 1, 5), ("epoch", 2, 5), ("step", 1, 1), ("step", 1, 2)])
def test_a_cycle_of_one_or_two_moves_stays_at_its_rate(by: str, epochs: int, steps: int) -> None:
    made = settings(optimizer="sgd", lr=0.2, schedule="onecycle", schedule_by=by, epochs=epochs)
    assert [rate for rate, _ in rates(made, steps)] == pytest.approx([0.2] * epochs * steps)


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_momentum_cycles_against_the_rate(by: str) -> None:
    made = settings(
        optimizer="sgd", lr=0.2, epochs=20, schedule_by=by, cycle_momentum=True, weight_decay_norms=False, momentum=0.9
    )
    found = rates(made, 3)
    assert found[0][1] == pytest.approx(0.95)
    assert min(momentum for _, momentum in found) == pytest.approx(0.85, abs=2e-3)
    assert max(found)[1] == min(momentum for _, momentum in found)  # lowest where the rate is highest
    assert {m for _, m in rates(settings(optimizer="sgd", epochs=4), 3)} == {0.9}


def test_other_schedules_by_epoch() -> None:
    by_epoch = {"optimizer": "sgd", "lr": 1.0, "schedule_by": "epoch"}
    multistep = settings(schedule="multistep", milestones=(2, 3), epochs=4, **by_epoch)
    assert [r for r, _ in rates(multistep, 2)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = settings(schedule="cosine", epochs=4, **by_epoch)
    expected = [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4) for _ in range(2)]
    assert [r for r, _ in rates(cosine, 2)] == pytest.approx(expected)
    assert {r for r, _ in rates(settings(schedule="constant", epochs=2, **by_epoch), 2)} == {1.0}


@pytest.mark.parametrize("by", ["step", "epoch"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "multistep", "constant"])
def test_a_schedule_resumes_from_its_state_in_the_middle_of_an_epoch(schedule: str, by: str) -> None:
    made = settings(
        optimizer="sgd",
        schedule=schedule,
        schedule_by=by,
        epochs=6,
        milestones=(2, 4),
        warmup=0.3,
        cycle_momentum=schedule == "onecycle",
    )
    whole, interrupted = rates(made, 5), []
    model, saved = small_net(), {}
    for first, last in ((0, 13), (13, 30)):
        optimizer = build_optimizer(made, model)
        advance = build_schedule(made, optimizer, 5)
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
            advance.load_state_dict(saved["schedule"])
        for step in range(first, last):
            interrupted.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            train_a_step(model, optimizer, step)
            advance.step()
        saved = copy.deepcopy({"optimizer": optimizer.state_dict(), "schedule": advance.state_dict()})
    assert interrupted == whole


# Averaging


def published_decay(step: int, tau: float, warmup: float, ramp: bool) -> float:
    since = step - warmup
    if step < warmup:
        return 0.0
    return min(tau, (1 + since) / (10 + since)) if ramp else tau


@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize(("warmup", "ramp"), [(0.0, False), (0.0, True), (0.25, True), (0.25, False), (0.11, True)])
def test_average_against_its_definition(warmup: float, ramp: bool, buffers: str) -> None:
    total = 40
    made = settings(averaging=0.8, averaging_warmup=warmup, averaging_ramp=ramp, averaging_buffers=buffers)
    model = small_net().double()
    average = build_average(made, model, total)
    assert average is not None
    expected: dict[str, torch.Tensor] = {}
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, total + 1):
        optimizer.zero_grad()
        x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        decay = 0.0 if step == 1 else published_decay(step, 0.8, warmup * total, ramp)
        parameters = dict(model.named_parameters())
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            own = decay if name in parameters or buffers == "average" else 0.0
            expected[name] = own * expected.get(name, torch.zeros_like(value)) + (1 - own) * value
        for name, value in expected.items():
            torch.testing.assert_close(average.module.state_dict()[name], value, rtol=1e-12, atol=1e-12)
        if buffers == "copy":
            assert torch.equal(average.module[1].running_var, model[1].running_var)
            assert average.module[1].num_batches_tracked == model[1].num_batches_tracked


def test_average_resumes_from_its_state_bit_for_bit() -> None:
    made = settings(averaging=0.9, averaging_warmup=0.2, averaging_ramp=True, averaging_buffers="copy")

    def updated(average: nn.Module, steps: range) -> nn.Module:
        for step in steps:
            average.update_parameters(small_net(step))
        return average

    whole = updated(build_average(made, small_net(), 20), range(15))
    first = updated(build_average(made, small_net(), 20), range(7))
    second = build_average(made, small_net(99), 20)
    second.load_state_dict(first.state_dict())
    updated(second, range(7, 15))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_no_average_where_it_is_off() -> None:
    assert build_average(settings(), small_net(), 10) is None


# Batch norm


def test_batch_norm_momentum_is_one_in_the_first_step_alone() -> None:
    made = settings(batchnorm_momentum=0.01, batchnorm_first=True)
    assert [batchnorm_momentum(made, step) for step in range(3)] == [1.0, 0.01, 0.01]
    assert [batchnorm_momentum(settings(batchnorm_momentum=0.3), step) for step in range(2)] == [0.3, 0.3]
    assert batchnorm_momentum(settings(), 0) is None


def test_running_statistics_with_that_momentum() -> None:
    made = settings(batchnorm_momentum=0.25, batchnorm_first=True)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, momentum=None)))
    expected = torch.zeros(3)
    for step in range(4):
        set_batchnorm_momentum(model, batchnorm_momentum(made, step))
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        model(x)
        weight = 1.0 if step == 0 else 0.25
        expected = (1 - weight) * expected + weight * x.mean(0)
        torch.testing.assert_close(model[0].running_mean, expected)
    assert model[1][0].momentum == 0.25


def test_batch_norm_momentum_without_batch_norm_is_an_error() -> None:
    with pytest.raises(InputError, match=r"batchnorm_momentum: 0\.1 for a model without batch norm"):
        set_batchnorm_momentum(nn.Linear(2, 2), 0.1)


# Label smoothing


def test_smoothed_labels() -> None:
    y = torch.tensor([2, 0])
    expected = torch.tensor([[0.05, 0.05, 0.9], [0.9, 0.05, 0.05]])
    torch.testing.assert_close(smoothed(y, 3, 0.1, "others"), expected)
    for over in ("all", "others"):
        assert torch.equal(smoothed(y, 3, 0.0, over), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))


def test_smoothing_is_that_of_torch_and_of_the_published_code() -> None:
    """.91 and .01 for an amount of .1 over ten classes."""
    y, logits = torch.arange(10), torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    targets = smoothed(y, 10, 0.1)
    torch.testing.assert_close(targets[0], torch.tensor([0.91] + [0.01] * 9))
    expected = nn.functional.cross_entropy(logits, y, label_smoothing=0.1)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, targets), expected)
    # the other convention is the same at nine tenths of the amount
    torch.testing.assert_close(smoothed(y, 10, 0.09, "others"), targets)


def test_runs_smooth_as_published() -> None:
    assert settings(label_smoothing=0.1).label_smoothing_over == "all"


@pytest.mark.parametrize(
    ("y", "classes", "amount", "message"),
    [
        (torch.tensor([0.0]), 3, 0.1, "y must be int64"),
        (torch.tensor([[0]]), 3, 0.1, "y must be int64"),
        (torch.tensor([0]), 1, 0.1, "num_classes must be at least 2, got 1"),
        (torch.tensor([0]), 3, 1.0, r"amount must lie in \[0, 1\), got 1.0"),
    ],
)
def test_smoothing_refuses(y: torch.Tensor, classes: int, amount: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smoothed(y, classes, amount)


# Settings that contradict each other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--schedule cosine --cycle-momentum", "cycle_momentum: True with schedule 'cosine', allowed: with onecycle"),
        ("--optimizer sgd --momentum 0 --cycle-momentum", "cycle_momentum: True with momentum 0"),
        ("--averaging 0 --averaging-warmup 0.1", "averaging_warmup: 0.1 without averaging"),
        ("--averaging 0 --averaging-ramp", "averaging_ramp: True without averaging"),
        ("--batchnorm-first", "batchnorm_first: True without batchnorm_momentum"),
        ("--awp-warmup 2", "awp_warmup: 2 without awp"),
        ("--awp 0.005 --awp-warmup 30 --epochs 30", "awp_warmup: 30, allowed: less than the 30 epochs"),
        ("--objective standard --awp 0.005", "awp: 0.005 with standard training"),
        ("--attack n_fgsm --attack-start uniform", "attack_start: 'uniform' with n_fgsm, which has its own"),
        ("--objective trades --free-replays 4", "free_replays: 4 with trades, allowed: with pgd_at"),
        ("--norm l1 --attack n_fgsm", "norm: 'l1' with n_fgsm, allowed: with attack pgd and without free_replays"),
        ("--norm l1 --free-replays 4", "norm: 'l1' with free_replays, allowed: with attack pgd"),
        ("--graph on --device cpu", "graph: 'on' on cpu, allowed: auto or off, or a CUDA device"),
        ("--precision tf32 --device cpu", "precision: 'tf32' on cpu, allowed: auto, float32 or bfloat16"),
        ("--free-replays 4 --clip 0.4", "clip: 0.4 with free_replays, allowed: 0.0"),
        ("--free-replays 4 --attack fgsm_rs", "attack: 'fgsm_rs' with free_replays, allowed: 'pgd'"),
        ("--data toy --label-smoothing 0.1", "label_smoothing: 0.1 with the toy"),
        ("--objective score_direct --label-smoothing 0.1", "label_smoothing: 0.1 with score_direct"),
        ("--target-mix 0.5", "target_mix: 0.5 with pgd_at, allowed: with score_direct"),
        ("--data-gradient none", "data_gradient: 'none' with pgd_at, allowed: with score_direct"),
        ("--transport 1", "transport: 1.0 with pgd_at, allowed: with trades"),
        ("--objective trades --transport 1", "transport: 1.0 without a posterior, allowed: with --posterior NAME"),
        ("--soft-targets", "soft_targets: True without a posterior, allowed: with --posterior NAME"),
        ("--posterior-from a.pt", "posterior_from: a.pt without a posterior, allowed: with --posterior NAME"),
        ("--posterior kernel_density", "posterior: 'kernel_density' with pgd_at, which asks none, allowed: with score"),
        (
            "--objective score_direct --soft-targets",
            "soft_targets: True with score_direct, whose targets are",
        ),
        (
            "--posterior kernel_density --soft-targets --label-smoothing 0.1",
            "label_smoothing: 0.1 with soft_targets, allowed: 0",
        ),
        (
            "--objective score_direct --target-mix 0.5 --posterior-settings.centering network",
            "target_mix: 0.5 with centering 'network', allowed: 1",
        ),
        ("--objective score_direct --target-mix 1.5", "target_mix: 1.5 is out of range, allowed: 0 to 1"),
        ("--objective trades --transport -1", "transport: -1.0 is out of range"),
        ("--free-replays -1", "free_replays: -1 is out of range"),
        ("--label-smoothing 1", "label_smoothing: 1.0 is out of range"),
        ("--awp 1", "awp: 1.0 is out of range"),
        ("--averaging 0.9 --averaging-warmup 1", "averaging_warmup: 1.0 is out of range"),
        ("--batchnorm-momentum 0", "batchnorm_momentum: 0.0 is out of range"),
    ],
)
def test_contradictions_are_named(options: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        config.parse(["--objective", "pgd_at", *options.split()])
    assert str(caught.value).startswith(message)
