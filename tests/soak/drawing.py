"""What hypothesis draws: tensors of any shape, layout and size of values, and arguments that do not fit."""

import os
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

SOAKING = "SCOREMATCH_SOAK" in os.environ


def examples(quick: int, soak: int) -> settings:
    """So many examples in the test run, or in a soak. Most of what is drawn are seeds: shrinking makes none clearer."""
    return settings(
        max_examples=soak if SOAKING else quick, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
    )


DTYPES = st.sampled_from([torch.float32, torch.float64])
SHAPES = st.tuples(st.integers(0, 4), st.lists(st.integers(1, 7), max_size=3)).map(lambda s: (s[0], *s[1]))
IMAGES = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
SIZES = st.integers(-12, 12).map(lambda power: 10.0**power)
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "expanded")
VALUES = ("normal", "mixed", "whole", "zero", "equal")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides; where a layout does not suit the shape, t itself."""
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided" and t.dim() >= 1 and t.numel():
        doubled = torch.stack([t, torch.full_like(t, 7)], dim=-1).flatten(-2) if t.dim() else t
        return doubled[..., ::2]
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and t.dim() >= 1 and len(t):
        return t[:1].expand_as(t)
    return t


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of one size, of many sizes at once, whole numbers with ties, zeros, or all equal; any layout."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind, size = draw(st.sampled_from(VALUES)), draw(SIZES)
    values = torch.randn(shape, generator=random, dtype=torch.float64)
    if kind == "mixed":
        values = values * 10.0 ** torch.randint(-12, 13, shape, generator=random).double()
    elif kind == "whole":
        values = torch.randint(-2, 3, shape, generator=random).double()
    elif kind == "zero":
        values = torch.zeros(shape, dtype=torch.float64)
    elif kind == "equal":
        values = torch.full(shape, size, dtype=torch.float64)
    else:
        values = values * size
    return laid_out(values.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def boxes(draw: Any) -> tuple[float, float]:
    lower, width = draw(st.sampled_from([-np.inf, -1e6, -1.0, 0.0, 0.25])), draw(SIZES)
    upper = draw(st.sampled_from([np.inf, 1.0, width]) if lower == -np.inf else st.just(lower + width))
    return lower, max(upper, np.nextafter(lower, np.inf))


@st.composite
def misfits(draw: Any, value: Any) -> Any:
    """Something else in the place of an argument, which may or may not be allowed."""
    others: list[Any] = [None, "0.5", float("nan"), float("inf"), -float("inf"), -1, -1.0, 0, True, [1.0], object()]
    if isinstance(value, Tensor):
        others += [
            value.numpy() if value.layout == torch.strided and not value.is_meta else None,
            value.unsqueeze(0),
            value.reshape(-1),
            torch.cat([value, value, value]) if value.dim() else value,
            value.to("meta"),
            value.to(torch.float16),
            value.to(torch.int64),
            value.to(torch.complex64),
            value.to(torch.bool),
            value.to_sparse() if value.dim() else value,
            value[:0] if value.dim() else value,
            torch.tensor(1.0),
            torch.full_like(value, float("nan")) if value.is_floating_point() else value,
            torch.full_like(value, float("inf")) if value.is_floating_point() else value,
            value - 10**9 if value.dtype == torch.int64 else value,
            value.requires_grad_() if value.is_floating_point() and value.is_leaf else value,
        ]
    return draw(st.sampled_from(others))
