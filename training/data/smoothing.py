"""Label smoothing, as targets."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Spread = Literal["all", "others"]


def smoothed(y: Tensor, num_classes: int, amount: float, over: Spread = "all") -> Tensor:
    """Labels as probabilities.

    Two conventions are in use. With ``amount`` .1 and ten classes the label gets

    - ``"all"``: .91, and every other class .01. The amount is shared among all classes, the label included. This is the
      convention of torch (``cross_entropy(label_smoothing=…)``), and so of the paper's published code.
    - ``"others"``: .90, and every other class .0111. The amount is shared among the other classes.

    Args:
        y: int64 [N] labels.
        num_classes: L, at least 2.
        amount: in [0, 1).
        over: which classes share the amount.

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
    if over == "all":
        return one_hot * (1.0 - amount) + amount / num_classes
    return one_hot * (1.0 - amount) + (1.0 - one_hot) * (amount / (num_classes - 1))
