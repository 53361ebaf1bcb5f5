"""Fig. 7, accuracy against the size of the perturbation: what ``training.evaluate --attack obfuscation`` measures.

The claim, that accuracy falls to 0 as the ball grows, is the first of its checks for masked gradients.
"""

from __future__ import annotations

from pathlib import Path

from training import evaluate
from training.engine import checkpoint
from training.figures.claims import mark_as_trial
from training.figures.figure_4 import Source
from training.measures import obfuscation
from training.reports import plots

QUICK = ["--limit", "20", "--steps", "2", "--restarts", "1"]


def make(source: Source, eps: float | None, out: Path, *, quick: bool) -> None:
    """Write ``out``/fig7.png and ``out``/fig7.json.

    Args:
        source: the classifier, which must be given.
        eps: radius of the checks, in input units; None is that of the run.
        out: an existing folder.
        quick: attack with a few steps only, to see that it runs.

    Raises:
        InputError: the classifier cannot be read.
    """
    options = {**vars(source), "eps": eps}
    path = out / "fig7.json"
    arguments = ["--attack", "obfuscation", "--out", str(path)]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    evaluate.main([*arguments, *(QUICK if quick else [])])
    results = {**checkpoint.read_json(path), "quick": quick}
    figure = obfuscation.figure(results)
    if quick:
        mark_as_trial(figure)
    checkpoint.write_atomically(out / "fig7.png", plots.rendered(figure, "png"))
    checkpoint.write_json(path, results)
