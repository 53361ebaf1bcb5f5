"""What auto stands for, and that it changes rounding alone."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scorematch import PGD, AutoAttack, ThreatModel
from training import engine, measures, models
from training.engine import checkpoint, hardware
from training.engine.hardware import GPU, PASSES_WORTH_COMPILING, Hardware, hardware_of
from training.engine.loop import speed_of
from training.settings import config
from training.settings.errors import InputError

OLD_GPU = Hardware("cuda", "an old GPU", bfloat16=False, compiler=False)
CPU = Hardware("cpu", "a CPU", bfloat16=False, compiler=False)
NEW_CPU = dataclasses.replace(CPU, bfloat16=True)
LONG = PASSES_WORTH_COMPILING


def speed(options: str, device: Hardware, steps: int = LONG, processes: int = 1) -> tuple[str, bool, bool]:
    settings = config.parse(f"--data cifar10 --objective pgd_at {options}".split())
    found = speed_of(settings, device, steps, processes)
    return found.precision, found.compile, found.graph


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ("", GPU, ("bfloat16", True, True)),
        ("", OLD_GPU, ("float32", False, True)),
        ("", CPU, ("float32", False, False)),
        ("", NEW_CPU, ("bfloat16", False, False)),
        ("--precision float32 --compile off --graph off", GPU, ("float32", False, False)),
        ("--compile on", CPU, ("float32", True, False)),
        ("--objective standard", GPU, ("bfloat16", True, False)),
        ("--free-replays 2", GPU, ("bfloat16", True, False)),
    ],
)
def test_auto_takes_what_the_hardware_does_best(
    options: str, device: Hardware, expected: tuple[str, bool, bool]
) -> None:
    assert speed(options, device) == expected


def test_short_runs_are_not_compiled() -> None:
    assert speed("--steps 9", GPU, steps=LONG // 10 - 1)[1] is False
    assert speed("--steps 9", GPU, steps=LONG // 10)[1] is True


def test_an_attack_that_communicates_is_not_recorded() -> None:
    assert speed("", GPU, processes=8)[2] is False
    assert speed("--no-sync-batchnorm", GPU, processes=8)[2] is True
    assert speed("--attack-mode eval", GPU, processes=8)[2] is True
    settings = dataclasses.replace(config.parse(["--data", "cifar10", "--objective", "pgd_at"]), graph="on")
    with pytest.raises(InputError, match=r"graph: 'on' in 8 processes, whose attack in train mode synchronises"):
        speed_of(settings, GPU, LONG, 8)


@pytest.mark.parametrize("recipe", ["table1", "table2 --objective trades", "table3", "table3-cifar100", "table4-l2"])
def test_the_recipes_of_the_paper_record_their_attack_in_several_processes(recipe: str) -> None:
    settings = config.parse(f"--recipe {recipe} --originals-only".split())
    assert settings.sync_batchnorm is False, "as published"
    assert speed_of(settings, GPU, LONG, 8).graph is True


def test_the_figures_of_the_digits_do_not_depend_on_the_processor() -> None:
    for name in ("digits", "toy"):
        assert config.parse(["--data", name, "--objective", "pgd_at"]).precision == "float32"


def test_this_machine() -> None:
    here = hardware_of(torch.device("cpu"))
    assert (here.kind, here.compiler) == ("cpu", False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_this_gpu() -> None:
    assert hardware_of(torch.device("cuda")).kind == "cuda"
    hardware.prepare(torch.device("cuda"), "bfloat16", deterministic=False)
    assert torch.backends.cudnn.benchmark
    hardware.prepare(torch.device("cuda"), "bfloat16", deterministic=True)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("untouched_process")
def test_only_deterministic_operations_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    hardware.only_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    hardware.only_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Watching(nn.Module):
    """A network that keeps how cuDNN would have chosen its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.network = models.build("digits_cnn", (1, 8, 8), 10).eval()
        self.found: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.found.add(torch.backends.cudnn.benchmark)
        return self.network(x)


def test_convolutions_are_not_timed_for_batches_that_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    network, x, y = Watching(), torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
    threat_model = ThreatModel("linf", 0.1)
    attack = PGD(threat_model, steps=2)
    measures.robust(network, x, y, attack, torch.Generator())
    measures.fooled(network, x, y, attack, torch.Generator(), 2)
    adversary = AutoAttack(network, "Linf", 0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    measures.autoattack(adversary, x, y)
    measures.accuracy_curve(adversary, x, y, (0.1, 0.2))
    assert network.found == {False}
    assert torch.backends.cudnn.benchmark


class Deceived(nn.Module):
    """A copy of a classifier that a part of the samples fools although the original stands."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.network(x)
        return torch.where(x[:, :1] > 0.5, -logits, logits)


def test_what_fools_the_fast_network_alone_does_not_count() -> None:
    torch.manual_seed(0)
    network = nn.Linear(6, 3)
    x = torch.rand(200, 6)
    y = network(x).argmax(1)
    attack = PGD(ThreatModel("linf", 0.1), steps=5, random_start=False)

    def verdicts(search: nn.Module | None) -> Tensor:
        return measures.robust(network, x, y, attack, torch.Generator().manual_seed(0), search=search)

    deceived = Deceived(network)
    expected = verdicts(None)
    assert 0 < int(expected.sum()) < 200
    found = verdicts(deceived)
    assert deceived.calls
    assert torch.equal(found, expected), "each such sample was attacked again at full precision"
    fooled = ~measures.correct(deceived, x, y)
    assert int((fooled & expected).sum()) > 0, "there were such samples"


def test_a_run_in_bfloat16_learns_what_one_in_float32_learns(call: Any, tmp_path: Path) -> None:
    accuracies, logs = {}, {}
    options = "--objective pgd_at --model digits_cnn_bn --epochs 5 --steps 3 --validation-steps 1"
    options += " --eval-steps 5 --eval-restarts 1 --curve-points 0"
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        arguments = [*options.split(), "--precision", precision, "--autoattack", "none", "--threads", "1"]
        ending = call("run", *arguments, "--out", out)
        assert ending.status == 0, ending.err
        assert ending.out.splitlines()[1].startswith(f"{precision}; ")
        summary = json.loads((out / "summary.json").read_text())
        assert summary["speed"] == precision
        accuracies[precision] = (summary["clean_acc"], summary["pgd_acc"])
        logs[precision] = checkpoint.read_metrics(out / "metrics.jsonl")
    assert logs["float32"] != logs["bfloat16"]
    for wide, narrow in zip(*accuracies.values(), strict=True):
        assert narrow == pytest.approx(wide, abs=6), "of 500 test images, two networks of one recipe"
    weights = checkpoint.load(tmp_path / "bfloat16" / "checkpoint.pt")["network"]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


def test_each_epoch_says_how_it_went(call: Any, tmp_path: Path) -> None:
    options = "--objective trades --epochs 2 --limit 600 --batch-size 20 --steps 1 --averaging 0.9"
    quick = "--validation-steps 1 --eval-steps 1 --curve-points 0 --autoattack none --threads 1"
    ending = call("run", *options.split(), *quick.split(), "--out", tmp_path / "run")
    assert ending.status == 0, ending.err
    for entry in checkpoint.read_metrics(tmp_path / "run" / "metrics.jsonl"):
        for name in ("train_acc", "train_attacked_acc", "val_acc", "val_pgd_acc"):
            assert 0 <= entry[name] <= 100, name
        assert entry["train_attacked_acc"] > 0
        assert 0 <= entry["zero_gradient_share"] <= 1
        for name in ("gradient_norm", "weight_norm", "samples_per_second", "memory_gib", "lr", "seconds"):
            assert entry[name] > 0, name
    assert re.search(r"^\d+ samples/s, \d+\.\d GiB of memory, \d+ s to the last step", ending.out, re.M), ending.out


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (119, "2 min"), (5_400, "1 h 30 min"), (200_000, "2 d 7 h")])
def test_durations_can_be_read(seconds: float, text: str) -> None:
    assert engine.duration(seconds) == text
