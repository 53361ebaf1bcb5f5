"""Functions that take gradients and compare densities do so in any mode that their caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

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


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast, for a posterior: log-densities of thousands of nats differ by less than half precision resolves."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def outside_modes(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that runs outside of ``torch.inference_mode`` and of autocast, whatever its caller does.

    It is for functions that compare posteriors or take their gradients. Tensors that were made in inference mode take
    no gradients; the function gets copies of them.
    """

    @functools.wraps(function)
    @outside_inference_mode
    def outside(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        with own_precision(tensors[0]) if tensors else nullcontext():
            return function(
                *map(_usable, arguments),  # type: ignore[arg-type]
                **{name: _usable(value) for name, value in options.items()},  # type: ignore[arg-type]
            )

    return outside


def _usable(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
