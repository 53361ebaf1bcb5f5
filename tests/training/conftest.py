"""What the tests of the programs share: calls in this process, and settings that make a run take a second."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from training import compare, evaluate, run
from training.errors import run_program

PROGRAMS = {"run": run.main, "evaluate": evaluate.main, "compare": compare.main}
TINY = (
    "--epochs 2 --limit 100 --batch-size 50 --steps 2 --validation-steps 1 --eval-steps 2 --eval-restarts 1 "
    "--curve-points 2 --autoattack none --threads 1"
)


class Ending(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Ending]


@pytest.fixture(autouse=True)
def untouched_process() -> Iterator[None]:
    """The programs set signal handlers, threads and determinism for their whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """``call("run", "--objective", ...)`` runs a program in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCOREMATCH_DATA", raising=False)  # no test here trains on the real images

    def ending(program: str, *arguments: object) -> Ending:
        capfd.readouterr()
        status = run_program(PROGRAMS[program], [str(argument) for argument in arguments])
        return Ending(status, *capfd.readouterr())

    return ending


@pytest.fixture
def tiny() -> list[str]:
    return TINY.split()


@pytest.fixture
def small_posterior() -> list[str]:
    """Options that train a posterior's network hardly at all."""
    return ["--posterior-settings.steps", "20", "--posterior-settings.width", "16"]
