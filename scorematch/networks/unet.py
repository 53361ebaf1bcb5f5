"""U-Nets of ``denoising_diffusion_pytorch`` as backbones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

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
    ) -> None:
        super().__init__()
        from denoising_diffusion_pytorch import Unet  # imports much; only image backbones pay for it

        self.unet: nn.Module = Unet(
            width, channels=channels, out_dim=outputs, dim_mults=tuple(multipliers), flash_attn=flash_attention
        )
        self.pooled = pooled

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        output: Tensor = self.unet(x, NOISE_SCALE * (noise + 2.0))
        return output.mean((2, 3)) if self.pooled else output
