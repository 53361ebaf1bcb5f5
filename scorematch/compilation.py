"""Networks by ``torch.compile``, with room for all the ways in which they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# torch keeps what it has compiled by the code of ``forward``, which all networks of a class share, and after 8 versions
# runs that code uncompiled. A version each is needed for the batch and the smaller last one, with gradients of the
# input, of the weights and of nothing, in training and in eval mode, for training and for the search, and for autocast.
VERSIONS = 128


def compiled(model: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """``torch.compile(model, dynamic=dynamic)`` that may compile ``model`` 128 times before it gives up."""
    options: dict[str, Any] = {"dynamic": dynamic}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = VERSIONS
    else:  # an earlier torch has one limit for all
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, VERSIONS)
    return torch.compile(model, **options)
