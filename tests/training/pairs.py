"""Two processes as torchrun starts them, without its new interpreters that import everything again."""

import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from killing import PROGRAMS, status, writing_into
from torch.distributed import TCPStore

from training.settings.errors import run_program


def _in_turn(
    rank: int, port: int, log: Path, runs: list[list[str]], name: str, prepare: Callable[[], None] | None
) -> None:
    writing_into(log)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if prepare is not None:
        prepare()
    worst = 0
    for number, options in enumerate(runs):
        # The processes meet under this number, and those of the run before have left their addresses under its own.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        worst = max(worst, run_program(PROGRAMS[name].main, options))
    sys.exit(worst)


class Pair(NamedTuple):
    processes: list[ForkServerProcess]
    store: TCPStore  # where they meet

    def statuses(self) -> list[int | None]:
        return [status(process) for process in self.processes]


def pair(
    context: ForkServerContext,
    log: Path,
    runs: list[list[str]],
    name: str = "run",
    prepare: Callable[[], None] | None = None,
) -> Pair:
    """Start ``training.NAME`` with each of these options, one call after the other; the worst status counts.

    ``prepare``, a function of a module, is called first in each process.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = [context.Process(target=_in_turn, args=(rank, store.port, log, runs, name, prepare)) for rank in range(2)]
    for process in found:
        process.start()
    return Pair(found, store)
