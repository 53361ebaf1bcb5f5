"""Direct SCORE against its surrogates on a problem whose p_d is known: what the sections of the page compare."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from training.experiments.estimators import CROSS_FITTED, ESTIMATORS
from training.experiments.mixtures import SURROGATES
from training.experiments.tables import OPEN, label, shown, signed, verdict
from training.measures.seeds import Estimate, estimate

TITLES = {"kl": "KL", "r_score": "R_SCORE", "clean": "clean accuracy", "robust": "robust accuracy by label"}
LOWER_IS_BETTER = ("kl", "r_score")
MEASURES = ("kl", "r_score", "disagrees", "clean", "robust")
HEADER = "KL | R_SCORE | disagrees, % | clean, % | robust by label, %"
KNOWN = {
    "digits": "known digits",
    "features": "known images by features",
    "images": "known images by principal components",
}


def digits_of(measure: str) -> int:
    return 3 if measure in LOWER_IS_BETTER else 1


def columns(measured: Sequence[dict[str, float]]) -> str:
    """The measures of the cells of a group as columns under HEADER."""
    return " | ".join(shown(estimate([m[name] for m in measured]), digits_of(name)) for name in MEASURES)


def groups(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each problem, under its title."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    order = ("mixture", "digits", "features", "images")
    for cell in sorted(cells, key=lambda cell: (order.index(cell["problem"]), cell["dimension"], cell["count"])):
        kind = KNOWN.get(cell["problem"], f"d = {cell['dimension']}")
        found[f"{kind}, {cell['count']:,} labels"].append(cell)
    return found


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
    means = {
        rival: float(np.mean([of_rival(rival, cell)[measure] for cell in group])) for rival in rivals_of(surrogates)
    }
    choose = min if measure in LOWER_IS_BETTER else max
    return choose(means, key=means.__getitem__)


def against_all(group: Sequence[dict[str, Any]], direct: Callable[[dict[str, Any]], dict[str, float]]) -> list[str]:
    """Paired differences from the surrogate that is best by its mean in each measure, picked by the oracle or not."""
    lines = []
    for measure in TITLES:
        best = best_surrogate(group, present(group, SURROGATES), measure)
        found = difference(group, direct, partial(of_rival, best), measure)
        lead = -found.mean if measure in LOWER_IS_BETTER else found.mean
        clear = found.low is not None and found.high is not None and found.low * found.high > 0
        doubt = ", within the interval" if found.low is not None else ", one seed"
        word = ("ahead" if lead > 0 else "behind" if lead < 0 else "level") + ("" if clear else doubt)
        picked = ", picked by the oracle" if best[1] == "best" else ""
        lines.append(
            f"  - {TITLES[measure]}: {signed(found, digits_of(measure))} against {label(best[0])}{picked}: {word}"
        )
    return lines


def dominated(group: Sequence[dict[str, Any]], direct: Callable[[dict[str, Any]], dict[str, float]]) -> str:
    """Against how many surrogates direct SCORE is better in all four measures, and how often another is ahead."""
    own = {measure: np.mean([direct(cell)[measure] for cell in group]) for measure in TITLES}
    surrogates, ahead = present(group, SURROGATES), Counter[str]()
    count = 0
    for name in surrogates:
        other = {measure: np.mean([of_surrogate(cell, name, "last")[measure] for cell in group]) for measure in TITLES}
        lead = {m: (other[m] - own[m]) * (1 if m in LOWER_IS_BETTER else -1) for m in TITLES}
        ahead.update(measure for measure in TITLES if lead[measure] < 0)
        count += all(value > 0 for value in lead.values())
    every = f"{count} of the {len(surrogates)} surrogates with their last weights"
    text = f"  - by the means it is better in all four than {every}"
    others = [f"{times} in {TITLES[measure]}" for measure, times in ahead.items()]
    return text + (f"; ahead of it are {', '.join(others)}" if others else "")


def rivals_of(surrogates: Sequence[str]) -> list[tuple[str, str]]:
    """Each surrogate with its last weights, and with the best ones as the oracle picks them."""
    return [(name, weights) for name in surrogates for weights in ("last", "best")]


def of_rival(rival: tuple[str, str], cell: dict[str, Any]) -> dict[str, float]:
    """Measures of a surrogate, which is a name and whether its weights are the last or the best."""
    name, weights = rival
    return of_surrogate(cell, name, weights)


def failures(
    group: Sequence[dict[str, Any]],
    direct: Callable[[dict[str, Any]], dict[str, float]],
    surrogates: Sequence[str],
    ahead: Sequence[str] = LOWER_IS_BETTER,
) -> dict[str, str]:
    """The measures in which direct SCORE fails against surrogates, and how many of them do not let it pass.

    A surrogate counts twice, with its last and with its picked weights. Direct SCORE has to be ahead by the interval in
    the measures ``ahead``, and not clearly behind in the others.
    """

    def passes(measure: str, rival: tuple[str, str]) -> bool:
        found = difference(group, direct, partial(of_rival, rival), measure)
        if found.low is None or found.high is None:
            return False
        worst, best = (-found.high, -found.low) if measure in LOWER_IS_BETTER else (found.low, found.high)
        return worst > 0 if measure in ahead else best >= 0

    rivals = rivals_of(surrogates)
    failed = {measure: sum(not passes(measure, rival) for rival in rivals) for measure in TITLES}
    return {measure: f"{count} of {len(rivals)}" for measure, count in failed.items() if count}


def judged(failed: Mapping[str, str], seeds: int, *, counted: bool = False) -> str:
    """The verdict with what it rests on, and if asked for with how many surrogates."""
    answer = verdict(not failed, seeds)
    where = [TITLES[measure] + f" ({count})" * counted for measure, count in failed.items()]
    return answer if answer == OPEN or not failed else f"{answer} in {' and '.join(where)}"
