"""Runs killed without warning, at random moments, and resumed until they end."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint, run
from training.errors import run_program

OPTIONS = (
    "--objective pgd_at --model digits_cnn_bn --epochs 30 --limit 60 --batch-size 10 --steps 3 --validation-steps 1 "
    "--shift 1 --averaging 0.5 --eval-steps 1 --eval-restarts 1 --curve-points 0 --autoattack none --threads 1"
)


def _program(arguments: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run_program(run.main, arguments))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Fresh processes that need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.run"])
    return context


def progress(out: Path) -> int:
    """Complete epochs of a run, or -1 before it has begun."""
    return len(checkpoint.read_metrics(out / "metrics.jsonl")) if (out / "config.toml").exists() else -1


def wait_until(reached: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)


def final(out: Path) -> tuple[dict, list[dict], dict]:
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["training"]["model"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    return weights, without_times(lines), without_times(summary)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        measured = ("seconds", "samples_per_second", "memory_gib")
        return {key: without_times(inner) for key, inner in value.items() if not key.endswith(measured)}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def test_killed_runs_end_with_the_same_bits(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    def start(arguments: list[str]) -> multiprocessing.context.ForkServerProcess:
        process = processes.Process(target=_program, args=(arguments, tmp_path / "log.txt"))
        process.start()
        return process

    whole, out = tmp_path / "whole", tmp_path / "parts"
    process = start([*OPTIONS.split(), "--out", str(whole)])
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()

    # By SIGKILL, after which a run goes on from its last checkpoint, or SIGTERM, upon which it writes one.
    draw = random.Random(0)
    kills, within_an_epoch = 0, 0
    while kills < 20:
        begun = (out / "config.toml").exists()
        process = start(["--resume", str(out)] if begun else [*OPTIONS.split(), "--out", str(out)])
        before = progress(out)
        wait_until(lambda before=before, process=process: progress(out) > before or not process.is_alive())
        time.sleep(draw.uniform(0.0, 0.4))
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        (process.kill if number == signal.SIGKILL else process.terminate)()
        process.join()
        if process.exitcode == 0:  # it came through: once more from the start
            shutil.rmtree(out)
            continue
        kills += 1
        assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
        within_an_epoch += torch.load(out / "checkpoint.pt", weights_only=True)["training"]["step"] > 0
    process = start(["--resume", str(out)])
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    assert within_an_epoch >= 5

    weights, lines, summary = final(whole)
    weights_of_parts, lines_of_parts, summary_of_parts = final(out)
    assert all(torch.equal(value, weights_of_parts[name]) for name, value in weights.items())
    assert lines == lines_of_parts
    assert summary == summary_of_parts


def test_autoattack_goes_on_inside_itself(tmp_path: Path, processes: multiprocessing.context.ForkServerContext) -> None:
    log = tmp_path / "log.txt"
    options = [
        *OPTIONS.split(),
        "--autoattack",
        "standard",
        "--autoattack-samples",
        "100",
        "--eps",
        "0.03",
        "--epochs",
        "3",
    ]

    def start(arguments: list[str]) -> multiprocessing.context.ForkServerProcess:
        process = processes.Process(target=_program, args=(arguments, log))
        process.start()
        return process

    whole, out = tmp_path / "whole", tmp_path / "parts"
    process = start([*options, "--out", str(whole)])
    process.join()
    assert process.exitcode == 0, log.read_text()

    state = out / run.STATE
    process = start([*options, "--out", str(out)])
    wait_until(lambda: log.read_text().count("robust accuracy after apgd-ce") == 2)
    time.sleep(0.1)
    process.terminate()
    process.join()
    assert process.exitcode == 1
    assert log.read_text().splitlines()[-1].endswith(f"python -m training.run --resume {out}")
    finished = torch.load(state, weights_only=True)["finished"]
    assert finished.max() > 0
    assert log.read_text().count("robust accuracy after square") == 1, "the signal came after AutoAttack"
    process = start(["--resume", str(out)])
    wait_until(lambda: f"resumed from {state}" in log.read_text())
    process.kill()  # leaves the state that the signal before it saved
    process.join()
    process = start(["--resume", str(out)])
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert log.read_text().count(f"resumed from {state}") == 2
    assert not state.exists()
    assert final(out)[2] == final(whole)[2]


def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    log, out = tmp_path / "log.txt", tmp_path / "run"
    process = processes.Process(target=_program, args=([*OPTIONS.split(), "--epochs", "500", "--out", str(out)], log))
    process.start()
    wait_until(lambda: progress(out) >= 2)
    process.terminate()
    process.join()
    assert process.exitcode == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped: SIGTERM")
    assert last.endswith(f"python -m training.run --resume {out}")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] >= 1
