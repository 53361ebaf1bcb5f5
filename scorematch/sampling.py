"""Draw samples with a score network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .inputs import check_count, check_instance, check_shape, check_share, check_strided
from .networks.denoiser import Denoiser
from .ops._checks import check_number


def noise_levels(sigma_max: float, sigma_min: float, count: int) -> list[float]:
    """``count`` noise levels falling geometrically from sigma_max to sigma_min (standard deviations, > 0).

    Raises:
        TypeError: count is not a whole number.
        ValueError: an argument is outside its range.
    """
    check_number("sigma_max", sigma_max)
    check_number("sigma_min", sigma_min)
    if not 0.0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min ≤ sigma_max is needed, both finite, got {sigma_min} and {sigma_max}")
    check_count("count", count)
    return torch.logspace(
        math.log10(sigma_max), math.log10(sigma_min), count, dtype=torch.float64, device="cpu"
    ).tolist()


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
        sigmas: falling noise levels, at least one; standard deviations in input units, > 0.
        class_labels: int64 [N] in [0, L); None samples the unconditional head.
        steps_per_level: Langevin steps at each level, ≥ 1.
        step_ratio: α / σ², in (0, 1).
        generator: randomness, on the device of the network.

    Returns:
        [N, …], in the range of the data up to the error of the network; not clipped.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    _check(denoiser, shape, sigmas, class_labels)
    check_count("steps_per_level", steps_per_level)
    check_share("step_ratio", step_ratio, zero=False)
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

    It is deterministic once the first noise is drawn. The last step goes from the smallest level to zero. Arguments,
    result and errors are those of :func:`annealed_langevin`.
    """
    _check(denoiser, shape, sigmas, class_labels)
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


def _check(denoiser: Denoiser, shape: tuple[int, ...], sigmas: list[float], class_labels: Tensor | None) -> None:
    check_instance("denoiser", denoiser, Denoiser)
    check_shape("shape", shape)
    if len(shape) < 2:
        raise ValueError(f"shape must be [N, …], got {list(shape)}")
    if isinstance(sigmas, str) or not isinstance(sigmas, Sequence):
        raise TypeError(f"sigmas must be a sequence of noise levels, got {type(sigmas).__name__}")
    for sigma in sigmas:
        check_number("each of sigmas", sigma)
    falls = all(later <= sigma for sigma, later in pairwise(sigmas))
    if not len(sigmas) or not falls or not all(0.0 < sigma < math.inf for sigma in sigmas):
        raise ValueError(f"sigmas must be one or more levels that fall, positive and finite, got {list(sigmas)}")
    if class_labels is None:
        return
    check_strided(class_labels, "class_labels")
    if class_labels.device != denoiser.center.device:
        raise ValueError(f"class_labels is on {class_labels.device} but the denoiser is on {denoiser.center.device}")
    if class_labels.dtype != torch.int64:
        raise TypeError(f"class_labels must be int64 [N], got {class_labels.dtype} {list(class_labels.shape)}")
    if class_labels.shape != tuple(shape[:1]):
        raise ValueError(f"class_labels must be [N] for samples {list(shape)}, got {list(class_labels.shape)}")
    low, high = (int(v) for v in torch.aminmax(class_labels)) if len(class_labels) else (0, 0)
    if low < 0 or high >= denoiser.num_classes:
        raise ValueError(f"class_labels must lie in [0, {denoiser.num_classes}), got values in [{low}, {high}]")
