"""Direct SCORE against its surrogates on a problem whose p_d is known: what the sections of the page compare."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from training.compare import Estimate, estimate
from training.experiments.estimators import CROSS_FITTED, ESTIMATORS
from training.experiments.mixtures import SURROGATES
from training.experiments.tables import OPEN, SEEDS_NEEDED, label, verdict

TITLES = {"kl": "KL", "r_score": "R_SCORE", "clean": "clean accuracy", "robust": "robust accuracy by label"}
LOWER_IS_BETTER = ("kl", "r_score")


def digits_of(measure: str) -> int:
    return 3 if measure in LOWER_IS_BETTER else 1


def present(cells: Sequence[dict[str, Any]], names: Sequence[str], entry: str = "student {}") -> list[str]:
    """Those of the names whose entry every cell has."""
    return [name for name in names if all(entry.format(name) in cell["entries"] for cell in cells)]


def estimators_of(cells: Sequence[dict[str, Any]]) -> list[str]:
    return present(cells, tuple(ESTIMATORS), "student direct:kl {}")


def chosen_by_evidence(cell: dict[str, Any]) -> str:
    """The learned posterior with the highest held-out log-likelihood, a choice that does not need the truth."""
    names = present([cell], CROSS_FITTED, "student direct:kl {}")
    return max(names, key=lambda name: max(cell["entries"][f"posterior {name}"]["evidence"].values()))


def of_direct(cell: dict[str, Any], name: str) -> dict[str, float]:
    """Measures of direct SCORE with this posterior, its last weights."""
    measures: dict[str, float] = cell["entries"][f"student direct:kl {name}"]["last"]
    return measures


def of_surrogate(cell: dict[str, Any], name: str, weights: str) -> dict[str, float]:
    measures: dict[str, float] = cell["entries"][f"student {name}"][weights]
    return measures


def difference(
    group: Sequence[dict[str, Any]],
    first: Callable[[dict[str, Any]], dict[str, float]],
    second: Callable[[dict[str, Any]], dict[str, float]],
    measure: str,
) -> Estimate:
    return estimate([first(cell)[measure] - second(cell)[measure] for cell in group])


def best_surrogate(group: Sequence[dict[str, Any]], surrogates: Sequence[str], measure: str) -> tuple[str, str]:
    """The surrogate that is best by its mean in this measure, and whether with its last weights or the picked ones."""
    rivals = [(name, weights) for name in surrogates for weights in ("last", "best")]
    means = {rival: float(np.mean([of_surrogate(cell, *rival)[measure] for cell in group])) for rival in rivals}
    choose = min if measure in LOWER_IS_BETTER else max
    return choose(means, key=means.__getitem__)


def against_all(group: Sequence[dict[str, Any]], direct: Callable[[dict[str, Any]], dict[str, float]]) -> list[str]:
    """Paired differences from the surrogate that is best by its mean in each measure, picked by the oracle or not."""
    lines = []
    for measure in TITLES:
        best = best_surrogate(group, present(group, SURROGATES), measure)
        found = difference(group, direct, partial(of_rival, best), measure)
        digits = digits_of(measure)
        ahead = found.mean < 0 if measure in LOWER_IS_BETTER else found.mean > 0
        clear = found.low is not None and found.high is not None and found.low * found.high > 0
        word = ("ahead" if ahead else "behind") + ("" if clear else ", within the interval")
        interval = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
        picked = ", picked by the oracle" if best[1] == "best" else ""
        lines.append(
            f"  - {TITLES[measure]}: {found.mean:+.{digits}f}{interval} against {label(best[0])}{picked}: {word}"
        )
    return lines


def dominated(group: Sequence[dict[str, Any]], direct: Callable[[dict[str, Any]], dict[str, float]]) -> str:
    """Against how many surrogates direct SCORE is better in all four measures, and how often another is ahead."""
    own = {measure: np.mean([direct(cell)[measure] for cell in group]) for measure in TITLES}
    surrogates, ahead = present(group, SURROGATES), Counter[str]()
    count = 0
    for name in surrogates:
        better = []
        for measure in TITLES:
            value = np.mean([of_surrogate(cell, name, "last")[measure] for cell in group])
            if value < own[measure] if measure in LOWER_IS_BETTER else value > own[measure]:
                better.append(measure)
        ahead.update(better)
        count += not better
    every = f"{count} of the {len(surrogates)} surrogates with their last weights"
    text = f"  - by the means it is better in all four than {every}"
    others = [f"{times} in {TITLES[measure]}" for measure, times in ahead.items()]
    return text + (f"; ahead of it are {', '.join(others)}" if others else "")


def of_rival(rival: tuple[str, str], cell: dict[str, Any]) -> dict[str, float]:
    """Measures of a surrogate, which is a name and whether its weights are the last or the best."""
    name, weights = rival
    return of_surrogate(cell, name, weights)


def failures(
    group: Sequence[dict[str, Any]],
    direct: Callable[[dict[str, Any]], dict[str, float]],
    surrogates: Sequence[str],
) -> list[str]:
    """In which measures direct SCORE fails against some surrogate, with its last or its picked weights.

    It has to be ahead in KL and R_SCORE by the interval, and not clearly behind in either accuracy.
    """
    failed = []
    for measure in TITLES:
        for name in surrogates:
            for weights in ("last", "best"):
                high = difference(group, direct, partial(of_rival, (name, weights)), measure).high
                passes = high is not None and (high < 0 if measure in LOWER_IS_BETTER else high >= 0)
                if not passes and measure not in failed:
                    failed.append(measure)
    return failed


def judged(failed: Sequence[str], seeds: int) -> str:
    """The verdict with what it rests on."""
    if seeds < SEEDS_NEEDED:
        return OPEN
    return verdict(not failed) + (f" in {' and '.join(TITLES[measure] for measure in failed)}" if failed else "")
