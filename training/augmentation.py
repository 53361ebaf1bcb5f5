"""Augmentation of image batches."""

import torch
from torch import Generator, Tensor
from torch.nn import functional


def augmented(x: Tensor, generator: Generator, *, shift: int, flip: bool) -> Tensor:
    """Images x [N, C, H, W] shifted by up to ``shift`` pixels and, with ``flip``, mirrored with probability 1/2."""
    x = shifted(x, shift, generator)
    return flipped(x, generator) if flip else x


def flipped(x: Tensor, generator: Generator) -> Tensor:
    """Each image of x [N, C, H, W] mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def shifted(x: Tensor, pixels: int, generator: Generator) -> Tensor:
    """Each image of x [N, C, H, W] moved by up to ``pixels`` in both directions, zeros moving in."""
    if not pixels:
        return x
    count, channels, height, width = x.shape
    padded = functional.pad(x, (pixels,) * 4)
    top, left = torch.randint(2 * pixels + 1, (2, count, 1), generator=generator, device=x.device)
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    sample = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]
