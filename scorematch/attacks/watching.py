"""Which functions of Python a piece of code calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any


def watch(functions: Sequence[Any], called: Callable[[FrameType], None], work: Callable[[], Any]) -> None:
    """Do ``work``; ``called`` gets the frame of each call of ``functions`` in it, but not in other threads.

    A profiler such as cProfile, or ``torch.profiler`` with its stacks, has the only place for a function that is told
    of calls, and not every profiler can be put back into it. Each thread has such a place, so ``work`` is then done in
    a thread of its own, which knows nothing of a mode of autograd that was entered outside of it.

    Args:
        functions: of Python, with code of their own.
        called: before the function does anything.
        work: with the modes of autograd that it needs.
    """
    codes = {function.__code__ for function in functions}

    def tell(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in codes:
            called(frame)

    def watched() -> None:
        sys.setprofile(tell)
        try:
            work()
        finally:
            sys.setprofile(None)

    if sys.getprofile() is None:
        watched()
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(watched).result()
