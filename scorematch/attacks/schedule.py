"""In which order an evaluation runs the parts of its attacks, and in which batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .parts import Attack

SMALLEST = 8  # samples for which a worker of their own is worth it


@dataclass(frozen=True)
class Stage:
    """A pass over the samples that are still robust: some parts of one attack, on each batch in turn."""

    attack: Attack
    parts: range


def stages_of(attacks: Sequence[Attack], classes: int, rng: str) -> list[Stage]:
    """The stages of all attacks, in order.

    With keyed numbers each part is a stage, so that it passes over all samples in full batches. With the reference's
    numbers a whole attack is one stage, since the stream of numbers of a batch goes through all its parts.
    """
    stages = []
    for attack in attacks:
        parts = attack.parts(classes)
        if rng == "keyed":
            stages += [Stage(attack, range(part, part + 1)) for part in range(parts)]
        else:
            stages.append(Stage(attack, range(parts)))
    return stages


def passes_left(stages: Sequence[Stage], finished: Tensor, verdict_passes: int = 1) -> int:
    """Passes of one sample that are still to be made if no further sample is fooled.

    Args:
        finished: int64 [K], how many stages each sample that is still robust has behind it; negative before the first.
        verdict_passes: over how many passes a point is judged; those that average a gradient are among them.
    """
    left = [0]  # after the last stage, then before it, and so on
    for stage in reversed(stages):
        left.append(left[-1] + _cost(stage.attack, verdict_passes) * len(stage.parts))
    return int(torch.tensor(left, device="cpu")[len(stages) - finished.clamp_min(0)].sum())


def _cost(attack: Attack, verdict_passes: int) -> int:
    """Passes of one part on a sample that it does not fool, as if it judged a point in each of its forward passes."""
    forwards, backwards = attack.cost()
    return math.ceil(forwards * max(1.0, verdict_passes / getattr(attack, "eot_iter", 1))) + backwards


def batch_size(count: int, most: int, workers: int) -> int:
    """How many of ``count`` samples go into a batch, so that each worker has as many batches of the same size.

    Args:
        most: samples in a batch, at most.
        workers: at least 1; where there are few samples, some of them have nothing to do.
    """
    rounds = math.ceil(count / (most * workers))
    return min(most, max(math.ceil(count / max(rounds * workers, 1)), SMALLEST))


def dealt_out(count: int, size: int) -> list[Tensor]:
    """``count`` rows in batches of at most ``size``; neighbours go to different ones, as data sets are often sorted."""
    batches = math.ceil(count / size)
    return [torch.arange(first, count, batches, device="cpu") for first in range(batches)]
