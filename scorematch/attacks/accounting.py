"""What attacks cost: passes and seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from .classifier import Classifier


@dataclass
class Cost:
    """What one attack took.

    Attributes:
        forwards, backwards: passes of one sample, the verification in float32 included.
        broken_gradients: gradients of one sample that were NaN or infinite in some element.
        seconds: of wall-clock time.
        unverified: successes of the search that the check with the model itself did not confirm.
    """

    forwards: int = 0
    backwards: int = 0
    broken_gradients: int = 0
    seconds: float = 0.0
    unverified: int = 0

    def add(self, other: Cost) -> None:
        """Take in what another process spent on the same attack at the same time."""
        self.forwards += other.forwards
        self.backwards += other.backwards
        self.broken_gradients += other.broken_gradients
        self.seconds = max(self.seconds, other.seconds)
        self.unverified += other.unverified


class Ledger:
    """Books what classifiers and the clock have counted on attacks.

    Args:
        costs: by attack; written to.
        since: the ``time.perf_counter()`` from which seconds are booked.
    """

    def __init__(self, costs: dict[str, Cost], since: float) -> None:
        self._costs = costs
        self._last = since

    def book(self, name: str, classifiers: Sequence[Classifier] = ()) -> None:
        """Book the seconds since the last call on an attack, and the passes of classifiers that nobody uses now."""
        cost = self._costs.setdefault(name, Cost())
        for classifier in classifiers:
            cost.forwards += classifier.forwards
            cost.backwards += classifier.backwards
            cost.broken_gradients += classifier.take_broken()
            classifier.forwards = classifier.backwards = 0
        now = time.perf_counter()
        cost.seconds += now - self._last
        self._last = now
