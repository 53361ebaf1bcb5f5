"""Programs that a signal hits at a chosen point of their work: the same point on a slow machine and on a fast one."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

import torch
from matplotlib.figure import Figure

from scorematch.attacks.classifier import Classifier
from training import compare, evaluate, generate, run, score
from training.engine import Engine, checkpoint
from training.engine.loop import Trainer
from training.engine.scores import ScoreTrainer
from training.reports import plots
from training.settings.errors import run_program

Start = Callable[..., ForkServerProcess]  # the fixture ``start``


FULL_DISK, NO_MEMORY = -1, -2  # in the place of a signal: no file gets beyond 32 kB any more; an allocation fails


class Hit(NamedTuple):
    """``number`` reaches the process just before the call ``count``, from 1, of a point of :data:`POINTS`."""

    point: str
    count: int
    number: int = signal.SIGKILL


POINTS: dict[str, tuple[Any, str]] = {
    "step": (Trainer, "_step"),
    "validation": (Trainer, "validate"),
    "score step": (ScoreTrainer, "_step"),
    "score validation": (ScoreTrainer, "validate"),
    "log": (checkpoint.MetricsLog, "append"),
    "save": (Engine, "save"),
    "replace": (os, "replace"),  # a file is written in full and not yet in its place; in a thread of its own
    "pass": (Classifier, "_logits"),  # of the network, in AutoAttack
    "batch": (generate.Generator, "images"),
    "start of a run": (compare, "_start"),
}
PROGRAMS = {"compare": compare, "evaluate": evaluate, "generate": generate, "run": run, "score": score}


def arm(hit: Hit) -> None:
    """From now on ``hit`` happens in this process."""
    owner, name = POINTS[hit.point]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == hit.count and hit.number == FULL_DISK:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))
        elif calls == hit.count and hit.number == NO_MEMORY:
            torch.empty(2**50)
        elif calls == hit.count:
            os.kill(os.getpid(), hit.number)
            if hit.number == signal.SIGKILL:
                time.sleep(60)  # the signal may take a moment, and nothing must happen until then
        return original(*arguments, **options)

    setattr(owner, name, counted)


def leave_pictures_undrawn(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Reports have a place for each picture, and not the picture, which takes longer to draw than a tiny run trains."""

    def undrawn(figure: Figure, alt: str) -> str:
        plots.plt.close(figure)
        return f'<div class="wide"><img src="data:," alt="{alt}"></div>'

    replace(plots, "as_image", undrawn)


def writing_into(log: Path) -> None:
    """From now on this process does."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def program(arguments: list[str], log: Path, hit: Hit | None, name: str = "run") -> None:
    """``training.NAME`` in this process, which writes into ``log``."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    writing_into(log)
    leave_pictures_undrawn()
    compare.subprocess = FROM_FORK_SERVER
    if hit is not None:
        arm(hit)
    sys.exit(run_program(PROGRAMS[name].main, arguments))


def _run(arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    program(arguments, log, None)


class Started:
    """A run of ``training.compare``, as a process that need not import torch again."""

    def __init__(self, command: list[str], *, stdout: TextIO, env: Mapping[str, str], **others: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "training.run"]
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_run, args=(command[3:], Path(stdout.name).absolute(), env))
        self.process.start()
        self.terminate = self.process.terminate

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        return status(self.process)


# In the place of the module ``subprocess`` in training.compare.
FROM_FORK_SERVER: Any = SimpleNamespace(Popen=Started, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)


def without_times(value: Any) -> Any:
    """What a program has written, without what a second run of it never repeats."""
    if isinstance(value, dict):
        measured = ("seconds", "samples_per_second", "memory_gib")
        return {key: without_times(inner) for key, inner in value.items() if not key.endswith(measured)}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def status(process: ForkServerProcess) -> int | None:
    process.join()
    return process.exitcode


if __name__ == "__main__":  # under torchrun: killing.py HITS, then the options of training.run
    hits = json.loads(sys.argv[1])  # a process and its Hit for each start by torchrun; none is hit after the last
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restart < len(hits) and hits[restart][0] == int(os.environ["RANK"]):
        arm(Hit(*hits[restart][1]))
    sys.exit(run_program(run.main, sys.argv[2:]))
