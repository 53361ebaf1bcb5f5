"""Theorems 4 and 5: two identities between losses and gradients, evaluated on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..attacks.classifier import gradient_of, logits_of
from ..inputs import check_callable, check_count, check_length, check_samples, handed
from ..model_state import as_found
from ..modes import outside_modes
from ..noise import normal_like
from ..ops.logit_divergence import logit_divergence
from ..posteriors.base import Posterior, begin_trace
from ..threat_model import DUAL_ORDERS, ThreatModel
from .estimates import Estimate, estimate
from .search import Ascent, Problem, clean_values, explore

ONE_FEATURE = 1e-12  # a share of the features so small that one of them moves


class Theorem4(NamedTuple):
    """R_SCORE^l1 − R_Standard^l1 and what it is to first order in ε.

    Attributes:
        increase: [N] max_{x'} ‖p(x') − q(x')‖₁ − ‖p(x) − q(x)‖₁, the left side; ≥ 0, at most 2.
        first_order: [N] ε ‖∇ₓ ‖p(x) − q(x)‖₁‖_q, the right side of Eqs. (22) and (23), which asks nothing of the signs.
        alignment: [N] 2ε ‖∇ₓ p(Y_d(x)|x) − ∇ₓ q(Y_d(x)|x)‖_q, the right side of the theorem (Eq. 25).
        assumption: bool [N], whether the theorem's assumption holds at the sample.
        increase_mean, first_order_mean, alignment_mean: their means over p_d(x).
        remainder: the mean of (increase − alignment) / ε, in inverse input units. The theorem says that it goes to 0
            with ε.
    """

    increase: Tensor
    first_order: Tensor
    alignment: Tensor
    assumption: Tensor
    increase_mean: Estimate
    first_order_mean: Estimate
    alignment_mean: Estimate
    remainder: Estimate


@outside_modes
def theorem_4(
    model: Callable[[Tensor], Tensor],
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    candidates: Tensor | None = None,
    weights: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Theorem4:
    """Theorem 4: R_SCORE^l1 = R_Standard^l1 + 2ε E‖∇ₓ p_d(Y_d(x)|x) − ∇ₓ p_θ(Y_d(x)|x)‖_q + o(ε) (Eqs. 22 to 25).

    Y_d(x) = arg max_y p_d(y|x), and ‖·‖_q is dual to the norm of B(x): l1 for linf, l2 for l2, linf for l1. The theorem
    is about the limit ε → 0, so call it for smaller and smaller ``eps``: ``remainder`` should go to 0.

    The assumption, p_d > p_θ at Y_d(x) and p_d < p_θ at every other class, is needed from three classes on; without
    it ``first_order`` is right and ``alignment`` is not. With two classes both agree without it, since the
    differences of the two classes are opposite. A class with p_d(y|x) = p_θ(y|x) is at a kink of l1; ``first_order``
    counts it as 0, which is too little. The paper calls the assumption trivially true for one-hot p_d. But then
    ∇ₓ p_d(y|x) = 0, and there is no gradient of the data left to align with: the term asks for a small ∇ₓ p_θ.

    ``increase`` is searched by gradient ascent, from x, from random points and from the first-order solution, a lower
    bound of the maximum over B(x); with candidates it is exact over these.

    Args:
        threat_model: B(x); its box must be at least eps away from every x, since the theorem is about whole balls.
        weights: [N] quadrature weights of p_d(x), see :func:`scorematch.bounds.estimate`; None: x are draws.

    The other arguments are those of :func:`scorematch.bounds.robust_errors`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    problem = Problem(model, posterior, x, y, threat_model)
    log_p, logits = clean_values(problem)
    eps = threat_model.eps
    if len(x):
        _check_inside(x, threat_model)
    p, q = log_p.exp(), logits.softmax(1)
    one_hot = torch.nn.functional.one_hot(log_p.argmax(1), log_p.shape[1]).to(p.dtype)
    signs = 2 * one_hot - 1  # s_y of Eq. (23) under the assumption
    slope = _difference_gradient(problem, (p - q).sign())
    alignment = 2 * eps * _dual_norm(_difference_gradient(problem, one_hot), threat_model.norm)

    clean = logit_divergence(logits, log_p, kind="l1")
    largest = clean.clone()

    def look(found_p: Tensor, found_logits: Tensor) -> None:
        count, points, classes = found_p.shape
        values = logit_divergence(found_logits.reshape(-1, classes), found_p.reshape(-1, classes), kind="l1")
        torch.maximum(largest, values.reshape(count, points).amax(1), out=largest)

    steepest = threat_model.replace(step_size=eps, share=ONE_FEATURE)  # in l1 it is that of the largest slope alone
    along = steepest.step(x, slope, x)
    climb = Ascent(lambda found, z: logit_divergence(z, found, kind="l1"), starts=(along,))
    explore(problem, [climb], look, candidates=candidates, steps=steps, restarts=restarts, generator=generator)
    increase = largest - clean
    first_order = eps * _dual_norm(slope, threat_model.norm)
    return Theorem4(
        increase,
        first_order,
        alignment,
        ((p - q).sign() == signs).all(1),
        estimate(increase, weights),
        estimate(first_order, weights),
        estimate(alignment, weights),
        estimate((increase - alignment) / eps, weights),
    )


def _check_inside(x: Tensor, threat_model: ThreatModel) -> None:
    eps, lower, upper = threat_model.eps, threat_model.lower, threat_model.upper
    low, high = (float(v) for v in torch.aminmax(x))
    if low - eps < lower or high + eps > upper:
        raise ValueError(
            f"x must be at least eps = {eps} inside the box [{lower}, {upper}] of the threat model, "
            f"got values in [{low:g}, {high:g}]"
        )


def _difference_gradient(problem: Problem, coefficients: Tensor) -> Tensor:
    """Σ_y c_y (∇ₓ p_d(y|x) − ∇ₓ p_θ(y|x)) for c [N, L], [N, …]."""
    with as_found(problem.model), torch.enable_grad():
        point = problem.x.detach().requires_grad_()
        by_model = gradient_of(problem.model(handed(point)).softmax(1), point, coefficients, problem.model)
    trace = begin_trace(problem.posterior, problem.x, problem.y)
    return trace.pull_back((coefficients * trace.log_p.exp()).contiguous(), -by_model)


def _dual_norm(gradient: Tensor, norm: str) -> Tensor:
    return gradient.flatten(1).norm(dim=1, p=DUAL_ORDERS[norm])


@runtime_checkable
class SmoothDensity(Protocol):
    """A joint density p(x, y) that can be convolved with noise, such as a Gaussian mixture or factor analysers."""

    def smoothed(self, sigma: float) -> SmoothDensity:
        """p_σ, this one convolved with N(0, σ² I)."""

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) [N, L] for x [N, …], differentiable."""


class Theorem5(NamedTuple):
    """d R_G / d(σ²) and the alignment of gradients that it is equal to, in nats per squared input unit.

    Attributes:
        left: [N] ∂/∂(σ²) of −log p_θ(y|x + σω), the mean over the noise drawn for a sample.
        right: [N] ½ ∇ log p_θ(y|x̃)ᵀ ∇ log p_σ(x̃|y) at the same noisy points x̃ = x + σω.
        loss: R_G(θ; σ) in nats (Eqs. 9, 35).
        left_mean, right_mean: both sides of the theorem.
        difference: left minus right, with the interval of the difference. The theorem says that it is 0.
    """

    left: Tensor
    right: Tensor
    loss: Estimate
    left_mean: Estimate
    right_mean: Estimate
    difference: Estimate


@outside_modes
def theorem_5(
    model: Callable[[Tensor], Tensor],
    density: SmoothDensity,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    repeats: int = 1,
    generator: torch.Generator | None = None,
) -> Theorem5:
    """Theorem 5: d R_G / d(σ²) = ½ E[∇ₓ log p_θ(y|x̃)ᵀ ∇ₓ log p_σ(x̃|y)], x̃ = x + σω (Eqs. 9, 26, 27).

    σ is a standard deviation here and a variance in the paper, so the derivative is one in σ²; that in σ is 2σ times
    it. Each noise vector is used with both signs. Given x̃ and y, the right side is the conditional mean of the left
    one, since ∇ₓ log p_σ(x̃|y) = E[−ω/σ | x̃, y] (Tweedie's formula).

    The proof drops a boundary term: log p_θ(y|x) must not grow faster than p_σ(x|y) decays, which all models whose
    logits grow like a polynomial satisfy. Eq. (10), the expansion at σ = 0, needs a p_d(x|y) with a score. The
    empirical distribution of a training set has none.

    Args:
        model: maps [N, …] to logits [N, L], differentiable almost everywhere and continuous; used in eval mode and left
            as found.
        density: p_d(x, y) before noise, in closed form, such as :class:`scorematch.posteriors.GaussianMixture`.
        x: [N, …] draws from it, N ≥ 2.
        y: int64 [N] their labels in [0, L).
        sigma: σ > 0, in input units.
        repeats: noise vectors for each sample, ≥ 1.
        generator: randomness of the noise, on the device of x.

    Raises:
        ValueError: an argument is outside its range, shapes do not fit, or the model or the density is not
            differentiable.
        TypeError: an argument is of another type, or the density cannot be smoothed.
    """
    if not isinstance(density, SmoothDensity):
        raise TypeError(f"density must have smoothed(sigma) and log_joint(x), got {type(density).__name__}")
    check_callable("model", model)
    check_samples(x, y, None, least=2)
    check_length("sigma", sigma)
    check_count("repeats", repeats)
    smooth = density.smoothed(sigma)

    def log_q(point: Tensor) -> Tensor:
        return logits_of(model, point).log_softmax(1)

    left, right, loss = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(3))
    with as_found(model):
        for _ in range(repeats):
            omega = normal_like(x, generator)
            for noise in (omega, -omega):
                own, by_model = _label_gradient(log_q, x + sigma * noise, y, model, "model")
                _, score = _label_gradient(smooth.log_joint, x + sigma * noise, y, density, "density")
                left -= (by_model * noise).flatten(1).sum(1).double() / (2 * sigma)
                right += 0.5 * (by_model.double() * score.double()).flatten(1).sum(1)
                loss -= own.double()
    left, right, loss = (total / (2 * repeats) for total in (left, right, loss))
    return Theorem5(left, right, estimate(loss), estimate(left), estimate(right), estimate(left - right))


def _label_gradient(
    values: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, source: object, name: str
) -> tuple[Tensor, Tensor]:
    """Of values(x) [N, L] those of the labels, [N], and their gradients in x, [N, …]; see :func:`gradient_of`."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        rows = values(point)
        if not bool(((y >= 0) & (y < rows.shape[1])).all()):
            raise ValueError(f"y must lie in [0, {rows.shape[1]}), got values in [{int(y.min())}, {int(y.max())}]")
        one_hot = torch.nn.functional.one_hot(y, rows.shape[1]).to(rows.dtype)
        gradient = gradient_of(rows, point, one_hot, source, name)
    return rows.detach().gather(1, y[:, None])[:, 0], gradient
