"""Score matching: how a network learns ∇ₓ log p(x).

==========================  ===================================================================  =====================
function                    minimised by                                                          source
==========================  ===================================================================  =====================
denoising                   s(x̃; σ, y) = ∇ log p_σ(x̃|y)                                           Vincent (2011)
sliced                      s(x) = ∇ log p(x)                                                     Song et al. (2019)
finite_difference           the same, without a second derivative                                 Pang et al. (2020)
denoising_likelihood        ∇ log p(y|x̃) + s(x̃) = ∇ log p_σ(x̃|y) for a classifier                Chao et al. (2022)
==========================  ===================================================================  =====================

σ is a standard deviation everywhere (in the paper's section 4.3 and Appendix C it is a variance).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .networks.denoiser import Denoiser

Score = Callable[[Tensor], Tensor]
Network = TypeVar("Network", bound=nn.Module)


def denoising(denoiser: Denoiser, x: Tensor, y: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Denoising score matching of the labelled and the unconditional head together.

    ½ λ(σ) (‖D_y(x̃) − x‖² + ‖D_∅(x̃) − x‖²) / features, x̃ = x + σ ω, with λ = (σ² + σ_data²) / (σ σ_data)², which
    gives every noise level the same weight at the start of training (Karras et al., 2022).

    Args:
        denoiser: the network.
        x: [N, …] clean inputs.
        y: int64 [N] labels.
        sigma: [N] noise levels, standard deviations in input units, > 0.
        noise: [N, …] standard Gaussian ω.

    Returns:
        [N], dimensionless.
    """
    scale = sigma.reshape(-1, *[1] * (x.dim() - 1))
    heads = denoiser.denoise_all(x + scale * noise, sigma)
    both = torch.stack([heads[torch.arange(len(x), device=x.device), y], heads[:, -1]], 1)
    weight = (sigma.square() + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data).square()
    return weight * (both - x[:, None]).flatten(1).square().mean(1)


def sliced(score: Score, x: Tensor, projection: Tensor) -> Tensor:
    """Sliced score matching: vᵀ ∇(vᵀ s) + ½ (vᵀ s)² for each sample (Song et al., UAI 2019, Eq. 7).

    Args:
        score: maps x [N, …] to s(x) [N, …], each sample by itself.
        x: [N, …].
        projection: [N, …] v with E[v vᵀ] = I (Gaussian or Rademacher).

    Returns:
        [N]; equals ½ E‖s − ∇ log p‖² up to a constant of the data.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = (score(x) * projection).flatten(1).sum(1)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (curvature * projection).flatten(1).sum(1) + 0.5 * slope.square()


def finite_difference(score: Score, x: Tensor, projection: Tensor, *, step: float) -> Tensor:
    """Sliced score matching with the derivative along v replaced by a central difference (Pang et al., NeurIPS 2020).

    With s± = s(x ± step · v): vᵀ (s₊ − s₋) / (2 step) + ⅛ (vᵀ (s₊ + s₋))², which differs from :func:`sliced` by
    O(step²) and needs no second backward pass.

    Args:
        score: maps x [N, …] to s(x) [N, …], each sample by itself.
        x: [N, …].
        projection: [N, …] v with E[v vᵀ] = I.
        step: length of the difference along v, in input units; > 0.

    Returns:
        [N].

    Raises:
        ValueError: ``step`` is not positive.
    """
    if not step > 0.0:
        raise ValueError(f"step must be positive, got {step}")
    ahead = (score(x + step * projection) * projection).flatten(1).sum(1)
    behind = (score(x - step * projection) * projection).flatten(1).sum(1)
    return (ahead - behind) / (2 * step) + 0.125 * (ahead + behind).square()


def denoising_likelihood(
    classifier: nn.Module, unconditional: Tensor, x_noisy: Tensor, y: Tensor, sigma: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Denoising likelihood score matching (Chao et al., ICLR 2022, Eq. 11), beside the classifier's cross-entropy.

    ½ σ² ‖∇ log p(y|x̃) + s(x̃) − (−ω/σ)‖² / features, with s the (estimated) unconditional score, held fixed.

    Args:
        classifier: maps (x [N, …], sigma [N]) to logits [N, L].
        unconditional: [N, …] s(x̃), without a graph.
        x_noisy: [N, …] x̃ = x + σ ω.
        y: int64 [N] labels.
        sigma: [N] noise levels, > 0.
        noise: [N, …] ω.

    Returns:
        the matching loss [N] and the logits [N, L], both with a graph to the parameters.
    """
    with torch.enable_grad():
        x_noisy = x_noisy.detach().requires_grad_()
        logits = classifier(x_noisy, sigma)
        log_likelihood = -cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(log_likelihood, x_noisy, create_graph=True)
    scale = sigma.reshape(-1, *[1] * (gradient.dim() - 1))
    residual = scale * (gradient + unconditional) + noise
    return 0.5 * residual.flatten(1).square().mean(1), logits


@dataclass(frozen=True)
class Fit:
    """How a score network or a noisy classifier is trained.

    Attributes:
        steps: optimiser steps, ≥ 1.
        batch_size: clean samples a step, ≥ 1; each is used with ω and with −ω, which removes the part of the noise
            in the gradient that is odd in ω.
        lr: peak learning rate of Adam, > 0; warmed up over 5 % of the steps, then decayed with a cosine to zero.
        sigma_min, sigma_max: range of noise levels, standard deviations in input units, drawn log-uniformly.
        averaging: decay of the exponential moving average of the weights, in [0, 1); ramped up in the beginning.
        weight_decay: of AdamW, ≥ 0.
        likelihood_weight: weight of denoising likelihood score matching beside cross-entropy (classifiers only), ≥ 0.

    Raises:
        ValueError: a value is outside its range.
    """

    steps: int = 3000
    batch_size: int = 128
    lr: float = 1e-3
    sigma_min: float = 0.05
    sigma_max: float = 1.0
    averaging: float = 0.998
    weight_decay: float = 0.0
    likelihood_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0.0 < self.sigma_min <= self.sigma_max:
            raise ValueError(f"0 < sigma_min ≤ sigma_max is needed, got {self.sigma_min} and {self.sigma_max}")
        if not 0.0 <= self.averaging < 1.0:
            raise ValueError(f"averaging must lie in [0, 1), got {self.averaging}")
        for name in ("weight_decay", "likelihood_weight"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


Progress = Callable[[int, float], None]  # after each step: steps done (from 1), loss of that step


def fit_denoiser(
    denoiser: Denoiser,
    x: Tensor,
    y: Tensor,
    fit: Fit,
    *,
    generator: torch.Generator,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    progress: Progress | None = None,
) -> Denoiser:
    """Train a denoiser by :func:`denoising`, in place, and return it with averaged weights, in eval mode.

    Args:
        denoiser: the network.
        x: [M, …] training inputs, on the device of the network.
        y: int64 [M] labels.
        fit: how to train.
        generator: all randomness of the training, on the device of x.
        augment: applied to each clean batch.
        progress: called after each step.
    """

    def loss(batch: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        return denoising(denoiser, batch, labels, sigma, noise)

    return _fit(denoiser, x, y, fit, loss, generator, augment, progress)


def fit_classifier(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    fit: Fit,
    *,
    generator: torch.Generator,
    denoiser: Denoiser | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a noise-conditional classifier with cross-entropy on x + σω, in place; see :func:`fit_denoiser`.

    Args:
        network: maps (x [N, …], sigma [N]) to logits [N, L].
        denoiser: supplies the unconditional score of :func:`denoising_likelihood`; needed if, and only if,
            ``fit.likelihood_weight`` > 0.

    Raises:
        ValueError: a likelihood weight without a denoiser.
    """
    if fit.likelihood_weight > 0.0 and denoiser is None:
        raise ValueError("likelihood_weight > 0 needs a denoiser, which supplies the unconditional score")

    def loss(batch: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        noisy = batch + sigma.reshape(-1, *[1] * (batch.dim() - 1)) * noise
        if denoiser is None or fit.likelihood_weight == 0.0:
            return cross_entropy(network(noisy, sigma), labels, reduction="none")
        with torch.no_grad():
            unconditional = denoiser.score(noisy, sigma)
        matching, logits = denoising_likelihood(network, unconditional, noisy, labels, sigma, noise)
        return cross_entropy(logits, labels, reduction="none") + fit.likelihood_weight * matching

    return _fit(network, x, y, fit, loss, generator, augment, progress)


def _fit(
    network: Network,
    x: Tensor,
    y: Tensor,
    fit: Fit,
    loss_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    generator: torch.Generator,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    progress: Progress | None,
) -> Network:
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(fit.averaging)) if fit.averaging else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=fit.lr, weight_decay=fit.weight_decay)
    warm_up = max(1, fit.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / fit.steps))),
    )
    low, high = math.log(fit.sigma_min), math.log(fit.sigma_max)
    network.train()
    for step in range(1, fit.steps + 1):
        index = torch.randint(len(x), (fit.batch_size,), generator=generator, device=x.device)
        batch, labels = x[index], y[index]
        if augment is not None:
            batch = augment(batch, generator)
        sigma = (low + (high - low) * torch.rand(len(batch), generator=generator, dtype=x.dtype, device=x.device)).exp()
        noise = torch.empty_like(batch).normal_(generator=generator)
        loss = loss_of(
            torch.cat([batch, batch]),
            torch.cat([labels, labels]),
            torch.cat([sigma, sigma]),
            torch.cat([noise, -noise]),
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        # Averaging begins when the learning rate falls, so that the average forgets the first weights.
        if averaged is not None and step >= fit.steps // 4:
            averaged.update_parameters(network)
        if progress is not None:
            progress(step, float(loss.detach()))
    if averaged is not None:
        network.load_state_dict(averaged.module.state_dict())
    return network.eval()
