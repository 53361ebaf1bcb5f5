"""Attacks take gradients, whatever mode their caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def outside_inference_mode(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that leaves ``torch.inference_mode`` while it runs.

    torch's own decorator would do the same, but warnings would then name its line instead of the caller's.
    """

    @functools.wraps(function)
    def outside(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        with torch.inference_mode(False):
            return function(*arguments, **options)

    return outside
