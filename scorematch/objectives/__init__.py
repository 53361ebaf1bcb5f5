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
from collections.abc import Callable

from .clean import Annealed, alignment_of, annealed, gaussian, noise_levels, standard
from .direct import noise_directions, score_direct
from .outcome import Outcome, accuracy, soft_targets
from .search import first_iterate
from .surrogates import pgd_at, trades

__all__ = [
    "OBJECTIVES",
    "Annealed",
    "Outcome",
    "accuracy",
    "alignment_of",
    "annealed",
    "default_of",
    "first_iterate",
    "gaussian",
    "noise_directions",
    "noise_levels",
    "pgd_at",
    "score_direct",
    "soft_targets",
    "standard",
    "trades",
]

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
