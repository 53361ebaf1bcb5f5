"""How a program ends: 0 done, 2 bad arguments or input (one line on stderr), 1 anything else."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


class InputError(Exception):
    """Arguments or input that cannot be used. The message is one line: what was given, and what is allowed."""


class StopError(Exception):
    """A run that had to stop, such as a loss that is not finite; the message says what remains and what to do."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not an ``Exception``, so that no handler between here and the program swallows it."""


def unknown_name(what: str, given: object, allowed: Sequence[object]) -> InputError:
    return InputError(f"{what}: {given!r} is unknown, allowed: {', '.join(str(name) for name in allowed)}")


class _Deferral:
    """Whether a signal waits for a good moment, and the one that does."""

    active = False
    waiting: str | None = None


def _interrupt(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _Deferral.active and _Deferral.waiting is None:
        _Deferral.waiting = name
        return
    raise Interrupted(name)


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], str | None]]:
    """A context in which the first SIGINT or SIGTERM waits; the function that it yields names that signal.

    A second signal interrupts at once.

    Raises:
        Interrupted: at the end of the block, if a signal came.
    """
    _Deferral.active, _Deferral.waiting = True, None
    try:
        yield lambda: _Deferral.waiting
    finally:
        _Deferral.active = False
    if _Deferral.waiting is not None:
        raise Interrupted(_Deferral.waiting)


def out_of_memory(error: BaseException) -> str | None:
    """What the allocator says, if ``error`` means that the CPU or a GPU is out of memory; None for other errors."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if not (isinstance(error, MemoryError) or of_torch):
        return None
    text = str(error).partition("\n")[0]
    return text[text.find("DefaultCPUAllocator") :] if "DefaultCPUAllocator" in text else text or "MemoryError"


def lost_process(error: BaseException) -> str | None:
    """What the backend of ``torch.distributed`` says, if ``error`` means that it no longer reaches another process."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" not in kinds and not (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return None
    return str(error).partition("\n")[0]


def run_program(program: Callable[[list[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Run ``program`` on the command line's arguments and return its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        program(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again as it flushes
        print("stopped: standard output is closed", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (StopError, Interrupted) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (told := out_of_memory(error)) is not None:
            message = f"out of memory ({told}); what was saved is kept; smaller batches need less"
        elif (told := lost_process(error)) is not None:
            message = f"another process has ended, its own message says why; what was saved is kept ({told})"
        else:
            raise
        print(f"stopped: {message}", file=sys.stderr)
        return 1
    return 0
