"""Settings as tables of plain values, as TOML files and checkpoints hold them, and back."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from training.engine.hardware import Switch
from training.settings.errors import InputError, unknown_name


def typed_table(table: object, settings: type, where: str, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """``table`` with every value converted to the type of its field in ``settings``.

    Raises:
        InputError: a key is unknown, or a value has another type.
    """
    if not isinstance(table, dict):
        raise InputError(f"{where}: {table!r} is not a table")
    hints = typing.get_type_hints(settings)
    allowed = [f.name for f in dataclasses.fields(settings) if f.name not in exclude]
    for key in table:
        if key not in allowed:
            raise InputError(f"{where}: unknown key {key!r}, allowed: {', '.join(allowed)}")
    return {key: _typed(value, hints[key], f"{where}: {key}") for key, value in table.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint``: int, float, bool, str, Path, Literal, tuple[T, ...], T | None or a dataclass's table."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _typed(value, get_args(hint)[0], where)
    if origin is Literal:
        if hint == Switch and isinstance(value, bool):  # as older runs saved it
            value = "on" if value else "off"
        if value not in get_args(hint):
            raise unknown_name(where, value, get_args(hint))
        return value
    if origin in (typing.Union, types.UnionType):
        return _typed(value, next(part for part in get_args(hint) if part is not type(None)), where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(part, get_args(hint)[0], where) for part in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return value
    if type(value) is not hint:
        raise InputError(f"{where}: {value!r} is of type {type(value).__name__}, allowed: {_name(hint)}")
    return value


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass as a table of plain values, without those that are None."""
    table: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            table[entry.name] = plain(value)
        elif value is not None:
            table[entry.name] = (
                [str(part) if isinstance(part, Path) else part for part in value]
                if isinstance(value, tuple)
                else str(value)
                if isinstance(value, Path)
                else value
            )
    return table
