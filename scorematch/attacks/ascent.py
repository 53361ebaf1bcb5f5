"""What an ascent remembers of each sample that it still attacks, whatever its steps are."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SETTLE_EVERY = 4  # steps after which samples that fell leave the batch; on CUDA this waits for the device


@dataclass
class Ascent:
    """The samples that still stand; every tensor is [N, …] or [N]."""

    rows: Tensor  # index of the sample in the batch
    x: Tensor
    grad: Tensor  # at x
    wrong: Tensor  # whether some iterate was misclassified
    fallen_x: Tensor  # that iterate, the latest
    best_x: Tensor
    best_grad: Tensor
    best_value: Tensor
    step_size: Tensor

    def settle(self, found: Tensor, fooled: Tensor) -> bool:
        """Write the samples that fell into ``found`` and ``fooled`` and forget them; True if none is left."""
        if not bool(self.wrong.any()):
            return len(self.rows) == 0
        fallen = self.rows[self.wrong]
        found[fallen], fooled[fallen] = self.fallen_x[self.wrong], True
        keep = (~self.wrong).nonzero().squeeze(1)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[keep])
        return len(keep) == 0

    def judge(self, fell: Tensor) -> None:
        """Take in the verdict on the new x."""
        self.fallen_x = torch.where(beside(fell, self.x), self.x, self.fallen_x)
        self.wrong = self.wrong | fell


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Values [N] that broadcast over x [N, …]."""
    return values.view(-1, *[1] * (x.dim() - 1))
