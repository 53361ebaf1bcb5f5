"""Objectives without an attack: standard training, and training under Gaussian noise."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..divergences import check_kind
from ..inputs import check_inputs, check_like, check_real
from ..noise import normal_like
from ..ops._checks import check_number
from .outcome import Outcome, accuracy, divergence_from, training_logits, warn_of_probabilities


def standard(model: nn.Module, x: Tensor, y: Tensor, *, divergence: str = "kl") -> Outcome:
    """Standard training, Eq. (1): D(y ‖ q(x)).

    Args:
        model: maps [N, …] to logits [N, L].
        x: [N, …] inputs.
        y: int64 [N] labels, or probabilities [N, L].
        divergence: name of D, see :data:`scorematch.divergences.KINDS`.

    Returns:
        An outcome whose ``x_adv`` is x.

    Raises:
        TypeError, ValueError: an argument is not what it must be; see :func:`scorematch.inputs.check_inputs` for x, y.
    """
    check_kind(divergence)
    check_inputs(model, x, y, None)
    logits = training_logits(model, x)
    warn_of_probabilities(model, logits)
    return Outcome(divergence_from(y, logits, divergence), x, {"accuracy": accuracy(logits, y)})


def gaussian(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float | tuple[float, float] | Tensor,
    gamma: float = 0.0,
    alignment: float | None = None,
    divergence: str = "kl",
    antithetic: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Outcome:
    """Gaussian-augmented training, Eqs. (35) to (37), with y the label of clean x and ω standard Gaussian noise.

    With R(σ) = E[D(y ‖ q(x + σω))] (Eqs. 9 and 35; R(0) is that of :func:`standard`) the objective is
    (R(σ) − γ R(0)) / (1 − γ), in the form

        R(0) + (R(σ) − R(0)) / (1 − γ).

    The first term is standard training. The second is, for D = KL, (σ² / 2) / (1 − γ) times the alignment
    E[∇ₓ log q(y|x)ᵀ ∇ₓ log p_d(x|y)], up to o(σ²) (Theorem 5 and Eq. 10), so its coefficient is

        σ² / (2 (1 − γ)).

    The paper's σ is the variance of the noise; ours is a standard deviation, so the paper's coefficient σ/(2(1−γ)) is
    this one.

    - γ = 0, the default: R(σ), plain augmentation (Cohen et al., ICML 2019), with one forward pass.
    - γ < 1: Eq. (36). The minimum draws ∇ₓ log q(y|x) towards −∇ₓ log p_d(x|y). A γ above 0 magnifies that term, one
      below 0 shrinks it, and γ → −∞ leaves R(0).
    - γ > 1: Eq. (37), which draws it towards +∇ₓ log p_d(x|y). The left side, (γ R(0) − R(σ)) / (γ − 1), is that of
      Eq. (36) term by term: the two equations are one function of γ, and γ alone decides the sign.

    For γ ≤ 0 both losses have weights of at least 0, which sum to 1, and the objective is at least 0. Otherwise a
    divergence is subtracted (the clean one for 0 < γ < 1, the noisy one for γ > 1). Then single values may be negative,
    and with D = KL nothing bounds the objective from below for networks in general: watch ``natural`` and ``noisy``.

    The noise is not clipped to any box: p_d convolved with N(0, σ² I) has none. In training mode batch norm sees the
    clean batch and each noisy one in passes of their own.

    Args:
        model: maps [N, …] to logits [N, L].
        x: [N, …] inputs.
        y: int64 [N] labels, or probabilities [N, L] at clean x.
        sigma: standard deviation of the noise in input units, finite and ≥ 0: a number; a range (low, high) from which
            each sample draws its own, see :func:`noise_levels`; or [N], those of the samples, of the dtype of x.
        gamma: γ, finite and not 1.
        alignment: c, in squared input units, finite and not 0, in the place of ``gamma``: each sample has the γ with
            σ² / (2 (1 − γ)) = c, which is γ = 1 − σ² / (2c). Negative for Eq. (37). Asks for σ > 0.
        divergence: name of D, see :data:`scorematch.divergences.KINDS`. The equations are about ``"kl"``.
        antithetic: R(σ) is the mean over ω and −ω, with one more forward pass. Then the part of the loss that is odd in
            the noise, of order σ / (1 − γ), cancels. Near γ = 1 that part dominates the variance of the loss.
        noise: ω itself, [N, …] as x is; None draws it.
        generator: randomness of σ, then of ω, on the device of x.

    Returns:
        An outcome whose ``x_adv`` is x + σω. Where γ is not 0, its metrics have ``natural`` and ``noisy``, the means of
        the two divergences.

    Raises:
        TypeError, ValueError: an argument is not what it must be; see :func:`scorematch.inputs.check_inputs` for x, y.
            The values of ``sigma`` as a tensor are looked at on the CPU only.
    """
    check_kind(divergence)
    check_inputs(model, x, y, None)
    check_number("gamma", gamma)
    if not math.isfinite(gamma) or gamma == 1.0:
        raise ValueError(f"gamma must be finite and not 1, got {gamma}")
    if alignment is not None:
        check_number("alignment", alignment)
        if not math.isfinite(alignment) or alignment == 0.0:
            raise ValueError(f"alignment must be finite and not 0, got {alignment}")
        if gamma != 0.0:
            raise ValueError(f"gamma must be left out where alignment decides it, got gamma {gamma} beside {alignment}")
    levels = noise_levels(x, sigma, generator, positive=alignment is not None)
    if noise is None:
        noise = normal_like(x, generator)
    else:
        check_like("noise", noise, x)
    shift = levels.view(-1, *[1] * (x.dim() - 1)) * noise.detach()
    noisy_x = (x + shift).detach()
    logits = training_logits(model, noisy_x)
    warn_of_probabilities(model, logits)
    noisy = divergence_from(y, logits, divergence)
    if antithetic:
        noisy = 0.5 * (noisy + divergence_from(y, training_logits(model, (x - shift).detach()), divergence))
    metrics = {"accuracy": accuracy(logits, y)}
    if alignment is None and gamma == 0.0:
        return Outcome(noisy, noisy_x, metrics)
    natural = divergence_from(y, training_logits(model, x), divergence)
    magnified = 1.0 / (1.0 - gamma) if alignment is None else 2.0 * alignment / levels.square()
    metrics |= {"natural": natural.detach().mean(), "noisy": noisy.detach().mean()}
    return Outcome(natural + magnified * (noisy - natural), noisy_x, metrics)


def noise_levels(
    x: Tensor,
    sigma: float | tuple[float, float] | Tensor,
    generator: torch.Generator | None = None,
    *,
    positive: bool = False,
) -> Tensor:
    """The standard deviation of the noise of each sample, for :func:`gaussian`.

    From a range, σ² is uniform in [low², high²]: the paper samples its σ, a variance, uniformly for each data point.

    Args:
        x: [N, …] inputs, floating point.
        sigma: a number, a range (low, high), or [N] of the dtype of x; finite and ≥ 0, in input units.
        generator: randomness, on the device of x; a range alone draws, N numbers.
        positive: whether 0 is refused.

    Returns:
        [N], on the device of x and of its dtype.

    Raises:
        TypeError, ValueError: ``sigma`` is none of these; the values of a tensor are looked at on the CPU only.
    """
    least = "above 0" if positive else "at least 0"
    check_real(x, batch=False)

    def allowed(value: float) -> bool:
        return math.isfinite(value) and (value > 0.0 if positive else value >= 0.0)

    if isinstance(sigma, Tensor):
        check_like("sigma", sigma, x, x.shape[:1])
        if sigma.device.type == "cpu" and len(sigma):
            low, high = (float(value) for value in torch.aminmax(sigma.detach()))
            if not (allowed(low) and allowed(high)):
                raise ValueError(f"sigma must be finite and {least}, got values in [{low:g}, {high:g}]")
        return sigma.detach()
    if isinstance(sigma, (tuple, list)):
        if len(sigma) != 2 or not all(allowed(value) for value in sigma) or sigma[0] > sigma[1]:
            raise ValueError(f"sigma as a range must be (low, high), both finite and {least}, got {tuple(sigma)}")
        low, high = sigma
        share = torch.empty(len(x), dtype=x.dtype, device=x.device).uniform_(generator=generator)
        return (low**2 + (high**2 - low**2) * share).sqrt()
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        raise TypeError(f"sigma must be a number, a range (low, high) or a tensor [N], got {type(sigma).__name__}")
    if not allowed(sigma):
        raise ValueError(f"sigma must be finite and {least}, got {sigma}")
    return x.new_full((len(x),), float(sigma))


def alignment_of(sigma: float, gamma: float) -> float:
    """σ² / (2 (1 − γ)), the coefficient of the alignment term in Eqs. (36) and (37), with σ a standard deviation.

    Args:
        sigma: standard deviation of the noise in input units, finite and ≥ 0.
        gamma: γ, finite and not 1.

    Returns:
        The coefficient in squared input units; negative for γ > 1, the sign of Eq. (37).

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    if not math.isfinite(gamma) or gamma == 1.0:
        raise ValueError(f"gamma must be finite and not 1, got {gamma}")
    return sigma**2 / (2.0 * (1.0 - gamma))


class Annealed(NamedTuple):
    """What :func:`annealed` returns: the ``sigma`` and ``gamma`` of :func:`gaussian` at a point of the training."""

    sigma: float
    gamma: float


def annealed(progress: float, *, sigma: float, final_sigma: float, gamma: float = 0.0) -> Annealed:
    """σ and γ of :func:`gaussian` at one point of a training that keeps σ² / (2 (1 − γ)) constant (after Eq. 36).

    σ² goes in a straight line from ``sigma``² to ``final_sigma``², and γ(t) = 1 − (1 − γ(0)) σ(t)² / σ(0)². The paper
    keeps its σ/(2(1−γ)) constant; its σ is a variance, so that is this one. As σ → 0, γ → 1: what remains is R(0) and
    the alignment term to first order, without the harm that large noise does. Take ``antithetic`` with it.

    Args:
        progress: the share of the training that is done, in [0, 1].
        sigma: standard deviation at the start, in input units, finite and > 0.
        final_sigma: at the end, finite and > 0.
        gamma: γ at the start, finite and not 1.

    Returns:
        σ > 0, and γ, which stays on its side of 1.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    for name, value in (("sigma", sigma), ("final_sigma", final_sigma)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be finite and positive, got {value}")
    if not math.isfinite(gamma) or gamma == 1.0:
        raise ValueError(f"gamma must be finite and not 1, got {gamma}")
    share = (1.0 - progress) + progress * (final_sigma / sigma) ** 2  # of the variance at the start
    return Annealed(sigma * math.sqrt(share), 1.0 - (1.0 - gamma) * share)
