"""One program for each folder: a second one that wants to write into it is refused, or waits."""

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from training.settings.errors import InputError


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
