"""The classic mistakes of a training step, found before it runs: pixels in 0…255, normalised images, odd labels."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from .threat_model import ThreatModel

SLACK = 1e-4  # of the box, for rounding in a data pipeline
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose images on a GPU have been looked at


def check_inputs(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel | None) -> None:
    """Refuse a batch that an objective cannot mean.

    Dtypes and shapes are looked at in every call. The values of x are on the CPU, and at the first call with this
    model on another device, where looking means waiting for it.

    Args:
        model: the model that is trained.
        x: [N, …] inputs.
        y: int64 [N] labels, or probabilities [N, L].
        threat_model: whose box x must lie in, up to a rounding of 1e-4 of its width; None checks no values.

    Raises:
        TypeError: x or y has a dtype that no objective takes.
        ValueError: shapes do not fit, or x leaves the box or is not finite.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
    if not x.dtype.is_floating_point:
        hint = "; divide pixels in 0…255 by 255: x.float() / 255" if x.dtype == torch.uint8 else ""
        raise TypeError(f"x must be floating point, got {x.dtype}{hint}")
    if x.dim() < 2 or y.dim() not in (1, 2) or len(x) != len(y):
        raise ValueError(f"x must be [N, …] and y [N] or [N, L], got x {list(x.shape)} and y {list(y.shape)}")
    if y.dim() == 1 and y.dtype != torch.int64:
        raise TypeError(f"y must be int64 labels [N] or probabilities [N, L], got {y.dtype} [N]; y.long() makes labels")
    if y.dim() == 2 and not y.dtype.is_floating_point:
        hint = "y[:, 0] makes labels" if y.shape[1] == 1 else "y.argmax(1) makes labels of a one-hot code"
        raise TypeError(f"y must be int64 labels [N] or probabilities [N, L], got {y.dtype} {list(y.shape)}; {hint}")
    if threat_model is not None:
        threat_model.check_radius(math.prod(x.shape[1:]))
    if threat_model is None or len(x) == 0 or (x.device.type != "cpu" and model in _seen):
        return
    _check_box(x, threat_model)
    _seen.add(model)


def _check_box(x: Tensor, threat_model: ThreatModel) -> None:
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    lower, upper = threat_model.lower, threat_model.upper
    slack = SLACK * (upper - lower)
    if low >= lower - slack and high <= upper + slack and low > -torch.inf and high < torch.inf:
        return
    hint = ""
    if (lower, upper) == (0.0, 1.0):
        if low >= 0.0 and 1.0 < high <= 255.0:
            hint = "; divide pixels in 0…255 by 255"
        elif low < 0.0:
            hint = "; if images are normalised, do that in the model, so that eps counts in pixels"
    raise ValueError(f"x must lie in the box [{lower:g}, {upper:g}] of the threat model, got [{low:g}, {high:g}]{hint}")
