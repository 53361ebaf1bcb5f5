"""An estimated posterior, used as a classifier, under an attack on itself: its robust accuracy and its likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attacks.classifier import predicted
from ..attacks.pgd import ascend
from ..inputs import check_attack, check_count, check_posterior, check_samples, check_tensor, clean_batch
from ..modes import outside_modes
from ..posteriors.base import Posterior, begin_trace, check_known, check_scores
from ..threat_model import ThreatModel

LARGE = 1e30  # takes a class out of a softmax; smaller than the largest float32 and bfloat16


@outside_modes
def robust_accuracy(
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    steps: int = 40,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Accuracy of arg max_y p(y|x') at clean points and under an attack that follows the posterior's own gradient.

    A point at which the posterior gives NaN counts as misclassified. Where an element of its gradient is NaN, the
    attack leaves that feature as it is. A posterior of which nothing could be said is refused: one that gives NaN at
    all clean points, or whose gradient at one of them is NaN in every feature.

    A model for which direct SCORE is zero on all of B(x) equals the posterior, and so has its robust accuracy. This is
    not a bound: training stops before that, and some trained models have a higher robust accuracy.

    A posterior that is anchored at labels is right at the clean points by construction. The attack then tests whether
    the scores alone carry it to another class.

    Args:
        posterior: the estimate.
        x: [N, …] clean inputs inside the box.
        y: class indices [N].
        threat_model: B(x) and the step size.
        steps: steps of one restart, ≥ 0; every iterate is judged.
        restarts: random starts, ≥ 1.
        generator: their randomness, on the device of x.

    Returns:
        Clean and robust accuracy, each in [0, 1].

    Raises:
        TypeError, ValueError: x, y and the threat model do not fit, see :func:`scorematch.inputs.clean_batch`, steps
            or restarts are outside their range, or the posterior gives NaN where it is refused.
    """
    clean, robust, _ = _attacked(posterior, x, y, threat_model, steps, restarts, generator)
    return float(clean.double().mean()), float(robust.double().mean())


@outside_modes
def attacked_log_likelihood(
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    steps: int = 40,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The lowest log p(y|x') that the attack of :func:`robust_accuracy` meets, in nats, [N]; NaN if it meets a NaN.

    :func:`scorematch.audit.log_likelihood` moves points in random directions, in which an estimate may err little. This
    moves them where the estimate says that their label is least likely. The label of x is no draw from p(y|x') at a
    point that was chosen so: a low value can be an error of the estimate, or p_d may turn within B(x). And an estimate
    that integrates along a path starts at clean x, as in training, which tells it more about the label than x' does.

    Args:
        posterior: the estimate. One that is anchored at labels is told the label at clean x.
        x: [N, …] clean held-out inputs inside the box.
        y: class indices [N].
        threat_model: B(x) and the step size.
        steps: steps of one restart, ≥ 0; every iterate is judged.
        restarts: random starts, ≥ 1.
        generator: their randomness, on the device of x.

    Raises:
        TypeError, ValueError: as :func:`robust_accuracy`.
    """
    return _attacked(posterior, x, y, threat_model, steps, restarts, generator)[2]


def _attacked(
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each sample: right at clean x, right at every iterate, and the lowest log p(y|x') of all of them."""
    check_posterior("posterior", posterior)
    check_attack(threat_model, steps)
    check_count("restarts", restarts)
    check_tensor("x", x)
    check_tensor("y", y)
    x, y = clean_batch(x, y, threat_model)
    check_samples(x, y, posterior.num_classes, least=1)
    trace = begin_trace(posterior, x, y, nan=True)
    at_clean = trace.log_p
    if bool(at_clean.isnan().any(1).all()):
        check_known(at_clean)
    check_scores(trace, x)
    clean = predicted(at_clean) == y
    robust, lowest = clean.clone(), at_clean.gather(1, y[:, None])[:, 0]
    one_hot = torch.nn.functional.one_hot(y, posterior.num_classes).to(x.dtype)

    def restart() -> None:
        trace = begin_trace(posterior, x, y, nan=True)

        def judge(x_adv: Tensor) -> None:
            trace.move(x_adv)
            robust.logical_and_(predicted(trace.log_p) == y)
            torch.minimum(lowest, trace.log_p.gather(1, y[:, None])[:, 0], out=lowest)

        def gradient(x_adv: Tensor) -> Tensor:
            judge(x_adv)
            # The direction of −∇ log p(y|x'), but for a factor: the other classes by their shares, minus the label. As
            # −1 + p(y|x') its weight of the label would lose all digits where p(y|x') rounds to 1.
            others = (trace.log_p - LARGE * one_hot).softmax(1)
            return trace.pull_back(others - one_hot, torch.zeros_like(x_adv)).nan_to_num(nan=0.0)

        judge(ascend(x, gradient, threat_model, steps=steps, generator=generator))

    for _ in range(restarts):
        restart()
    return clean, robust, lowest
