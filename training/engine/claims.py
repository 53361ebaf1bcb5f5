"""One program for each folder: a second one that wants to write into it is refused, or waits.

Names of files in it are taken as well, whether or not they are written already.
"""

import contextlib
import fcntl
import fnmatch
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from training.settings.errors import InputError

MARK = "config.toml"  # of a folder of training.run or training.score, which write it first
OF_RUN = (
    *(MARK, "metrics.jsonl", "checkpoint.pt", "best.pt", "epoch-*.pt", "posterior.pt", "autoattack.pt*"),
    *("curve.json", "paths.json", "fooled.npz", "toy.json", "summary.json", "report.html"),
)
OF_SCORE = (
    *("posterior.pt", "score.json", "samples.npz", "samples.png", "scores.png"),
    *("audit.json", "audit.html", "chosen.toml"),
)
OF_BOTH = ("tensorboard", "score-network", "classifier", "fold-*")  # folders
OF_RUNS_FOLDER = (*OF_RUN, *OF_BOTH)
OF_SCORES_FOLDER = (MARK, *OF_SCORE, *OF_BOTH)
TAKEN = (*OF_RUNS_FOLDER, *OF_SCORE)


def refuse_left_over(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder without a config.toml that holds files of these names, which an earlier program has left.

    Raises:
        InputError: as said.
    """
    if left := sorted(found.name for name in names for found in folder.glob(name)):
        raise InputError(f"out: {folder} holds {', '.join(left)} without a {MARK}, allowed: another folder")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """``folder`` belongs to this program until the block ends, or until the process ends, even if it is killed.

    The folder itself is locked, so that no file is left behind. A file system without locks gives a warning.

    Raises:
        InputError: another program has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"out: {folder} cannot be made ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"out: another program is writing into {folder}, wait until it has ended or give another folder"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): start no second program in it", RuntimeWarning, stacklevel=2
        )
    try:
        yield
    finally:
        os.close(handle)


def is_claimed(folder: Path) -> bool:
    """Whether another program is writing into it at this moment."""
    if not folder.is_dir():
        return False
    try:
        with claimed(folder):
            return False
    except InputError:
        return True


def taken(path: Path) -> bool:
    """Whether a file of this name belongs to a training in whose folder it lies, or is going to be written by it."""
    path = path.parent.resolve() / path.name
    inner = path
    for folder in path.parents:
        if any(fnmatch.fnmatchcase(inner.name, name) for name in TAKEN) and _is_of_training(folder):
            return True
        inner = folder
    return False


def _is_of_training(folder: Path) -> bool:
    """Whether its config.toml is that of training.run or training.score: other programs have such files, too."""
    try:
        return "posterior_settings" in (folder / MARK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
