"""Augmentation of clean batches in the training of score networks.

An augmentation maps images [N, C, H, W] and a generator to two things: the augmented images, and what the network is
told of them, conditions [N, K] or None. A score network that is not told learns the density of the augmented images. A
network that is told learns a density for each transformation. Where the conditions are zero, this is the density of the
data itself (Karras et al., NeurIPS 2022, appendix F.2).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample

from .inputs import check_single, check_strided
from .ops._checks import check_number


def mirror(x: Tensor, generator: Generator) -> tuple[Tensor, None]:
    """Mirror each image left to right with probability 1/2; the network is not told.

    For data in which an image and its mirror image are equally likely.

    Args:
        x: [N, C, H, W].
        generator: on the device of x.

    Returns:
        Images like x, and None.
    """
    _check(x)
    flipped = torch.rand(len(x), generator=generator, device=x.device, dtype=torch.float32) < 0.5
    return torch.where(flipped[:, None, None, None], x.flip(3), x), None


class NonLeaking:
    """Geometric augmentation that the network is told of, and that therefore does not leak into its samples.

    Each of five transformations is drawn for each image with the given probability, independently of the others:
    mirrored top to bottom, every second time; scaled by 2^(.2 n); rotated by a uniform angle; stretched by 2^(.2 n)
    along one uniform direction and shrunk as much across; moved by .125 n of the width and of the height, where each n
    is standard normal. With ``mirrored``, every second image is first mirrored left to right, and the network is told.
    The image is resampled once, bilinearly, and reflected at its border. Images are taken to be square.

    Args:
        probability: of each transformation, in [0, 1].
        mirrored: whether to mirror left to right.

    Raises:
        TypeError, ValueError: ``probability`` is no number, or lies outside [0, 1].
    """

    conditions = 9

    def __init__(self, probability: float = 0.12, *, mirrored: bool = True) -> None:
        check_number("probability", probability)
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        self.probability = probability
        self.mirrored = mirrored

    def __call__(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Augmented x [N, C, H, W] and conditions [N, 9], zero where nothing was done."""
        _check(x)
        check_single(x)
        count = len(x)
        if not count:
            return x, x.new_zeros(0, self.conditions)
        uniform = torch.rand(count, 10, generator=generator, device=x.device, dtype=x.dtype)
        normal = torch.empty(count, 4, device=x.device, dtype=x.dtype).normal_(generator=generator)
        chosen = (uniform[:, :5] < self.probability).to(x.dtype)
        left_right = (uniform[:, 5] < 0.5).to(x.dtype) * self.mirrored
        top_bottom = chosen[:, 0] * (uniform[:, 6] < 0.5)
        scale = chosen[:, 1] * normal[:, 0]
        angle = chosen[:, 2] * (2 * uniform[:, 7] - 1) * math.pi
        stretch, direction = chosen[:, 3] * normal[:, 1], (2 * uniform[:, 8] - 1) * math.pi
        move = chosen[:, 4, None] * normal[:, 2:]

        matrix = _diagonal(1 - 2 * left_right, 1 - 2 * top_bottom)
        matrix = _diagonal(torch.exp2(0.2 * scale), torch.exp2(0.2 * scale)) @ matrix
        matrix = _rotation(angle) @ matrix
        along = _diagonal(torch.exp2(0.2 * stretch), torch.exp2(-0.2 * stretch))
        matrix = _rotation(direction) @ along @ _rotation(-direction) @ matrix
        # The grid says where each pixel of the result comes from, in units of half the image.
        source = torch.linalg.inv_ex(matrix).inverse
        offset = -source @ (0.25 * move)[..., None]
        grid = affine_grid(torch.cat([source, offset], 2), list(x.shape), align_corners=False)
        resampled = grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        told = torch.stack(
            [
                left_right,
                top_bottom,
                scale,
                angle.cos() - 1,
                angle.sin(),
                stretch * direction.cos(),
                stretch * direction.sin(),
                move[:, 0],
                move[:, 1],
            ],
            1,
        )
        untouched = (told == 0).all(1)
        return torch.where(untouched[:, None, None, None], x, resampled), told


def _check(x: Tensor) -> None:
    check_strided(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must be images [N, C, H, W], got {list(x.shape)}")


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([first, second], 1))


def _rotation(angle: Tensor) -> Tensor:
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([cosine, -sine, sine, cosine], 1).reshape(-1, 2, 2)
