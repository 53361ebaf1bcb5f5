"""Random numbers of attacks: keyed by sample, or in the order in which the official AutoAttack package draws them."""

from __future__ import annotations

import math
import zlib
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ..ops.keyed_uniform import keyed_uniform
from ..ops.random_start import random_start
from ..threat_model import ThreatModel

ATTACK_KEYS = {"apgd-ce": 1, "apgd-dlr": 2, "apgd-t": 3, "fab": 4, "fab-t": 5, "square": 6}


def attack_key(name: str) -> int:
    """The number by which an attack draws, from 1 to 127. That of a user's attack is computed from its name."""
    return ATTACK_KEYS.get(name) or 64 + zlib.crc32(name.encode()) % 64


class Noise(Protocol):
    """What one attack on one batch draws. ``samples`` int64 [N] names the samples that are still attacked.

    Attributes:
        depends_on_batch: whether the numbers of a sample depend on which others are there.
    """

    depends_on_batch: bool

    def start(self, samples: Tensor, like: Tensor, norm: str) -> Tensor:
        """Noise of a random start, [N, …] as ``like``: uniform in [−1, 1] for linf, else standard normal."""

    def skip_start(self, samples: Tensor, like: Tensor) -> None:
        """Skip numbers [N, …] as ``like`` that the official package draws and does not use."""

    def stripes(self, samples: Tensor, channels: int, width: int) -> Tensor:
        """Signs ±1 of Square's first perturbation, [N, channels, 1, width]."""

    def window(self, samples: Tensor, channels: int, room: tuple[int, int], query: int) -> tuple[Tensor, Tensor]:
        """Square's window for linf: corner int64 [N, 2], at most ``room`` from the origin, and signs [N, channels]."""

    def tile(self, samples: Tensor, channels: int, tile: int) -> tuple[Tensor, Tensor]:
        """One tile of Square's first perturbation in l2 and l1: whether it is transposed [N], signs [N, channels]."""

    def windows(
        self, samples: Tensor, channels: int, room: tuple[int, int], query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Square's two windows for l2 and l1: corners int64 [N, 4], whether to transpose the pattern [N], signs."""


def start_at_distance(model: ThreatModel, radius: float, x: Tensor, samples: Tensor, noise: Noise) -> Tensor:
    """A random point at distance ``radius`` from x [N, …] (in linf, in the coordinate that moves farthest), clipped.

    In l1 it is x plus normal noise, whose spread is the width of the box, projected to the ball and the box.
    """
    raw = noise.start(samples, x, model.norm)
    if model.norm == "l1":
        return model.replace(eps=radius).project(x + model.unit * raw.to(x), x)
    if model.norm == "linf":
        raw = raw / raw.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))
    return random_start(x, raw.to(x), norm=model.norm, eps=radius, lower=model.lower, upper=model.upper)


class KeyedNoise:
    """Numbers that depend on (seed, sample, attack, part, query) alone.

    They do not depend on the batch size, on the other samples that are still attacked or on the number of devices. An
    interrupted attack goes on with the same numbers.

    Args:
        seed: 0 ≤ seed < 2^63.
        attack: its name.
        part: target or restart, 0 ≤ part < 2^16.
    """

    depends_on_batch = False

    def __init__(self, seed: int, attack: str, part: int) -> None:
        self.seed = seed
        self._prefix = attack_key(attack) << 56 | part << 40

    def _uniform(self, samples: Tensor, count: int, draw: int) -> Tensor:
        return keyed_uniform(samples, count, seed=self.seed, stream=self._prefix | draw)

    def start(self, samples: Tensor, like: Tensor, norm: str) -> Tensor:
        count = like[0].numel()
        if norm == "linf":
            return (2 * self._uniform(samples, count, 0) - 1).to(like.dtype).view_as(like)
        radius, angle = self._uniform(samples, 2 * count, 0).split(count, dim=1)
        normal = (-2 * torch.log1p(-radius)).sqrt() * (2 * math.pi * angle).cos()  # Box and Muller
        return normal.to(like.dtype).view_as(like)

    def skip_start(self, samples: Tensor, like: Tensor) -> None:
        """Nothing to skip: numbers do not come from a stream."""

    def stripes(self, samples: Tensor, channels: int, width: int) -> Tensor:
        return _signs(self._uniform(samples, channels * width, 0)).view(-1, channels, 1, width)

    def window(self, samples: Tensor, channels: int, room: tuple[int, int], query: int) -> tuple[Tensor, Tensor]:
        draws = self._uniform(samples, 2 + channels, query + 1)
        return _corners(draws[:, :2], room), _signs(draws[:, 2:])

    def tile(self, samples: Tensor, channels: int, tile: int) -> tuple[Tensor, Tensor]:
        draws = self._uniform(samples, 1 + channels, (1 << 32) + tile)
        return draws[:, 0] > 0.5, _signs(draws[:, 1:])

    def windows(
        self, samples: Tensor, channels: int, room: tuple[int, int], query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        draws = self._uniform(samples, 5 + channels, query + 1)
        return _corners(draws[:, :4], (*room, *room)), draws[:, 4] > 0.5, _signs(draws[:, 5:])


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0)


def _corners(draws: Tensor, room: tuple[int, ...]) -> Tensor:
    """Whole numbers from 0 to ``room`` inclusive, so that a window reaches both edges of the image."""
    return (draws * _places(room, draws.device)).long()


@cache
def _places(room: tuple[int, ...], device: torch.device) -> Tensor:
    """``room`` + 1 on a device, kept there: a GPU that is sent numbers is waited for, at every query of Square."""
    return torch.tensor(room, device=device) + 1


class ReferenceNoise:
    """The stream of the official package (fra31/auto-attack): for comparisons with it, sample by sample.

    A CPU generator is seeded anew for every batch. Windows, and in linf their signs too, are shared by the whole batch;
    they never touch the last row and column. Results therefore depend on the batch size and on the other samples that
    are still attacked.
    """

    depends_on_batch = True

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device="cpu")

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu")

    def _signs(self, *shape: int) -> Tensor:
        return torch.sign(2 * self._rand(*shape) - 1)

    def start(self, samples: Tensor, like: Tensor, norm: str) -> Tensor:
        shape = tuple(like.shape)
        noise = 2 * self._rand(*shape) - 1 if norm == "linf" else self._randn(*shape)
        return noise.to(like)

    def skip_start(self, samples: Tensor, like: Tensor) -> None:
        self._randn(*like.shape)

    def stripes(self, samples: Tensor, channels: int, width: int) -> Tensor:
        return self._signs(len(samples), channels, 1, width).to(samples.device)

    def window(self, samples: Tensor, channels: int, room: tuple[int, int], query: int) -> tuple[Tensor, Tensor]:
        corner = self._corner(room).expand(len(samples), 2)
        signs = self._signs(channels, 1, 1).view(1, channels).expand(len(samples), channels)
        return corner.to(samples.device), signs.to(samples.device)

    def tile(self, samples: Tensor, channels: int, tile: int) -> tuple[Tensor, Tensor]:
        return self._transpose(samples), self._signs(len(samples), channels, 1, 1).view(-1, channels).to(samples.device)

    def windows(
        self, samples: Tensor, channels: int, room: tuple[int, int], query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        corners = torch.cat([self._corner(room), self._corner(room)]).expand(len(samples), 4).to(samples.device)
        transpose = self._transpose(samples)
        return corners, transpose, self._signs(len(samples), channels, 1, 1).view(-1, channels).to(samples.device)

    def _corner(self, room: tuple[int, int]) -> Tensor:
        return torch.cat([(limit * self._rand(1)).long() for limit in room])

    def _transpose(self, samples: Tensor) -> Tensor:
        return (self._rand(1) > 0.5).expand(len(samples)).to(samples.device)
