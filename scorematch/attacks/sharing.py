"""How the processes of ``torch.distributed`` share out an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
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
        return torch.arange(count, device="cpu")[self.rank :: self.world]

    def check_alike(self, identity: Mapping[str, Any]) -> None:
        """Refuse processes of which some have another model, data or settings.

        Each of them must ask, or the others wait for it.

        Args:
            identity: what this process has, by the name that the error gives it.

        Raises:
            ValueError: as said. Every process raises it.
        """
        if self.world == 1:
            return
        everywhere: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everywhere, dict(identity))
        for rank, other in enumerate(everywhere):
            if differs := [name for name, value in everywhere[0].items() if other[name] != value]:
                raise ValueError(
                    "share_samples takes the same model, samples and settings in all processes, but ranks 0 and "
                    f"{rank} differ in {', '.join(differs)}; without it each process attacks the samples it was given"
                )

    def agreed_seed(self, kept: int | None, new: int) -> int:
        """One seed for all processes; each of them must ask, or the others wait for it.

        Args:
            kept: the seed in the file of this process, or None if it has no file.
            new: what to take if no process has a file; that of rank 0 counts.

        Raises:
            ValueError: the files have different seeds. Every process raises it.
        """
        seeds: list[Any] = [(kept, new)] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(seeds, (kept, new))
        known = {rank: seed for rank, (seed, _) in enumerate(seeds) if seed is not None}
        if len(set(known.values())) > 1:
            told = ", ".join(f"{seed} (rank {rank})" for rank, seed in known.items())
            raise ValueError(f"state_path: the files of the processes have different seeds: {told}")
        return next(iter(known.values()), seeds[0][1])

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


def path_of_this_process(path: Path) -> Path:
    """A file of its own for each of several processes, whether they share out the samples or not."""
    process = Share.of_this_process()
    return path if process.world == 1 else path.with_name(f"{path.name}.rank{process.rank}of{process.world}")
