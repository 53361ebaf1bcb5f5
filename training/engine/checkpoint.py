"""Files that survive an interruption at any moment: written beside their place, flushed, then renamed."""

import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from training.settings.errors import InputError, StopError

FORMAT = "scorematch-run-1"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of ``path`` when the block ends: a reader sees the old file or the new one."""
    if is_special(path):
        raise StopError(f"{path} cannot be written (it is a device or a pipe, whose place a file would take)")
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the file that was there is untouched" if path.exists() else ""
        raise StopError(f"{path} cannot be written ({error.strerror}){kept}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_special(path: Path) -> bool:
    """Whether this is a device, a pipe or a name of an open file, such as /dev/null, /dev/stdout and /dev/fd/3."""
    folder = path.parent.resolve()
    return folder == Path("/dev") or folder.is_relative_to("/proc") or (path.exists() and not path.is_file())


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, never a part."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, as_json(value, indent=2) + "\n")


def make_folder(path: Path, option: str) -> None:
    """Make a folder that an option asks for, if it is not there yet.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be made ({error.strerror})") from None


def check_writable(path: Path) -> None:
    """Find out before the work whether a file can be written after it; makes its folder.

    Raises:
        InputError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: its folder cannot be made ({error.strerror})") from None
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if is_special(path):
        raise InputError(f"{path}: is a device or a pipe, expected a file to write")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: its folder cannot be written")


def as_json(value: object, indent: int | None = None) -> str:
    """``value`` as JSON, which has no word for numbers that are not finite: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path: Path, *, epoch: int, settings: dict[str, Any], network: dict[str, Tensor], **rest: Any) -> None:
    """Save a run's state. ``network`` is the state dict to evaluate (of averaged weights where there are such)."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "epoch": epoch, "settings": settings, "network": network, **rest}, buffer)
    write_atomically(path, buffer.getvalue())


class Writer:
    """Saves in a thread of its own, one file after the other, so that training need not wait for the disk.

    The state that is handed over is copied first, without waiting for a GPU, so later steps do not change what is
    written. At most one file waits: a call that hands over another one waits until that file is written.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def save(self, path: Path, **state: Any) -> None:
        """:func:`save`, later."""
        copied, ready = copied_to_host(state)

        def write() -> None:
            ready()
            save(path, **copied)

        self._hand_over(write)

    def keep_copy(self, path: Path, epoch: int, count: int) -> None:
        """:func:`keep_copy`, after what was handed over before."""
        if count:
            self._hand_over(lambda: keep_copy(path, epoch, count))

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            StopError: a file could not be written.
        """
        pending, self._pending = self._pending, []
        errors = [error for future in pending if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _hand_over(self, work: Callable[[], None]) -> None:
        while self._pending and (len(self._pending) > 1 or self._pending[0].done()):
            if self._pending[0].exception() is not None:
                self.wait()  # raises it; what waits behind it may have failed, too, and must not be what is told
            self._pending.pop(0)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending.append(self._thread.submit(work))


def copied_to_host(state: Any) -> tuple[Any, Callable[[], None]]:
    """A copy of a nested state on the CPU, and a function that waits until it is complete.

    Tensors of a GPU go to pinned memory behind the work that is queued there, and nothing waits for it meanwhile.
    """
    devices: set[torch.device] = set()

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_cuda:
            return value.detach().clone()
        target = torch.empty_like(value, device="cpu", pin_memory=True)
        target.copy_(value.detach(), non_blocking=True)
        devices.add(value.device)
        return target

    copies = pytree.tree_map(copied, state)
    # Of the device of the tensors, which need not be the current one.
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return copies, wait


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote; nothing but tensors and plain values is ever unpickled."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a checkpoint of training.run")
    try:
        state = load_values(path, device)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a checkpoint of training.run") from None
    except Exception:
        raise InputError(
            f"{path}: is damaged, or holds more than tensors and plain values, expected a checkpoint of training.run"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: is not a checkpoint of training.run (its format is not {FORMAT!r})")
    return state


def load_values(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote: tensors and plain values, nothing else is ever unpickled.

    Raises:
        Exception: the file is damaged or holds something else; which kind depends on where the damage is.
    """
    with open(path, "rb") as file:
        new = file.read(4) == b"PK\3\4"
        file.seek(0)
        # The format before torch 1.6 is a bare pickle. A file gives as much memory as a damaged one asks for.
        source = file if new else io.BytesIO(file.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the bytes of a file that is no checkpoint
            return torch.load(source, map_location=device, weights_only=True)


def epoch_of(path: Path) -> int:
    """The last epoch that a checkpoint has finished; its tensors are not read."""
    epoch: int = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["epoch"]
    return epoch


def load_weights(network: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put the saved weights into ``network``, which must have the same shapes."""
    try:
        network.load_state_dict(state["network"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: its weights do not fit the model {state['settings'].get('model')} ({reason})"
        ) from None


def keep_copy(path: Path, epoch: int, count: int) -> None:
    """Keep ``path`` as epoch-NNNN.pt beside it, and the ``count`` latest of these.

    Raises:
        StopError: the file cannot be made, or an older one not removed.
    """
    if count == 0:
        return
    copy = path.with_name(f"epoch-{epoch:04d}.pt")
    try:
        copy.unlink(missing_ok=True)
        os.link(path, copy)  # the same bytes: the next checkpoint replaces the name, not the file
    except OSError:  # on a file system without hard links
        with replacing(copy) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
    try:
        for old in sorted(path.parent.glob("epoch-*.pt"))[:-count]:
            old.unlink()
    except OSError as error:
        raise StopError(f"{error.filename} cannot be removed ({error.strerror}); {path} is written") from None


class MetricsLog:
    """metrics.jsonl: one object an epoch, in order, each once."""

    def __init__(self, path: Path, last_epoch: int = 0) -> None:
        """Keep the lines up to ``last_epoch``; later ones belong to epochs that no checkpoint has."""
        self.path = path
        entries = [entry for entry in read_metrics(path) if entry["epoch"] <= last_epoch]
        if (known := entries[-1]["epoch"] if entries else 0) != last_epoch:
            raise InputError(f"{path}: ends with epoch {known}, but checkpoint.pt with {last_epoch}: a file is missing")
        lines = [as_json(entry) + "\n" for entry in entries]
        write_atomically(path, "".join(lines))

    def append(self, entry: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(as_json(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StopError(f"{self.path} cannot be written ({error.strerror}); the last checkpoint is kept") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a last line that was cut short is left out.

    Raises:
        InputError: it is damaged.
    """
    complete = _text(path).rpartition("\n")[0] if path.exists() else ""
    return [_parsed(line, dict, f"{path}, line {number}") for number, line in enumerate(complete.splitlines(), 1)]


def read_json(path: Path, kind: type = dict) -> Any:
    """What :func:`write_json` wrote, a ``dict`` or a ``list``.

    Raises:
        InputError: it is missing, damaged, or of another kind.
    """
    return _parsed(_text(path), kind, str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"{path}: cannot be read ({reason})") from None


def _parsed(text: str, kind: type, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is damaged ({error}), expected JSON") from None
    if not isinstance(value, kind):
        raise InputError(f"{where}: is damaged (a {type(value).__name__} in the place of a {kind.__name__})")
    return value
