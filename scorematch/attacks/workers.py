"""Threads that share out the batches of an evaluation."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, CellType, FrameType, FunctionType, MethodType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .watching import watch

Job = TypeVar("Job")
MOST = 8  # threads that "auto" takes; more have not been measured
# What the attributes of a module may be made of if threads share it: things whose contents can be looked at …
TRANSPARENT = (nn.Module, dict, list, tuple, set, frozenset, functools.partial, MethodType)
# … and things that have none, or whose changes can be seen.
PLAIN = (
    *(Tensor, NoneType, str, bytes, Number, Enum, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(type, FunctionType, BuiltinFunctionType),
)
BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}  # torch's own, hooks among it


class Stopped(BaseException):
    """Raised in a worker when another one has failed or the evaluation is interrupted."""


class Team:
    """Workers that take jobs from one list until it is empty.

    One worker is the calling thread. Several are threads of their own; each has its share of torch's threads and the
    autocast state of the caller.

    Args:
        count: workers, at least 1.
        device_types: where they compute.
    """

    def __init__(self, count: int, device_types: Iterable[str] = ("cpu",)) -> None:
        self.count = count
        self._device_types = {"cpu", *device_types}
        self._stop = threading.Event()

    def check(self) -> None:
        """Raise :class:`Stopped` if the workers have to stop; called often, so that they stop soon."""
        if self._stop.is_set():
            raise Stopped

    def run(self, jobs: Iterable[Job], work: Callable[[int, Job], None]) -> None:
        """Do all jobs.

        Args:
            jobs: taken in this order.
            work: called with the number of a worker, from 0, and a job.

        Raises:
            BaseException: the first that a worker, or the caller while it waits, has raised. Then no worker runs any
                more.
        """
        waiting = deque(jobs)
        count = min(self.count, len(waiting))
        if count <= 1:
            for job in waiting:
                work(0, job)
            return
        failures: list[BaseException] = []
        ended = threading.Semaphore(0)
        threads = torch.get_num_threads()
        autocast = [_autocast_of(device_type) for device_type in self._device_types]

        def work_off(worker: int) -> None:
            try:
                if self._stop.is_set():
                    return
                torch.set_num_threads(max(threads // count, 1))
                with ExitStack() as stack:
                    for settings in autocast:
                        stack.enter_context(torch.autocast(**settings))
                    while not self._stop.is_set():
                        try:
                            job = waiting.popleft()
                        except IndexError:
                            return
                        work(worker, job)
            except Stopped:
                pass
            except BaseException as failure:
                failures.append(failure)
                self._stop.set()
            finally:
                ended.release()

        workers = [threading.Thread(target=work_off, args=(worker,), daemon=True) for worker in range(count)]
        try:
            for worker in workers:
                worker.start()
            for _ in workers:
                ended.acquire()  # a signal makes join() take a thread that runs for an ended one, before Python 3.13
        except BaseException:  # a signal reaches the calling thread alone
            self._stop.set()
            raise
        finally:
            for worker in workers:
                while worker.ident is None and worker in threading.enumerate():
                    time.sleep(0.001)  # a signal came while it was being started
                if worker.ident is not None:
                    worker.join()
            torch.set_num_threads(threads)  # threads that begin later take the last number that was set
        if failures:
            raise failures[0]


def automatic(model: Any, x: Tensor) -> int:
    """How many workers suit a model in eval mode on the CPU: one for each of torch's threads if it can be shared.

    Args:
        x: [N, …], a few samples on the device where the model computes.
    """
    if x.device.type != "cpu" or torch.get_num_threads() == 1 or not can_be_shared(model, x):
        return 1
    return min(torch.get_num_threads(), MOST)


def copies(model: Any, devices: Sequence[torch.device]) -> list[Any]:
    """A model for each device: itself on the first, copies of its own on the others.

    Raises:
        ValueError: there are several devices, and the model is not a module or cannot be copied.
    """
    made = [model]
    for device in devices[1:]:
        if not isinstance(model, nn.Module):
            raise ValueError(f"device: a copy on {device} needs a module, the model is a {type(model).__name__}")
        try:
            made.append(copy.deepcopy(model).to(device))
        except Exception as error:  # whatever an attribute that cannot be copied raises
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"device: the model cannot be copied to {device} ({reason})") from error
    return made


def can_be_shared(model: Any, x: Tensor) -> bool:
    """Whether several threads may call a model at the same time, as far as can be seen.

    They may call a module of Python that has no hooks, and sets no attribute and changes no tensor while it predicts.
    It may hold tensors, modules, functions, plain values, and containers of these that stay the same; so must what its
    class holds, and what its functions read around them. Another object may keep anything. A scripted module or another
    callable may be as harmless; nothing shows it.

    Args:
        model: in eval mode.
        x: [N, …], N ≥ 1.
    """
    if not isinstance(model, nn.Module) or torch_module._has_any_global_hook():
        return False
    before = _contents(model)
    if any(not isinstance(value, (*TRANSPARENT, *PLAIN)) for value, _ in before):
        return False
    modules = {id(value): value for value, _ in before if isinstance(value, nn.Module)}
    if any(isinstance(module, torch.jit.ScriptModule) or _has_hooks(module) for module in modules.values()):
        return False
    around = _surroundings(modules.values())
    writes = 0

    def count_write(frame: FrameType) -> None:
        nonlocal writes
        writes += id(frame.f_locals["self"]) in modules  # what is set and reset within a pass is the same after it

    passing = torch.enable_grad()(lambda: model(x.detach().requires_grad_()))
    watch((nn.Module.__setattr__, nn.Module.__delattr__), count_write, passing)
    after = _contents(model) + _surroundings(modules.values())
    one, other = ([(id(value), version) for value, version in contents] for contents in (before + around, after))
    return not writes and one == other


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _contents(value: Any) -> list[tuple[Any, int | None]]:
    """A value and all that it is made of, down to any depth, with how often a tensor was written to."""
    contents, waiting, seen = [], [value], set()
    while waiting:
        value = waiting.pop()
        contents.append((value, _version(value)))
        if id(value) not in seen:
            seen.add(id(value))
            waiting += _entries(value)
    return contents


def _entries(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        return [entry for name, entry in vars(value).items() if name not in BOOKKEEPING]
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    return []


def _surroundings(modules: Iterable[nn.Module]) -> list[tuple[Any, int | None]]:
    """What the classes of modules hold, and what functions of theirs read outside of themselves; torch's own left out.

    A pass may keep something there: in a class, in a variable of its file, or in one that a function has around it.
    """
    found: list[tuple[Any, int | None]] = []
    seen: set[int] = set()

    def note(value: Any) -> None:
        found.append((value, _version(value)))
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (dict, list, tuple, set)):
            found.extend(_contents(value))
        elif isinstance(value, FunctionType) and not str(value.__module__).startswith("torch."):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            read = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
            for outside in (*cells, *read):
                note(outside)

    classes = {kind: None for module in modules for kind in type(module).__mro__}  # in their order
    for kind in classes:
        if kind is not object and not str(kind.__module__).startswith("torch."):
            for value in vars(kind).values():
                note(value)
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, FunctionType):
                note(value)
    return found


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _autocast_of(device_type: str) -> dict[str, Any]:
    """The autocast state of this thread, as arguments of ``torch.autocast``."""
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
