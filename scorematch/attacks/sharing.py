"""How the processes of ``torch.distributed`` share out an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .accounting import Cost
from .evaluation_state import VECTORS, EvaluationState

SHARED = (*VECTORS, "adversarial")


@dataclass(frozen=True)
class Share:
    """One process of several, or the only one."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    def __str__(self) -> str:
        return f"{self.rank} of {self.world}"

    def samples(self, count: int) -> Tensor:
        """Which of ``count`` samples are those of this process, int64."""
        return torch.arange(count)[self.rank :: self.world]

    def path(self, path: Path) -> Path:
        """The file of this process."""
        return path if self.world == 1 else path.with_name(f"{path.name}.rank{self.rank}of{self.world}")

    def agreed(self, value: int) -> int:
        """The value of rank 0."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, state: EvaluationState, warnings: list[str]) -> None:
        """Bring what each process found, spent and warned of together on all of them."""
        if self.world == 1:
            return
        mine = self.samples(len(state.robust))
        found = {name: getattr(state, name)[mine] for name in SHARED}
        shares: list[Any] = [None] * self.world
        further = mine[state.is_beyond[mine]]
        beyond = (further, state.beyond[further])
        torch.distributed.all_gather_object(shares, (mine, found, beyond, state.costs, warnings))
        state.costs = {}
        for samples, part, (further, points), costs, notes in shares:
            state.beyond[further] = points
            for name in SHARED:
                getattr(state, name)[samples] = part[name]
            for name, cost in costs.items():
                state.costs.setdefault(name, Cost()).add(cost)
            warnings += [note for note in notes if note not in warnings]
