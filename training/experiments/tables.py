"""What the sections of the page share: reading results, and how numbers and verdicts are written."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.experiments.runner import changes, read_cell
from training.measures.seeds import Estimate
from training.settings.errors import InputError

# Of each posterior its name in words, colour and marker.
FAMILIES = {
    "kernel_density": ("kernel density of the training points", "#e69f00", "D"),
    "kernel_density_drawn": ("kernel density of drawn samples", "#b8860b", "d"),
    "factor_analysers": ("factor analysers, the family of p_d", "#222222", "*"),
    "classifier": ("noise-conditional classifier", "#cc79a7", "v"),
    "classifier_ensemble": ("ensemble of classifiers", "#8c3a6b", "v"),
    "energy": ("joint energy", "#009e73", "s"),
    "energy_ensemble": ("ensemble of joint energies", "#005a41", "s"),
    "score": ("score network", "#d55e00", "^"),
    "score_ensemble": ("ensemble of score networks", "#8f3f00", "^"),
    "score_last": ("score network, trained to the last step", "#f0a070", "^"),
    "score_literal": ("score network, literal Eq. (34)", "#767676", "x"),
    "score_regular": ("score network, augmented images and dropout", "#f5c242", "<"),
    "oracle": ("p_d itself", "#56b4e9", "P"),
}


TITLES = {"standard": "standard", "pgd_at": "PGD-AT", "trades": "TRADES", "direct": "direct"}
NOTES = {
    "soft": "soft targets by {}",
    "moved": "target moved by {}",
    "fixed": "ablation A",
    "model-only": "ablation B",
    "noise": "ablation D",
    "drawn": "drawn",
}


def label(form: str) -> str:
    """An objective in words, of the form that :func:`training.experiments.students.objective_of` reads."""
    objective, _, posterior = form.partition(" ")
    kind, divergence, *words = objective.split(":")
    family = FAMILIES[posterior][0] if posterior else ""
    title = TITLES[kind]
    if kind in ("pgd_at", "trades"):
        title += f" {divergence.upper()}"
    notes = [family] if kind == "direct" else []
    if kind == "trades":
        notes.append(f"β {words.pop(0)}")
    return ", ".join([title, *notes, *(NOTES[word].format(family) for word in words)])


# What the cells of an experiment say that they are about; audits of gradients say nothing.
PROBLEMS = {"mixtures": "mixture", "real-digits": "real digits", "gradients": None}
IDENTITY = ("dimension", "count", "seed", "fold", "eps")


def read(folder: Path, last: str) -> list[dict[str, Any]]:
    """The cells of an experiment, in the order of their names.

    Args:
        folder: of the experiment, whose name it has.
        last: entry without which a cell is not finished.

    Raises:
        InputError: there are none, one is damaged or not finished, a measure is not finite, or they do not belong
            together.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"evidence: {folder} holds no results, expected the JSON files of an experiment")
    cells = {path: read_cell(path) for path in paths}
    first, whole = cells[paths[0]], {last}.union(*(cell["entries"] for cell in cells.values()))
    seen: dict[tuple[Any, ...], Path] = {}
    for path, cell in cells.items():
        problem, expected = cell.get("problem"), PROBLEMS.get(folder.name, folder.name)
        if problem != expected:
            raise InputError(f"evidence: {path} is about {problem}, expected {expected}")
        changed = [line for key in ("budget", "grid") for line in changes(first.get(key), cell.get(key), key)]
        if changed:
            raise InputError(f"evidence: {path} has other settings than {paths[0].name} ({'; '.join(sorted(changed))})")
        if gaps := list(undefined(cell["entries"])):
            raise InputError(
                f"evidence: {path} has a measure that is not finite ({gaps[0]}): a training or a fit diverged, and a "
                "mean with it would say nothing"
            )
        if missing := sorted(whole - cell["entries"].keys()):
            raise InputError(
                f"evidence: {path} is not finished, it lacks {len(missing)} entries such as {missing[0]!r}; the "
                "command of the experiment goes on with it"
            )
        other = seen.setdefault(tuple(cell.get(key) for key in IDENTITY), path)
        if other != path:
            raise InputError(f"evidence: {path} is the same problem and seed as {other.name}, expected it once")
    return list(cells.values())


def undefined(value: Any, name: str = "") -> Iterator[str]:
    """Where a stored measure is null, as one that is not finite is; but the data gradient is direct SCORE's alone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "data_gradient_ratio":
                yield from undefined(inner, f"{name}: {key}" if name else key)
    elif value is None:
        yield name


def shown(value: Estimate, digits: int) -> str:
    """Mean ± half the 95 % interval over seeds."""
    if value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ± {value.high - value.mean:.{digits}f}"


def signed(value: Estimate, digits: int = 1) -> str:
    """A difference with its 95 % interval."""
    interval = "" if value.low is None else f" [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"
    return f"{value.mean:+.{digits}f}{interval}"


# Of two runs, half a 95 % interval is 9 standard deviations: that decides nothing.
RUNS_NEEDED = 3
OPEN = "**open**, for want of a third run"


def verdict(holds: bool, runs: int) -> str:
    """Of a hypothesis, from so many seeds or folds."""
    if runs < RUNS_NEEDED:
        return OPEN
    return "**holds**" if holds else "**fails**"


def seeds(cells: Sequence[dict[str, Any]]) -> str:
    return " ".join(str(seed) for seed in sorted({cell["seed"] for cell in cells}))


def commands(cells: Sequence[dict[str, Any]], name: str, options: dict[str, str]) -> str:
    """The commands that make these cells and no others, one for each set of values that go together.

    Args:
        cells: of one experiment.
        name: of the experiment, and of its folder.
        options: of the command line → what a cell calls it.
    """
    parts = sorted({tuple((cell[key],) for key in options.values()) for cell in cells})
    for place in reversed(range(len(options))):
        merged: dict[Any, list[Any]] = defaultdict(list)
        for part in parts:
            merged[part[:place], part[place + 1 :]] += part[place]
        parts = [(*before, tuple(values), *after) for (before, after), values in merged.items()]
    lines = []
    for part in parts:
        words = [f"--{option} {' '.join(map(str, values))}" for option, values in zip(options, part, strict=True)]
        lines.append(f"    python -m training.experiments --name {name} {' '.join(words)} --out docs/evidence/{name}")
    return "\n".join(lines)
