"""Several processes compute what one does; batch normalisation over processes; signals reach all of them.

Two tests have torchrun itself. The others start the processes as it does, without new imports.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from killing import Hit, without_times
from pairs import pair
from torch import nn

from training import data, measures, models, run
from training.data import official
from training.engine import checkpoint, distributed, loop
from training.settings import config
from training.settings.errors import InputError, run_program

SOAKING = "SCOREMATCH_SOAK" in os.environ
DICE = random.SystemRandom()  # of a soak

OPTIONS = (
    "--objective {objective} --model digits_cnn_bn --epochs 2 --limit 90 --batch-size 30 --steps 2 "
    "--validation-steps 2 --shift 1 --averaging 0.9 --optimizer sgd --lr 0.05 --eval-steps 1 --eval-restarts 1 "
    "--eval-losses ce --curve-points 2 --autoattack none --threads 1"
)


def torchrun(processes: int, *arguments: str) -> list[str]:
    rendezvous = ["--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, *arguments]


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


CASES = {
    "batch norm": ("pgd_at", ["--attack-mode", "train"]),
    "accumulate": ("pgd_at", ["--accumulate", "2"]),
    # Near x the gradient of TRADES is small, and rounding decides some of its signs, on some processors further away,
    # too. Hence a start far from x, and steps without signs.
    "trades": ("trades", ["--attack-start", "uniform", "--norm", "l2", "--eps", "1", "--step-size", "0.5"]),
    "cutmix": ("pgd_at", ["--cutmix", "0.7", "--attack-start", "uniform"]),
    "free": ("pgd_at", ["--free-replays", "2"]),
    "direct": ("score_direct", ["--posterior", "kernel_density", "--data-gradient", "noise"]),
    "awp": ("pgd_at", ["--awp", "0.01", "--awp-warmup", "1"]),
}
# killed below, and here not
LONGER = [*OPTIONS.format(objective="pgd_at").split(), "--epochs", "5", "--autoattack", "fast"]
LONGER += ["--autoattack-samples", "40"]


def options_of(case: str) -> list[str]:
    objective, more = CASES[case]
    return [*OPTIONS.format(objective=objective).split(), *more]


class Runs(NamedTuple):
    folder: Path
    output: str


@pytest.fixture(scope="module")
def by_two(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of each case by two processes, and a longer one."""
    folder = tmp_path_factory.mktemp("by_two")
    runs = {**{case: options_of(case) for case in CASES}, "longer": LONGER}
    log = folder / "log.txt"
    started = pair(processes, log, [[*options, "--out", str(folder / name)] for name, options in runs.items()])
    assert started.statuses() == [0, 0], log.read_text()
    return Runs(folder, log.read_text())


def test_one_process_speaks(by_two: Runs) -> None:
    assert by_two.output.count("everything is in") == len(CASES) + 1
    assert by_two.output.count("evaluate: 100%") == len(CASES) + 1


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, by_two: Runs, tmp_path: Path) -> None:
    one, two = tmp_path / "one", by_two.folder / case
    assert run_program(run.main, [*options_of(case), "--out", str(one)]) == 0
    expected, actual = (checkpoint.load(out / "checkpoint.pt") for out in (one, two))
    for part in ("model", "average"):
        for name, value in expected["training"][part].items():
            torch.testing.assert_close(actual["training"][part][name], value, rtol=0, atol=1e-5, msg=name)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["clean_acc"] == pytest.approx(summaries[1]["clean_acc"], abs=0.5)
    for first, second in zip(*(checkpoint.read_metrics(out / "metrics.jsonl") for out in (one, two)), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
        assert first.keys() == second.keys()
        for name in {"zero_gradient_share", "train_attacked_acc", "gradient_norm"} & first.keys():
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-3), name
    if case == "free":
        held = [saved["training"]["free"]["perturbation"] for saved in (expected, actual)]
        torch.testing.assert_close(*held, rtol=0, atol=1e-5)
    # and one process goes on where two stopped, or says that there is nothing to do
    assert run_program(run.main, ["--resume", str(two)]) == 0


def tell_measured_buffers() -> None:
    """From now on this process says of each network that it attacks which buffers that has."""
    original = measures.robust

    def robust(model: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        digest = hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in model.buffers())).hexdigest()
        os.write(1, f"rank {os.environ['RANK']}: {digest}\n".encode())  # at once: another process writes, too
        return original(model, *arguments, **options)

    measures.robust = robust


def test_all_processes_evaluate_the_same_running_statistics(
    processes: ForkServerContext, log: Path, tmp_path: Path
) -> None:
    """Each has statistics of its own in training. Two validations and two radii, with and without an average."""
    options = [*OPTIONS.format(objective="pgd_at").split(), "--no-sync-batchnorm", "--selection", "last"]
    runs = [[*options, "--averaging", decay, "--out", str(tmp_path / decay)] for decay in ("0", "0.9")]
    assert pair(processes, log, runs, prepare=tell_measured_buffers).statuses() == [0, 0], log.read_text()
    told = [re.findall(f"rank {rank}: (\\w+)", log.read_text()) for rank in range(2)]
    assert [len(digests) for digests in told] == [8, 8]
    assert len(set(told[0])) == 4, "one network for each validation, the last one is also evaluated"
    assert told[0] == told[1]


def download_from(source: Path | None, lists: dict[str, Any]) -> None:
    """From now on this process downloads CIFAR-10 out of a folder, or in vain, and says so."""

    def download(self: Any) -> None:
        if self._check_integrity():
            return
        os.write(1, f"download by {os.environ['RANK']}\n".encode())
        if source is None:
            raise RuntimeError("no network")
        time.sleep(1)  # as long as the others would need to begin as well
        shutil.copytree(source, self.root)

    official.CIFAR["cifar10"] = type("CIFAR10", (official.CIFAR["cifar10"],), {**lists, "download": download})


@pytest.mark.parametrize("reached", [True, False])
def test_the_first_process_downloads(
    reached: bool, synthetic: Any, processes: ForkServerContext, log: Path, tmp_path: Path
) -> None:
    source = synthetic("cifar10")
    lists = {name: getattr(official.CIFAR["cifar10"], name) for name in ("train_list", "test_list", "meta")}
    options = "--objective standard --data cifar10 --download --autoattack fast --autoattack-samples 1000 --threads 1"
    options += f" --data-root {tmp_path / 'downloaded'} --out {tmp_path / 'run'}"
    prepare = functools.partial(download_from, source if reached else None, lists)
    assert pair(processes, log, [options.split()], prepare=prepare).statuses() == [2, 2], log.read_text()
    assert re.findall(r"download by (\d)", log.read_text()) == ["0"]
    # All have read the files, or all say why not.
    told = "autoattack_samples: 1000 is out of range" if reached else "holds no intact cifar10, expected"
    assert log.read_text().count(told) == 2
    assert "Traceback" not in log.read_text()


def long_run(limit: int, out: Path) -> list[str]:
    options = [*OPTIONS.format(objective="pgd_at").split(), "--epochs", "400", "--validate-every", "400"]
    return [*options, "--batch-size", "10", "--limit", str(limit), "--out", str(out)]


def wait_for_an_epoch(out: Path) -> None:
    deadline = time.monotonic() + 600  # of a run that hangs
    while len(checkpoint.read_metrics(out / "metrics.jsonl")) < 1:
        assert time.monotonic() < deadline, f"no epoch has ended in {out}"
        time.sleep(0.05)


def all_stopped(out: Path, said: str, *steps: int) -> None:
    assert "continue with" in said
    saved = checkpoint.load(out / "checkpoint.pt")
    assert saved["training"]["step"] in (0, *steps)
    assert saved["epoch"] < 400


def test_a_signal_stops_all_processes_after_the_same_twentieth_step(tmp_path: Path) -> None:
    """Of an epoch of thirty steps."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        torchrun(2, "-m", "training.run", *long_run(300, out)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_an_epoch(out)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    all_stopped(out, errors, 20, 30)


def test_a_signal_stops_all_processes_after_the_same_short_epoch(
    processes: ForkServerContext, log: Path, tmp_path: Path
) -> None:
    """Of five steps."""
    out = tmp_path / "run"
    started = pair(processes, log, [long_run(50, out)])
    wait_for_an_epoch(out)
    for process in started.processes:
        process.terminate()
    assert started.statuses() == [1, 1], log.read_text()
    all_stopped(out, log.read_text(), 5)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(10 if SOAKING else 1))
def test_torchrun_restarts_a_run_where_it_was(number: int, by_two: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # The second process is killed before its eighth step, in the third epoch, then the first one within AutoAttack.
    hits = [(1, Hit("step", 8)), (0, Hit("pass", 5))]
    if SOAKING:
        points = [
            DICE.choice([("step", 15), ("validation", 5), ("pass", 50), ("log", 5), ("save", 5)]) for _ in range(5)
        ]
        hits = [(DICE.randrange(2), Hit(point, DICE.randint(1, most))) for point, most in points]
    killed = [str(Path(__file__).with_name("killing.py")), json.dumps(hits), *LONGER, "--out", str(out)]
    command = torchrun(2, *killed)
    command[3:3] = ["--max-restarts", str(len(hits)), "--monitor-interval", "0.1"]
    ended = finished(command)
    assert ended.returncode == 0, f"{hits}\n{ended.stderr}"
    if not SOAKING:
        assert ended.stdout.count("pgd_at (kl) on digits") == 3, "it was killed twice, and started again"
        assert "another process has ended, its own message says why; what was saved is kept" in ended.stderr
    expected, actual = (checkpoint.load(folder / "checkpoint.pt") for folder in (by_two.folder / "longer", out))
    for name, value in expected["training"]["model"].items():
        assert torch.equal(actual["training"]["model"][name], value), (hits, name)
    assert [entry["epoch"] for entry in checkpoint.read_metrics(out / "metrics.jsonl")] == list(range(1, 6))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (by_two.folder / "longer", out)]
    for summary in summaries:
        del summary["commit"]  # somebody may commit while this goes on
    assert without_times(summaries[0]) == without_times(summaries[1]), hits


def test_a_batch_too_small_for_the_processes_is_refused(
    processes: ForkServerContext, log: Path, tmp_path: Path
) -> None:
    arguments = OPTIONS.format(objective="pgd_at").replace("--limit 90", "--limit 91")
    started = pair(processes, log, [[*arguments.split(), "--out", str(tmp_path / "run")]])
    assert started.statuses() == [2, 2], log.read_text()
    assert "batch_size: 30 of 91 samples leaves a batch of 1 for 2 processes" in log.read_text()


def _batchnorm_of_a_share(rank: int, world: int, folder: Path, x: torch.Tensor, layer: nn.Module) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = x[rank::world].clone().requires_grad_()
    network = distributed.synchronise_batchnorm(nn.Sequential(layer))
    y = network(mine)
    (y**3).sum().backward()
    weight, bias = (distributed.summed(p.grad) for p in network.parameters())
    torch.save([y.detach(), mine.grad, weight, bias, *network.buffers()], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4, 2)])
def test_batchnorm_over_processes(shape: tuple[int, ...], processes: ForkServerContext, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) + 2
    layer = (nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)).double()
    nn.init.normal_(layer.weight)
    arguments = (2, tmp_path, x, layer)
    torch.multiprocessing.start_processes(_batchnorm_of_a_share, arguments, nprocs=2, start_method="forkserver")

    whole = x.clone().requires_grad_()
    y = layer(whole)
    (y**3).sum().backward()
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        expected = [y.detach()[rank::2], whole.grad[rank::2], layer.weight.grad, layer.bias.grad, *layer.buffers()]
        for given, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(given, wanted, rtol=0, atol=1e-10)


def test_every_batchnorm_is_synchronised() -> None:
    """One without parameters, inside of a module that has none, too."""
    bare = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.ReLU())
    network = distributed.synchronise_batchnorm(nn.Sequential(nn.Linear(3, 3), bare, nn.BatchNorm1d(3)))
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [distributed.SyncBatchNorm] * 2


class Activated(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_batch_norm_that_does_more_is_not_replaced() -> None:
    with pytest.raises(InputError, match=r"sync_batchnorm: 1 is a Activated, .* allowed: --no-sync-batchnorm"):
        distributed.synchronise_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), Activated(2)))


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of two that have the same samples."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda values: values.mul_(2))


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}, {"affine": False}]
)
def test_batchnorm_is_that_of_all_samples(options: dict[str, Any], twins: None) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(3, eps=0.1, **options).double()
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    shared = distributed._with_our_batchnorm(copy.deepcopy(plain))
    assert isinstance(shared, distributed.SyncBatchNorm)
    for _ in range(3):
        x = torch.randn(7, 3, dtype=torch.float64) + 2
        torch.testing.assert_close(shared(x), plain(torch.cat([x, x]))[:7])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value)
    torch.testing.assert_close(shared.eval()(x), plain.eval()(x))
    assert not distributed._with_our_batchnorm(plain).training, "it is in the mode that it was in"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batchnorm_of_short_numbers_adds_in_float32(dtype: torch.dtype, twins: None) -> None:
    x = (100 + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = distributed.SyncBatchNorm(3)(x)
    assert y.dtype == dtype
    assert torch.equal(y, distributed.SyncBatchNorm(3)(x.float()).to(dtype))


def test_batchnorm_of_what_has_no_channels(twins: None) -> None:
    with pytest.raises(ValueError, match=r"x must be \[N, C, …\], got \[3\]"):
        distributed.SyncBatchNorm(3)(torch.zeros(3))


def test_buffers_of_one_process_are_its_own() -> None:
    norm = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    distributed.share_buffers(norm)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())


def test_a_validation_sends_what_is_on_the_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL sends nothing else. Here the device is meta, and the average has a count on the CPU."""
    make, sent = loop.generator, []
    monkeypatch.setattr(loop, "generator", lambda seed, purpose, device="cpu": make(seed, purpose))
    settings = config.parse(
        ["--objective", "standard", "--model", "digits_cnn_bn", "--averaging", "0.9", "--limit", "60", "--threads", "1"]
    )
    loaded = data.load(settings.data_settings).to(torch.device("meta"))
    loaded = dataclasses.replace(loaded, x_validation=loaded.x_validation[:0], y_validation=loaded.y_validation[:0])
    model = models.build(settings.model, loaded.input_shape, loaded.num_classes).to("meta")
    trainer = loop.Trainer(settings, loaded, model, None, tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.distributed, "broadcast", lambda values, src: sent.append(values.device.type))
    trainer.validate()
    assert trainer.average is not None
    assert len(sent) == 2 * len(list(model.buffers())) > 0
    assert set(sent) == {"meta"}


def test_rows_of_all_processes_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(14).view(7, 2)
    assert distributed.interleaved(whole) is whole, "there is one process"
    monkeypatch.setattr(distributed, "world_size", lambda: 3)

    def gather(parts: list[Any], mine: torch.Tensor) -> None:
        assert torch.equal(mine, whole[1::3])
        parts[:] = [whole[number::3] for number in range(3)]

    monkeypatch.setattr(distributed.distributed, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert torch.equal(distributed.interleaved(whole[distributed.own_samples(7)]), whole)


def test_what_layers_draw_depends_on_seed_step_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for rank, seed, step in itertools.product(range(2), range(2), range(2)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found = []
        for _ in range(2):
            distributed.seed_step(seed, step)
            found.append(torch.rand(()).item())
        assert found[0] == found[1]
        drawn[rank, seed, step] = found[0]
    assert len(set(drawn.values())) == 8


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.device_of_this_process(cuda) == cuda, "alone"
    given = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert distributed.device_of_this_process(cuda) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device_of_this_process(cuda) == torch.device("cuda", 1)
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        assert distributed.device_of_this_process(device) == device
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine finds 2 CUDA devices, allowed: at most as many"):
        distributed.device_of_this_process(cuda)


def test_how_often_torchrun_has_started_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert distributed.restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert distributed.restarts() == 2


@pytest.mark.parametrize(("rank", "local", "turn"), [(0, "0", 0), (2, "0", 1), (1, "1", 2), (3, "1", 2)])
def test_turns_on_two_machines(rank: int, local: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """First one process of all, then the first of the other machine, then those that find what is there."""
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    told_by_others: list[str | None] = [None] * 4
    gathered: list[str | None] = []

    def gather(told: list[str | None], mine: str | None) -> None:
        gathered.append(mine)
        told[:] = [mine if number == rank else other for number, other in enumerate(told_by_others)]

    monkeypatch.setattr(distributed.distributed, "all_gather_object", gather)
    called: list[int] = []

    def found() -> int:
        called.append(len(gathered))
        return 10 + rank

    def refused() -> int:
        raise InputError("no network")

    assert distributed.in_turns(found) == 10 + rank
    assert (called, gathered) == ([turn], [None] * 3)
    gathered.clear()
    with pytest.raises(InputError, match="no network"):
        distributed.in_turns(refused)
    assert gathered == [None] * turn + ["no network"]
    told_by_others[(rank + 1) % 4] = "another has none"
    with pytest.raises(InputError, match="another has none"):
        distributed.in_turns(found)
