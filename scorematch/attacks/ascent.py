"""What a gradient ascent remembers of each sample that it still attacks, whatever its steps are."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .losses import margin_loss

SETTLE_EVERY = 4  # steps after which misclassified samples leave the batch; on CUDA this waits for the device


@dataclass
class Ascent:
    """The samples that are still attacked; every tensor is [N, …] or [N]."""

    rows: Tensor  # index of the sample in the batch
    x: Tensor
    grad: Tensor  # at x
    wrong: Tensor  # whether some iterate was misclassified
    fallen_x: Tensor  # that iterate: the latest, or the clearest
    clearness: Tensor  # the margin of the clearest, where that is asked for
    best_x: Tensor
    best_grad: Tensor
    best_value: Tensor
    step_size: Tensor

    def settle(self, found: Tensor, fooled: Tensor) -> bool:
        """Write the misclassified samples into ``found`` and ``fooled`` and drop them; True if none is left."""
        if not bool(self.wrong.any()):
            return len(self.rows) == 0
        fallen = self.rows[self.wrong]
        found[fallen], fooled[fallen] = self.fallen_x[self.wrong], True
        keep = (~self.wrong).nonzero().squeeze(1)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[keep])
        return len(keep) == 0

    def clearer(self, fell: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Which of the misclassified iterates ``fell``, bool [N], have a larger margin than all before."""
        margin = margin_loss(logits, labels).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        better = fell & (margin > self.clearness)
        self.clearness = torch.where(better, margin, self.clearness)
        return better

    def judge(self, fell: Tensor) -> None:
        """Take in the verdict on the new x."""
        self.fallen_x = torch.where(beside(fell, self.x), self.x, self.fallen_x)
        self.wrong = self.wrong | fell


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Values [N] that broadcast over x [N, …]."""
    return values.view(-1, *[1] * (x.dim() - 1))
