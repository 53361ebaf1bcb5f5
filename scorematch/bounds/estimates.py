"""Means over p_d(x), with their uncertainty where x was sampled."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import intervals
from ..inputs import check_floating, check_tensor

NORMAL_QUANTILE = 1.959963984540054  # of a two-sided 95 % interval


class Estimate(NamedTuple):
    """An expectation over p_d(x).

    Attributes:
        mean: its estimate.
        low, high: ends of a 95 % interval over the draw of the samples; both equal ``mean`` where the samples are the
            nodes of a quadrature, with weights, and nothing was drawn.
    """

    mean: float
    low: float
    high: float


def estimate(values: Tensor, weights: Tensor | None = None) -> Estimate:
    """E over p_d(x) of one value a sample.

    Args:
        values: [N], bool or floating; N ≥ 2 without weights. A bool gives a share, with Wilson's interval; a number a
            mean, with the interval of the normal approximation.
        weights: [N] weights of a quadrature, ≥ 0, such as p_d(x) times the spacing of a grid; normalised here. None:
            the samples are independent draws from p_d(x).

    Raises:
        TypeError: values or weights are no tensors of such numbers.
        ValueError: shapes do not fit, a value is not finite, a weight is negative, or there are too few samples for an
            interval.
    """
    check_tensor("values", values)
    if values.dtype != torch.bool:
        check_floating(values, "values")
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"values must be finite, got {bad} of {values.numel()} that are not")
    if values.dim() != 1:
        raise ValueError(f"values must be [N], got {list(values.shape)}")
    if weights is None and values.dtype == torch.bool:
        if len(values) < 1:
            raise ValueError("values must be at least one sample, got none")
        hits = int(values.sum())
        return Estimate(hits / len(values), *intervals.wilson(hits, len(values)))
    return around(mean(values, weights), values, weights)


def mean(values: Tensor, weights: Tensor | None) -> float:
    """The mean of values [N] in float64; see :func:`estimate`.

    Raises:
        ValueError: as :func:`estimate`.
    """
    if weights is None:
        return float(values.double().mean())
    check_tensor("weights", weights)
    if weights.is_complex():
        raise TypeError(f"weights must be real, got {weights.dtype}")
    if weights.shape != values.shape:
        raise ValueError(f"weights must be [N] as values, {list(values.shape)}, got {list(weights.shape)}")
    share = weights.double()
    if not bool((share >= 0).all()) or not 0.0 < float(share.sum()) < math.inf:
        given = f"{int((share < 0).sum())} negative values and the sum {float(share.sum()):g}"
        raise ValueError(f"weights must be non-negative with a positive and finite sum, got {given}")
    return float((share * values.double()).sum() / share.sum())


def around(value: float, influence: Tensor, weights: Tensor | None) -> Estimate:
    """The interval of an estimate that moves, to first order, with the mean of ``influence`` [N] (delta method).

    Raises:
        ValueError: there are fewer than two samples and no weights.
    """
    if weights is not None:
        return Estimate(value, value, value)
    if len(influence) < 2:
        raise ValueError(f"x must be at least two samples for an interval, or come with weights, got {len(influence)}")
    half = NORMAL_QUANTILE * float(influence.double().std()) / math.sqrt(len(influence))
    return Estimate(value, value - half, value + half)
