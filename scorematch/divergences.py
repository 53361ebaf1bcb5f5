"""The divergences D(P ‖ Q) between class distributions, and how a loss is clipped.

The eight losses are those of Table 1 of Pang et al. (ICML 2022). The arithmetic is in the compiled operators
:func:`scorematch.divergence` and :func:`scorematch.logit_divergence`; this file says what the names mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .ops.divergence import divergence


@dataclass(frozen=True)
class Divergence:
    """One divergence D(P ‖ Q) of two distributions over L classes, in nats where a logarithm occurs.

    Attributes:
        name: the ``kind`` that the operators take.
        formula: its definition.
        is_metric: whether it satisfies the axioms of a distance (identity, symmetry, triangle inequality), which is
            what Theorem 1 and Theorem 3 ask for.
        root: name of the metric of which it is an increasing convex function (Theorem 2), or None.
    """

    name: str
    formula: str
    is_metric: bool
    root: str | None = None


DIVERGENCES: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("kl", "Σ P log(P / Q)", False),
        Divergence("se", "‖P − Q‖₂²", False, root="l2"),
        Divergence("l2", "‖P − Q‖₂", True),
        Divergence("l1", "‖P − Q‖₁", True),
        Divergence("linf", "max |P − Q|", True),
        Divergence("js", "½ KL(P ‖ M) + ½ KL(Q ‖ M), M = ½ (P + Q)", False, root="js_distance"),
        Divergence("js_distance", "√JS(P ‖ Q)", True),
        Divergence("l1_squared", "‖P − Q‖₁²", False, root="l1"),
    )
}
KINDS: tuple[str, ...] = tuple(DIVERGENCES)


def check_kind(kind: str, argument: str = "divergence") -> str:
    """Return ``kind`` if it names a divergence.

    Args:
        kind: one of :data:`KINDS`.
        argument: what the error calls it.

    Raises:
        ValueError: ``kind`` names no divergence.
    """
    if not isinstance(kind, str) or kind not in DIVERGENCES:
        raise ValueError(f"{argument} must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def clip_bound(kind: str, threshold: float, num_classes: int) -> float:
    """Value of D below which a clipped loss is zero, for a clipping threshold c (section 5.2, Table 2).

    The bound is D(one-hot ‖ [1 − c, c/(L−1), …]): the loss of a prediction that gives the true class the probability
    1 − c and spreads c evenly over the others. For squared error and 10 classes, c = 0.4 gives 0.1778 and c = 0.3
    gives 0.1.

    Args:
        kind: name of the divergence.
        threshold: c, a probability in [0, 1).
        num_classes: L ≥ 2.

    Returns:
        The bound, in the units of D; 0 for c = 0.

    Raises:
        ValueError: an argument is outside its range.
    """
    check_kind(kind, "kind")
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if threshold == 0.0:
        return 0.0
    prediction = torch.full((1, num_classes), threshold / (num_classes - 1), dtype=torch.float64, device="cpu")
    prediction[0, 0] = 1.0 - threshold
    return float(divergence(prediction.log(), torch.zeros(1, dtype=torch.int64, device="cpu"), kind=kind))
