"""The surrogates of SCORE: PGD-AT and TRADES."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..attacks.pgd import input_gradient
from ..graphs import AttackGraphs
from ..inputs import check_posterior
from ..model_state import borrowed
from ..modes import own_precision
from ..ops._checks import check_number
from ..ops.logit_divergence import logit_divergence
from ..posteriors.base import Posterior, begin_trace
from ..threat_model import Perturbations
from ..weight_perturbation import WeightPerturbation
from .moving_target import DirectAscent, MovingTarget
from .outcome import Outcome, accuracy, clipping, divergence_from, training_logits, warn_of_probabilities
from .search import Watched, at_perturbed_weights, attacked, check_search, found_by, start_of


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
    check_search(model, x, y, threat_model, steps, divergence, clip)

    def search(x: Tensor, y: Tensor, first: Tensor) -> dict[str, Tensor]:
        with borrowed(model, attack_mode):
            gradient = Watched(
                input_gradient(lambda x_adv: divergence_from(y, training_logits(model, x_adv), divergence))
            )
            return {"x_adv": attacked(x, gradient, threat_model, attack, steps, first), **gradient.metrics()}

    metrics = found_by(graphs, search, [model], x, y, start_of(x, threat_model, start, generator, attack))
    x_adv = metrics.pop("x_adv")

    def outcome() -> Outcome:
        logits = training_logits(model, x_adv)
        warn_of_probabilities(model, logits)
        bounds = clipping(clip, clip_form, divergence, logits.shape[1])
        clip_at = bounds.of_total + bounds.of_robust
        loss = divergence_from(y, logits, divergence, clip_at)
        return Outcome(loss, x_adv, {"accuracy": accuracy(logits, y), **metrics})

    return at_perturbed_weights(weights, outcome)


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
    check_search(model, x, y, threat_model, steps, divergence, clip)
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
            gradient = Watched(
                input_gradient(lambda x_adv: logit_divergence(training_logits(model, x_adv), clean, kind=divergence))
            )
            return {"x_adv": attacked(x, gradient, threat_model, attack, steps, first), **gradient.metrics()}

    def search_with(posterior: Posterior, x: Tensor, y: Tensor, first: Tensor) -> dict[str, Tensor]:
        with own_precision(x):
            trace = begin_trace(posterior, x, y)
        with borrowed(model, attack_mode):
            with torch.no_grad():
                clean = training_logits(model, x)
            target = MovingTarget(trace, clean, transport)
            ascent = DirectAscent(model, target, divergence)
            x_adv = attacked(x, ascent.gradient, threat_model, attack, steps, first)
            target.move(x_adv)
        return {"x_adv": x_adv, "shift": target.shift(), **ascent.metrics()}

    first = start_of(x, threat_model, start, generator, attack)
    if posterior is None:
        found = found_by(graphs, search, [model], x, first)
    else:
        found = found_by(graphs, partial(search_with, posterior), [model, posterior], x, y, first)
    x_adv, shift = found.pop("x_adv"), found.pop("shift", None)

    def outcome() -> Outcome:
        logits = training_logits(model, x)
        warn_of_probabilities(model, logits)
        bounds = clipping(clip, clip_form, divergence, logits.shape[1])
        natural = divergence_from(y, logits, divergence)
        moved = training_logits(model, x_adv)
        target = logits if shift is None else logits + shift
        robust = logit_divergence(moved, target, kind=divergence, clip=bounds.of_robust)
        loss = natural + beta * robust
        if bounds.of_total:
            loss = torch.relu(loss - bounds.of_total)
        terms = {"natural": natural.detach().mean(), "robust": robust.detach().mean()}
        return Outcome(loss, x_adv, {"accuracy": accuracy(moved, y), **terms, **found})

    return at_perturbed_weights(weights, outcome)
