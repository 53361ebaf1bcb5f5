"""A denoiser D(x; σ, y) of all classes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """Preconditioned denoiser with one head a class and an unconditional head.

    D_y(x; σ) estimates E[clean x | noisy x, y]; the score of p_σ is (D_y − x) / σ² (Vincent, 2011). The
    preconditioning is that of Karras et al. (NeurIPS 2022), Table 1: D = c_skip x + c_out F(c_in x; c_noise), which
    keeps inputs, outputs and targets of the backbone F at unit scale for every σ. All heads come from one evaluation
    of F, since direct SCORE needs the scores of all classes at each point of an attack.

    Args:
        backbone: maps (x [N, …], c_noise [N]) to [N, H · C, …], where x is [N, C, …] and H = num_classes + 1: the
            heads in the order of the classes, the unconditional one last.
        num_classes: L.
        center: mean of the data, a number or a tensor that broadcasts against x; subtracted before and added after.
        sigma_data: standard deviation of the data about ``center``, in input units; > 0.

    Raises:
        ValueError: an argument is outside its range.
    """

    center: Tensor

    def __init__(
        self, backbone: nn.Module, *, num_classes: int, sigma_data: float, center: Tensor | float = 0.0
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not sigma_data > 0.0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.backbone = backbone
        self.num_classes = num_classes
        self.sigma_data = sigma_data
        self.register_buffer("center", torch.as_tensor(center, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """D(x; σ, y) [N, …] for x [N, …], σ a number or [N], labels int64 [N]; None is the unconditional head."""
        heads = self.denoise_all(x, sigma)
        if class_labels is None:
            return heads[:, -1]
        return heads[torch.arange(len(x), device=x.device), class_labels]

    def denoise_all(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """All heads, [N, L + 1, …]: D_1 … D_L, then the unconditional one."""
        centred, sigma_, total, output = self._heads(x, sigma)
        skip, scale = (self.sigma_data / total).square(), sigma_ * self.sigma_data / total
        return (skip * centred + self.center.to(x.dtype))[:, None] + scale[:, None] * output

    def all_scores(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Scores of all heads at x, [N, L + 1, …]: ∇ₓ log p_σ(x|y) for each class, then ∇ₓ log p_σ(x)."""
        return self._scores(x, sigma, self.num_classes + 1)

    def class_scores(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """∇ₓ log p_σ(x|y) of every class at x, [N, L, …], contiguous."""
        return self._scores(x, sigma, self.num_classes)

    def score(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """∇ₓ log p_σ(x|y) [N, …] for labels int64 [N], or ∇ₓ log p_σ(x) without labels."""
        scores = self.all_scores(x, sigma)
        if class_labels is None:
            return scores[:, -1]
        return scores[torch.arange(len(x), device=x.device), class_labels]

    def _scores(self, x: Tensor, sigma: Tensor | float, heads: int) -> Tensor:
        # (D − x) / σ² with the preconditioning multiplied out, t² = σ² + σ_data²: −(x − c) / t² + F σ_data / (σ t)
        centred, sigma_, total, output = self._heads(x, sigma)
        base = -centred / total.square()
        return torch.addcmul(base[:, None], (self.sigma_data / (sigma_ * total))[:, None], output[:, :heads])

    def _heads(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x − center, σ and √(σ² + σ_data²) shaped to broadcast against x, and F [N, L + 1, …]."""
        # A tensor made of a number by as_tensor would be copied to a GPU, and waited for.
        noise = sigma.to(x) if isinstance(sigma, Tensor) else x.new_full((1,), sigma)
        noise = noise.expand(len(x))
        sigma_ = noise.reshape(-1, *[1] * (x.dim() - 1))
        total = (sigma_.square() + self.sigma_data**2).sqrt()
        centred = x - self.center.to(x.dtype)
        output = self.backbone(centred / total, noise.log() / 4)
        return centred, sigma_, total, output.reshape(len(x), self.num_classes + 1, *x.shape[1:])


class NoiseEmbedding(nn.Module):
    """Sines and cosines of c_noise [N] at learned-free, log-spaced frequencies, then a linear layer: [N, width]."""

    frequencies: Tensor

    def __init__(self, width: int, count: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(count) * 0.5)
        self.linear = nn.Linear(2 * count + 1, width)

    def forward(self, noise: Tensor) -> Tensor:
        phase = noise[:, None] * self.frequencies.to(noise.dtype)
        embedding: Tensor = self.linear(torch.cat([noise[:, None], phase.sin(), phase.cos()], 1))
        return embedding


def feature_count(shape: Sequence[int]) -> int:
    """Number of features of one sample of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count
