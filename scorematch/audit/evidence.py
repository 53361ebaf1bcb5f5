"""What held-out data say about an estimated posterior, where p_d is not known.

Each function finds one kind of error, so none decides alone. ``log_likelihood`` is a proper score of the values,
``matching_error`` of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import (
    check_callable,
    check_classes,
    check_count,
    check_floating,
    check_length,
    check_posterior,
    check_samples,
    check_seed,
    check_share,
    check_tensor,
)
from ..modes import outside_modes
from ..noise import normal_like
from ..posteriors.base import Posterior, begin_trace, check_known, check_sums, wrong_sum
from .oracle import posterior_gradients, ratio

# Rounding of log p by eps / 2 of its size moves an entropy by up to |1 + log p| eps / 2 of its own, and another order
# of the classes moves it by a few eps more. Entropies that differ by at most this many eps are alike.
ALIKE = 16
RESAMPLED = 200  # times that labels are drawn from the stated probabilities


@outside_modes
def log_likelihood(
    posterior: Posterior, x: Tensor, y: Tensor, *, noise: float, repeats: int = 4, seed: int = 0
) -> Tensor:
    """log p̂(y|x + noise · ω) of held-out labels, in nats, [N]: the mean over ``repeats`` noise vectors.

    A label of x is a label of the noisy point x' too, drawn from p_noise(y|x'). So this is a proper score: its mean is
    highest for p_noise itself. With ``noise`` = eps / √features the noise is about as long as eps in L2; choose this to
    judge the values that an attack of that length meets.

    An estimate that integrates along a path starts at x' + noise · ω' and moves to x'. Given x', that start is
    independent of the label. A path that starts at x would tell the estimate more about the label than x' does.

    Args:
        posterior: the estimate. One that is anchored at labels is told the label, so its value here means nothing.
        x: [N, …] held-out inputs.
        y: int64 [N] their labels.
        noise: standard deviation in input units, ≥ 0.
        repeats: noise vectors for each point, ≥ 1; the same in every call with this seed.
        seed: decides them.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or the posterior gives a NaN; the message names
            it.
    """
    check_posterior("posterior", posterior)
    check_samples(x, y, posterior.num_classes)
    check_length("noise", noise, zero=True)
    check_count("repeats", repeats)
    check_seed(seed)
    generators = _generators(x, seed)
    total = x.new_zeros(len(x))
    for _ in range(repeats):
        total = total + _log_p_at_noise(posterior, x, y, noise, *generators).gather(1, y[:, None])[:, 0]
    return total / repeats


def _generators(x: Tensor, seed: int) -> tuple[torch.Generator, torch.Generator]:
    """Of the noise, and of where paths start."""
    noise, starts = (torch.Generator(x.device).manual_seed(int(seed) + offset) for offset in (0, 1_000_003))
    return noise, starts


def _log_p_at_noise(
    posterior: Posterior, x: Tensor, y: Tensor, noise: float, generator: torch.Generator, of_starts: torch.Generator
) -> Tensor:
    """log p̂(·|x'), x' = x + noise · ω, [N, L], on a path that tells no more about the label than x' does."""
    moved = x + noise * normal_like(x, generator)
    trace = begin_trace(posterior, moved + noise * normal_like(x, of_starts), y)
    trace.move(moved)
    check_known(trace.log_p)
    return trace.log_p


@outside_modes
def matching_error(
    posterior: Posterior,
    unconditional: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    repeats: int = 4,
    seed: int = 0,
) -> Tensor:
    """‖ĝ_y(x̃) + ŝ(x̃) + ω/σ‖² / features on held-out data, [N]: denoising score matching of the posterior's gradient.

    ĝ_y + s is the class score, whose denoising loss is lowest at the truth (Vincent, 2011). With one ŝ for all
    estimates, the differences of their means are the differences of their gradient errors, up to a term that is zero
    where Σ_y p_y ĝ_y = 0. Only differences have a meaning, since most of the value is the noise of the target.

    Args:
        posterior: an estimate of p_σ of this σ.
        unconditional: ŝ, the score of p_σ, from x [N, …]; the same for all estimates that are compared.
        x: [N, …] held-out inputs.
        y: int64 [N] their labels.
        sigma: the noise level, in input units; > 0.
        repeats: noise vectors for each point, each used with both signs; ≥ 1.
        seed: decides them.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("posterior", posterior)
    check_callable("unconditional", unconditional)
    check_samples(x, y, posterior.num_classes)
    check_length("sigma", sigma)
    check_count("repeats", repeats)
    check_seed(seed)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    total = x.new_zeros(len(x))
    for _ in range(repeats):
        omega = normal_like(x, generator)
        for noise in (omega, -omega):
            noisy = x + sigma * noise
            _, gradients = posterior_gradients(posterior, noisy, y)
            chosen = gradients[torch.arange(len(x), device=x.device), y]
            total = total + (chosen + unconditional(noisy) + noise / sigma).flatten(1).square().mean(1)
    return total / (2 * repeats)


class Calibration(NamedTuple):
    """How far stated probabilities are from frequencies, and how far they would be by chance.

    Few points in a bin have other frequencies than their probabilities, so the error of a perfectly calibrated estimate
    is above 0 (Kumar, Liang and Ma, NeurIPS 2019). How large it is by chance, labels drawn from the stated
    probabilities tell: the consistency resampling of Bröcker and Smith (Weather and Forecasting, 2007), see also
    Vaicenavicius et al. (AISTATS 2019).

    Attributes:
        error: expected calibration error of the most likely class, in [0, 1].
        confidence: its mean probability.
        accuracy: the share of points at which it is the label.
        chance: the mean error of 200 draws of labels from the stated probabilities.
        chance_high: the 95 % quantile of these errors. A larger ``error`` is evidence against the probabilities.
    """

    error: float
    confidence: float
    accuracy: float
    chance: float
    chance_high: float


@outside_modes
def calibration(
    posterior: Posterior, x: Tensor, y: Tensor, *, noise: float, bins: int = 15, seed: int = 0
) -> Calibration:
    """The expected calibration error (Guo et al., ICML 2017) at x + noise · ω, reached as in :func:`log_likelihood`.

    Args:
        posterior: the estimate. One that is anchored at labels is told the label, so its value here means nothing.
        x: [N, …] held-out inputs.
        y: int64 [N] their labels.
        noise: standard deviation in input units, ≥ 0.
        bins: how many, of equal width; ≥ 1.
        seed: decides the noise, and the labels that are drawn.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("posterior", posterior)
    check_samples(x, y, posterior.num_classes, least=1)
    check_length("noise", noise, zero=True)
    check_count("bins", bins)
    check_seed(seed)
    return reliability(_log_p_at_noise(posterior, x, y, noise, *_generators(x, seed)), y, bins=bins, seed=seed)


def reliability(log_p: Tensor, y: Tensor, *, bins: int = 15, seed: int = 0) -> Calibration:
    """The expected calibration error (Guo et al., ICML 2017) of stated probabilities, such as those of a model.

    Args:
        log_p: [N, K] log-probabilities, in nats, normalised: ``logits.log_softmax(1)`` of a model.
        y: int64 [N] labels.
        bins: how many, of equal width; ≥ 1.
        seed: decides the labels that are drawn.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    _check_log_p(log_p)
    check_tensor("y", y)
    check_classes(y, log_p, log_p.shape[1])
    check_count("bins", bins)
    check_seed(seed)
    confidence, predicted = log_p.double().exp().max(1)
    hit = (predicted == y).double()
    index = (confidence * bins).long().clamp(max=bins - 1)

    def error(hit: Tensor) -> Tensor:
        return confidence.new_zeros(bins).index_add_(0, index, confidence - hit).abs().sum() / len(y)

    # A label that is drawn from p is the most likely class with the probability of that class.
    generator = torch.Generator(log_p.device).manual_seed(int(seed) + 2_000_003)
    drawn = [
        error((torch.rand(len(y), generator=generator, dtype=torch.float64, device=log_p.device) < confidence).double())
        for _ in range(RESAMPLED)
    ]
    by_chance = torch.stack(drawn)
    return Calibration(
        error=float(error(hit)),
        confidence=float(confidence.mean()),
        accuracy=float(hit.mean()),
        chance=float(by_chance.mean()),
        chance_high=float(by_chance.quantile(0.95)),
    )


@outside_modes
def spread(posteriors: Sequence[Posterior], x: Tensor, y: Tensor) -> tuple[float, float]:
    """The variance over several trainings of one estimator that differ in their seed or their data.

    Args:
        posteriors: at least two.
        x: [N, …] points.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.

    Returns:
        For the gradients E Σ_y p̄_y ‖ĝ_y − ḡ_y‖² / E Σ_y p̄_y ‖ḡ_y‖², an unbiased variance of one member relative to
        their mean, 0 where all gradients are; for the values the mean over the members of E KL(p̄ ‖ p̂) in nats. p̄, ḡ are
        means over members. Both are NaN where a member is.

    Raises:
        TypeError, ValueError: there are fewer than two, or an argument is not what is said above.
    """
    if not isinstance(posteriors, Sequence) or len(posteriors) < 2:
        given = len(posteriors) if isinstance(posteriors, Sequence) else type(posteriors).__name__
        raise ValueError(f"posteriors must be at least two, got {given}")
    for posterior in posteriors:
        check_posterior("each of posteriors", posterior)
    check_samples(x, y, posteriors[0].num_classes, least=1)
    values, gradients = zip(*(posterior_gradients(posterior, x, y) for posterior in posteriors), strict=True)
    log_p = torch.stack(values).double()
    mean_p = log_p.exp().mean(0)
    g = torch.stack(gradients).double().flatten(3)
    mean_g = g.mean(0)
    variance = (mean_p * (g - mean_g).square().sum(3)).sum() / (len(posteriors) - 1)
    log_mean = log_p.logsumexp(0) - math.log(len(posteriors))
    kl = torch.where(mean_p == 0, 0.0, mean_p * (log_mean - log_p)).sum(2).mean()
    return ratio(float(variance), float((mean_p * mean_g.square().sum(2)).sum())), float(kl)


@outside_modes
def closed_loop(posterior: Posterior, x: Tensor, y: Tensor, *, length: float, seed: int = 0) -> Tensor:
    """How much a walk around a square changes log p(y|x), in nats, [N]: the largest change over the classes.

    For a posterior that has a value at every point it is 0, up to rounding. The field of a score network need not be a
    gradient. A change on a closed path is then an error that every integrated value may have, together with the error
    of the trapezoid rule.

    Args:
        posterior: the estimate.
        x: [N, …] corners from which the walk starts.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.
        length: L2 length of a side, in input units; > 0.
        seed: decides the two directions, which are random and orthogonal.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("posterior", posterior)
    check_samples(x, y, posterior.num_classes)
    if x[0:1].numel() == 1:
        raise ValueError("x must have at least two features, a square needs two directions, got one")
    check_length("length", length)
    check_seed(seed)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    a, b = (normal_like(x, generator).flatten(1) for _ in range(2))
    a = a / a.norm(dim=1, keepdim=True)
    b = b - (a * b).sum(1, keepdim=True) * a
    first, second = (length * a).reshape(x.shape), (length * b / b.norm(dim=1, keepdim=True)).reshape(x.shape)
    trace = begin_trace(posterior, x, y)
    before = trace.log_p
    for corner in (x + first, x + first + second, x + second, x):
        trace.move(corner)
    return (trace.log_p - before).abs().amax(1)


@outside_modes
def martingale(
    finer: Posterior, coarser: Posterior, x: Tensor, y: Tensor, *, sigmas: tuple[float, float], seed: int = 0
) -> tuple[float, float]:
    """Whether a posterior at one noise level is the mean of that at a lower one, as it must be.

    p_σ₂(y|x₂) = E[p_σ₁(y|x₁) | x₂] for x₂ = x₁ + noise, so E Σ_y (p_σ₁(y|x₁) − p_σ₂(y|x₂)) p_σ₂(y|x₂) = 0. No labels
    are needed.

    Args:
        finer, coarser: estimates of p_σ₁ and of p_σ₂.
        x: [N, …] clean inputs, N at least 2.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.
        sigmas: σ₁ < σ₂, in input units; ≥ 0.
        seed: decides the noise.

    Returns:
        The mean, which is positive where the coarser posterior is not sure enough, and its standard error. It is 0
        for the truth and for a coarser posterior that is the same for all classes, so it grows with the error of
        values near the truth alone.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_posterior("finer", finer)
    check_posterior("coarser", coarser)
    check_samples(x, y, finer.num_classes, least=2)
    if not isinstance(sigmas, Sequence) or len(sigmas) != 2:
        raise ValueError(f"sigmas must be two numbers, got {sigmas!r}")
    low, high = sigmas
    check_length("the first of sigmas", low, zero=True)
    check_length("the second of sigmas", high)
    if not low < high:
        raise ValueError(f"sigmas must rise, got {sigmas}")
    check_seed(seed)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    first = x + low * normal_like(x, generator)
    second = first + (high**2 - low**2) ** 0.5 * normal_like(x, generator)
    p = begin_trace(finer, first, y).log_p.double().exp()
    q = begin_trace(coarser, second, y).log_p.double().exp()
    values = ((p - q) * q).sum(1)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@outside_modes
def centre(posterior: Posterior, x: Tensor, y: Tensor) -> float:
    """E ‖Σ_y p̂_y ĝ_y‖² / E Σ_y p̂_y ‖ĝ_y‖², which is 0 for the gradient of any normalised posterior and where all are 0.

    Centring by the posterior makes it 0 by construction. What the literal Eq. (34) leaves is the error of its
    unconditional score, which every class score shares.

    Args:
        posterior: the estimate.
        x: [N, …] points.
        y: int64 [N] labels; read only by posteriors that are anchored at labels.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    log_p, gradients = posterior_gradients(posterior, x, y)
    p, g = log_p.double().exp()[..., None], gradients.double().flatten(2)
    return ratio(float((p * g).sum(1).square().sum()), float((p * g.square()).sum()))


@outside_modes
def energy_identity(
    at: Callable[[float], Posterior],
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    step: float = 0.05,
    repeats: int = 4,
    seed: int = 0,
) -> tuple[float, float]:
    """The two sides of E‖∇ log p_σ(y|x̃)‖² = H′(σ) / σ, where H(σ) is the entropy of y given x̃ = x + σω.

    The left side is the energy of the estimate's own gradients. The right side is a difference of held-out
    cross-entropies at σ (1 ± ``step``) with the same noise. A larger left side means noise in the gradients, a smaller
    one means that they are too short. The right side also depends on the errors of the estimate's own values, so this
    is a hint and not a proof.

    Args:
        at: the estimate of p_σ for any σ.
        x: [N, …] held-out inputs.
        y: int64 [N] their labels.
        sigma: σ, in input units; > 0.
        step: of the difference, as a share of σ; in (0, 1).
        repeats: noise vectors for each point, each used with both signs; ≥ 1.
        seed: decides them.

    Returns:
        Both sides, in nats per squared input unit.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_callable("at", at)
    check_length("sigma", sigma)
    check_count("repeats", repeats)
    check_share("step", step, zero=False)
    posterior = at(sigma)
    check_posterior("what at returns", posterior)
    check_samples(x, y, posterior.num_classes, least=1)
    check_seed(seed)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    energy, slope = 0.0, 0.0
    for _ in range(repeats):
        omega = normal_like(x, generator)
        for noise in (omega, -omega):
            log_p, gradients = posterior_gradients(posterior, x + sigma * noise, y)
            energy += float((log_p.double().exp() * gradients.double().flatten(2).square().sum(2)).sum(1).mean())
            ends = []
            for level in (sigma * (1 - step), sigma * (1 + step)):
                values = begin_trace(at(level), x + level * noise, y).log_p
                ends.append(-float(values.double().gather(1, y[:, None]).mean()))
            slope += (ends[1] - ends[0]) / (2 * step * sigma)
    return energy / (2 * repeats), slope / (2 * repeats * sigma)


class Agreement(NamedTuple):
    """How close a posterior is to distributions over labels that people gave.

    Attributes:
        kl: the mean KL(people ‖ posterior), in nats.
        entropy_rank: Spearman's correlation of the two entropies over the points: whether what is ambiguous to people
            is so to the posterior; 0 where one of them is constant.
    """

    kl: float
    entropy_rank: float


def agreement(log_p: Tensor, people: Tensor) -> Agreement:
    """Compare log p(y|x) with label distributions such as CIFAR-10H (Peterson et al., ICCV 2019).

    Args:
        log_p: [N, L] of a posterior or of a model, normalised.
        people: [N, L] probabilities, normalised.

    Raises:
        TypeError, ValueError: the shapes differ or are empty, a value is no log probability or no probability, or those
            of a point do not sum to 1.
    """
    _check_log_p(log_p)
    check_tensor("people", people)
    check_floating(people, "people")
    if log_p.shape != people.shape:
        raise ValueError(f"log_p and people must both be [N, L], got {list(log_p.shape)}, {list(people.shape)}")
    if not bool(((people >= 0) & (people <= 1 + 1e-3)).all()):
        raise ValueError("people must be probabilities, got values outside [0, 1]")
    check_sums(people, "people")
    q, p = log_p.double(), people.double()
    kl = (torch.special.entr(p).sum(1).neg() - (p * q.clamp(min=-1e30)).sum(1)).mean()
    ranks = torch.stack([_entropy_ranks(p, people.dtype), _entropy_ranks(q.exp(), log_p.dtype)])
    return Agreement(float(kl), float(torch.corrcoef(ranks)[0, 1].nan_to_num()))


def _check_log_p(log_p: Tensor) -> None:
    check_tensor("log_p", log_p)
    check_floating(log_p, "log_p")
    if log_p.dim() != 2 or not log_p.numel():
        raise ValueError(f"log_p must be [N, L] and not empty, got {list(log_p.shape)}")
    if not bool((log_p <= 1e-3).all()):
        raise ValueError(f"log_p must be log probabilities, at most 0, got values up to {float(log_p.max())}")
    if (given := wrong_sum(log_p)) is not None:
        raise ValueError(
            "log_p must be normalised, so that its exponentials sum to 1 over the classes, got a sum of "
            f"{given:.4g} (logits need .log_softmax(1))"
        )


def _entropy_ranks(p: Tensor, given: torch.dtype) -> Tensor:
    """The ranks [N] of the entropies of float64 p [N, L], which was given with less precision; alike ones share theirs.

    Ties are told along the order: two entropies are alike if no gap between them is larger than rounding.
    """
    ordered, order = torch.special.entr(p).sum(1).sort()
    gaps = ordered.diff(prepend=ordered[:1]) > ALIKE * torch.finfo(given).eps * ordered.abs()
    _, counts = gaps.cumsum(0).unique_consecutive(return_counts=True)
    means = counts.cumsum(0).double() - 0.5 * (counts.double() - 1)
    return torch.empty_like(ordered).index_copy_(0, order, means.repeat_interleave(counts))
