"""Direct minimisation of SCORE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attacks.single_step import SINGLE_STEP
from ..graphs import AttackGraphs
from ..inputs import check_like, check_posterior
from ..model_state import borrowed
from ..modes import own_precision
from ..ops._checks import check_number
from ..ops.logit_divergence import logit_divergence
from ..posteriors.base import Posterior, begin_trace
from ..threat_model import Perturbations
from ..weight_perturbation import WeightPerturbation
from .moving_target import DirectAscent, MovingTarget
from .outcome import (
    Outcome,
    accuracy,
    check_comparable,
    check_target,
    clipping,
    training_logits,
    warn_of_probabilities,
)
from .search import at_perturbed_weights, attacked, check_search, found_by, start_of

DATA_GRADIENTS = ("scores", "none", "noise")


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
            has no mixed target. On the CPU, log p of clean x and the first data gradient must not be NaN.
    """
    check_search(model, x, y, threat_model, steps, divergence, clip)
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
        target = MovingTarget(trace) if target_mix == 1.0 else MovingTarget(trace, trace.log_p, target_mix)
        ascent = DirectAscent(model, target, divergence, literal=literal, scores=scores, noise=noise)
        with borrowed(model, attack_mode):
            x_adv = attacked(x, ascent.gradient, threat_model, attack, steps, first)
            target.move(x_adv)
        return {"x_adv": x_adv, "log_p": target.logits(), **ascent.metrics()}

    first = start_of(x, threat_model, start, generator, attack)
    scores = isinstance(data_gradient, Tensor) or data_gradient != "none"
    noise = _noise(x, data_gradient, steps, generator, attack)
    metrics = found_by(graphs, search, [model, posterior], x, y, first, *noise)
    x_adv, log_p = metrics.pop("x_adv"), metrics.pop("log_p")

    def outcome() -> Outcome:
        logits = training_logits(model, x_adv)
        warn_of_probabilities(model, logits)
        check_comparable(logits, log_p)
        check_target(y, logits)
        bounds = clipping(clip, clip_form, divergence, logits.shape[1])
        clip_at = bounds.of_total + bounds.of_robust
        loss = logit_divergence(logits, log_p, kind=divergence, clip=clip_at)
        return Outcome(loss, x_adv, {"accuracy": accuracy(logits, y), **metrics})

    return at_perturbed_weights(weights, outcome)


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
    check_like("data_gradient", data_gradient, x, [1 if attack in SINGLE_STEP else steps, *x.shape])
    return [data_gradient.detach()]
