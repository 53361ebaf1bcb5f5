"""Augmentation of image batches."""

import torch
from torch import Generator, Tensor
from torch.nn import functional

from scorematch.augmentation import mirror


def cut_and_mixed(x: Tensor, targets: Tensor, share: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al., ICCV 2019): each image gets a rectangle of another one, and its target the same share.

    All images of a batch get the same rectangle. Its area is 1 − λ of the image with λ uniform in [0, 1] (their
    α = 1), its centre is uniform in the image; what reaches beyond the edge is cut off, and targets are mixed by the
    pixels that are left.

    Args:
        x: [N, C, H, W] images.
        targets: [N, L] probabilities.
        share: the share of the batches that are mixed, in [0, 1]; the others stay as they are.
        generator: randomness, on the device of x; equally many numbers are drawn whether the batch is mixed or not.

    Returns:
        Images and targets, without a wait for the device.
    """
    height, width = x.shape[-2:]
    mixed, area, row, column = torch.rand(4, generator=generator, device=x.device).unbind()
    partner = torch.randperm(len(x), generator=generator, device=x.device)
    side = area.sqrt()
    inside = _interval(row, side, height)[:, None] & _interval(column, side, width) & (mixed < share)
    amount = inside.float().mean()
    return torch.where(inside, x[partner], x), targets * (1 - amount) + targets[partner] * amount


def _interval(centre: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of 0 … size − 1 lie within ``length`` around ``centre``, both shares of ``size``; bool [size]."""
    position = torch.arange(size, device=centre.device)
    pixels = (length * size).floor()
    first = (centre * size).floor() - (pixels / 2).floor()
    return (position >= first) & (position < first + pixels)


def augmented(x: Tensor, generator: Generator, *, shift: int, flip: bool, border: float = 0.0) -> Tensor:
    """Images x [N, C, H, W] shifted by up to ``shift`` pixels and, with ``flip``, mirrored with probability 1/2."""
    x = shifted(x, shift, generator, border)
    return mirror(x, generator)[0] if flip else x


def shifted(x: Tensor, pixels: int, generator: Generator, border: float = 0.0) -> Tensor:
    """Each image of x [N, C, H, W] moved by up to ``pixels`` in both directions, with ``border`` around it."""
    if not pixels:
        return x
    count, channels, height, width = x.shape
    padded = functional.pad(x, (pixels,) * 4, value=border)
    top, left = torch.randint(2 * pixels + 1, (2, count, 1), generator=generator, device=x.device)
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    sample = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]
