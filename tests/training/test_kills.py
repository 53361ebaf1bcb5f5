"""Every program, killed without warning at random points again and again: the result is that of an undisturbed call.

A soak kills each 25 times, and says with which seed.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from killing import Hit, Start, status, without_times

from training import compare, run, score
from training.engine import checkpoint
from training.settings.errors import run_program

SOAKING = "SCOREMATCH_SOAK" in os.environ
KILLS = 25 if SOAKING else 1
SEED = random.SystemRandom().randrange(2**32) if SOAKING else 0

RUN = (
    "--model digits_cnn_bn --epochs 3 --limit 60 --batch-size 10 --steps 2 --validation-steps 1 --eval-steps 1 "
    "--eval-restarts 1 --curve-points 0 --threads 1"
)
SCORE = (
    "--data digits --limit 60 --samples 10 --levels 2 --steps-per-level 1 --judge-epochs 1 --threads 1 "
    "--posterior-settings.steps 30 --posterior-settings.width 16 --posterior-settings.depth 1"
)
Given = dict[str, Path]


def of_run(out: Path) -> Any:
    weights = checkpoint.load(out / "checkpoint.pt")["training"]["model"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    del summary["commit"]  # somebody may commit while this goes on
    assert (out / "report.html").exists()
    return {name: value.tolist() for name, value in weights.items()}, without_times(lines), without_times(summary)


def of_score(out: Path) -> Any:
    weights = checkpoint.load(out / "posterior.pt")["network"]
    result = without_times(json.loads((out / "score.json").read_text()))
    return {name: value.tolist() for name, value in weights.items()}, result


def of_comparison(out: Path) -> Any:
    compared = without_times(json.loads((out / "compare.json").read_text()))
    assert (out / "report.html").exists()
    for found in [found for runs in compared["runs"].values() for found in runs]:
        del found["folder"], found["commit"]  # somebody may commit while this goes on
    return {name: compared[name] for name in ("runs", "aggregate", "paired")}


def of_evaluation(out: Path) -> Any:
    return without_times(json.loads(out.with_suffix(".json").read_text()))


class Case(NamedTuple):
    arguments: Callable[[Given, Path], str]
    points: dict[str, int]  # where it can be hit, and how often it gets there
    result: Callable[[Path], Any]
    resume: Callable[[Path], str] | None = None  # the arguments that go on; None: the same


CASES = {
    "run": Case(
        lambda given, out: f"{RUN} --objective pgd_at --autoattack fast --autoattack-samples 20 --out {out}",
        {"step": 18, "validation": 3, "log": 3, "save": 4, "replace": 12, "pass": 120},
        of_run,
        lambda out: f"--resume {out}",
    ),
    "score": Case(
        lambda given, out: f"{SCORE} --out {out}",
        {"score step": 30, "score validation": 3, "replace": 10},
        of_score,
        lambda out: f"--resume {out}",
    ),
    "generate": Case(
        lambda given, out: f"--run {given['score']} --count 40 --batch-size 4 --levels 2 --threads 1 --out {out}.npz",
        {"batch": 10, "replace": 12},
        lambda out: out.with_suffix(".npz").read_bytes(),
    ),
    "evaluate": Case(
        lambda given, out: (
            f"--run {given['run']} --attack autoattack --version fast --limit 20 --threads 1 "
            f"--state {out}.pt --out {out}.json"
        ),
        {"pass": 200, "replace": 5},
        of_evaluation,
    ),
    "compare": Case(
        lambda given, out: f"--seeds 0 --objectives standard pgd_at:se --jobs 1 --out {out} -- {RUN} --autoattack none",
        {"start of a run": 2, "replace": 1},
        of_comparison,
    ),
}


def finished(out: Path) -> set[tuple[Path, int]]:
    """The runs of a comparison that are through, and when."""
    return {(path, path.stat().st_mtime_ns) for path in out.glob("runs/*/summary.json")}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A trained classifier and a trained score network."""
    folder = tmp_path_factory.mktemp("given")
    trained = [*RUN.split(), "--objective", "standard", "--autoattack", "none", "--out", str(folder / "run")]
    assert run_program(run.main, trained) == 0
    assert run_program(score.main, [*SCORE.split(), "--out", str(folder / "score")]) == 0
    return {name: folder / name for name in ("run", "score")}


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_kills_at_random_points_lose_nothing(name: str, given: Given, tmp_path: Path, start: Start, log: Path) -> None:
    case, dice = CASES[name], random.Random(f"{SEED} {name}")
    whole, out = tmp_path / "whole" / "one", tmp_path / "parts" / "one"
    whole.parent.mkdir()
    assert status(start(case.arguments(given, whole).split(), name=name)) == 0, log.read_text()
    expected = case.result(whole)

    def go_on(hit: Hit | None = None) -> int | None:
        begun = case.resume and (out / "config.toml").exists()
        arguments = case.resume(out) if begun and case.resume else case.arguments(given, out)
        return status(start(arguments.split(), hit, name=name))

    kills, hits, done = 0, list[Hit](), set[tuple[Path, int]]()
    while kills < KILLS:
        out.parent.mkdir(exist_ok=True)
        point = dice.choice(list(case.points))
        hits.append(Hit(point, dice.randint(1, case.points[point])))
        ended = go_on(hits[-1])
        if ended == -signal.SIGKILL:
            kills += 1
            assert finished(out) >= done, (SEED, hits)
            done = finished(out)
            continue
        assert ended == 0, (SEED, hits, log.read_text())  # it was through before it came there
        assert case.result(out) == expected, (SEED, hits)
        assert finished(out) >= done, (SEED, hits)
        shutil.rmtree(out.parent)
        hits.clear()
        done.clear()
    out.parent.mkdir(exist_ok=True)
    assert go_on() == 0, (SEED, hits, log.read_text())
    assert case.result(out) == expected, (SEED, hits)
    assert finished(out) >= done, (SEED, hits)
    assert not [path for path in out.parent.rglob("*") if path.name.endswith((".part", ".parts"))]


def test_a_comparison_goes_on_with_a_run_that_was_killed(start: Start, log: Path, tmp_path: Path) -> None:
    options = [*RUN.replace("--epochs 3", "--epochs 4").split(), "--autoattack", "none"]
    settings = compare.CompareSettings(objectives=("standard",), seeds=(0,), jobs=1, out=tmp_path / "here")
    (job,) = compare.plan(settings, options, tmp_path / "here", 1)
    assert status(start(job.arguments, Hit("step", 20))) == -signal.SIGKILL  # of 24, after three epochs
    first, *_ = checkpoint.read_metrics(job.out / "metrics.jsonl")
    arguments = ["--objectives", "standard", "--seeds", "0", "--jobs", "1", "--out", str(tmp_path / "here"), "--"]
    assert status(start([*arguments, *options], name="compare")) == 0, log.read_text()
    found = checkpoint.read_metrics(job.out / "metrics.jsonl")
    assert (len(found), found[0]) == (4, first)  # with its seconds; at most two checkpoints wait to be written
