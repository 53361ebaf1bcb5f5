"""How a program ends: 0 done, 2 bad arguments or input (one line on stderr), 1 anything else."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# Of an OSError that tells of the machine, never of a mistake in these programs.
OF_MACHINE = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
}


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


_terminals: list[int] = []  # which of standard output and standard error were one when the program began


def _interrupt(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)  # the shell may send another one
        for descriptor in _terminals:  # it is gone, and a progress bar must not end what is still to be saved
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    if _Deferral.active and _Deferral.waiting is None:
        _Deferral.waiting = name
        return
    raise Interrupted(name)


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], str | None]]:
    """A context in which the first SIGINT, SIGTERM or SIGHUP waits; the function that it yields names that signal.

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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    _terminals[:] = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    _prepare_streams()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        _check_values(given)
        with _flushed_at_exit():
            program(given)
    except InputError as error:
        _tell(f"error: {' '.join(str(error).split())}")
        return 2
    except (StopError, Interrupted) as error:
        _tell(f"stopped: {error}")
        return 1
    except Exception as error:
        if isinstance(error, OSError) and (told := _of_output(error)) is not None:
            message = f"standard output {told}"
        elif (told := out_of_memory(error)) is not None:
            message = f"out of memory ({told}); what was saved is kept; smaller batches need less"
        elif (told := lost_process(error)) is not None:
            message = f"another process has ended, its own message says why; what was saved is kept ({told})"
        elif isinstance(error, OSError) and error.filename is not None and error.errno in OF_MACHINE:
            message = f"{error.filename} cannot be used ({error.strerror})"
        else:
            raise
        _tell(f"stopped: {message}")
        return 1
    return 0


def _prepare_streams() -> None:
    """Whatever standard output and the others are, no program ends because of a line that it prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this program
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack a letter; that of stderr does this


def _check_values(arguments: Sequence[str]) -> None:
    """Refuse what is no value of any option.

    Raises:
        InputError: a value is empty, as of a variable that is not set (as a path it would be the current folder), or it
            could not be written into any file of settings, report or log.
    """
    option = "argument"
    for argument in arguments:
        if argument.startswith("--"):
            option = argument.partition("=")[0]
        if argument in ("", f"{option}="):
            raise InputError(f"{option}: the value is empty, allowed: one that is not, or to leave the option out")
        if argument.encode(errors="replace") != argument.encode(errors="surrogatepass"):
            raise InputError(
                f"{argument!a}: is not text in the encoding of this shell ({sys.getfilesystemencoding()}), allowed: "
                "names that are; for letters beyond ASCII set LC_ALL=C.UTF-8"
            )


@contextlib.contextmanager
def _flushed_at_exit() -> Iterator[None]:
    """What was printed is written here, also by ``--help``, which exits: Python fails later with lines of its own."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _of_output(error: OSError) -> str | None:
    """What is wrong with standard output, if that is where the error comes from."""
    if error.filename is not None:
        return None
    try:
        if not isinstance(error, BrokenPipeError):
            print(flush=True)
            return None  # it takes what is printed
    except OSError:
        pass
    with contextlib.suppress(OSError):  # a notebook's has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again as it flushes
    return "is closed" if isinstance(error, BrokenPipeError) else f"cannot be written ({error.strerror})"


def _tell(message: str) -> None:
    """One line on stderr, where that can be written: the status says the most important thing as well."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
