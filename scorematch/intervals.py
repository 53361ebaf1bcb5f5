"""Confidence intervals of a share."""

import math


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, JASA 1927), both ends in [0, 1].

    Args:
        hits: successes, 0 ≤ hits ≤ count.
        count: trials, at least 1.
        z: quantile of the standard normal distribution; the default gives 95 %.

    Raises:
        ValueError: hits or count is outside its range.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"hits must lie between 0 and count, and count be at least 1, got {hits} and {count}")
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # It holds the share itself; at 0 and 1 rounding would leave that out.
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)
