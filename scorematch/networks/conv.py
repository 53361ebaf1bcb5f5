"""A residual convolutional network for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .denoiser import NoiseEmbedding, check_backbone


class ConvBackbone(nn.Module):
    """Residual convolutions at one resolution, conditional on the noise level: (x [N, C, H, W], noise [N]) → output.

    It is for small images, or larger ones in patches. Half of the blocks are dilated by two, and the position of each
    pixel is an input. It has no attention and works at one resolution, so that a CPU runs it many times as fast as a
    U-Net.

    Args:
        channels: C of the images.
        outputs: channels of the output; with ``pooled`` the number of outputs.
        width: hidden channels, a multiple of 8, at least 16.
        depth: residual blocks.
        pooled: average over the pixels before the last layer: [N, outputs], for a noise-conditional classifier;
            else [N, outputs, H, W], for a denoiser.
        patch: rows and columns of the patches; must divide H and W. The pixels of a patch become the channels of one
            pixel, and the output is spread over the patch again. 1 works at full resolution. 2 works at half of it:
            the same width costs a quarter and sees twice as far.
        dropout: probability of dropping a hidden feature while training, in [0, 1).
        conditions: K, if the network takes a third argument [N, K], such as how x was augmented; 0 if it does not.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or ``width`` is not a multiple of 8, or is 8. With
            8, each group of the group norm has one channel, and the norm takes the noise level out again.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 4,
        pooled: bool = False,
        patch: int = 1,
        dropout: float = 0.0,
        conditions: int = 0,
    ) -> None:
        super().__init__()
        check_backbone(
            dropout=dropout,
            conditions=conditions,
            depth=depth,
            channels=channels,
            outputs=outputs,
            width=width,
            patch=patch,
        )
        if width < 16 or width % 8:
            raise ValueError(f"width must be a multiple of 8 and at least 16, got {width}")
        self.patch = patch
        self.inlet = nn.Conv2d(channels * patch**2 + 2, width, 3, padding=1)
        self.noise = NoiseEmbedding(width, conditions=conditions)
        self.blocks = nn.ModuleList(_Block(width, dilation=1 + i % 2, dropout=dropout) for i in range(depth))
        self.pooled = pooled
        self.outlet = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU())
        self.last: nn.Module = nn.Linear(width, outputs) if pooled else nn.Conv2d(width, outputs * patch**2, 1)

    def forward(self, x: Tensor, noise: Tensor, conditions: Tensor | None = None) -> Tensor:
        if self.patch > 1:
            x = pixel_unshuffle(x, self.patch)
        rows = torch.linspace(-1.0, 1.0, x.shape[2], dtype=x.dtype, device=x.device)[:, None].expand(x.shape[2:])
        columns = torch.linspace(-1.0, 1.0, x.shape[3], dtype=x.dtype, device=x.device).expand(x.shape[2:])
        position = torch.stack([rows, columns]).expand(len(x), -1, -1, -1)
        h = self.inlet(torch.cat([x, position], 1))
        embedding = self.noise(noise, conditions)[:, :, None, None]
        for block in self.blocks:
            h = block(h, embedding)
        h = self.outlet(h)
        if self.pooled:
            output: Tensor = self.last(h.mean((2, 3)))
            return output
        output = self.last(h)
        return pixel_shuffle(output, self.patch) if self.patch > 1 else output  # which would copy it even for 1


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
