"""What a figure is made of: a picture, the claims that it illustrates with verdicts, and the numbers behind both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib.figure import Figure
from tqdm import tqdm

from training.engine import checkpoint
from training.engine.side_by_side import processes
from training.measures.seeds import Estimate
from training.reports import plots

Item = TypeVar("Item")
Value = TypeVar("Value")

DIGITS = 5  # significant digits of the numbers in a file
LARGEST_SVG = 300_000  # bytes; a larger one is not written


class Claim(NamedTuple):
    """A statement of the paper, or of ours, with what was found.

    Attributes:
        text: the claim, with its tolerance, as written before anything was run.
        found: the numbers that decide, in words.
        holds: the verdict.
        choices: what the paper leaves open and was chosen here, in words.
    """

    text: str
    found: str
    holds: bool
    choices: str = ""

    def record(self) -> dict[str, str]:
        """What a JSON file says of it."""
        verdict = "pass" if self.holds else "fail"
        return {"claim": self.text, "choices": self.choices, "found": self.found, "verdict": verdict}


class Result(NamedTuple):
    """A figure that is made.

    Attributes:
        figure: the picture.
        claims: verdicts.
        numbers: plain values for the JSON file.
    """

    figure: Figure
    claims: Sequence[Claim]
    numbers: dict[str, Any]


def save(name: str, result: Result, out: Path, about: dict[str, Any]) -> None:
    """Write ``out``/NAME.png, NAME.svg (where it is small) and NAME.json.

    Args:
        name: of the figure.
        result: what was made; its picture is closed.
        out: an existing folder.
        about: what the JSON file says beside claims and numbers; where it says ``quick``, so does the picture.
    """
    if about["quick"]:
        mark_as_trial(result.figure)
    svg, png = plots.rendered_as(result.figure, ("svg", "png"))
    checkpoint.write_atomically(out / f"{name}.png", png)
    if len(svg) < LARGEST_SVG:
        checkpoint.write_atomically(out / f"{name}.svg", svg)
    claims = [claim.record() for claim in result.claims]
    checkpoint.write_json(out / f"{name}.json", {**about, "claims": claims, "numbers": rounded(result.numbers)})


def mark_as_trial(figure: Figure) -> None:
    """Write across the picture that it is one of a quick trial."""
    figure.text(
        0.5, 0.5, "quick trial", size=48, color="#b00020", alpha=0.35, rotation=20, ha="center", va="center", zorder=10
    )


def table(records: Sequence[dict[str, str]]) -> str:
    """Claims as a Markdown table.

    Args:
        records: the ``claims`` of a JSON file.
    """
    head = ["| verdict | claim | found | choices |", "| --- | --- | --- | --- |"]
    rows = [[r["verdict"], *(r[key].replace("|", "\\|") for key in ("claim", "found", "choices"))] for r in records]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def rounded(value: Any) -> Any:
    """Nested plain values with floats of five significant digits; what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def mapped(function: Callable[[Item], Value], items: Sequence[Item], jobs: int, name: str) -> list[Value]:
    """``function`` of each item, in order, in ``jobs`` processes of one CPU thread each (1: in this one).

    Args:
        function: of a module, so that a process can import it.
        items: what it is called with, plain values.
        jobs: processes, at least 1.
        name: for the progress bar.

    Raises:
        Interrupted: a signal came.
    """

    def watched(values: Iterable[Value]) -> list[Value]:
        return list(tqdm(values, total=len(items), desc=name, unit="fit", mininterval=1.0))

    if jobs == 1:
        return watched(function(item) for item in items)
    with processes(jobs) as pool:
        return watched(pool.map(function, items))


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The smallest and the largest of some values."""
    low, high = min(values), max(values)
    return f"{low:.{digits}g}" if len(values) == 1 else f"{low:.{digits}g} to {high:.{digits}g}"


def interval(value: Estimate, digits: int = 3) -> str:
    """A mean with its 95 % interval."""
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}g} (one value, no interval)"
    return f"{value.mean:.{digits}g} (95 % interval {value.low:.{digits}g} to {value.high:.{digits}g})"
