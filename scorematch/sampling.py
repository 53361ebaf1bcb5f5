"""Draw samples with a score network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .networks.denoiser import Denoiser


def noise_levels(sigma_max: float, sigma_min: float, count: int) -> list[float]:
    """``count`` noise levels falling geometrically from sigma_max to sigma_min (standard deviations, > 0).

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 < sigma_min <= sigma_max:
        raise ValueError(f"0 < sigma_min ≤ sigma_max is needed, got {sigma_min} and {sigma_max}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), count, dtype=torch.float64).tolist()


@torch.no_grad()
def annealed_langevin(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    sigmas: list[float],
    class_labels: Tensor | None = None,
    steps_per_level: int = 10,
    step_ratio: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (Song & Ermon, NeurIPS 2019, Algorithm 1), with a last denoising step.

    At each level x ← x + α s(x; σ) + √(2α) ω with α = step_ratio · σ²; at the end x ← D(x; σ_min), which removes the
    noise of the last level (Jolicoeur-Martineau et al., ICLR 2021).

    Args:
        denoiser: the network.
        shape: [N, …] of the samples.
        sigmas: falling noise levels, standard deviations in input units.
        class_labels: int64 [N]; None samples the unconditional head.
        steps_per_level: Langevin steps at each level.
        step_ratio: α / σ², in (0, 1).
        generator: randomness, on the device of the network.

    Returns:
        [N, …], in the range of the data up to the error of the network; not clipped.
    """
    device, dtype = denoiser.center.device, denoiser.center.dtype

    def gaussian() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = denoiser.center + math.hypot(sigmas[0], denoiser.sigma_data) * gaussian()
    for sigma in sigmas:
        alpha = step_ratio * sigma**2
        for _ in range(steps_per_level):
            x = x + alpha * denoiser.score(x, sigma, class_labels) + math.sqrt(2 * alpha) * gaussian()
    return denoiser(x, sigmas[-1], class_labels)


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    sigmas: list[float],
    class_labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Probability-flow ODE dx/dσ = (x − D(x; σ)) / σ by Heun's method (Karras et al., 2022, Algorithm 1).

    It is deterministic once the first noise is drawn. The last step goes from the smallest level to zero. Arguments and
    result are those of :func:`annealed_langevin`.
    """
    device, dtype = denoiser.center.device, denoiser.center.dtype
    spread = math.hypot(sigmas[0], denoiser.sigma_data)  # of p_σ itself, as the largest level need not dwarf the data
    x = denoiser.center + spread * torch.randn(shape, generator=generator, device=device, dtype=dtype)
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        slope = (x - denoiser(x, sigma, class_labels)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0.0:
            slope = 0.5 * (slope + (ahead - denoiser(ahead, following, class_labels)) / following)
            ahead = x + (following - sigma) * slope
        x = ahead
    return x
