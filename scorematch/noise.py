"""Random numbers for every feature of a batch, which do not depend on the memory format of the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gaussian noise like x, contiguous; the generator is on the device of x."""
    return _empty(x).normal_(generator=generator)


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform noise in [−1, 1) like x, contiguous; the generator is on the device of x."""
    return _empty(x).uniform_(-1.0, 1.0, generator=generator)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
