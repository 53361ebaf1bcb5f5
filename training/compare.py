"""Direct SCORE beside its surrogates, over seeds: ``python -m training.compare``.

    python -m training.compare --data digits --seeds 0 1 2 --out runs/compare-digits
    python -m training.compare --objectives standard trades:se score_direct:oracle --data toy -- --epochs 10

Each objective and seed is one ``python -m training.run`` in a process of its own, several side by side with one thread
each. Called again with the same --out, finished runs are kept and interrupted ones go on. Options after ``--`` go to
every run; they cannot change what tells the runs apart. Writes compare.json, report.html (self-contained), and for a
README table.md and the main plot.
"""

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, get_args

from scorematch.divergences import KINDS
from training import data as data_sets
from training.data import DataName
from training.engine import checkpoint
from training.engine.claims import claimed, is_claimed
from training.engine.progress import progress_bar
from training.measures.seeds import SAME, Estimate, over_seeds
from training.reports import comparison as report
from training.settings import command_line, config, unused
from training.settings.config import Objective, Posterior, RunSettings
from training.settings.errors import InputError, Interrupted, StopError, run_program, unknown_name

DEFAULT_OBJECTIVES = {
    "digits": (
        "standard",
        "pgd_at:kl",
        "pgd_at:se",
        "trades:kl",
        "trades:se",
        "score_direct:score_network",
        "score_direct:kernel_density",
        "score_direct:noise_conditional_classifier",
    ),
    "toy": ("standard", "pgd_at:kl", "score_direct:oracle", "score_direct:score_network"),
    "cifar10": ("standard", "pgd_at:kl", "pgd_at:se", "trades:kl", "trades:se"),
    "cifar100": ("standard", "pgd_at:kl", "pgd_at:se", "trades:kl", "trades:se"),
    "svhn": ("standard", "pgd_at:kl", "pgd_at:se", "trades:kl", "trades:se"),
}
OWN_OBJECTIVES = {"images": "cifar10", "small-images": "digits", "vectors": "digits"}  # as on this data set
GENERATED, SOFT = "generated", "soft"  # parts of an entry's name
FORM = "[:DIVERGENCE][:POSTERIOR][:soft][:generated]"
ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.5
LOG_LINES = 5  # of a failed run, shown


@dataclass(frozen=True)
class CompareSettings:
    """Which objectives to compare, on what, and how often."""

    # data set: a name as for training.run, folder, or module:function; --data-root and --image-size go after --
    data: DataName = "digits"
    # OBJECTIVE[:DIVERGENCE][:POSTERIOR][:soft][:generated], such as trades:se; none: the usual ones. The data move the
    # target of trades:kernel_density; pgd_at:kernel_density:soft and trades:kernel_density:soft have soft targets
    objectives: tuple[str, ...] = ()
    generated: tuple[Path, ...] = ()  # files of generated images, for the entries with :generated
    seeds: tuple[int, ...] = (0, 1, 2)  # one run of each objective a seed; the split is always the same
    out: Path | None = None  # folder of the comparison; None is runs/compare-DATA
    jobs: int = 0  # runs side by side, one CPU thread each; 0 is the number of cores
    figures: Path | None = None  # folder that also gets the main plot and the table, for a README


class Entry(NamedTuple):
    """One objective of the comparison."""

    name: str  # as given, such as trades:se
    objective: str
    divergence: str
    posterior: str | None
    generated: bool = False  # trained on generated images too
    soft: bool = False  # the posterior's p(y|x) in the place of labels

    @property
    def family(self) -> str:
        """What decides the colour of a plot."""
        if self.posterior is None:
            return self.objective
        return self.posterior if self.objective == "score_direct" else f"{self.objective} with a posterior"

    @property
    def label(self) -> str:
        titles = {
            "standard": "standard",
            "gaussian": "Gaussian",
            "pgd_at": "PGD-AT",
            "trades": "TRADES",
            "score_direct": "direct",
        }
        words = [titles[self.objective], {"kl": "KL", "se": "SE"}.get(self.divergence, self.divergence)]
        if self.objective in ("standard", "gaussian") and self.divergence == "kl":
            words.pop()
        notes = [", generated data too"] if self.generated else []
        if self.posterior:
            name = report.POSTERIOR_NAMES[self.posterior]
            if self.objective == "score_direct":
                words = [words[0], name, *([] if self.divergence == "kl" else words[1:])]
            else:
                notes.insert(0, f", {'soft targets' if self.soft else 'target moved'} by {name}")
        return " ".join(words) + "".join(notes)


Runs = dict[str, dict[int, dict[str, Any]]]  # the summary of each finished run: name of an entry, seed


class Job(NamedTuple):
    """One run of one entry."""

    entry: Entry
    seed: int
    out: Path
    arguments: list[str]
    settings: RunSettings

    @property
    def finished(self) -> bool:
        return (self.out / "summary.json").exists()

    @property
    def epochs_done(self) -> int:
        return len(checkpoint.read_metrics(self.out / "metrics.jsonl"))


def parse_entry(name: str) -> Entry:
    """``OBJECTIVE[:DIVERGENCE][:POSTERIOR][:soft][:generated]``, the parts after the first in any order."""
    objective, *parts = name.split(":")
    if objective not in get_args(Objective):
        raise unknown_name("objectives", name, [f"{o}{FORM}" for o in get_args(Objective)])
    generated, soft = GENERATED in parts, SOFT in parts and objective != "score_direct"
    known = (*KINDS, *(get_args(Posterior) if soft or objective in ("trades", "score_direct") else ()))
    divergence, posterior = "kl", "score_network" if objective == "score_direct" else None
    for part in parts:
        if part == GENERATED or (part == SOFT and soft):
            continue
        if part not in known:
            allowed = [*known, *([] if objective == "score_direct" else [SOFT]), GENERATED]
            raise unknown_name(f"objectives: {name}", part, allowed)
        if part in KINDS:
            divergence = part
        else:
            posterior = part
    if soft and posterior is None:
        raise InputError(f"objectives: {name} has no posterior, expected such as {objective}:kernel_density:{SOFT}")
    return Entry(name, objective, divergence, posterior, generated, soft)


def usual_objectives(settings: CompareSettings, options: Sequence[str] = ()) -> list[str]:
    """What is compared where nothing is named; with generated images the surrogates, without them and with them.

    ``options``, of every run, say where data of one's own lie.
    """
    name = settings.data
    if data_sets.is_own(name):
        run = config.parse(["--objective", "standard", "--data", name, *options])
        name = OWN_OBJECTIVES[config.own_kind(data_sets.format_of(run.data_settings).input_shape)]
    usual = DEFAULT_OBJECTIVES[name]
    if not settings.generated:
        return list(usual)
    surrogates = [name for name in usual if name.startswith(("pgd_at", "trades"))]
    return [full for name in surrogates for full in (name, f"{name}:{GENERATED}")]


def plan(settings: CompareSettings, options: Sequence[str], out: Path, jobs: int) -> list[Job]:
    """All runs, seed by seed, each checked by the parser of training.run before the first one starts."""
    data_sets.check_name(settings.data)
    entries = [parse_entry(name) for name in settings.objectives or usual_objectives(settings, options)]
    if any(entry.generated for entry in entries) != bool(settings.generated):
        given = "no file given" if not settings.generated else f"{settings.generated[0]} given, but no entry uses it"
        raise InputError(f"generated: {given}, expected --generated FILE and entries such as pgd_at:kl:{GENERATED}")
    for one, other in itertools.combinations(entries, 2):
        if one._replace(name=other.name) == other:
            raise InputError(f"objectives: {one.name} and {other.name} are the same, allowed: each once")
    planned = []
    for seed in settings.seeds:
        for entry in entries:
            folder = out / "runs" / f"{entry.name.replace(':', '-')}-seed{seed}"
            arguments = ["--objective", entry.objective, "--divergence", entry.divergence, "--data", settings.data]
            if entry.posterior:
                arguments += ["--posterior", entry.posterior]
            if entry.soft:
                arguments += ["--soft-targets"]
            if entry.generated:
                arguments += ["--generated", *map(command_line.as_argument, settings.generated)]
            arguments += ["--seed", str(seed), "--out", command_line.as_argument(folder)]
            if jobs > 1:
                arguments += ["--threads", "1"]
            arguments += options
            planned.append(Job(entry, seed, folder, arguments, config.parse(arguments)))
    for job in planned:
        _refuse_another_run(job, settings)
        _refuse_other_settings(job)
    if data_sets.is_own(settings.data):
        _refuse_other_data([job for job in planned if job.finished])
    return planned


def _refuse_another_run(job: Job, settings: CompareSettings) -> None:
    """What tells the runs apart is decided by the comparison: options after ``--`` must not change it."""
    entry = job.entry
    decided = {
        "resume": None,
        "objective": entry.objective,
        "divergence": entry.divergence,
        "posterior": entry.posterior,
        "soft_targets": entry.soft,
        "generated": tuple(path.absolute() for path in settings.generated) if entry.generated else (),
        "data": settings.data,
        "seed": job.seed,
        "out": job.out,
    }
    for name, value in decided.items():
        if (given := getattr(job.settings, name)) != value:
            raise InputError(
                f"{name}: {_shown(given)} after --, allowed: {_shown(value)}, which the comparison decides for "
                f"{entry.name} with seed {job.seed}"
            )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _refuse_other_settings(job: Job) -> None:
    """An earlier run in the folder must have the same settings, but for the number of threads.

    So must those be that are None in one of the two. A folder of official files that is not named may be anywhere. A
    finished run from before AutoAttack stays as it is.
    """
    path = job.out / "config.toml"
    if not path.exists():
        return
    table = config.read_toml(path)
    before = config.with_posterior(config.from_table(table, str(path)), table.get("posterior_settings", ()))
    saved, now = (_flat(config.as_table(each)) for each in (before, job.settings))
    ignored = ["threads"]
    if job.settings.data_root is None:
        ignored.append("data_root")
    if "autoattack" not in table and job.finished:
        ignored += ["autoattack", "autoattack_samples", "autoattack_compile"]
    for name in dict.fromkeys([*now, *saved]):  # what is None is in neither
        if name not in ignored and saved.get(name) != now.get(name):
            raise InputError(
                f"out: {job.out} holds a run with {name} = {saved.get(name)!r}, expected {now.get(name)!r}"
            )


def _refuse_other_data(finished: Sequence[Job]) -> None:
    """Finished runs must have had the data of one's own that are there now, as far as their checkpoints remember them.

    A run that is not finished looks by itself when it goes on. Data sets of this package never change.
    """
    if not finished:
        return
    loaded = data_sets.load(finished[0].settings.data_settings)
    for job in finished:
        path = job.out / ("best.pt" if job.settings.selection == "best" else "checkpoint.pt")
        if not path.exists():
            continue
        saved = checkpoint.load(path).get("data")
        try:
            data_sets.check_record(saved, loaded, path, exact=True)
        except InputError as error:
            raise InputError(f"{error}; the runs of a comparison have the same data, give another --out") from None


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """A table with the names of those in it before their keys, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def run_all(planned: Sequence[Job], jobs: int) -> list[Job]:
    """Run what is not finished, ``jobs`` at a time; returns the runs that failed.

    Where this program was killed, its runs went on: they are waited for.
    """
    waiting = [job for job in planned if not job.finished]
    others = [job for job in waiting if is_claimed(job.out)]
    if others:
        print(f"still running: {', '.join(job.out.name for job in others)}", flush=True)
    running: dict[subprocess.Popen, Job] = {}
    failed: list[Job] = []
    total = sum(job.settings.epochs for job in planned)
    done = sum(job.settings.epochs for job in planned if job.finished)
    with progress_bar(total=total, initial=done, desc="compare", unit="epoch", smoothing=0.05) as progress:
        try:
            while waiting or running:
                others = [job for job in others if is_claimed(job.out)]
                waiting = [job for job in waiting if not job.finished]
                ready = [job for job in waiting if job not in others]
                for job in ready[: max(0, jobs - len(running) - len(others))]:
                    waiting.remove(job)
                    running[_start(job, threads=1 if jobs > 1 else None)] = job
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode:
                        failed.append(job)
                        progress.write(_failure(job, process.returncode), file=sys.stderr)
                epochs = sum(job.settings.epochs if job.finished else job.epochs_done for job in planned)
                progress.set_postfix_str(", ".join(j.out.name for j in running.values()), refresh=False)
                progress.update(epochs - progress.n)
                if sys.stderr.isatty():
                    progress.refresh()
        except Interrupted:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise
    return failed


def _start(job: Job, threads: int | None) -> subprocess.Popen:
    job.out.mkdir(parents=True, exist_ok=True)
    started = (job.out / "config.toml").exists()
    arguments = ["--resume", command_line.as_argument(job.out)] if started else job.arguments
    # The runs find this very package from any working directory.
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search_path, "PYTHONIOENCODING": "utf-8"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(_log(job), "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "training.run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then ends the runs in order
        )


def _log(job: Job) -> Path:
    return job.out.with_suffix(".log")


def _failure(job: Job, status: int) -> str:
    text = _log(job).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join([f"{job.out.name} failed with status {status}; the end of {_log(job)}:", *lines[-LOG_LINES:]])


def gather(settings: CompareSettings, planned: Sequence[Job]) -> dict[str, Any]:
    """compare.json: every finished run, the means over seeds, and differences from the best surrogate seed by seed.

    Runs that are not finished are named. See :func:`_paired` and :func:`verdict` for what is compared.
    """
    runs: Runs = {}
    for job in planned:
        if job.finished:
            summary = checkpoint.read_json(job.out / "summary.json")
            curve = checkpoint.read_json(job.out / "curve.json", list)
            runs.setdefault(job.entry.name, {})[job.seed] = {**summary, "curve": curve, "folder": str(job.out)}
    entries = {job.entry.name: job.entry for job in planned if job.entry.name in runs}
    aggregate = {name: _aggregate(entries[name], list(by_seed.values())) for name, by_seed in runs.items()}
    first = planned[0].settings
    return {
        "data": settings.data,
        "seeds": list(settings.seeds),
        "settings": {job.entry.name: config.as_table(job.settings) for job in planned if job.seed == planned[0].seed},
        "commands": {job.entry.name: shlex.join(["python", "-m", "training.run", *job.arguments]) for job in planned},
        "norm": first.norm,
        "eps": first.eps,
        "runs": {name: list(by_seed.values()) for name, by_seed in runs.items()},
        "failed": [
            {"objective": job.entry.name, "seed": job.seed, "folder": str(job.out), "log": str(_log(job))}
            for job in planned
            if not job.finished
        ],
        "aggregate": aggregate,
        "paired": _paired(runs, aggregate),
    }


MEASURES = (
    "clean_acc",
    "pgd_acc",
    "autoattack_acc",
    "nll",
    "calibration_error",
    "r_standard",
    "r_score",
    "r_madry",
    "data_gradient_ratio",
    "sign_change_share",
    "posterior_clean_acc",
    "posterior_robust_acc",
    "train_seconds",
    "posterior_seconds",
    "eval_seconds",
    "autoattack_seconds",
)


def _aggregate(entry: Entry, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means over seeds of one objective."""
    measures = {
        measure: over_seeds([s[measure] for s in summaries], _one_sample(measure, summaries))._asdict()
        for measure in MEASURES
        if all(s.get(measure) is not None for s in summaries)
    }
    one_sample = _one_sample("pgd_acc", summaries)
    curve = [
        {"eps": points[0]["eps"], **over_seeds([point["acc"] for point in points], one_sample)._asdict()}
        for points in zip(*(s["curve"] for s in summaries), strict=True)
    ]
    return {**entry._asdict(), "label": entry.label, "family": entry.family, **measures, "curve": curve}


ACCURACIES = ("clean_acc", "pgd_acc", "autoattack_acc")


def _one_sample(measure: str, summaries: Sequence[dict[str, Any]]) -> float:
    """What one test sample counts in an accuracy, in points; 0 of other measures, or where a summary does not tell."""
    if measure not in ACCURACIES:
        return 0.0
    of_autoattack = measure == "autoattack_acc"
    counts = [s.get("autoattack_samples", 0) if of_autoattack else s.get("split", {}).get("test", 0) for s in summaries]
    return 100 / min(counts) if min(counts) else 0.0


def _paired(runs: Runs, aggregate: dict[str, Any]) -> dict[str, Any]:
    """Differences, seed by seed, from the best surrogate, and the verdict on the best direct objective.

    The best surrogate has the highest mean over the seeds that all objectives have: where runs failed, others differ
    in seeds, too. The mean is of the accuracy under AutoAttack, or under PGD if a run of a direct objective or of a
    surrogate has none. The differences have plain 95 % intervals, which do not allow for this choice; see
    :func:`verdict` for one that does.
    """
    common = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    surrogates = [name for name, entry in aggregate.items() if report.is_surrogate(entry)]
    direct = [name for name, entry in aggregate.items() if report.is_direct(entry)]
    if not surrogates or not common:
        return {}
    attacked = all(_have("autoattack_acc", runs[name].values()) for name in [*direct, *surrogates])
    measure = "autoattack_acc" if attacked else "pgd_acc"
    best = _best(runs, surrogates, measure, common)
    differences: dict[str, Any] = {}
    for name, by_seed in runs.items():
        both = sorted(set(by_seed) & set(runs[best]))
        if name != best:
            differences[name] = {
                key: _difference(key, by_seed, runs[best], both)._asdict()
                for key in ACCURACIES
                if _have(key, [run[seed] for run in (by_seed, runs[best]) for seed in both])
            }
    return {
        "against": best,
        "measure": measure,
        "seeds": common,
        "in_common": {name: _accuracies(by_seed, common) for name, by_seed in runs.items()},
        "differences": differences,
        "verdict": verdict(runs, direct, surrogates, measure, common) if direct else None,
    }


def verdict(
    runs: Runs, direct: Sequence[str], surrogates: Sequence[str], measure: str, common: Sequence[int]
) -> dict[str, Any]:
    """The best direct objective against the best surrogate, seed by seed.

    Both are chosen and judged by the same numbers, which favours what was lucky. So the interval is one of those that
    hold all D · U differences between a direct objective and a surrogate at once, in 95 of 100 such comparisons: each
    has the level 1 − .05 / (D · U) (Bonferroni).

    Args:
        runs: summaries.
        direct: names of the D direct objectives, one or more.
        surrogates: names of the U surrogates, one or more.
        measure: an accuracy that all their runs have.
        common: seeds that all of them have. They decide which are best; the difference is over all seeds of these two.

    Returns:
        ``direct`` and ``surrogate``, the two names; ``measure``; ``of``, [D, U]; ``seeds`` of both; ``accuracies`` of
        each name over these seeds; ``difference`` of the first minus the second; ``level`` of its interval;
        ``one_sample``, what one test sample counts, in points; and ``ahead``: "direct" or "surrogate" where the
        interval tells and the lead is one sample at least, else None.
    """
    ours, theirs = (_best(runs, group, measure, common) for group in (direct, surrogates))
    seeds = sorted(set(runs[ours]) & set(runs[theirs]))
    level = 1 - 0.05 / (len(direct) * len(surrogates))
    found = _difference(measure, runs[ours], runs[theirs], seeds, level)
    one_sample = _one_sample(measure, [runs[name][seed] for name in (ours, theirs) for seed in seeds])
    ahead = None
    if found.low is not None and found.high is not None and abs(found.mean) >= one_sample * (1 - SAME):
        ahead = "direct" if found.low > 0 else "surrogate" if found.high < 0 else None
    return {
        "direct": ours,
        "surrogate": theirs,
        "measure": measure,
        "of": [len(direct), len(surrogates)],
        "seeds": seeds,
        "accuracies": {name: _accuracies(runs[name], seeds) for name in (ours, theirs)},
        "difference": found._asdict(),
        "level": level,
        "one_sample": one_sample,
        "ahead": ahead,
    }


def _best(runs: Runs, names: Sequence[str], measure: str, seeds: Sequence[int]) -> str:
    """The name with the highest mean of a measure over these seeds."""
    return max(names, key=lambda name: fmean(runs[name][seed][measure] for seed in seeds))


def _have(measure: str, summaries: Iterable[dict[str, Any]]) -> bool:
    """Whether all of these runs have measured it."""
    return all(summary.get(measure) is not None for summary in summaries)


def _accuracies(by_seed: dict[int, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The means of one objective over these seeds, of the accuracies that all of them have."""
    summaries = [by_seed[seed] for seed in seeds]
    return {
        measure: over_seeds([s[measure] for s in summaries], _one_sample(measure, summaries))._asdict()
        for measure in ACCURACIES
        if _have(measure, summaries)
    }


def _difference(
    measure: str,
    one: dict[int, dict[str, Any]],
    other: dict[int, dict[str, Any]],
    seeds: Sequence[int],
    level: float = 0.95,
) -> Estimate:
    """An accuracy of one objective minus that of another, seed by seed."""
    values = [one[seed][measure] - other[seed][measure] for seed in seeds]
    one_sample = _one_sample(measure, [run[seed] for run in (one, other) for seed in seeds])
    return over_seeds(values, one_sample, accuracies=2, level=level)


def _check(settings: CompareSettings) -> None:
    ranges: dict[str, config.Check] = {
        "seeds": config.different(lambda seed: 0 <= seed < 2**32, "seeds from 0"),
        "jobs": (lambda v: v >= 0, "0 (the number of cores) or a number of runs"),
    }
    config.check_ranges(settings, ranges)


def main(arguments: list[str]) -> None:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    settings = command_line.parse(
        CompareSettings,
        arguments[:end],
        program="python -m training.compare",
        description="Compare direct SCORE with its surrogates over seeds. Options after -- go to every run.",
    )
    _check(settings)
    out = settings.out or Path("runs") / f"compare-{data_sets.slug(settings.data)}"
    jobs = config.resolve_jobs(settings.jobs)
    options = arguments[end + 1 :]
    planned = plan(settings, options, out, jobs)
    # Each run says this in its log; here counts what no run at all reads.
    by_run = [unused.unused(job.settings, options) for job in planned]
    unused.print_notes({name: where for name, where in by_run[0].items() if all(name in run for run in by_run)})
    with claimed(out):
        run(settings, planned, out, jobs, arguments)


def run(settings: CompareSettings, planned: list[Job], out: Path, jobs: int, arguments: list[str]) -> None:
    count = len({job.entry.name for job in planned})
    print(
        f"{len(planned)} runs ({count} objectives, {len(settings.seeds)} seeds), {jobs} side by side, in {out}; "
        f"{sum(job.finished for job in planned)} are finished"
    )
    begin = time.perf_counter()
    try:
        failed = run_all(planned, jobs)
    except Interrupted as signal:
        raise Interrupted(f"{signal}, all runs are saved; the same command continues") from None
    comparison = gather(settings, planned)
    comparison["command"] = shlex.join(["python", "-m", "training.compare", *arguments])
    comparison["wall_seconds"] = time.perf_counter() - begin
    if not comparison["runs"]:
        raise StopError("no run finished")
    checkpoint.write_json(out / "compare.json", comparison)
    table = report.write(out, comparison, settings.figures)
    print(table)
    print(f"{out / 'report.html'} has the plots, {out / 'compare.json'} the numbers")
    if failed:
        raise StopError(f"{len(failed)} of {len(planned)} runs failed: {', '.join(job.out.name for job in failed)}")


if __name__ == "__main__":
    sys.exit(run_program(main))
