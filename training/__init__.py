"""The programs of scorematch, such as ``python -m training.run``; docs/reference/programs.md lists them all."""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped: SIGINT, before anything was begun\n")
    os._exit(1)  # from wherever an import is


if sys.argv[:1] == ["-m"]:  # python -m training.PROGRAM: its imports take seconds, then it has handlers of its own
    signal.signal(signal.SIGINT, _leave)
