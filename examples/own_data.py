"""A data set of one's own for ``--data module:function``: drawings of discs, squares and crosses.

    python -m training.run --objective trades --data examples.own_data:shapes --epochs 8

``shapes`` is what such a function has to be: called without arguments, it returns a ``training.data.Data`` with the
three splits. It must return the same each time it is called, as an evaluation and a resumed run call it again.
"""

import torch
from torch import Tensor

from training.data import Data

KINDS = ("disc", "square", "cross")
SIZE = 16  # height and width


def shapes() -> Data:
    """Grey images [1, 16, 16] in [0, 1] of three classes: 900 to train, 150 to validate, 300 to test."""
    generator = torch.Generator().manual_seed(0)
    x_train, y_train = drawings(900, generator)
    x_validation, y_validation = drawings(150, generator)
    x_test, y_test = drawings(300, generator)
    return Data(
        name="shapes",
        num_classes=len(KINDS),
        x_train=x_train,  # float32 [N, C, H, W], or [N, D] where these are not images
        y_train=y_train,  # int64 [N]
        x_validation=x_validation,
        y_validation=y_validation,
        x_test=x_test,
        y_test=y_test,
        lower=0.0,  # no attack leaves [lower, upper]
        upper=1.0,
        classes=KINDS,
    )


def drawings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many drawings [count, 1, 16, 16] and their labels, as many of each class."""
    y = torch.arange(count) % len(KINDS)
    radius = 3 + 3 * torch.rand(count, 1, 1, generator=generator)
    row, column = (radius + (SIZE - 1 - 2 * radius) * torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    down = (torch.arange(SIZE).view(1, -1, 1) - row).abs()
    right = (torch.arange(SIZE).view(1, 1, -1) - column).abs()
    inside = torch.maximum(down, right) <= radius
    disc = down.square() + right.square() <= radius.square()
    cross = inside & (torch.minimum(down, right) <= 1)
    of_class = torch.stack([disc, inside, cross])[y, torch.arange(count)]
    x = 0.8 * of_class.float() + 0.1 * torch.randn(count, SIZE, SIZE, generator=generator)
    return x.clamp(0, 1)[:, None], y
