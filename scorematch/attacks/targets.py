"""Which classes a targeted attack tries: the most likely ones, or those that somebody chose for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .classifier import Classifier
from .losses import ranked_targets


def check_target_classes(targets: Any) -> None:
    """Refuse target classes that cannot fit any data set.

    Args:
        targets: int64 [N, T], T ≥ 1, each row T different classes; or None.

    Raises:
        TypeError, ValueError: they are something else; the message names ``target_classes``.
    """
    if targets is None:
        return
    if not isinstance(targets, Tensor):
        raise TypeError(f"target_classes must be an int64 tensor [N, T] or None, got {type(targets).__name__}")
    if targets.dtype != torch.int64 or targets.dim() != 2 or targets.shape[1] < 1:
        given = f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"target_classes must be an int64 tensor [N, T] with T >= 1, got {given}")
    ordered = targets.sort(1).values
    _refuse((ordered[:, 1:] == ordered[:, :-1]).any(1), targets, "has a class twice")
    _refuse((targets < 0).any(1), targets, "has a negative class")


def check_targets_fit(attack: Any, y: Tensor, classes: int | None = None) -> None:
    """Refuse target classes, where an attack has some, that do not fit its samples.

    Args:
        attack: with the attribute ``target_classes`` or without it.
        y: int64 [N], the labels.
        classes: of the model, where they are known.

    Raises:
        ValueError: there is not a row for each sample, or a row has the label of its sample or a class that the model
            does not have.
    """
    targets = getattr(attack, "target_classes", None)
    if targets is None:
        return
    name = f"{attack.name}: target_classes"
    if len(targets) != len(y):
        raise ValueError(f"{name} must have a row for each of the {len(y)} samples, got {list(targets.shape)}")
    _refuse((targets == y.to(targets.device)[:, None]).any(1), targets, "has the label of its sample", name)
    if classes is not None:
        _refuse((targets >= classes).any(1), targets, f"goes beyond the {classes} classes of the model", name)


def target_of(classifier: Classifier, x: Tensor, samples: Tensor, targets: Tensor | None, index: int) -> Tensor:
    """The target of each sample in run ``index`` (from 0), int64 [N].

    Args:
        x: [N, …], clean.
        samples: int64 [N], which samples of the data set they are.
        targets: [M, T] for the samples of the whole data set; None takes the class of rank ``index`` + 2 of the clean
            logits.
    """
    if targets is None:
        return ranked_targets(classifier.logits(x), 2 + index)
    return targets[samples.to(targets.device), index].to(x.device)


def _refuse(bad: Tensor, targets: Tensor, what: str, name: str = "target_classes") -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: row {row} {what}, got {targets[row].tolist()}")
