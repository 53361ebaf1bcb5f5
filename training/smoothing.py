"""Label smoothing, as targets."""

import torch
from torch import Tensor
from torch.nn import functional


def smoothed(y: Tensor, num_classes: int, amount: float) -> Tensor:
    """Labels as probabilities: 1 − ``amount`` for the label, the rest shared out equally among the other classes.

    Args:
        y: int64 [N] labels.
        num_classes: L, at least 2.
        amount: in [0, 1).

    Returns:
        [N, L] float32, rows that sum to 1.

    Raises:
        ValueError: an argument is outside its range.
    """
    if y.dtype != torch.int64 or y.dim() != 1:
        raise ValueError(f"y must be int64 [N], got {y.dtype} {list(y.shape)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"amount must lie in [0, 1), got {amount}")
    one_hot = functional.one_hot(y, num_classes).float()
    return one_hot * (1.0 - amount) + (1.0 - one_hot) * (amount / (num_classes - 1))
