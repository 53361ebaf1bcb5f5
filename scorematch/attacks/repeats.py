"""Which proposals of Square were asked since a point last moved: the same question has the same answer.

With small windows on small grey images there are few different proposals. Once a search has come to a point that none
of them improves, all of its queries repeat earlier ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = 32  # of 64 bits for each sample
PROPOSALS = 64 * WORDS  # so many different ones are remembered; where there are more, few are asked twice


def numbers(corner: Tensor, sign: Tensor, room: tuple[int, int]) -> Tensor | None:
    """The number of each proposal of a window in linf, int64 [N]; None if there are more than can be remembered.

    Args:
        corner: int64 [N, 2], first row and column of the window, at most ``room`` from the origin.
        sign: [N, C], 1 or −1.
    """
    channels = sign.shape[1]
    if (room[0] + 1) * (room[1] + 1) << channels > PROPOSALS:
        return None
    number = corner[:, 0] * (room[1] + 1) + corner[:, 1]
    for of_channel in (sign > 0).unbind(1):
        number = 2 * number + of_channel
    return number


def nothing_asked(count: int, device: torch.device) -> Tensor:
    """The bits of ``count`` samples, int64 [N, WORDS]: a bit for each proposal."""
    return torch.zeros(count, WORDS, dtype=torch.int64, device=device)


def is_asked(asked: Tensor, number: Tensor) -> Tensor:
    """Whether the bits of a sample have its proposal, bool [N]."""
    return _word(asked, number) >> number % 64 & 1 == 1


def now_asked(asked: Tensor, number: Tensor) -> Tensor:
    """The bits with these proposals among them."""
    return asked.scatter(1, number[:, None] // 64, (_word(asked, number) | 1 << number % 64)[:, None])


def _word(asked: Tensor, number: Tensor) -> Tensor:
    return asked.gather(1, number[:, None] // 64).squeeze(1)
