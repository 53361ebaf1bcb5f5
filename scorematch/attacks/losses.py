"""The losses that attacks increase: one value for each sample, larger where it is closer to being misclassified."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.divergence import divergence


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j ≠ y} z_j − z_y for each sample: positive where the sample is misclassified (Carlini & Wagner, 2017).

    Args:
        logits: [N, L].
        labels: int64 [N].

    Returns:
        [N], in the dtype of the logits.
    """
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true.squeeze(1)


def own_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's own loss, with a ValueError where it does not return what an attack needs."""

    def checked(logits: Tensor, labels: Tensor) -> Tensor:
        value = loss(logits, labels)
        if not isinstance(value, Tensor) or value.shape != labels.shape or not value.requires_grad:
            given = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss must return a tensor [{len(labels)}] with a gradient, one value for each sample, got {given}"
            )
        return value

    return checked


def difference(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """z_t − z_y, [N].

    Args:
        logits: [N, L].
        labels, targets: int64 [N].
    """
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio −(z_y − max_{j ≠ y} z_j) / (z_(1) − z_(3)) (Croce & Hein, 2020, Eq. 6).

    With two classes there is no third logit; the loss is then the margin itself.

    Args:
        logits: [N, L], L ≥ 2.
        labels: int64 [N].
    """
    margin = margin_loss(logits, labels)
    if logits.shape[1] < 3:
        return margin
    top = logits.topk(3, dim=1).values
    return margin / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """−(z_y − z_t) / (z_(1) − (z_(3) + z_(4)) / 2) (Croce & Hein, 2020, Eq. 7).

    With three classes the denominator is z_(1) − z_(3); with two there is none.

    Args:
        logits: [N, L], L ≥ 2.
        labels, targets: int64 [N].
    """
    gain = difference(logits, labels, targets)
    classes = logits.shape[1]
    if classes < 3:
        return gain
    top = logits.topk(min(classes, 4), dim=1).values
    return gain / (top[:, 0] - 0.5 * (top[:, 2] + top[:, -1]) + 1e-12)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(z)_y, [N]: the divergence KL from the one-hot label."""
    return divergence(logits, labels, kind="kl")


UNTARGETED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "dlr": dlr_loss,
}


def ranked_targets(logits: Tensor, rank: int) -> Tensor:
    """The class of the rank-th largest logit of each sample, int64 [N]; rank 1 is the largest.

    The order among equal logits is that of an ascending sort, read from its end.
    """
    return logits.sort(dim=1).indices[:, -rank]
