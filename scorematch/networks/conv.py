"""A residual convolutional network for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .denoiser import NoiseEmbedding


class ConvBackbone(nn.Module):
    """Residual convolutions at full resolution, conditional on the noise level: (x [N, C, H, W], noise [N]) → output.

    For images small enough (8×8 digits) that no down-sampling is needed: half of the blocks are dilated by two, and
    the position of each pixel is an input.

    Args:
        channels: C of the images.
        outputs: channels of the output; with ``pooled`` the number of outputs.
        width: hidden channels.
        depth: residual blocks.
        pooled: average over the pixels before the last layer: [N, outputs], for a noise-conditional classifier;
            else [N, outputs, H, W], for a denoiser.
        dropout: probability of dropping a hidden feature while training, in [0, 1).
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 4,
        pooled: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(channels + 2, width, 3, padding=1)
        self.noise = NoiseEmbedding(width)
        self.blocks = nn.ModuleList(_Block(width, dilation=1 + i % 2, dropout=dropout) for i in range(depth))
        self.pooled = pooled
        self.outlet = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU())
        self.last: nn.Module = nn.Linear(width, outputs) if pooled else nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        rows = torch.linspace(-1.0, 1.0, x.shape[2], dtype=x.dtype, device=x.device)[:, None].expand(x.shape[2:])
        columns = torch.linspace(-1.0, 1.0, x.shape[3], dtype=x.dtype, device=x.device).expand(x.shape[2:])
        position = torch.stack([rows, columns]).expand(len(x), -1, -1, -1)
        h = self.inlet(torch.cat([x, position], 1))
        embedding = self.noise(noise)[:, :, None, None]
        for block in self.blocks:
            h = block(h, embedding)
        h = self.outlet(h)
        output: Tensor = self.last(h.mean((2, 3)) if self.pooled else h)
        return output


class _Block(nn.Module):
    def __init__(self, width: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.second = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
        )

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        update: Tensor = self.second(self.first(h) + embedding)
        return h + update
