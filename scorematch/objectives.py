r"""Training objectives: one loss a sample, with the point at which it was taken.

| objective | per-sample loss | source |
| --- | --- | --- |
| standard | D(y ‖ q(x)) | Eq. (1) |
| gaussian | D(y ‖ q(x)) + (D(y ‖ q(x + σω)) − D(y ‖ q(x))) / (1 − γ) | Eqs. (35) to (37) |
| pgd_at | max_{x'} D(y ‖ q(x')) | Eq. (3), Eq. (5) |
| trades | D(y ‖ q(x)) + β max_{x'} D(q(x) ‖ q(x')) | Eq. (21) |
| score_direct | max_{x'} D(p(·\|x') ‖ q(x')) | Eq. (4), Eq. (6) |

q = softmax of the model, y the label (or a distribution over labels), p a data posterior.

Direct SCORE differs from the surrogates (PGD-AT and TRADES) in several pieces. These options take one piece at a time:

| objective and option | per-sample loss |
| --- | --- |
| score_direct, target_mix m | max_{x'} D(p_m ‖ q(x')), p_m ∝ p(·\|x)^(1−m) p(·\|x')^m |
| score_direct, data_gradient | the same loss; the attack without the data gradient, or with noise of its length |
| trades, posterior and transport κ | D(y ‖ q(x)) + β max_{x'} D(q_κ ‖ q(x')), q_κ ∝ q(x) (p(·\|x') / p(·\|x))^κ |
| any but score_direct | y = p(·\|x), by :func:`soft_targets` |
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attacks.classifier import check_logits
from .attacks.console import frames_of_the_package
from .attacks.inspection import probabilities
from .attacks.pgd import ascend, input_gradient
from .attacks.single_step import SINGLE_STEP, single_step, single_step_start
from .divergences import check_kind, clip_bound
from .graphs import Attack, AttackGraphs
from .inputs import check_attack, check_classes, check_inputs, check_posterior, readable
from .model_state import borrowed
from .noise import normal_like
from .ops._checks import check_number
from .ops.divergence import divergence as divergence_of
from .ops.logit_divergence import logit_divergence
from .posteriors.base import Posterior, Trace, begin_trace, check_values, own_precision
from .threat_model import Perturbations, ThreatModel
from .weight_perturbation import WeightPerturbation

CLIP_FORMS = ("total", "robust", "threshold")
ATTACKS = ("pgd", *SINGLE_STEP)
STARTS = ("uniform", "gaussian")
DATA_GRADIENTS = ("scores", "none", "noise")
GAUSSIAN_START = 1e-3  # standard deviation, in input units, of the start of TRADES as published
_heard: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose logits have been looked at
LOWEST = -1e30  # log p of a class of probability 0 where two of them are subtracted: −∞ would give NaN


class Outcome(NamedTuple):
    """What an objective returns.

    Attributes:
        loss: [N], differentiable in the parameters of the model; the caller reduces it.
        x_adv: [N, …] the points at which the robust term was taken (x itself for ``standard``), without a graph.
        metrics: named scalars (0-dim tensors, without a graph), for logging. All objectives have ``accuracy``, the
            share in [0, 1] of the samples that are classified as y at ``x_adv``, in the mode of training.
    """

    loss: Tensor
    x_adv: Tensor
    metrics: dict[str, Tensor]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of samples whose largest logit is that of the label.

    Args:
        logits: [N, L].
        y: int64 [N] labels, or probabilities [N, L], of which the largest counts.

    Returns:
        A float32 scalar in [0, 1], without a graph.
    """
    labels = y if y.dim() == 1 else y.argmax(1)
    return (logits.detach().argmax(1) == labels).float().mean()


def soft_targets(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """The class probabilities p(·|x) of a posterior at clean inputs, for use as y of an objective.

    Args:
        posterior: estimate of p_d(y|x), fixed; read outside of autocast.
        x: [N, …] clean inputs.
        y: int64 [N] labels, or probabilities [N, L]; read only by posteriors that are anchored at labels, whose p(·|x)
            is the smoothed label.

    Returns:
        [N, L] probabilities, without a graph.

    Raises:
        ValueError: the posterior does not give log-probabilities; looked at on the CPU alone.
    """
    with torch.no_grad(), own_precision(x):
        log_p = posterior.clean_log_prob(x, y)
        check_values(log_p)
        return log_p.exp()


class _Clip(NamedTuple):
    """relu(total − of_total), and relu(robust term − of_robust)."""

    of_total: float
    of_robust: float


def _clipping(clip: float, form: str, kind: str, num_classes: int) -> _Clip:
    """The two bounds of a clipping form (section 5.2; see :func:`scorematch.divergences.clip_bound`)."""
    if form not in CLIP_FORMS:
        raise ValueError(f"clip_form must be one of {', '.join(CLIP_FORMS)}, got {form!r}")
    if form == "threshold":
        if not clip >= 0.0:
            raise ValueError(f"clip must not be negative, got {clip}")
        return _Clip(0.0, clip)
    if not 0.0 <= clip < 1.0:
        raise ValueError(f"clip must lie in [0, 1), got {clip}")
    bound = clip_bound(kind, clip, num_classes)
    return _Clip(bound, 0.0) if form == "total" else _Clip(0.0, bound)


def training_logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a model returns for x [N, …]: [N, L], no narrower than x, since autocast gives logits in half precision.

    Raises:
        ValueError: they are not logits.
    """
    logits = model(x)
    check_logits(logits, x)
    return logits.to(torch.promote_types(logits.dtype, x.dtype))


def warn_of_probabilities(model: nn.Module, logits: Tensor) -> None:
    """Warn if a model returns probabilities; its logits [N, L] are looked at once, since a GPU has to be waited for."""
    if torch.compiler.is_compiling() or model in _heard or not len(logits) or logits.is_meta:
        return
    _heard.add(model)
    if probabilities(logits.detach()) is not None:
        warnings.warn(
            "the model seems to return probabilities: objectives need logits, without the softmax",
            stacklevel=frames_of_the_package() + 1,
        )


def check_comparable(logits: Tensor, target: Tensor) -> None:
    """Refuse a posterior whose log p [N, L] cannot be compared with the logits of the model.

    Raises:
        ValueError: as said.
    """
    if target.shape != logits.shape or target.dtype != logits.dtype:
        given = f"{target.dtype} {list(target.shape)} for logits {logits.dtype} {list(logits.shape)}"
        raise ValueError(f"posterior must give log p of the shape and dtype of the model's logits, got {given}")


def check_target(y: Tensor, logits: Tensor) -> None:
    """Refuse labels, or probabilities, of other classes than the logits [N, L]; labels are read on the CPU alone.

    Raises:
        ValueError: as said.
    """
    if y.dim() == 1:
        check_classes(y, logits, logits.shape[1], values=readable(y))
    elif y.shape != logits.shape:
        raise ValueError(f"y must be labels [N] or probabilities {list(logits.shape)}, got {list(y.shape)}")


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
    return Outcome(divergence_of(logits, y, kind=divergence), x, {"accuracy": accuracy(logits, y)})


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
    elif noise.shape != x.shape or noise.dtype != x.dtype or noise.device != x.device:
        raise ValueError(
            f"noise must be {x.dtype} {list(x.shape)} on {x.device} as x is, got {noise.dtype} {list(noise.shape)} on "
            f"{noise.device}"
        )
    shift = levels.view(-1, *[1] * (x.dim() - 1)) * noise.detach()
    noisy_x = (x + shift).detach()
    logits = training_logits(model, noisy_x)
    warn_of_probabilities(model, logits)
    noisy = divergence_of(logits, y, kind=divergence)
    if antithetic:
        noisy = 0.5 * (noisy + divergence_of(training_logits(model, (x - shift).detach()), y, kind=divergence))
    metrics = {"accuracy": accuracy(logits, y)}
    if alignment is None and gamma == 0.0:
        return Outcome(noisy, noisy_x, metrics)
    natural = divergence_of(training_logits(model, x), y, kind=divergence)
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

    def allowed(value: float) -> bool:
        return math.isfinite(value) and (value > 0.0 if positive else value >= 0.0)

    if isinstance(sigma, Tensor):
        if sigma.shape != x.shape[:1] or sigma.dtype != x.dtype or sigma.device != x.device:
            raise ValueError(
                f"sigma must be {x.dtype} [{len(x)}] on {x.device}, one for each sample, got {sigma.dtype} "
                f"{list(sigma.shape)} on {sigma.device}"
            )
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
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        raise TypeError(f"sigma must be a number, a range (low, high) or a tensor [N], got {type(sigma).__name__}")
    if not allowed(sigma):
        raise ValueError(f"sigma must be finite and {least}, got {sigma}")
    return x.new_full((len(x),), sigma)


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


def pgd_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: Perturbations,
    steps: int = 10,
    divergence: str = "kl",
    clip: float = 0.0,
    clip_form: str = "total",
    attack: str = "pgd",
    attack_mode: str = "train",
    start: str | Tensor = "uniform",
    weights: WeightPerturbation | None = None,
    graphs: AttackGraphs | None = None,
    generator: torch.Generator | None = None,
) -> Outcome:
    """PGD adversarial training, Eq. (3) for KL and Eq. (5) for any other D.

    Args:
        model: maps [N, …] to logits [N, L].
        x: [N, …] inputs inside the box of the threat model.
        y: int64 [N] labels, or probabilities [N, L].
        threat_model: B(x) and the step size of the attack; for ``attack="pgd"`` also a B(x) of your own, see
            :class:`scorematch.Perturbations`.
        steps: steps of the attack (pgd), at least 0.
        divergence: name of D, in the attack and in the loss.
        clip: threshold c; 0 clips nothing. In [0, 1), or at least 0 for the form ``"threshold"``.
        clip_form: ``"total"`` or ``"robust"`` (the same here): relu(D − bound), the bound that of
            :func:`scorematch.divergences.clip_bound`; ``"threshold"``: relu(D − c).
        attack: ``"pgd"``, or one step from a start of its own, ``"fgsm_rs"`` or ``"n_fgsm"``: see
            :func:`scorematch.attacks.single_step.single_step`.
        attack_mode: batch norm during the attack, see :func:`scorematch.model_state.borrowed`.
        start: ``"uniform"`` or ``"gaussian"`` (pgd), see :func:`first_iterate`, or the first iterate itself, [N, …].
        weights: adversarial weight perturbation, inside its ``with`` block; the loss is taken at the moved weights.
        graphs: if given, the attack runs as a CUDA graph; give the same object in every call.
        generator: randomness of the start, on the device of x.

    Returns:
        An outcome whose metrics have ``zero_gradient_share``: the share in [0, 1] of features whose gradient was 0 at
        the last step of the attack (left out if there are no steps).

    Raises:
        TypeError, ValueError: an argument is not what it must be; see :func:`scorematch.inputs.check_inputs` for x, y.
    """
    check_kind(divergence)
    check_attack(threat_model, steps)
    check_number("clip", clip)
    check_inputs(model, x, y, threat_model)

    def search(x: Tensor, y: Tensor, first: Tensor) -> dict[str, Tensor]:
        with borrowed(model, attack_mode):
            gradient = _Watched(
                input_gradient(lambda x_adv: divergence_of(training_logits(model, x_adv), y, kind=divergence))
            )
            return {"x_adv": _attacked(x, gradient, threat_model, attack, steps, first), **gradient.metrics()}

    metrics = _found(graphs, search, [model], x, y, _start(x, threat_model, start, generator, attack))
    x_adv = metrics.pop("x_adv")

    def outcome() -> Outcome:
        logits = training_logits(model, x_adv)
        warn_of_probabilities(model, logits)
        bounds = _clipping(clip, clip_form, divergence, logits.shape[1])
        clip_at = bounds.of_total + bounds.of_robust
        loss = divergence_of(logits, y, kind=divergence, clip=clip_at)
        return Outcome(loss, x_adv, {"accuracy": accuracy(logits, y), **metrics})

    return _perturbing(weights, outcome)


def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: Perturbations,
    beta: float = 6.0,
    posterior: Posterior | None = None,
    transport: float = 1.0,
    steps: int = 10,
    divergence: str = "kl",
    clip: float = 0.0,
    clip_form: str = "total",
    attack: str = "pgd",
    attack_mode: str = "eval",
    start: str | Tensor = "gaussian",
    weights: WeightPerturbation | None = None,
    graphs: AttackGraphs | None = None,
    generator: torch.Generator | None = None,
) -> Outcome:
    """TRADES, Eq. (21): D(y ‖ q(x)) + β max_{x'} D(q(x) ‖ q(x')), with the gradient through both arguments of D.

    With a posterior p the target of the robust term moves with x' as the data do. The robust term is then
    D(softmax(log q(x) + κ (log p(·|x') − log p(·|x))) ‖ q(x')). For κ = 1 and a model that is right at x, so that
    q(x) = p(·|x), it is that of direct SCORE. Where p is a path integral from x, its anchor cancels. The attack follows
    the model gradient and κ times the data gradient, as in :func:`score_direct`; the outer gradient holds the shift of
    the target constant.

    Args:
        beta: weight of the robust term, ≥ 0.
        posterior: estimate of p_d(y|x'), fixed and read outside of autocast; None leaves the target at q(x).
        transport: κ, how far the target moves with the posterior, finite and ≥ 0; 0 is TRADES itself.
        clip_form: ``"total"`` clips the sum of both terms, relu(total − bound); ``"robust"`` the robust term,
            relu(D − bound); ``"threshold"`` the robust term, relu(D − c).

    The other arguments are those of :func:`pgd_at`.

    Returns:
        An outcome with the metrics of :func:`pgd_at`, with ``natural`` and ``robust``, the means of the two terms (the
        robust one after clipping, without β), and with a posterior those of the data gradient of :func:`score_direct`.

    Raises:
        TypeError, ValueError: an argument is not what it must be; see :func:`scorematch.inputs.check_inputs` for x, y.
    """
    check_kind(divergence)
    check_attack(threat_model, steps)
    check_number("clip", clip)
    check_inputs(model, x, y, threat_model)
    check_number("beta", beta)
    check_number("transport", transport)
    if not beta >= 0.0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if not 0.0 <= transport < math.inf:
        raise ValueError(f"transport must be finite and not negative, got {transport}")
    if posterior is not None:
        check_posterior("posterior", posterior)

    def search(x: Tensor, first: Tensor) -> dict[str, Tensor]:
        with borrowed(model, attack_mode):
            with torch.no_grad():
                clean = training_logits(model, x)
            gradient = _Watched(
                input_gradient(lambda x_adv: logit_divergence(training_logits(model, x_adv), clean, kind=divergence))
            )
            return {"x_adv": _attacked(x, gradient, threat_model, attack, steps, first), **gradient.metrics()}

    def search_with(posterior: Posterior, x: Tensor, y: Tensor, first: Tensor) -> dict[str, Tensor]:
        with own_precision(x):
            trace = begin_trace(posterior, x, y)
        with borrowed(model, attack_mode):
            with torch.no_grad():
                clean = training_logits(model, x)
            target = _Target(trace, clean, transport)
            ascent = _DirectAscent(model, target, divergence)
            x_adv = _attacked(x, ascent.gradient, threat_model, attack, steps, first)
            target.move(x_adv)
        return {"x_adv": x_adv, "shift": target.shift(), **ascent.metrics()}

    first = _start(x, threat_model, start, generator, attack)
    if posterior is None:
        found = _found(graphs, search, [model], x, first)
    else:
        found = _found(graphs, partial(search_with, posterior), [model, posterior], x, y, first)
    x_adv, shift = found.pop("x_adv"), found.pop("shift", None)

    def outcome() -> Outcome:
        logits = training_logits(model, x)
        warn_of_probabilities(model, logits)
        bounds = _clipping(clip, clip_form, divergence, logits.shape[1])
        natural = divergence_of(logits, y, kind=divergence)
        attacked = training_logits(model, x_adv)
        target = logits if shift is None else logits + shift
        robust = logit_divergence(attacked, target, kind=divergence, clip=bounds.of_robust)
        loss = natural + beta * robust
        if bounds.of_total:
            loss = torch.relu(loss - bounds.of_total)
        terms = {"natural": natural.detach().mean(), "robust": robust.detach().mean()}
        return Outcome(loss, x_adv, {"accuracy": accuracy(attacked, y), **terms, **found})

    return _perturbing(weights, outcome)


def score_direct(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: Perturbations,
    posterior: Posterior,
    target_mix: float = 1.0,
    data_gradient: str | Tensor = "scores",
    steps: int = 10,
    divergence: str = "kl",
    clip: float = 0.0,
    clip_form: str = "total",
    attack: str = "pgd",
    attack_mode: str = "train",
    start: str | Tensor = "uniform",
    weights: WeightPerturbation | None = None,
    graphs: AttackGraphs | None = None,
    generator: torch.Generator | None = None,
) -> Outcome:
    """Direct minimisation of SCORE, Eq. (4) for KL and Eq. (6) for any other D: max_{x'} D(p(·|x') ‖ q(x')).

    The direction of ascent is Eq. (33): the model gradient, by automatic differentiation, plus the data gradient
    Σ_y w_y s_y, with the weights w = ∂D/∂ log p projected to the simplex and the class scores s_y of the posterior.
    The outer gradient holds p(·|x') constant.

    Args:
        posterior: estimate of p_d(y|x'), fixed and read outside of autocast.
        y: int64 [N] labels, or probabilities [N, L]; read only by posteriors that are anchored at labels.
        target_mix: m in [0, 1], how far the target follows x': it is p(·|x)^(1−m) p(·|x')^m, normalised. 1 is SCORE;
            0 keeps the posterior of clean x, PGD-AT with :func:`soft_targets`, and the data gradient is 0.
        data_gradient: what the attack adds to the model gradient: ``"scores"``, the data gradient of Eq. (33);
            ``"none"``, nothing, while the target still follows x'; ``"noise"``, Gaussian noise with, sample by sample,
            the norm of the data gradient, a control; or the noise before it is scaled, see :func:`noise_directions`.

    The other arguments are those of :func:`pgd_at`.

    Returns:
        An outcome with the metrics of :func:`pgd_at`, with ``data_gradient_ratio``, Σ‖data gradient‖ / Σ‖model
        gradient‖ over the samples and the steps of the attack (0 to ∞), and with ``sign_change_share``, the share in
        [0, 1] of features for which adding the data gradient changes the sign of the step.

    Raises:
        TypeError, ValueError: an argument is not what it must be; see :func:`scorematch.inputs.check_inputs` for x, y.
            ``target_mix`` must be 1 with a posterior whose ``centering`` is ``"network"``: the literal form of Eq. (34)
            has no mixed target.
    """
    check_kind(divergence)
    check_attack(threat_model, steps)
    check_number("clip", clip)
    check_inputs(model, x, y, threat_model)
    check_number("target_mix", target_mix)
    if not 0.0 <= target_mix <= 1.0:
        raise ValueError(f"target_mix must lie in [0, 1], got {target_mix}")
    check_posterior("posterior", posterior)
    literal = getattr(posterior, "centering", "posterior") == "network"
    if literal and target_mix != 1.0:
        raise ValueError(f"target_mix must be 1 for a posterior with centering 'network', got {target_mix}")

    def search(x: Tensor, y: Tensor, first: Tensor, *noise: Tensor) -> dict[str, Tensor]:
        with own_precision(x):
            trace = begin_trace(posterior, x, y)
        target = _Target(trace) if target_mix == 1.0 else _Target(trace, trace.log_p, target_mix)
        ascent = _DirectAscent(model, target, divergence, literal=literal, scores=scores, noise=noise)
        with borrowed(model, attack_mode):
            x_adv = _attacked(x, ascent.gradient, threat_model, attack, steps, first)
            target.move(x_adv)
        return {"x_adv": x_adv, "log_p": target.logits(), **ascent.metrics()}

    first = _start(x, threat_model, start, generator, attack)
    scores = isinstance(data_gradient, Tensor) or data_gradient != "none"
    noise = _noise(x, data_gradient, steps, generator, attack)
    metrics = _found(graphs, search, [model, posterior], x, y, first, *noise)
    x_adv, log_p = metrics.pop("x_adv"), metrics.pop("log_p")

    def outcome() -> Outcome:
        logits = training_logits(model, x_adv)
        warn_of_probabilities(model, logits)
        check_comparable(logits, log_p)
        check_target(y, logits)
        bounds = _clipping(clip, clip_form, divergence, logits.shape[1])
        clip_at = bounds.of_total + bounds.of_robust
        loss = logit_divergence(logits, log_p, kind=divergence, clip=clip_at)
        return Outcome(loss, x_adv, {"accuracy": accuracy(logits, y), **metrics})

    return _perturbing(weights, outcome)


class _Watched:
    """A gradient whose last value is looked at once the attack is through."""

    def __init__(self, gradient: Callable[[Tensor], Tensor]) -> None:
        self.gradient = gradient
        self.last: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.last = self.gradient(x)
        return self.last

    def metrics(self) -> dict[str, Tensor]:
        return {} if self.last is None else {"zero_gradient_share": (self.last == 0).float().mean()}


class _Target:
    """The target of an attack, moving with the data: softmax(base + share (log p(·|x') − log p(·|x))).

    Without a base it is p(·|x') itself.
    """

    def __init__(self, trace: Trace, base: Tensor | None = None, share: float = 1.0) -> None:
        if base is not None:
            check_comparable(base, trace.log_p)
        self.trace, self.base, self.share = trace, base, share
        self.clean = trace.log_p if base is None else trace.log_p.clamp(min=LOWEST)

    def move(self, x: Tensor) -> None:
        if self.share:
            with own_precision(x):
                self.trace.move(x)

    def shift(self) -> Tensor:
        """share (log p(·|x') − log p(·|x)) [N, L], finite."""
        return self.share * (self.trace.log_p.clamp(min=LOWEST) - self.clean)

    def logits(self) -> Tensor:
        """[N, L], whose softmax is the target; with no base normalised."""
        return self.trace.log_p if self.base is None else self.base + self.shift()

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        """grad + Σ_y c_y ∇ₓ logits_y for the weights c [N, L], up to what all classes have in common."""
        with own_precision(grad):
            return self.trace.pull_back(weights if self.share == 1.0 else self.share * weights, grad)


class _DirectAscent:
    """The direction of Eq. (33) along one attack, and how much of it comes from the data.

    Args:
        model: maps [N, …] to logits [N, L].
        target: what the model is compared with.
        kind: name of D.
        literal: see :func:`direct_weights`.
        scores: whether the data have a part in the direction.
        noise: none, or [steps, N, …], whose directions stand for that of the data gradient, one a step.
    """

    def __init__(
        self,
        model: nn.Module,
        target: _Target,
        kind: str,
        *,
        literal: bool = False,
        scores: bool = True,
        noise: Sequence[Tensor] = (),
    ) -> None:
        self.model = model
        self.target = target
        self.kind = kind
        self.literal = literal
        self.scores = scores and target.share > 0.0
        self.noise = iter(noise[0]) if noise else None
        self.data_norm: Tensor | float = 0.0
        self.model_norm: Tensor | float = 0.0
        self.sign_changes: Tensor | float = 0.0
        self.features = 0
        self.last: Tensor | None = None

    def gradient(self, x: Tensor) -> Tensor:
        self.target.move(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = training_logits(self.model, x)
        target = self.target.logits()
        check_comparable(logits, target)
        weights, grad_logits = direct_weights(logits.detach(), target, self.kind, literal=self.literal)
        (model_gradient,) = torch.autograd.grad(logits, x, grad_logits)
        total = self._with_data(weights, model_gradient)
        self._measure(model_gradient, total)
        return total

    def _with_data(self, weights: Tensor, model_gradient: Tensor) -> Tensor:
        if not self.scores:
            return model_gradient
        if self.noise is None:
            return self.target.pull_back(weights, model_gradient)
        length = _lengths(self.target.pull_back(weights, torch.zeros_like(model_gradient)))
        direction = next(self.noise)
        return model_gradient + direction * (length / _lengths(direction))

    def _measure(self, model_gradient: Tensor, total: Tensor) -> None:
        self.data_norm = self.data_norm + (total - model_gradient).flatten(1).norm(dim=1).sum()
        self.model_norm = self.model_norm + model_gradient.flatten(1).norm(dim=1).sum()
        self.sign_changes = self.sign_changes + (total.sign() != model_gradient.sign()).sum()
        self.features += total.numel()
        self.last = total

    def metrics(self) -> dict[str, Tensor]:
        if self.last is None:
            return {}
        return {
            "data_gradient_ratio": torch.as_tensor(self.data_norm / self.model_norm),
            "sign_change_share": torch.as_tensor(self.sign_changes / self.features),
            "zero_gradient_share": (self.last == 0).float().mean(),
        }


def _lengths(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample of x [N, …], [N, 1, …]."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def direct_weights(logits: Tensor, log_p: Tensor, kind: str, *, literal: bool = False) -> tuple[Tensor, Tensor]:
    """Derivatives of D(p ‖ softmax(logits)) that the two gradients of Eq. (33) need.

    Args:
        logits: [N, L] of the model.
        log_p: [N, L] log posterior; normalised where ``literal``, else logits p = softmax(log_p).
        kind: name of D.
        literal: give c = ∂D/∂ log p as Eq. (33) writes it (for KL: p (log p − log q), without the constant that
            cancels), instead of its projection w = c − p Σ c. Needed when the scores are centred by an estimated
            unconditional score, which does not cancel exactly.

    Returns:
        weights of the class scores [N, L] and ∂D/∂ logits [N, L].
    """
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        if not literal:
            t = log_p.detach().requires_grad_()
            grad_z, weights = torch.autograd.grad(logit_divergence(z, t, kind=kind).sum(), [z, t])
            return weights, grad_z
        p = log_p.detach().exp().requires_grad_()
        grad_z, grad_p = torch.autograd.grad(divergence_of(z, p, kind=kind).sum(), [z, p])
    if kind == "kl":
        grad_p = grad_p - 1.0
    return p.detach() * grad_p, grad_z


def noise_directions(x: Tensor, steps: int, generator: torch.Generator | None = None, attack: str = "pgd") -> Tensor:
    """Standard Gaussian noise for each step of an attack, for ``data_gradient`` of :func:`score_direct`.

    Args:
        x: [N, …] clean inputs.
        steps: steps of the attack (pgd).
        generator: randomness, on the device of x.
        attack: ``"pgd"``, or one of a single step.

    Returns:
        [steps, N, …] in the dtype of x; [1, N, …] for an attack of a single step.
    """
    count = 1 if attack in SINGLE_STEP else steps
    return torch.empty(count, *x.shape, dtype=x.dtype, device=x.device).normal_(generator=generator)


def _noise(
    x: Tensor, data_gradient: str | Tensor, steps: int, generator: torch.Generator | None, attack: str
) -> list[Tensor]:
    """The noise in the place of the data gradient, [steps, N, …], where there is one."""
    if not isinstance(data_gradient, Tensor):
        if data_gradient not in DATA_GRADIENTS:
            allowed = f"one of {', '.join(DATA_GRADIENTS)}, or a tensor [steps, N, …]"
            raise ValueError(f"data_gradient must be {allowed}, got {data_gradient!r}")
        return [noise_directions(x, steps, generator, attack)] if data_gradient == "noise" else []
    expected = (1 if attack in SINGLE_STEP else steps, *x.shape)
    if data_gradient.shape != expected or data_gradient.dtype != x.dtype or data_gradient.device != x.device:
        raise ValueError(
            f"data_gradient must be {x.dtype} {list(expected)} on {x.device}, for each step what x is, got "
            f"{data_gradient.dtype} {list(data_gradient.shape)} on {data_gradient.device}"
        )
    return [data_gradient.detach()]


def _attacked(
    x: Tensor, gradient: Callable[[Tensor], Tensor], threat_model: Perturbations, attack: str, steps: int, first: Tensor
) -> Tensor:
    if attack == "pgd":
        return ascend(x, gradient, threat_model, steps=steps, start=first)
    return single_step(x, gradient, _ball(threat_model, attack), attack=attack, start=first)


def _ball(threat_model: Perturbations, attack: str) -> ThreatModel:
    """The threat model of a single-step attack, whose lengths are multiples of eps."""
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(f"threat_model must be a ThreatModel for attack {attack!r}, got {type(threat_model).__name__}")
    return threat_model


def _found(
    graphs: AttackGraphs | None, search: Attack, modules: Sequence[object], *inputs: Tensor
) -> dict[str, Tensor]:
    return search(*inputs) if graphs is None else graphs(search, *inputs, modules=modules)


def _perturbing(weights: WeightPerturbation | None, outcome: Callable[[], Outcome]) -> Outcome:
    """The outcome, at perturbed weights where asked for."""

    def loss() -> Tensor:
        return outcome().loss.sum()

    if weights is not None:
        weights.perturb(loss)
    return outcome()


def first_iterate(
    x: Tensor,
    threat_model: Perturbations,
    start: str = "uniform",
    generator: torch.Generator | None = None,
    attack: str = "pgd",
) -> Tensor:
    """Where an attack during training starts.

    Args:
        x: [N, …] clean inputs.
        threat_model: B(x).
        start: of PGD: ``"uniform"`` in B(x), or ``"gaussian"``, x + 0.001 ω projected to B(x).
        generator: randomness, on the device of x.
        attack: ``"pgd"``; ``"fgsm_rs"`` and ``"n_fgsm"`` have a start of their own and ignore ``start``.

    Returns:
        [N, …] inside B(x), but for ``"n_fgsm"``: within 2 eps.

    Raises:
        ValueError: ``start`` or ``attack`` is none of these.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}")
    if attack in SINGLE_STEP:
        return single_step_start(x, _ball(threat_model, attack), attack, generator)
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, or a tensor like x, got {start!r}")
    with torch.no_grad():
        if start == "uniform":
            return threat_model.random_start(x, generator)
        noise = normal_like(x, generator)
        return threat_model.project(x + GAUSSIAN_START * noise, x)


def _start(
    x: Tensor, threat_model: Perturbations, start: str | Tensor, generator: torch.Generator | None, attack: str
) -> Tensor:
    if not isinstance(start, Tensor):
        return first_iterate(x, threat_model, start, generator, attack)
    if start.shape != x.shape or start.dtype != x.dtype or start.device != x.device:
        raise ValueError(
            f"start must be {x.dtype} {list(x.shape)} on {x.device} as x is, got {start.dtype} {list(start.shape)} "
            f"on {start.device}"
        )
    return start.detach()


OBJECTIVES: dict[str, Callable[..., Outcome]] = {
    "standard": standard,
    "gaussian": gaussian,
    "pgd_at": pgd_at,
    "trades": trades,
    "score_direct": score_direct,
}


def default_of(objective: str, argument: str) -> str | None:
    """The default of an argument of an objective, by names; None if the objective has no such argument."""
    parameter = inspect.signature(OBJECTIVES[objective]).parameters.get(argument)
    return None if parameter is None else parameter.default
