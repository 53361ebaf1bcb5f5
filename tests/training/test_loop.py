"""One training loop: exact resumption, and the stop at a loss that is not finite."""

import dataclasses
import json
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
from library_models import Replayed, replays_on_the_cpu

from training import data, models
from training.engine import checkpoint, distributed, posteriors
from training.engine.loop import PURPOSES, Trainer, generator
from training.settings import config
from training.settings.errors import InputError, Interrupted, StopError

OPTIONS = (
    "--objective trades --model digits_cnn_bn --epochs 4 --limit 60 --batch-size 25 --steps 2 --validation-steps 1 "
    "--shift 1 --averaging 0.9 --threads 1"
)

MEASURED = ("seconds", "samples_per_second", "memory_gib")  # differ from run to run


def trainer(out: Path, *options: str, graph: bool = False) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    settings = config.parse([*OPTIONS.split(), *options])
    if graph:  # refused on a CPU by the parser
        settings = dataclasses.replace(settings, graph="on")
    loaded = data.load(settings.data_settings)
    posterior = None
    if settings.posterior is not None:
        posterior = posteriors.build(settings.posterior_settings, loaded, seed=settings.seed, folder=out)
    torch.manual_seed(settings.seed)
    return Trainer(settings, loaded, models.build(settings.model, loaded.input_shape, 10), posterior, out)


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def interrupted_after(trainer: Trainer, steps: int) -> None:
    """Train, and stop by a signal in the middle of things after some steps."""
    step = trainer._step
    left = steps

    def counted(index: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        return step(index)

    trainer._step = counted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.fit()


def test_an_interrupted_training_leaves_no_writer_of_tensorboard(tmp_path):
    def writers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if "Writer" in type(thread).__name__]

    before = writers()
    training = trainer(tmp_path)
    interrupted_after(training, 3)
    assert writers() == before


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "multistep --milestones 2", "constant"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, schedule: str) -> None:
    options = ["--optimizer", optimizer, "--schedule", *schedule.split()]
    whole = trainer(tmp_path / "whole", *options)
    whole.save()
    whole.fit()

    out = tmp_path / "parts"
    first = trainer(out, *options)
    first.save()
    interrupted_after(first, 4)  # in the second epoch of three steps
    second = trainer(out, *options)
    second.resume()
    interrupted_after(second, 7)
    last = trainer(out, *options)
    last.resume()
    assert last.epoch == 3
    last.fit()

    for network, expected in ((last.model, whole.model), (last.network, whole.network)):
        for name, value in expected.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name
    assert metrics(out) == metrics(tmp_path / "whole")
    assert last.best == whole.best


@pytest.mark.parametrize("options", ["--objective trades", "--objective pgd_at --free-replays 2 --averaging 0"])
def test_a_state_is_read_on_the_cpu_and_goes_where_it_belongs(options: str, tmp_path: Path) -> None:
    """Adam's counts of its steps stay there; the device, which weights that are copied never see, is played by meta."""
    first = trainer(tmp_path, *options.split(), "--optimizer", "adam")
    first.save()
    interrupted_after(first, 2)
    first.device = torch.device("meta")  # as if it had been trained there
    first.save()
    first.written()
    second = trainer(tmp_path, *options.split(), "--optimizer", "adam")
    second.device = torch.device("meta")
    second.resume()
    assert {total.device.type for total in second.sums.values()} == {"meta"}
    assert {state["step"].device.type for state in second.optimizer.state.values()} == {"cpu"}
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    if second.free is not None:
        assert second.free.perturbation is not None
        assert second.free.perturbation.device.type == "meta"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.save()
    interrupted_after(run, 3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    broken = trainer(tmp_path)
    broken.resume()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(torch.nan)
    with pytest.raises(StopError, match=r"not finite in epoch 2.*checkpoint\.pt keeps .* \(epoch 1\)"):
        broken.fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert len(metrics(tmp_path)) == 1


def test_the_seed_decides_the_run(tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run = trainer(tmp_path / name, "--seed", seed, "--epochs", "1")
        run.fit()
        runs[name] = torch.cat([parameter.flatten() for parameter in run.model.parameters()])
    assert torch.equal(runs["a"], runs["b"])
    assert not torch.equal(runs["a"], runs["c"])


def test_purposes_draw_from_generators_of_their_own(tmp_path: Path) -> None:
    draws = {purpose: torch.rand(4, generator=generator(0, purpose)) for purpose in PURPOSES}
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(PURPOSES)
    short, long = (trainer(tmp_path / steps, "--steps", steps, "--epochs", "1") for steps in ("1", "3"))
    for run in (short, long):
        run.fit()
    for purpose in ("order", "augmentation"):
        assert torch.equal(short.generators[purpose].get_state(), long.generators[purpose].get_state()), purpose


def test_best_is_chosen_by_robust_then_clean_accuracy_then_the_later_epoch(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    kept = []
    for epoch, (robust, clean) in enumerate([(50, 90), (60, 80), (60, 85), (60, 85), (55, 99)], start=1):
        run.epoch = epoch
        run.is_best({"val_pgd_acc": robust, "val_acc": clean})
        kept.append(run.best["epoch"])
    assert kept == [1, 2, 3, 4, 4]


def test_best_of_standard_training_is_chosen_by_clean_accuracy(tmp_path: Path) -> None:
    run = trainer(tmp_path, "--objective", "standard")
    for epoch, (robust, clean) in enumerate([(30, 60), (10, 99), (12, 98)], start=1):
        run.epoch = epoch
        assert run.is_best({"val_pgd_acc": robust, "val_acc": clean}) == (epoch <= 2)
    assert run.best["epoch"] == 2


def test_a_training_goes_on_on_the_same_kind_of_device_alone(tmp_path: Path) -> None:
    run, path = trainer(tmp_path), tmp_path / "checkpoint.pt"
    run.save()
    run.written()
    run.resume()
    saved = checkpoint.load(path)
    saved["training"]["device"] = "cuda"
    torch.save(saved, path)
    with pytest.raises(InputError, match=r"^device: cpu, but .*checkpoint.pt was saved on cuda.* --device cuda"):
        run.resume()
    del saved["training"]["device"]  # as earlier versions saved
    torch.save(saved, path)
    run.resume()


def test_a_checkpoint_that_is_due_does_not_wait_for_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, "--save-minutes", "1e-9")
    monkeypatch.setattr(Trainer, "validate", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert (saved["epoch"], saved["training"]["step"]) == (0, run.course.steps)


def test_best_weights_and_checkpoint_are_of_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption on a device that does not repeat its bits: no epoch is as good as before it."""
    robust = iter([50.0, 50.0, 50.0, 90.0, *[10.0] * 4])
    monkeypatch.setattr(Trainer, "validate", lambda self: {"val_pgd_acc": next(robust), "val_acc": 50.0})
    options = ("--epochs", "6", "--save-every", "3")
    first = trainer(tmp_path, *options)
    first.save()
    interrupted_after(first, 4 * first.course.steps + 1)
    second = trainer(tmp_path, *options)
    second.resume()
    second.fit()
    best = checkpoint.load(tmp_path / "best.pt")["epoch"]
    assert best == second.best["epoch"]
    logged = {entry["epoch"]: entry["val_pgd_acc"] for entry in checkpoint.read_metrics(tmp_path / "metrics.jsonl")}
    assert logged[best] == second.best["val_pgd_acc"]


def test_dropout_is_a_function_of_the_step_and_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_dropout.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, input_shape, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Dropout(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "with_dropout", raising=False)
    masks = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        masks.append(output == 0)

    for other_process, before in ((0, 1), (0, 2), (1, 1)):
        monkeypatch.setattr(distributed, "rank", lambda other_process=other_process: other_process)
        run = trainer(tmp_path / "run", "--objective", "standard", "--model", "with_dropout:Net", "--shift", "0")
        run.rank = 0  # of the samples: the same ones
        run.model.get_submodule("1").register_forward_hook(keep)
        torch.manual_seed(before)
        run._step(torch.arange(25))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_step_without_random_layers_leaves_the_global_generator(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    before = torch.get_rng_state()
    run._step(torch.arange(25))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_gradient_that_is_not_finite_spoils_no_file(optimizer: str, bad: float, tmp_path: Path) -> None:
    """In the last step of an epoch, whose loss is finite."""
    run = trainer(tmp_path, "--objective", "standard", "--epochs", "3", "--optimizer", optimizer)
    update = run._update

    def spoilt() -> None:
        if run.steps_done == 2 * run.course.steps - 1:
            gradient = run.weights()[0].grad
            assert gradient is not None
            gradient.view(-1)[0] = bad
        update()

    run._update = spoilt  # type: ignore[method-assign]
    with pytest.raises(StopError, match=r"the weights are not finite in epoch 2; .* last good checkpoint .epoch 1."):
        run.fit()
    for name in ("checkpoint.pt", "best.pt"):
        saved = checkpoint.load(tmp_path / name)
        assert saved["epoch"] == 1, name
        assert all(value.isfinite().all() for value in saved["network"].values()), name


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ("--objective trades", True),
        ("--objective trades --attack-mode train", False),
        ("--objective pgd_at", False),
        ("--objective pgd_at --free-replays 2", False),
        ("--objective standard", False),
        ("--objective standard --precision bfloat16", True),  # in the search of a validation
        ("--objective trades --model digits_cnn --batchnorm-momentum None", False),
    ],
)
def test_folding_is_told_where_it_happens(options: str, folds: bool, tmp_path: Path) -> None:
    training = trainer(tmp_path, "--fold", *options.split())
    assert ("batch norm folded" in str(training.speed)) == folds


def test_validation_judges_the_averaged_weights_on_its_own_split(tmp_path: Path) -> None:
    """They are right about all of it, and wrong about all other images; the weights themselves are always wrong."""
    run = trainer(tmp_path)
    with torch.no_grad():
        list(run.model.modules())[-1].weight.neg_()
        list(run.model.modules())[-1].bias.neg_()
        said = {part: run.network.eval()(getattr(run.data, f"x_{part}")).argmax(1) for part in ("train", "validation")}
    labels = {"y_validation": said["validation"], "y_train": (said["train"] + 1) % 10}
    run.data = dataclasses.replace(run.data, **labels, x_test=torch.full_like(run.data.x_test, torch.nan))
    found = run.validate()
    assert (found["train_acc"], found["val_acc"]) == (0.0, 100.0)
    run.data = dataclasses.replace(run.data, y_validation=(said["validation"] + 1) % 10)
    assert run.validate()["val_pgd_acc"] == 0.0


def test_the_norm_of_the_gradients_is_a_mean_over_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, "--objective", "standard", "--epochs", "1")
    norms, update = [], run._update

    def watched() -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).norm()))
        update()

    monkeypatch.setattr(run, "_update", watched)
    run.fit()
    expected = sum(count * norm for count, norm in zip((25, 25, 10), norms, strict=True)) / 60
    assert metrics(tmp_path)[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_steps_are_counted_over_all_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each epoch would see the same generated images again."""
    run = trainer(tmp_path, "--objective", "standard", "--epochs", "2")
    asked, batch = [], run.batches.batch
    monkeypatch.setattr(run.batches, "batch", lambda index, step: asked.append(step) or batch(index, step))
    run.fit()
    assert asked == list(range(6))


def test_weights_are_perturbed_from_the_epoch_after_the_warmup(tmp_path: Path) -> None:
    run = trainer(tmp_path, "--awp", "0.01", "--awp-warmup", "2")
    perturbed = []
    for run.epoch in range(4):
        with run._perturbation() as perturbation:
            perturbed.append(perturbation is not None)
    assert perturbed == [False, False, True, True]


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_a_step_folds_the_weights_of_the_step_before(fused: str, tmp_path: Path) -> None:
    """Nothing else changes with frozen batch norms, and a fused optimiser does not tell that it writes."""
    training = trainer(tmp_path, "--fold", fused)
    for module in training.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
    x = training.data.x_train[:5]

    def look() -> None:
        training.model.train(False).requires_grad_(False)
        torch.testing.assert_close(training.forward(x), training.model(x), rtol=1e-4, atol=1e-4)
        training.model.train(True).requires_grad_(True)

    assert not training.forward.folds_nothing
    for _ in range(2):
        look()
        training._step(torch.arange(25))
    look()


@pytest.mark.parametrize("objective", ["trades", "pgd_at --attack-mode eval"])
def test_switches_for_speed_change_rounding_alone(objective: str, tmp_path: Path) -> None:
    options = ["--objective", *objective.split(), "--attack-start", "uniform", "--optimizer", "sgd", "--lr", "0.05"]
    # without shifts: where their zeros come in, gradients are so small that rounding decides their signs
    options += ["--steps", "1", "--epochs", "1", "--shift", "0"]
    plain = trainer(tmp_path / "plain", *options)
    fast = trainer(tmp_path / "fast", *options, "--fold", "--fused", "--channels-last")
    assert len(fast.forward._folding.pairs) == 3  # type: ignore[union-attr]
    for run in (plain, fast):
        run.save()
        run.fit()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(fast.model.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        "--objective pgd_at --averaging 0.9 --batchnorm-momentum 0.1 --batchnorm-first",
        "--objective trades --fold --awp 0.01 --label-smoothing 0.1",
        "--objective trades --attack n_fgsm --accumulate 2",
        "--objective score_direct --posterior kernel_density",
        "--objective score_direct --posterior kernel_density --data-gradient noise --target-mix 0.5 --accumulate 2",
        "--objective trades --posterior kernel_density --soft-targets --transport 0.5",
    ],
)
def test_recorded_attacks_train_to_the_same_bits(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a recording repeats the call that it was made from, whatever has changed since."""
    arguments = [*options.split(), "--epochs", "3"]
    plain = trainer(tmp_path / "plain", *arguments)
    recorded = trainer(tmp_path / "recorded", *arguments, graph=True)
    replays_on_the_cpu(monkeypatch)
    for run in (plain, recorded):
        run.fit()
    assert Replayed.made > 0
    for name, value in plain.model.state_dict().items():
        assert torch.equal(recorded.model.state_dict()[name], value), name


def weights_after(out: Path, options: str) -> torch.Tensor:
    options += " --epochs 1 --model digits_cnn --averaging 0 --optimizer sgd --lr 0.05"
    run = trainer(out, *options.split())
    run.fit()
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "score_direct --posterior kernel_density --target-mix 0",
            "pgd_at --posterior kernel_density --soft-targets",
        ),
        ("trades --posterior kernel_density --transport 0", "trades"),
        (
            "score_direct --posterior kernel_density --data-gradient noise",
            "score_direct --posterior kernel_density --data-gradient noise --accumulate 3",
        ),
    ],
)
def test_options_that_mean_the_same_train_the_same(one: str, other: str, tmp_path: Path) -> None:
    a, b = (weights_after(tmp_path / str(number), f"--objective {o}") for number, o in enumerate((one, other)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_each_option_of_a_posterior_changes_the_training(tmp_path: Path) -> None:
    posterior = "--posterior kernel_density"
    options = [
        f"score_direct {posterior}",
        f"score_direct {posterior} --target-mix 0.5",
        f"score_direct {posterior} --data-gradient none",
        f"score_direct {posterior} --data-gradient noise",
        "trades",
        f"trades {posterior}",
        f"trades {posterior} --transport 0.5",
        f"trades {posterior} --soft-targets",
        f"trades {posterior} --soft-targets --transport 1",
        "standard",
        f"standard {posterior} --soft-targets",
        "pgd_at --free-replays 2",
        f"pgd_at {posterior} --soft-targets --free-replays 2",
    ]
    found = [weights_after(tmp_path / str(number), f"--objective {o}") for number, o in enumerate(options)]
    for number, weights in enumerate(found):
        assert not any(torch.equal(weights, other) for other in found[:number]), options[number]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ("--objective pgd_at", False),
        ("--objective pgd_at --toy-labels hard", True),
        ("--objective pgd_at --soft-targets --posterior oracle", True),
        ("--objective score_direct --posterior oracle", True),
    ],
)
def test_the_oracle_is_the_target_where_no_posterior_gives_it(options: str, labels: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, "--data", "toy", "--model", "toy_mlp", "--shift", "0", *options.split())
    assert (run.batches.targets.dim() == 1) == labels
    expected = run.data.y_train if labels else run.data.p_train
    assert run.batches.targets is expected


def test_batch_norm_needs_two_samples(tmp_path: Path) -> None:
    """One batch of all, or parts of them, that leaves a single sample is refused before the first step."""
    with pytest.raises(InputError) as refused:
        trainer(tmp_path, "--batch-size", "59")
    needed = "allowed: at least two samples each, as the model has batch norm"
    assert str(refused.value) == f"batch_size: 59 of 60 samples leaves a batch of 1, {needed}"
    with pytest.raises(InputError, match="a batch of 5 for 1 processes with 3 parts each, allowed: at least two"):
        trainer(tmp_path, "--batch-size", "5", "--accumulate", "3")
    trainer(tmp_path, "--batch-size", "59", "--model", "digits_cnn")
    trainer(tmp_path, "--batch-size", "59", "--steps-per-epoch", "1")  # the batch of one is never seen


def test_a_graph_does_not_communicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"graph: 'on' in 2 processes, whose attack in train mode synchronises"):
        trainer(tmp_path / "run", "--objective", "pgd_at", graph=True)
