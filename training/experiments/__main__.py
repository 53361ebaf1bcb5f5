"""Run an experiment: ``python -m training.experiments``. :mod:`training.experiments.page` writes the page from it.

python -m training.experiments --name mixtures --seeds 0 1 2 3 4 --dimensions 16 --counts 2000 10000
python -m training.experiments --name mixtures --quick --out runs/quick
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.engine.claims import claimed
from training.experiments import gradients, mixtures, problems, real_digits
from training.experiments.runner import run_cells
from training.settings import command_line, config
from training.settings.errors import InputError, Interrupted, run_program


@dataclass(frozen=True)
class ExperimentSettings:
    """Which experiment, and how much of it. Called again, it does what is missing."""

    name: Literal["mixtures", "sweep", "digits", "images", "features", "gradients", "real-digits"] = "mixtures"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # one cell for each, with its own problem, data and initialisation
    dimensions: tuple[int, ...] = (16,)  # mixtures, sweep: numbers of features of x
    counts: tuple[int, ...] = (2000, 10_000)  # mixtures, sweep, digits, features, images: numbers of training points
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)  # real-digits: which fifths of the images are tested on
    radii: tuple[float, ...] = (real_digits.EPS,)  # real-digits: eps of the training
    root: Path | None = None  # images: folder of CIFAR-10, to which their distribution is fitted; see training.run
    quick: bool = False  # a few steps of everything, to see that it runs; its numbers mean nothing
    jobs: int = 0  # cells side by side, one CPU thread each; 0 is the number of cores
    out: Path | None = None  # folder of the results, one JSON file for each cell; None is runs/experiments/NAME


RANGES: dict[str, config.Check] = {
    "seeds": config.different(lambda seed: seed >= 0, "seeds from 0"),
    "dimensions": config.different(lambda dimension: dimension >= 1, "ones from 1"),
    "counts": config.different(lambda count: count >= 40, "ones from 40"),
    "folds": config.different(
        lambda fold: 0 <= fold < problems.REAL_FOLDS, f"folds from 0 to {problems.REAL_FOLDS - 1}"
    ),
    "radii": config.different(lambda eps: 0 < eps < 1, "ones between 0 and 1"),
    "jobs": config.RANGES["threads"],
}
USES = {
    "dimensions": ("mixtures", "sweep"),
    "counts": ("mixtures", "sweep", "digits", "features", "images"),
    "folds": ("real-digits",),
    "radii": ("real-digits",),
    "root": ("features", "images"),
}
# The fewest points from which every class is drawn, and as many principal components as networks see.
FEWEST = {"digits": 100, "features": 100, "images": 2 * problems.DIRECTIONS}


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        ExperimentSettings,
        arguments,
        program="python -m training.experiments",
        description="Compare direct SCORE with its surrogates, most of all where the truth is known.",
        default=ExperimentSettings(),
    )
    check(settings)
    out = settings.out or Path("runs") / "experiments" / settings.name
    jobs = config.resolve_jobs(settings.jobs)
    try:
        with claimed(out):
            count = run(settings, out, jobs)
    except Interrupted as signal:
        raise Interrupted(f"{signal}, all finished entries are kept in {out}; the same command continues") from None
    print(f"{count} cells in {out}")


def check(settings: ExperimentSettings) -> None:
    """Refuse options out of range, and those that the experiment does not read, before any work."""
    config.check_ranges(settings, RANGES)
    for option, names in USES.items():
        if getattr(settings, option) != getattr(ExperimentSettings, option) and settings.name not in names:
            raise InputError(f"{option}: is for {', '.join(names)}, got {settings.name}")
    if settings.name == "mixtures" and min(settings.dimensions) < 2:
        raise InputError(f"dimensions: {settings.dimensions} is out of range, allowed for mixtures: from 2")
    if settings.name in FEWEST and min(settings.counts) < FEWEST[settings.name]:
        fewest = f"allowed for {settings.name}: from {FEWEST[settings.name]}"
        raise InputError(f"counts: {settings.counts} is out of range, {fewest}")


def run(settings: ExperimentSettings, out: Path, jobs: int) -> int:
    """Run what is missing; the number of cells."""
    if settings.name == "gradients":
        cells = [gradients.Cell(seed, out, settings.quick) for seed in settings.seeds]
        run_cells(gradients.run, cells, jobs)
        return len(cells)
    if settings.name == "real-digits":
        trained = [
            real_digits.Cell(fold, seed, eps, out, settings.quick)
            for eps in settings.radii
            for seed in settings.seeds
            for fold in settings.folds
        ]
        run_cells(real_digits.run, trained, jobs)
        return len(trained)
    kind = "mixture" if settings.name == "mixtures" else settings.name
    dimensions = settings.dimensions if settings.name in ("mixtures", "sweep") else (None,)
    planned = [
        mixtures.Cell(kind, count, seed, out, settings.quick, dimension, settings.root)
        for seed in settings.seeds
        for dimension in dimensions
        for count in settings.counts
    ]
    if kind in ("images", "features"):
        try:
            planned[0].analysers()  # before several processes ask for them at once
        except InputError as error:  # of the data set, whose options have other names elsewhere
            told = (
                str(error)
                .replace("data_root:", "root:")
                .replace("--data-root", "--root")
                .replace(", or --download", "")
            )
            raise InputError(told) from None
    run_cells(mixtures.run, planned, jobs)
    return len(planned)


if __name__ == "__main__":
    sys.exit(run_program(main))
