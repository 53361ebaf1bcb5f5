"""A device that is not the CPU, without one: tensors say that they are elsewhere, and the CPU computes them.

What mixes such a tensor with one on the CPU fails, as it would on a GPU, and so does what reads its memory without
asking for a copy. So programs can be tried on "another device" from end to end, with values. It has torch's device type
``lazy``, which nothing else uses here.

Not covered: streams, precision, and code that asks whether the device is CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from scorematch import _extension
from scorematch.ops import _checks

DEVICE = torch.device("lazy:0")
GENERATOR = torch.Generator
COPIES = ("copy_", "_to_copy")  # between devices
INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # indices may be on the CPU
JOINS = ("cat", "stack")


class Elsewhere(torch.Tensor):
    """A tensor on :data:`DEVICE`, whose numbers are in ``inner`` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        own = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        own.inner = inner
        return own  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise TypeError(f"can't convert {self.device} tensor to numpy, use Tensor.cpu() first")

    def __array__(self, dtype: Any = None) -> NoReturn:
        self.numpy()


class ElsewhereGenerator(torch.Generator):
    """A generator that says on which device it is, and draws on the CPU."""

    places: ClassVar[dict[int, torch.device]] = {}  # by address: torch hands operators another object

    def __new__(cls, device: torch.device | str = "cpu") -> ElsewhereGenerator:
        own = super().__new__(cls, "cpu")
        own.place = cls.places[own._cdata] = torch.device(device)
        return own

    @property
    def device(self) -> torch.device:
        return self.place


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives, on the device that it would be on."""
    name = func._schema.name.partition("::")[2]
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    is_elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    asked = [args[0], *args[2:3]] if name in INDEXES else tensors  # what is indexed, and the values put there
    written = args[0] if name.endswith("_") else None
    on_cpu = [
        list(tensor.shape)
        for tensor in asked
        if isinstance(tensor, Tensor)
        and tensor.device.type == "cpu"
        and (tensor.dim() or name in JOINS or tensor is written)  # other operations take a number of the CPU
    ]
    if is_elsewhere and on_cpu and name not in COPIES:
        raise RuntimeError(f"{func} with tensors on {DEVICE} and on the CPU {on_cpu}")
    if (device := kwargs.get("device")) is not None:
        is_elsewhere = torch.device(device).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu"), **({"pin_memory": None} if "pin_memory" in kwargs else {})}
    for leaf in leaves:
        place = ElsewhereGenerator.places.get(leaf._cdata) if isinstance(leaf, GENERATOR) else None
        if place is not None and (place.type == DEVICE.type) != is_elsewhere:
            raise RuntimeError(f"{func} with a generator on {place}")
    plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and len(func._schema.returns) == 1 and name.endswith("_"):
        return args[0]
    return tree_map(lambda value: Elsewhere(value) if is_elsewhere and isinstance(value, Tensor) else value, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


class _Mode(TorchDispatchMode):
    """Makes tensors elsewhere where a function is told to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, ``device="lazy"`` is a device with kernels, generators and checkpoints."""
    load = torch.load

    def loaded(*args: Any, map_location: Any = None, **options: Any) -> Any:
        values = load(*args, map_location="cpu", **options)
        if map_location is None or torch.device(map_location).type != DEVICE.type:
            return values
        return tree_map(lambda value: value.to(DEVICE) if isinstance(value, Tensor) else value, values)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", loaded)
        for module in list(sys.modules.values()):  # some import the class itself
            if getattr(module, "Generator", None) is GENERATOR:
                patch.setattr(module, "Generator", ElsewhereGenerator)
        patch.setattr(_checks, "_refuse_device", lambda name, t: None)
        patch.setattr(_extension, "missing_kernel_message", lambda device: None)
        before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        try:
            with _Mode():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]
            ElsewhereGenerator.places.clear()
