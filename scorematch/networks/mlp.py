"""A residual multilayer perceptron for vectors and very small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..inputs import check_shape
from .denoiser import NoiseEmbedding, check_backbone, feature_count


class MLPBackbone(nn.Module):
    """Residual MLP, conditional on the noise level: (x [N, *shape], noise [N]) → [N, outputs].

    Used as the backbone of a :class:`scorematch.networks.Denoiser` (outputs = (L + 1) × features) and as a
    noise-conditional classifier (outputs = L).

    Args:
        shape: shape of one sample.
        outputs: number of outputs.
        width: hidden features.
        depth: residual blocks.
        dropout: probability of dropping a hidden feature while training, in [0, 1).
        conditions: K, if the network takes a third argument [N, K], such as how x was augmented; 0 if it does not.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        width: int = 256,
        depth: int = 3,
        dropout: float = 0.0,
        conditions: int = 0,
    ) -> None:
        super().__init__()
        check_shape("shape", shape)
        check_backbone(dropout=dropout, conditions=conditions, depth=depth, outputs=outputs, width=width)
        self.inlet = nn.Linear(feature_count(shape), width)
        self.noise = NoiseEmbedding(width, conditions=conditions)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, x: Tensor, noise: Tensor, conditions: Tensor | None = None) -> Tensor:
        h = self.inlet(x.flatten(1)) + self.noise(noise, conditions)
        for block in self.blocks:
            h = h + block(h)
        output: Tensor = self.outlet(h)
        return output
