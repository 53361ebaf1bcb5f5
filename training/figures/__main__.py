"""The paper's figures and tables: ``python -m training.figures [NAME ...]``.

    python -m training.figures                                        # Figs. 1 to 4 and 6, and the tables
    python -m training.figures fig3 fig6 --seeds 0 1 2
    python -m training.figures fig4 --run runs/digits-pgd_at-kl-seed0
    python -m training.figures fig7 --run runs/digits-pgd_at-se-seed0
    python -m training.figures tables --runs runs

Each figure is written as NAME.png and NAME.svg beside NAME.json, which has its claims with verdicts and its numbers.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import scorematch
from training.data import DataName
from training.engine import checkpoint
from training.figures import certified, figure_1, figure_2, figure_3, figure_4, figure_6, figure_7, tables, toy_fits
from training.figures.claims import Result, save
from training.run import commit
from training.settings import command_line, config
from training.settings.errors import InputError, run_program, unknown_name

QUICK_STEPS = 8
TRIAL = "a quick trial, to see that it runs: its numbers and verdicts mean nothing"


@dataclass(frozen=True)
class FigureSettings:
    """Which figures, how often, and from what."""

    # fig1, fig2, fig3, fig4 (also the paper's Fig. 5), fig6, fig7, certified (accuracy under noise), tables; without a
    # name all but fig7, which takes minutes
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    out: Path = Path("runs/figures")  # folder of the files
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of training points and initialisation; fig4 and certified take three
    quick: bool = False  # a few steps of everything with one seed, to see that it runs; its numbers mean nothing
    jobs: int = 0  # trainings side by side, one CPU thread each; 0 is the number of cores

    # fig4 and fig7: a classifier of yours instead of two that are trained on the digits
    run: Path | None = None  # folder of a run of training.run
    model_from: str | None = None  # weights or module:function, as for training.evaluate
    model: str | None = None  # architecture of --model-from, where its weights do not tell
    data: DataName | None = None  # data set of --model-from, as for training.evaluate; None is cifar10
    data_root: Path | None = None  # folder of its files; None is the run's, or $SCOREMATCH_DATA
    image_size: int | None = None  # --model-from with --data folder: as for training.run
    eps: float | None = None  # fig7 with --model-from: radius in input units
    score_from: Path | None = None  # fig4: posterior.pt of training.score; None: kernel density of the training images
    images: int = 200  # fig4: test images whose cosines are measured; the first ones are shown

    runs: Path | None = None  # tables: folder with runs of training.run, at any depth; None: the paper's numbers alone


RANGES: dict[str, config.Check] = {
    "seeds": config.different(lambda seed: seed >= 0, "seeds from 0"),
    "jobs": config.RANGES["threads"],
    "images": (lambda v: v >= figure_4.SHOWN, f"at least {figure_4.SHOWN}, which are shown"),
    "eps": (lambda v: v is None or v > 0, "above 0"),
}
FEWER_SEEDS = {"fig4": figure_4.SEEDS, "certified": certified.SEEDS}
TRAINED = ("fig1", "fig2", "fig3", "fig6", "certified")  # by as many trainings side by side as asked for
# What reads each option; given with nothing of it, the option is refused.
USES = {
    **dict.fromkeys(("run", "model_from", "model", "data", "data_root", "image_size"), ("fig4", "fig7")),
    **dict.fromkeys(("score_from", "images"), ("fig4",)),
    "eps": ("fig7",),
    "runs": ("tables",),
    "jobs": TRAINED,
    "seeds": (*TRAINED, "fig4"),
    "quick": (*TRAINED, "fig4", "fig7"),
}


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        FigureSettings,
        arguments,
        program="python -m training.figures",
        description="Make the paper's figures and tables, with a verdict on each claim.",
        default=FigureSettings(),
    )
    names = check(settings)
    torch.set_num_threads(1)
    checkpoint.make_folder(settings.out, "out")
    for name in names:
        if settings.quick and name in USES["quick"]:
            print(TRIAL)
        if name in FILES:
            FILES[name](settings)
            continue
        begin = time.perf_counter()
        result = FIGURES[name](settings)
        about = {
            "command": shlex.join(["python", "-m", "training.figures", *arguments]),
            "seeds": list(seeds_of(settings, name)),
            "quick": settings.quick,
            "torch": torch.__version__,
            "scorematch": scorematch.__version__,
            "commit": commit(),
        }
        save(name, result, settings.out, about)
        report(name, result, settings.out, time.perf_counter() - begin)


def check(settings: FigureSettings) -> tuple[str, ...]:
    """The names of what is to be made.

    Raises:
        InputError: an option is out of range, belongs to nothing that is made, or something is missing.
    """
    config.check_ranges(settings, RANGES)
    for name in settings.names:
        if name not in (*FIGURES, *FILES):
            raise unknown_name("names", name, [*FIGURES, *FILES])
    names = settings.names or (*FIGURES, "tables")
    defaults = FigureSettings()
    for option, figures in USES.items():
        if getattr(settings, option) != getattr(defaults, option) and not set(figures) & set(names):
            raise InputError(f"{option}: is for {' and '.join(figures)}, got {' '.join(names)}")
    more = {"seeds": len(settings.seeds) > 1, "images": settings.images != figure_4.SHOWN, "jobs": settings.jobs != 1}
    for option, is_more in more.items():
        value = getattr(settings, option)
        if settings.quick and is_more and value != getattr(defaults, option):
            raise InputError(
                f"{option}: {value} with --quick, which takes one seed, {figure_4.SHOWN} images and one job"
            )
    if settings.run is not None and settings.model_from is not None:
        raise InputError("run, model_from: both given, expected one of them")
    for option in ("model", "data", "image_size", "eps"):
        if getattr(settings, option) is not None and settings.model_from is None:
            raise InputError(f"{option}: {getattr(settings, option)} is for --model-from, which is not given")
    given = source_of(settings).given
    if settings.data_root is not None and not given:
        raise InputError(f"data_root: {settings.data_root} is for --run and --model-from, none of which is given")
    if settings.seeds != defaults.seeds and given and not set(TRAINED) & set(names):
        raise InputError(f"seeds: {settings.seeds} with --run or --model-from, allowed: without, as nothing is trained")
    if "fig7" in names and not given:
        raise InputError("run, model_from: none given, fig7 needs a trained classifier by one of them")
    if "fig7" in names and settings.model_from is not None and settings.eps is None:
        raise InputError("eps: none given, fig7 needs it with --model-from")
    if settings.quick:
        refuse_finished(settings.out, [name for name in names if name in USES["quick"]])
    if "tables" in names:
        tables.stored(settings.runs)  # they come last
    return names


def refuse_finished(out: Path, names: Sequence[str]) -> None:
    """A quick trial writes over nothing but other trials.

    Raises:
        InputError: the folder holds a figure of one of these names that is none, or its file cannot be read.
    """
    for name in names:
        path = out / f"{name}.json"
        if path.exists() and not checkpoint.read_json(path).get("quick"):
            raise InputError(f"quick: {path} is of a whole figure, give a quick trial another folder with --out")


def seeds_of(settings: FigureSettings, name: str) -> tuple[int, ...]:
    """The seeds that a figure uses."""
    if name == "fig4" and source_of(settings).given:
        return ()
    return settings.seeds[: 1 if settings.quick else FEWER_SEEDS.get(name)]


def toy_figure(name: str, make: Callable[[tuple[int, ...], int, int], Result]) -> Callable[[FigureSettings], Result]:
    """A figure on the toy from the settings."""

    def made(settings: FigureSettings) -> Result:
        steps = QUICK_STEPS if settings.quick else toy_fits.STEPS
        jobs = 1 if settings.quick else config.resolve_jobs(settings.jobs)
        return make(seeds_of(settings, name), steps, jobs)

    return made


def semantic_gradients(settings: FigureSettings) -> Result:
    """Fig. 4."""
    return figure_4.make(
        source_of(settings),
        seeds_of(settings, "fig4"),
        score_from=settings.score_from,
        images=figure_4.SHOWN if settings.quick else settings.images,
        quick=settings.quick,
    )


def certified_accuracy(settings: FigureSettings) -> Result:
    """Randomized smoothing, Eqs. (35) to (38)."""
    jobs = 1 if settings.quick else config.resolve_jobs(settings.jobs)
    return certified.make(seeds_of(settings, "certified"), jobs=jobs, quick=settings.quick)


def source_of(settings: FigureSettings) -> figure_4.Source:
    """The options that name a classifier."""
    return figure_4.Source(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(figure_4.Source)})


def masked_gradients(settings: FigureSettings) -> None:
    """Fig. 7."""
    figure_7.make(source_of(settings), settings.eps, settings.out, quick=settings.quick)


def write_tables(settings: FigureSettings) -> None:
    """Tables 1 to 4 as Markdown."""
    page = tables.page(settings.runs)
    path = settings.out / "tables.md"
    checkpoint.write_atomically(path, page)
    print(f"tables: {path}")


def report(name: str, result: Result, out: Path, seconds: float) -> None:
    """The verdicts, one a line."""
    print(f"{name}: {out / f'{name}.png'}, {seconds:.0f} s")
    for claim in result.claims:
        choices = f" [{claim.choices}]" if claim.choices else ""
        print(f"  {'pass' if claim.holds else 'FAIL'}  {claim.text}: {claim.found}{choices}")
    sys.stdout.flush()


FIGURES: dict[str, Callable[[FigureSettings], Result]] = {
    "fig1": toy_figure("fig1", figure_1.make),
    "fig2": toy_figure("fig2", figure_2.make),
    "fig3": toy_figure("fig3", figure_3.make),
    "fig4": semantic_gradients,
    "fig6": toy_figure("fig6", figure_6.make),
    "certified": certified_accuracy,
}
FILES: dict[str, Callable[[FigureSettings], None]] = {"fig7": masked_gradients, "tables": write_tables}


if __name__ == "__main__":
    sys.exit(run_program(main))
