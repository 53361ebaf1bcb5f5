"""Borrow a model for an attack and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ATTACK_MODES = ("eval", "train", "frozen")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm as they are: in training mode it uses those of the batch alone."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        # Without tracking, batch norm in training mode neither reads nor writes its running statistics.
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def borrowed(model: nn.Module, attack_mode: str = "eval") -> Iterator[None]:
    """Put a model into the mode of an attack, without parameter gradients; restore everything on leaving.

    Args:
        model: any module.
        attack_mode: what batch normalisation (and dropout) does meanwhile:
            ``"eval"``: running statistics are used (TRADES, and evaluation);
            ``"train"``: batch statistics are used and the running ones updated (PGD-AT as published);
            ``"frozen"``: batch statistics are used, the running ones stay untouched (the generated-data pipeline).
            With the last two a model in training mode stays as it is: a batch norm that you have put into eval mode
            goes on with its running statistics. A model in eval mode is put into training mode as a whole.

    Raises:
        ValueError: ``attack_mode`` is none of these.
    """
    if attack_mode not in ATTACK_MODES:
        raise ValueError(f"attack_mode must be one of {', '.join(ATTACK_MODES)}, got {attack_mode!r}")
    training = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # a frozen script has no mode
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        trains = attack_mode != "eval"
        if training and not (trains and model.training):
            model.train(trains)
        with frozen_statistics(model) if attack_mode == "frozen" else nullcontext():
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
