"""Which functions of Python a piece of code calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def watched(functions: Sequence[Any], called: Callable[[FrameType], None]) -> Iterator[None]:
    """A context in which ``called`` gets the frame of each call of ``functions``; other threads are not watched.

    Args:
        functions: of Python, with code of their own.
        called: before the function does anything.
    """
    codes = {function.__code__ for function in functions}

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in codes:
            called(frame)

    previous = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(previous)
