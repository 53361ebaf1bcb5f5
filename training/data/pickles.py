"""Numpy arrays out of a pickle that nobody has to trust.

A pickle is a program: it names functions to call. Numpy's functions believe what a pickle says about the memory of an
array, so damaged bytes can end the process. Here a pickle calls nothing but the classes below, which write down what it
says. An array is made afterwards, out of its type, shape and bytes, if they fit together.
"""

import codecs
import os
import pickle
import pickletools
import re
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

_NUMBERS = re.compile("b1|[iu][1248]|f[248]")
_NO_FIELDS = [None, None, None, -1, -1, 0]  # the rest of the state of a type that is a plain number


def load(path: Path) -> Any:
    """What a pickle holds: plain values, and arrays for :func:`as_array`.

    Raises:
        Exception: it is damaged or names something else; which kind depends on where the damage is.
    """
    with open(path, "rb") as file:
        _check_memo(_Bounded(file))
        return _ArraysOnly(_Bounded(file), encoding="latin1").load()


def as_array(value: Any) -> np.ndarray:
    """An array that :func:`load` found, or a list of numbers, as an array.

    Raises:
        Exception: its type, shape and bytes do not fit together.
    """
    if isinstance(value, _Array):
        return value.array()
    return np.asarray([item.item() if isinstance(item, _Scalar) else item for item in value])


class _Type:
    """In the place of ``numpy.dtype``."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code, self.order, self.rest = code, "=", _NO_FIELDS

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.order, *self.rest = state

    def dtype(self) -> np.dtype:
        if not _NUMBERS.fullmatch(self.code) or self.order not in ("<", ">", "=", "|") or self.rest != _NO_FIELDS:
            raise pickle.UnpicklingError(f"it has an array of type {self.order}{self.code}, expected plain numbers")
        return np.dtype(self.code).newbyteorder(cast(Any, self.order))


class _Array:
    """In the place of an array."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.axes: tuple[int, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.type, self.in_fortran_order, self.content = state

    def array(self) -> np.ndarray:
        dtype = self.type.dtype()
        if not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise pickle.UnpicklingError(f"it has an array of shape {self.shape}")
        flat = np.frombuffer(self.content, dtype) if len(self.content) else np.empty(0, dtype)
        array = flat.reshape(self.shape, order="F" if self.in_fortran_order else "C")
        return array if self.axes is None else array.transpose(self.axes)


class _Buffered(_Array):
    """In the place of an array in a pickle of protocol 5."""

    def __init__(self, content: Any, type: _Type, shape: Any, order: str, axes: Any = None) -> None:
        self.content, self.type, self.shape, self.in_fortran_order = content, type, shape, order == "F"
        self.axes = axes if order == "K" else None


class _Scalar:
    """In the place of one number out of an array."""

    def __init__(self, type: _Type, content: bytes) -> None:
        self.type, self.content = type, content

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes a number")

    def item(self) -> Any:
        (number,) = np.frombuffer(self.content, self.type.dtype())
        return number


class _Latin1:
    """In the place of ``codecs.encode``: pickles of protocol 2 hold the bytes of an array as text."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it encodes text as {encoding}")
        return codecs.encode(text, "latin1")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes an encoding")


# What pickles of arrays name, wherever this and older versions of numpy keep it. Each is a class with __setstate__: a
# pickle may also set attributes of what it names, but not then.
_PARTS: dict[str, dict[str, Any]] = {
    "numpy": {"ndarray": "the kind of an array, which is not called", "dtype": _Type},
    "multiarray": {"_reconstruct": _Array, "scalar": _Scalar},
    "numeric": {"_frombuffer": _Buffered},
    "_codecs": {"encode": _Latin1},
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        short = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if name not in _PARTS.get(short, {}):
            raise pickle.UnpicklingError(f"it would import {module}.{name}, allowed: arrays")
        return _PARTS[short][name]


class _Bounded:
    """A file whose reads take no more memory than it has bytes, whatever length a damaged file asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def read(self, size: int, /) -> bytes:
        return self.file.read(min(size, self.size - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline()


def _check_memo(file: _Bounded) -> None:
    """Refuse a pickle that numbers its values beyond its own length: it would be given a table of that size."""
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):  # which only reads
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and not 0 <= int(argument or 0) < file.size:
            raise pickle.UnpicklingError(f"it numbers a value {argument}")
