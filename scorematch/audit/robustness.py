"""The robust accuracy of an estimated posterior that is used as a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attacks.pgd import ascend
from ..inputs import check_attack, check_count, check_posterior, check_samples, check_tensor, clean_batch
from ..posteriors.base import Posterior, begin_trace
from ..threat_model import ThreatModel

LARGE = 1e30  # takes a class out of a softmax; smaller than the largest float32 and bfloat16


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
        TypeError, ValueError: x, y and the threat model do not fit, see :func:`scorematch.inputs.clean_batch`, or
            steps or restarts are outside their range.
    """
    check_posterior("posterior", posterior)
    check_attack(threat_model, steps)
    check_count("restarts", restarts)
    check_tensor("x", x)
    check_tensor("y", y)
    x, y = clean_batch(x, y, threat_model)
    check_samples(x, y, posterior.num_classes, least=1)
    clean = begin_trace(posterior, x, y).log_p.argmax(1) == y
    robust = clean.clone()
    one_hot = torch.nn.functional.one_hot(y, posterior.num_classes).to(x.dtype)
    for _ in range(restarts):
        trace = begin_trace(posterior, x, y)

        def gradient(x_adv: Tensor, trace=trace) -> Tensor:  # type: ignore[no-untyped-def]
            trace.move(x_adv)
            robust.logical_and_(trace.log_p.argmax(1) == y)
            # The direction of −∇ log p(y|x'), but for a factor: the other classes by their shares, minus the label. As
            # −1 + p(y|x') its weight of the label would lose all digits where p(y|x') rounds to 1.
            others = (trace.log_p - LARGE * one_hot).softmax(1)
            return trace.pull_back(others - one_hot, torch.zeros_like(x_adv))

        trace.move(ascend(x, gradient, threat_model, steps=steps, generator=generator))
        robust.logical_and_(trace.log_p.argmax(1) == y)
    return float(clean.double().mean()), float(robust.double().mean())
