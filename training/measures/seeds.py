"""Means over seeds, or other repetitions, with their intervals."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t as student

SAME = 1e-9  # relative: a smaller interval is rounding of float64


class Estimate(NamedTuple):
    """A mean over seeds with its interval (Student's t, 95 % unless said otherwise); one seed has no interval."""

    mean: float
    low: float | None
    high: float | None
    values: list[float]


def estimate(values: Sequence[float], *, level: float = 0.95, least: float = 0.0) -> Estimate:
    """The mean of values with its interval, which takes their standard deviation to be at least ``least``."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None, list(values))
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * max(stdev(values), least) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half, list(values))


def over_seeds(
    values: Sequence[float], one_sample: float = 0.0, *, accuracies: int = 1, level: float = 0.95
) -> Estimate:
    """:func:`estimate` of what runs have measured, where equal values of all seeds do not make an interval of width 0.

    Args:
        values: one for each seed.
        one_sample: what one test sample counts in an accuracy, in points. 0: the values are no accuracies, or it is not
            known; then equal values have no interval.
        accuracies: how many a value is made of; a difference is made of two.
        level: of the interval.
    """
    # An accuracy is rounded to multiples of h, one sample. An error u anywhere in [-h/2, h/2] has the variance
    # (1/h) ∫ u² du = h²/12, and a difference of two accuracies twice that, h²/6.
    found = estimate(values, level=level, least=one_sample * (accuracies / 12) ** 0.5)
    if found.low is None or found.high is None or found.high - found.low > SAME * max(map(abs, values)):
        return found
    return found._replace(low=None, high=None)
