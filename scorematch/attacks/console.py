"""What an evaluation says: lines on stdout and in a log file, warnings, a progress bar."""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path

from tqdm import tqdm

from .inspection import AutoAttackWarning

PACKAGE = __name__.split(".", maxsplit=1)[0]


class Logger:
    """Lines on stdout, which a progress bar leaves whole, and in a file.

    Args:
        log_path: file to which lines are appended; None is none.
    """

    def __init__(self, log_path: str | Path | None) -> None:
        self.log_path = log_path

    def log(self, text: str, *, printed: bool = True) -> None:
        """Print a line, unless it is for the file alone, and append it to the file."""
        if printed:
            tqdm.write(text, file=sys.stdout)
        if self.log_path is not None:
            with open(self.log_path, "a") as file:
                file.write(text + "\n")


class Console:
    """What one process prints, logs and warns of.

    Args:
        verbose: print lines, and a progress bar where stderr is a terminal.
        logger: takes the lines.
        speaks: whether this process prints and logs; warnings are raised in every process.

    Attributes:
        warnings: the texts of the warnings so far.
    """

    def __init__(self, verbose: bool, logger: Logger, speaks: bool) -> None:
        self.warnings: list[str] = []
        self._speaks = speaks
        self._verbose = verbose and speaks
        self._logger = logger
        self._progress: tqdm | None = None
        self._lock = threading.Lock()  # a bar counts the passes of all threads

    def say(self, text: str) -> None:
        if self._speaks:
            self._logger.log(text, printed=self._verbose)

    def warn(self, text: str | None) -> None:
        """Warn of a doubt, if there is a new one, in the name of the line that called the package."""
        if text is None or text in self.warnings:
            return
        self.warnings.append(text)
        self.say(f"warning: {text}")
        warnings.warn(text, AutoAttackWarning, stacklevel=frames_of_the_package() + 1)

    def start_progress(self, passes: int) -> None:
        """Show how many of so many passes of one sample are done."""
        seen = getattr(sys.stderr, "isatty", bool)()  # a program without a console has no stderr
        self._progress = tqdm(
            total=passes,
            unit="pass",
            unit_scale=True,
            smoothing=0.05,
            disable=not (self._verbose and seen),
        )

    def advance(self, passes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress.update(passes)

    def expect(self, passes_left: int, text: str) -> None:
        """So many passes are left; ``text`` stands before the bar."""
        if self._progress is not None:
            with self._lock:
                self._progress.total = self._progress.n + passes_left
                self._progress.set_description(text, refresh=False)

    def end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()


def frames_of_the_package() -> int:
    """How many frames lie between the caller and the line outside that called the package, itself included."""
    frame, depth, outermost = sys._getframe(1), 1, 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".", maxsplit=1)[0] == PACKAGE:
            outermost = depth
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return outermost
