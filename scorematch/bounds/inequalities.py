"""Theorems 1 to 3 and Corollary 1: both sides of each inequality.

All hold sample by sample, which is more than the paper says: its inequalities between expectations follow by averaging.
And all hold for the maxima over any finite set of points that contains x, so both sides come from one call of
:func:`scorematch.bounds.robust_errors` and can be compared although a search finds only lower bounds of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import DIVERGENCES
from ..modes import outside_modes
from .errors import RobustErrors
from .estimates import Estimate, around, estimate, mean

ZERO_ONE = "zero_one"
METRICS = (*(name for name, kind in DIVERGENCES.items() if kind.is_metric), ZERO_ONE)
PHI_POINTS = 129  # at which a φ is checked
PHI_TOLERANCE = 1e-6  # relative to the range of φ


class Inequality(NamedTuple):
    """Both sides of an inequality, left ≤ right.

    Attributes:
        left, right: [N], the inequality at each sample.
        left_mean, right_mean: the paper's two sides, in which every error is an expectation over p_d(x).
        slack: right minus left of these, with the interval of the difference: both sides share their samples. It is
            negative where the inequality is violated.
    """

    left: Tensor
    right: Tensor
    left_mean: Estimate
    right_mean: Estimate
    slack: Estimate


class Theorem1(NamedTuple):
    """|R_Madry^D − C^D| ≤ R_SCORE^D ≤ R_Madry^D + C^D.

    Attributes:
        lower: its first inequality.
        upper: its second.
    """

    lower: Inequality
    upper: Inequality


class Theorem3(NamedTuple):
    """R_Madry^D ≤ R_TRADES^D(β) ≤ (1 + 2β) R_Madry^D.

    Attributes:
        lower: its first inequality.
        upper: its second.
    """

    lower: Inequality
    upper: Inequality


def theorem_1(errors: RobustErrors, *, weights: Tensor | None = None) -> Theorem1:
    """Theorem 1: R_Madry and C^D bound R_SCORE from both sides, for any metric D (Eqs. 14 to 16).

    At each sample |M − C| ≤ S ≤ M + C, so even E|M − C| ≤ R_SCORE, where the paper has |E M − E C|. The lower bound is
    attained where q = p_d: then S = 0 and M = C. The upper bound is attained, for l1, l2 and linf, where q(x') lies on
    the other side of p_d(·|x) than p_d(·|x'). The proof uses symmetry and the triangle inequality alone. So 0-1 errors
    obey it, too, although different distributions may have the same most likely class
    (:class:`scorematch.bounds.ZeroOneErrors`). For KL, squared error, JS and squared l1 it is false; Theorem 2 and
    Corollary 1 are about these.

    Args:
        errors: of a metric: ``"l2"``, ``"l1"``, ``"linf"``, ``"js_distance"`` or ``"zero_one"``.
        weights: [N] quadrature weights of p_d(x), see :func:`scorematch.bounds.estimate`; None: x are draws.

    Raises:
        ValueError: D is not a metric, or weights do not fit.
    """
    _check_metric(errors)
    madry, score, constant = errors.madry, errors.score, errors.constant
    upper = Inequality(
        score,
        madry + constant,
        estimate(score, weights),
        estimate(madry + constant, weights),
        estimate(madry + constant - score, weights),
    )
    return Theorem1(_distance_below(madry, constant, score, weights), upper)


@outside_modes
def theorem_2(
    errors: RobustErrors,
    *,
    phi: Callable[[Tensor], Tensor] = torch.square,
    inverse: Callable[[Tensor], Tensor] = torch.sqrt,
    weights: Tensor | None = None,
) -> Inequality:
    """Theorem 2: |R_SCORE^D − C^D| ≤ φ⁻¹(R_Madry^{φ∘D}) for any metric D and increasing convex φ (Eqs. 17 to 20).

    R_Madry^{φ∘D} is E φ(max D), since φ changes no maximiser (Eq. 18). With the default, the square, φ∘D is squared
    error for l2, JS for the JS distance and squared l1 for l1. Sample by sample it says no more than Theorem 1; in
    expectation it is looser by Jensen's inequality (Eq. 19), and equal to Eq. (17) only where max D is the same at all
    samples or φ is linear.

    Two words of the paper need care. φ must increase strictly on [0, ∞), else φ⁻¹ does not exist. And convexity is
    needed: for φ(t) = √t the statement is false.

    Args:
        errors: of a metric D, as for :func:`theorem_1`; not of φ∘D.
        phi: φ, elementwise and differentiable, of values ≥ 0.
        inverse: φ⁻¹, elementwise.
        weights: [N] quadrature weights of p_d(x); None: x are draws.

    Raises:
        ValueError: D is not a metric, or on the range of max D ``phi`` does not increase, is not convex or is not
            undone by ``inverse`` (each checked at 129 points).
    """
    _check_metric(errors)
    _check_phi(phi, inverse, errors.madry)
    madry = errors.madry.double()
    value = phi(madry)
    average = mean(value, weights)
    right = float(inverse(torch.tensor(average, dtype=torch.float64, device="cpu")))
    deviation = value - average
    # Where all values are equal the slope may be infinite, as that of a root at 0, but nothing varies.
    influence = torch.where(deviation == 0, deviation, deviation / _slope(phi, right))
    return _below(errors.score, errors.constant, inverse(value), right, influence, weights)


def theorem_3(errors: RobustErrors, *, beta: float, weights: Tensor | None = None) -> Theorem3:
    """Theorem 3: R_Madry^D ≤ R_TRADES^D(β) ≤ (1 + 2β) R_Madry^D for any metric D and β ≥ 1 (Eq. 21).

    The lower bound is attained for β = 1 where q(x) = p_d(·|x). The upper bound is attained, for l1, l2 and linf, where
    p_d(·|x) lies in the middle between q(x) and the q(x') that is farthest from it. The upper bound needs x ∈ B(x),
    which always holds here. The lower bound needs β ≥ 1; for smaller β it is β R_Madry ≤ R_TRADES. Two errors that
    bound each other need not have the same minimisers: p_d itself has R_Madry = C^D but R_TRADES = β C^D, so for large
    β TRADES prefers a constant model where R_Madry prefers p_d.

    Args:
        errors: of a metric D, as for :func:`theorem_1`.
        beta: β ≥ 1.
        weights: [N] quadrature weights of p_d(x); None: x are draws.

    Raises:
        ValueError: D is not a metric, or β is smaller than 1.
    """
    _check_metric(errors)
    if not beta >= 1.0:
        raise ValueError(f"beta must be at least 1, got {beta}")
    trades, scaled = errors.trades(beta), (1 + 2 * beta) * errors.madry
    return Theorem3(_plain(errors.madry, trades, weights), _plain(trades, scaled, weights))


def corollary_1(distance: RobustErrors, kl: RobustErrors, *, weights: Tensor | None = None) -> Inequality:
    """Corollary 1: |R_SCORE^l1 − C^l1| ≤ √(2 R_Madry), R_Madry with KL in nats (Eqs. 8, 30), by Pinsker's Eq. (7).

    The corollary is right; two lines of its printed proof are not. Eq. (28) has R_Madry^l1 where Theorem 2 gives
    R_Madry^{l1²}: as printed it fails for a model that is wrong with certainty, where R_SCORE^l1 = 2, C^l1 = 0 and
    √R_Madry^l1 = √2. And below Eq. (29) "R_Madry^l1 ≤ 2 R_Madry" should read R_Madry^{l1²} ≤ 2 R_Madry: as printed it
    fails for every model that is close to p_d, where l1 is of the order of √KL.

    Args:
        distance: errors of ``"l1"``.
        kl: errors of ``"kl"`` from the same call of :func:`scorematch.bounds.robust_errors`.
        weights: [N] quadrature weights of p_d(x); None: x are draws.

    Raises:
        ValueError: the errors are of other divergences, or of other samples.
    """
    for argument, given, expected in (("distance", distance, "l1"), ("kl", kl, "kl")):
        if given.divergence != expected:
            raise ValueError(f"{argument} must hold errors of {expected}, got {given.divergence}")
    if kl.madry.shape != distance.madry.shape:
        raise ValueError(
            f"kl must have as many samples as distance, {list(distance.madry.shape)}, got {list(kl.madry.shape)}"
        )
    value = 2 * kl.madry.double()
    average = mean(value, weights)
    right = average**0.5
    deviation = value - average
    influence = torch.where(deviation == 0, deviation, deviation / (2 * right))
    return _below(distance.score, distance.constant, value.sqrt(), right, influence, weights)


def _plain(left: Tensor, right: Tensor, weights: Tensor | None) -> Inequality:
    return Inequality(left, right, estimate(left, weights), estimate(right, weights), estimate(right - left, weights))


def _distance_below(a: Tensor, b: Tensor, right: Tensor, weights: Tensor | None) -> Inequality:
    """|E a − E b| ≤ E right."""
    return _below(a, b, right, mean(right, weights), right.double() - mean(right, weights), weights)


def _below(
    a: Tensor, b: Tensor, right: Tensor, right_value: float, influence: Tensor, weights: Tensor | None
) -> Inequality:
    """|E a − E b| ≤ right_value, an estimate that moves with the mean of ``influence`` [N]; |a − b| ≤ right at each."""
    difference = a.double() - b.double()
    signed = estimate(difference, weights)
    sign = -1.0 if signed.mean < 0 else 1.0
    ends = sorted((abs(signed.low), abs(signed.high)))
    left_mean = Estimate(abs(signed.mean), 0.0 if signed.low < 0 < signed.high else ends[0], ends[1])
    return Inequality(
        (a - b).abs(),
        right.to(a.dtype),
        left_mean,
        around(right_value, influence, weights),
        around(right_value - abs(signed.mean), influence - sign * difference, weights),
    )


def _slope(phi: Callable[[Tensor], Tensor], at: float) -> float:
    with torch.enable_grad():
        point = torch.tensor(at, dtype=torch.float64, device="cpu", requires_grad=True)
        return float(torch.autograd.grad(phi(point), point)[0])


def _check_metric(errors: RobustErrors) -> None:
    if errors.divergence not in METRICS:
        raise ValueError(f"errors must be of a metric, one of {', '.join(METRICS)}, got {errors.divergence}")


def _check_phi(phi: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], distances: Tensor) -> None:
    largest = float(distances.max())
    if largest == 0.0:
        return
    at = torch.linspace(0.0, largest, PHI_POINTS, dtype=torch.float64, device="cpu")
    values = phi(at)
    rise = values.diff()
    if not bool((rise > 0).all()):
        raise ValueError(f"phi must increase strictly on [0, {largest:g}], but does not")
    if not bool((rise.diff() >= -PHI_TOLERANCE * float(values[-1] - values[0])).all()):
        raise ValueError(f"phi must be convex on [0, {largest:g}], but is not")
    if not torch.allclose(inverse(values), at, rtol=1e-6, atol=1e-6 * largest):
        raise ValueError(f"inverse must undo phi on [0, {largest:g}], but does not")
