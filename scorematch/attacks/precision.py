"""float32 arithmetic without TF32, which torch allows or forbids in the whole process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Setting = TypeVar("Setting")
OPERATIONS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)


@dataclass(frozen=True)
class _Arithmetic:
    """What torch is told of float32, by its old names and by its new ones.

    The old names can be read only while they agree with the new ones, and code within the model, such as the guards of
    ``torch.compile``, reads them. So both are set wherever both could be read.

    Attributes:
        products, convolutions: by the old names; None where these cannot be read.
        operations: by the new name ``fp32_precision``, of each of OPERATIONS.
    """

    products: str | None
    convolutions: bool | None
    operations: tuple[str, ...]

    @classmethod
    def now(cls) -> _Arithmetic:
        products = _readable(torch.get_float32_matmul_precision)
        convolutions = _readable(lambda: torch.backends.cudnn.allow_tf32)
        return cls(products, convolutions, tuple(operation.fp32_precision for operation in OPERATIONS))

    def exact(self) -> _Arithmetic:
        """The same without TF32."""
        products = None if self.products is None else "highest"
        convolutions = None if self.convolutions is None else False
        return _Arithmetic(products, convolutions, ("ieee",) * len(OPERATIONS))

    def set(self) -> None:
        if self.products is not None:
            torch.set_float32_matmul_precision(self.products)
        if self.convolutions is not None:
            torch.backends.cudnn.allow_tf32 = self.convolutions
        for operation, precision in zip(OPERATIONS, self.operations, strict=True):
            operation.fp32_precision = "none"  # which may stand for what is set for all operations
            if operation.fp32_precision != precision:
                operation.fp32_precision = precision


def _readable(read: Callable[[], Setting]) -> Setting | None:
    try:
        return read()
    except RuntimeError:  # the new names were used for what the old ones cannot say
        return None


def allow_tf32(allowed: bool) -> None:
    """Allow TF32 on CUDA in this process or forbid it, whatever was set before by old names or new ones."""
    on_cuda = "tf32" if allowed else "ieee"
    on_cpu = "none" if allowed else "ieee"
    _Arithmetic("high" if allowed else "highest", allowed, (on_cuda, on_cuda, on_cuda, on_cpu)).set()


class _WithoutTF32:
    """What holds in the whole process comes back when the last thread has left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._before: _Arithmetic

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._before = _Arithmetic.now()
                self._before.exact().set()
            self._within += 1

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._before.set()


_without_tf32 = _WithoutTF32()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """float32 arithmetic without TF32 on CUDA, in any number of threads; on another device nothing changes."""
    return _without_tf32 if device.type == "cuda" else nullcontext()
