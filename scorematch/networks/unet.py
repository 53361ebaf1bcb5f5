"""U-Nets of ``denoising_diffusion_pytorch`` as backbones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..inputs import check_shape
from .denoiser import check_backbone

NOISE_SCALE = 250.0  # c_noise = ln(σ)/4 lies within ±1.5; that U-Net embeds time steps from 0 to 1000


class UNetBackbone(nn.Module):
    """The U-Net of Ho et al. (2020) as written by denoising_diffusion_pytorch: (x [N, C, H, W], noise [N]) → output.

    Args:
        channels: C of the images.
        outputs: channels of the output, (L + 1) × C for a :class:`scorematch.networks.Denoiser`.
        width: channels at full resolution.
        multipliers: channels of each resolution as multiples of ``width``; H and W must be divisible by
            2 ** (len(multipliers) − 1).
        flash_attention: use PyTorch's fused attention.
        pooled: average the output over the pixels: [N, outputs], for a noise-conditional classifier.
        dropout: probability of dropping a hidden feature while training, in [0, 1).
        conditions: K, if the network takes a third argument [N, K], such as how x was augmented: a linear function of
            it is added to the embedding of the noise level. 0 if it does not.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        flash_attention: bool = False,
        pooled: bool = False,
        dropout: float = 0.0,
        conditions: int = 0,
    ) -> None:
        super().__init__()
        check_backbone(dropout=dropout, conditions=conditions, channels=channels, outputs=outputs, width=width)
        check_shape("multipliers", multipliers)
        if not multipliers or 0 in multipliers:
            raise ValueError(f"multipliers must be whole numbers, at least one and each at least 1, got {multipliers}")
        from denoising_diffusion_pytorch import Unet  # imports much; only image backbones pay for it

        self.unet: nn.Module = Unet(
            width,
            channels=channels,
            out_dim=outputs,
            dim_mults=tuple(multipliers),
            flash_attn=flash_attention,
            dropout=dropout,
        )
        if conditions:
            self.unet.time_mlp = _Conditioned(self.unet.time_mlp, conditions, 4 * width)
        self.pooled = pooled

    def forward(self, x: Tensor, noise: Tensor, conditions: Tensor | None = None) -> Tensor:
        time = NOISE_SCALE * (noise + 2.0)
        if conditions is not None:
            time = torch.cat([time[:, None], conditions], 1)
        output: Tensor = self.unet(x, time)
        return output.mean((2, 3)) if self.pooled else output


class _Conditioned(nn.Module):
    """The embedding of time [N] plus a linear function of K conditions, where these stand behind it: [N, 1 + K].

    The U-Net hands its ``time`` to this module and to nothing else.
    """

    def __init__(self, embedding: nn.Module, conditions: int, width: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.conditions = nn.Linear(conditions, width, bias=False)

    def forward(self, time: Tensor) -> Tensor:
        if time.dim() == 1:
            embedded: Tensor = self.embedding(time)
            return embedded
        embedded = self.embedding(time[:, 0]) + self.conditions(time[:, 1:])
        return embedded
