"""What attacks are given: a batch in the box, and its labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..threat_model import ThreatModel

OUTSIDE = 1e-6  # of the largest bound of the box: what rounding may add, eight steps of float32 at 1


def clean_batch(x: Tensor, y: Tensor, threat_model: ThreatModel, label_name: str = "y") -> tuple[Tensor, Tensor]:
    """The batch and its labels as attacks take them; reads x once (synchronises a GPU), so not for training steps.

    Args:
        x: [N, …] inside the box of the threat model, or outside by at most 1e-6 of its largest bound; then it is
            clamped.
        y: class indices of any integer type, [N] or [N, 1]. One-hot labels are refused.
        threat_model: its box is checked.
        label_name: what errors call y.

    Returns:
        x [N, …] in the box, without a graph, and y int64 [N]. The tensors given are not written to.

    Raises:
        ValueError: shapes do not fit, labels are no class indices, or x leaves the box or is not finite.
    """
    labels = y.squeeze(1) if y.dim() == 2 and y.shape[1] == 1 else y
    if y.dim() == 2 and labels is y and len(x) == len(y):
        raise ValueError(
            f"{label_name} must be class indices [N], got labels {list(y.shape)}: of one-hot labels pass "
            f"{label_name}.argmax(1)"
        )
    if x.dim() < 2 or labels.dim() != 1 or len(x) != len(y):
        raise ValueError(f"x must be [N, …] and y [N], got x {list(x.shape)} and y {list(y.shape)}")
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise ValueError(f"{label_name} must be int64 labels, got {y.dtype}")
    x, labels = x.detach(), labels.long()
    if len(x) == 0:
        return x, labels
    lower, upper = threat_model.lower, threat_model.upper
    rounding = OUTSIDE * max((abs(bound) for bound in (lower, upper) if math.isfinite(bound)), default=0.0)
    low, high = (float(v) for v in torch.aminmax(x))
    if not (low >= lower - rounding and high <= upper + rounding):
        raise ValueError(
            f"x must lie in the box [{lower}, {upper}] of the threat model, got values in [{low!r}, {high!r}]"
        )
    return (x if lower <= low and high <= upper else x.clamp(lower, upper)), labels
