"""Comparisons over seeds, and the report."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tomli_w
from tqdm import tqdm

from training import compare, measures
from training.data import generated, load
from training.engine import checkpoint
from training.measures.seeds import estimate, over_seeds
from training.reports import comparison as report
from training.settings import config
from training.settings.errors import InputError

POINTS = """
import torch
from training.data import Data

def points():
    y = torch.arange(30) % 2
    x = y[:, None] + torch.zeros(30, 3)
    return Data("points", 2, x, y, x, y, x, y)
"""
RUNS = ["--objectives", "pgd_at:se", "score_direct:kernel_density", "--seeds", "0", "1", "--out", "here"]


@pytest.mark.pictures
@pytest.mark.usefixtures("quick_runs")
def test_a_comparison_of_two_objectives(call: Any, tiny: list[str], tmp_path: Path) -> None:
    tiny += ["--autoattack", "fast", "--autoattack-samples", "20"]
    ending = call("compare", *RUNS, "--jobs", "2", "--figures", "figures", "--", *tiny)
    assert ending.status == 0, ending
    comparison = json.loads((tmp_path / "here" / "compare.json").read_text())
    assert {name: len(runs) for name, runs in comparison["runs"].items()} == {
        "pgd_at:se": 2,
        "score_direct:kernel_density": 2,
    }
    assert comparison["paired"]["against"] == "pgd_at:se"
    first, second = (comparison["runs"][name] for name in comparison["runs"])
    for key in ("pgd_acc", "autoattack_acc"):
        difference = comparison["paired"]["differences"]["score_direct:kernel_density"][key]
        assert difference["values"] == [b[key] - a[key] for a, b in zip(first, second, strict=True)]
        means = [comparison["aggregate"][name][key]["mean"] for name in comparison["runs"]]
        assert means == [sum(run[key] for run in runs) / 2 for runs in (first, second)]

    page = (tmp_path / "here" / "report.html").read_text()
    assert "PGD-AT SE" in page
    errors = [[run["calibration_error"] for run in runs] for runs in comparison["runs"].values()]
    assert all(0 < error < 100 for runs in errors for error in runs)
    assert f"{sum(errors[0]) / 2:.1f} ±" in (tmp_path / "here" / "table.md").read_text().splitlines()[2]
    assert "AutoAttack: fast, 20 test samples." in page
    assert "% under AutoAttack at eps 0.15 and the best surrogate (PGD-AT SE)" in page
    assert "; under PGD, " in page
    column, cells = autoattack_cells(tmp_path / "here" / "table.md")
    assert column == "AutoAttack, %"
    assert all("±" in cell for cell in cells)
    assert "kernel density" in page
    assert page.count("data:image/svg+xml;base64,") == 3  # accuracy, training, posteriors along an attack
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"digits-accuracy.png", "digits-table.md"}

    comparison["runs"]["pgd_at:se"][0]["threads"] = 4
    mixed = report.page(comparison)
    assert "Runs had 1 and 4 CPU threads, so their times are not comparable." in mixed
    assert "CPU threads of a run: 1 or 4<" in mixed
    assert [row[-1] for row in report.table_rows(comparison)] == ["training, s", "–", "–"]
    assert "not comparable" not in page
    assert "CPU threads of a run: 1<" in page
    assert "\nseed = " not in page

    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "here" / "runs").glob("*.log")}
    assert len(logs) == 4
    again = call("compare", *RUNS, "--jobs", "2", "--", *tiny)
    assert again.status == 0
    assert "4 are finished" in again.out
    assert {path: path.stat().st_mtime_ns for path in logs} == logs, "finished runs are not run again"

    other = call("compare", *RUNS, "--jobs", "2", "--", *tiny, "--eps", "0.1")
    assert other.status == 2
    assert "eps = 0.15, expected 0.1" in other.err


def autoattack_cells(table: Path) -> tuple[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.read_text().splitlines()]
    return rows[0][4], [row[4] for row in rows[2:]]


@pytest.mark.usefixtures("quick_runs")
def test_runs_from_before_autoattack(call: Any, tiny: list[str], tmp_path: Path) -> None:
    """They are finished: neither run again nor refused."""
    runs = ["--objectives", "pgd_at", "trades", "--seeds", "0", "--out", "here"]
    without = tiny[: tiny.index("--autoattack")] + tiny[tiny.index("--autoattack") + 2 :]
    assert call("compare", *runs, "--", *tiny).status == 0
    for folder in (tmp_path / "here" / "runs").glob("*-seed0"):
        config = folder / "config.toml"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("autoattack")]
        config.write_text("\n".join(lines) + "\n")
        summary = json.loads((folder / "summary.json").read_text())
        kept = {key: value for key, value in summary.items() if "autoattack" not in key}
        (folder / "summary.json").write_text(json.dumps({**kept, "autoattack_acc": None}))
    ending = call("compare", *runs, "--", *without)
    assert ending.status == 0, ending
    assert "2 are finished" in ending.out
    assert autoattack_cells(tmp_path / "here" / "table.md") == ("AutoAttack, %", ["–", "–"])
    assert "AutoAttack:" not in (tmp_path / "here" / "report.html").read_text()


@pytest.mark.usefixtures("quick_runs")
def test_with_generated_images_and_without(call: Any, tiny: list[str], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    generated.save(tmp_path / "more.npz", images, np.arange(60) % 10)
    arguments = ["--objectives", "pgd_at:kl", "pgd_at:kl:generated", "--seeds", "0", "--out", "here"]
    ending = call("compare", *arguments, "--generated", "more.npz", "--", *tiny)
    assert ending.status == 0, ending.err
    comparison = json.loads((tmp_path / "here" / "compare.json").read_text())
    folders = [Path(comparison["runs"][name][0]["folder"]) for name in ("pgd_at:kl", "pgd_at:kl:generated")]
    losses = [checkpoint.read_metrics(folder / "metrics.jsonl")[0]["loss"] for folder in folders]
    assert losses[0] != losses[1]
    assert comparison["settings"]["pgd_at:kl:generated"]["generated"] == [str(tmp_path / "more.npz")]
    assert "PGD-AT KL, generated data too" in (tmp_path / "here" / "report.html").read_text()
    assert "2 are finished" in call("compare", *arguments, "--generated", "more.npz", "--", *tiny).out
    for wrong in (["--objectives", "pgd_at:generated"], ["--objectives", "pgd_at", "--generated", "more.npz"]):
        ending = call("compare", *wrong, "--seeds", "0", "--out", "other", "--", *tiny)
        assert ending.status == 2
        assert "expected --generated FILE and entries such as pgd_at:kl:generated" in ending.err


def test_the_usual_objectives_with_generated_images() -> None:
    names = compare.usual_objectives(compare.CompareSettings(generated=(Path("more.npz"),)))
    assert names[:2] == ["pgd_at:kl", "pgd_at:kl:generated"]
    assert len(names) == 8


@pytest.mark.pictures
def test_a_comparison_on_the_toy(call: Any, tiny: list[str], tmp_path: Path) -> None:
    """Its run is started as a user's is."""
    ending = call("compare", "--data", "toy", "--objectives", "standard", "--seeds", "0", "--out", "here", "--", *tiny)
    assert ending.status == 0, ending
    page = (tmp_path / "here" / "report.html").read_text()
    assert "What the models learn" in page
    assert "R_SCORE, nat" in page
    assert (tmp_path / "here" / "posteriors.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 7", "seed: 7 after --, allowed: 0, which the comparison decides for trades:se with seed 0"),
        ("--divergence js", "divergence: js after --, allowed: se"),
        ("--objective pgd_at", "objective: pgd_at after --, allowed: trades"),
        ("--data toy --autoattack none", "data: toy after --, allowed: digits"),
        ("--posterior kernel_density", "posterior: kernel_density after --, allowed: None"),
        ("--posterior kernel_density --soft-targets", "posterior: kernel_density after --, allowed: None"),
        ("--generated more.npz", "more.npz after --, allowed: none"),
        ("--out elsewhere", "out: elsewhere after --, allowed: here/runs/trades-se-seed0"),
    ],
)
def test_options_of_every_run_do_not_change_which_runs_there_are(
    call: Any, tmp_path: Path, options: str, message: str
) -> None:
    ending = call("compare", "--objectives", "trades:se", "--seeds", "0", "--out", "here", "--", *options.split())
    assert (ending.status, message in ending.err) == (2, True), ending.err
    assert not list(tmp_path.iterdir()), "nothing is made"


@pytest.mark.usefixtures("quick_runs")
def test_a_failed_run_is_reported_with_the_end_of_its_log(call: Any, tiny: list[str]) -> None:
    diverging = ["--lr", "1e30", "--optimizer", "sgd"]
    ending = call("compare", "--objectives", "standard", "--seeds", "0", "--out", "here", "--", *tiny, *diverging)
    assert ending.status == 1
    assert "standard-seed0 failed with status 1" in ending.err
    assert "the loss is not finite" in ending.err


@pytest.mark.usefixtures("quick_runs")
def test_a_comparison_with_a_failed_run_says_so_and_compares_on_common_seeds(
    call: Any, tiny: list[str], tmp_path: Path
) -> None:
    names = ["pgd_at:kl", "trades:kl", "score_direct:kernel_density"]
    arguments = ["--objectives", *names, "--seeds", "0", "1", "--out", "here", "--", *tiny]
    assert call("compare", *arguments).status == 0
    assert "failed" not in (tmp_path / "here" / "report.html").read_text()
    # trades:kl is better than the mean of pgd_at:kl, but not on seed 0, which is the one that it has.
    for name, accuracies in zip(names, ((60.0, 20.0), (50.0, 90.0), (70.0, 10.0)), strict=True):
        for seed, accuracy in enumerate(accuracies):
            path = tmp_path / "here" / "runs" / f"{name.replace(':', '-')}-seed{seed}" / "summary.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "pgd_acc": accuracy}))
    folder = tmp_path / "here" / "runs" / "trades-kl-seed1"
    (folder / "summary.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"damaged")

    ending = call("compare", *arguments)
    assert (ending.status, "1 of 6 runs failed: trades-kl-seed1" in ending.err) == (1, True), ending
    comparison = json.loads((tmp_path / "here" / "compare.json").read_text())
    place = "here/runs/trades-kl-seed1"
    assert comparison["failed"] == [
        {"objective": "trades:kl", "seed": 1, "folder": place, "log": f"{place}.log"},
    ]
    assert (comparison["paired"]["against"], comparison["paired"]["seeds"]) == ("pgd_at:kl", [0])
    assert comparison["paired"]["differences"]["trades:kl"]["pgd_acc"]["values"] == [-10.0]
    assert comparison["paired"]["differences"]["score_direct:kernel_density"]["pgd_acc"]["values"] == [10.0, -10.0]
    rows = [[cell.strip() for cell in line.split("|")] for line in ending.out.splitlines() if line.startswith("| ")]
    assert [row[2] for row in rows] == ["seeds", "2", "1", "2"]
    page = (tmp_path / "here" / "report.html").read_text()
    assert "Means over 1 to 2 seeds, as the column says," in page
    assert "mean under PGD on these very samples, over the seeds that all have (0), and the intervals" in page
    assert f"1 of 6 runs failed, and nothing here has their numbers: trades:kl with seed 1 ({place}.log)." in page
    # Over the two seeds of these two, as the difference is.
    assert "apart (+0.0 ± " in page
    assert "(direct kernel density) keeps 40.0 ± 381.2 % under PGD at eps 0.15" in page
    assert "and the best surrogate (PGD-AT KL) 40.0 ± 254.1 %; clean," in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("standard", ("standard", "kl", None)),
        ("trades:se", ("trades", "se", None)),
        ("score_direct", ("score_direct", "kl", "score_network")),
        ("score_direct:js:kernel_density", ("score_direct", "js", "kernel_density")),
        ("score_direct:kernel_density:js", ("score_direct", "js", "kernel_density")),
    ],
)
def test_names_of_objectives(name: str, expected: tuple) -> None:
    assert compare.parse_entry(name)[1:4] == expected
    entry = compare.parse_entry(f"{name}:generated")
    assert (entry[1:4], entry.generated) == (expected, True)
    assert not entry.soft


@pytest.mark.parametrize(
    ("name", "label", "options"),
    [
        ("trades:kl:score_network", "TRADES KL, target moved by score network", ["--posterior", "score_network"]),
        (
            "pgd_at:kl:kernel_density:soft",
            "PGD-AT KL, soft targets by kernel density",
            ["--posterior", "kernel_density", "--soft-targets"],
        ),
        (
            "trades:soft:se:kernel_density:generated",
            "TRADES SE, soft targets by kernel density, generated data too",
            ["--posterior", "kernel_density", "--soft-targets", "--generated", "more.npz"],
        ),
        (
            "standard:kernel_density:soft",
            "standard, soft targets by kernel density",
            ["--posterior", "kernel_density", "--soft-targets"],
        ),
    ],
)
def test_surrogates_with_a_posterior(name: str, label: str, options: list[str], tmp_path: Path) -> None:
    entry = compare.parse_entry(name)
    assert entry.label == label
    assert not report.is_surrogate(entry._asdict()), "differences are from the best objective without a posterior"
    more = (Path("more.npz"),) if entry.generated else ()
    (job,) = compare.plan(compare.CompareSettings(objectives=(name,), generated=more, seeds=(0,)), [], tmp_path, 1)
    start = job.arguments.index("--posterior")
    assert job.arguments[start : start + len(options)] == options


@pytest.mark.usefixtures("quick_runs")
def test_a_comparison_with_surrogates_that_have_a_posterior(call: Any, tiny: list[str], tmp_path: Path) -> None:
    names = ["pgd_at:kl", "pgd_at:kl:kernel_density:soft", "trades:kl:kernel_density"]
    ending = call("compare", "--objectives", *names, "--seeds", "0", "--out", "here", "--", *tiny)
    assert ending.status == 0, ending
    comparison = json.loads((tmp_path / "here" / "compare.json").read_text())
    assert comparison["paired"]["against"] == "pgd_at:kl"
    assert [comparison["runs"][name][0]["soft_targets"] for name in names] == [False, True, False]
    assert [comparison["runs"][name][0]["transport"] for name in names] == [0.0, 0.0, 1.0]
    page = (tmp_path / "here" / "report.html").read_text()
    assert "PGD-AT KL, soft targets by kernel density" in page
    assert "<b>TRADES KL, target moved by kernel density</b>: ‖data gradient‖" in page
    assert "Target posteriors along an attack" not in page


def test_a_label_for_each_of_the_usual_objectives() -> None:
    for names in compare.DEFAULT_OBJECTIVES.values():
        labels = [compare.parse_entry(name).label for name in names]
        assert len(set(labels)) == len(labels)


def test_unknown_part_of_a_name() -> None:
    with pytest.raises(InputError, match="allowed: kl, se"):
        compare.parse_entry("trades:hinge")


def test_students_interval() -> None:
    """Mean 2, standard deviation 1, three values: 2 ± 4.303 / √3."""
    mean, low, high, _ = estimate([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert estimate([5.0])[:3] == (5.0, None, None)


def test_wilsons_interval() -> None:
    """The values of Wilson's formula for 8 of 10, by hand."""
    assert measures.wilson(8, 10) == pytest.approx((49.02, 94.33), abs=0.01)
    assert measures.wilson(10, 10)[1] == 100.0


def test_a_data_gradient_below_one_per_cent_is_called_distillation() -> None:
    def told(ratio: float) -> str:
        entry = {"label": "direct", "data_gradient_ratio": estimate([ratio])._asdict()}
        return " ".join(report.gradient_section({"aggregate": {"direct": entry}, "runs": {}}))

    assert "Distillation: the data gradient changes almost nothing" in told(0.009)
    assert "Distillation" not in told(0.011)


SAMPLES = 500
ByName = dict[str, dict[int, tuple[float, float]]]  # accuracies under PGD and AutoAttack of each seed


def compared(found: ByName, *, attacked: bool = True) -> dict[str, Any]:
    """A comparison of runs with these accuracies."""
    counts = {"split": {"test": SAMPLES}, "autoattack_samples": SAMPLES}
    runs = {
        name: {
            seed: {"clean_acc": 90.0, "pgd_acc": pgd, "autoattack_acc": ensemble if attacked else None, **counts}
            for seed, (pgd, ensemble) in by_seed.items()
        }
        for name, by_seed in found.items()
    }
    entries = [compare.parse_entry(name) for name in found]
    aggregate = {entry.name: {**entry._asdict(), "label": entry.label} for entry in entries}
    return {
        "data": "digits",
        "seeds": sorted({seed for by_seed in found.values() for seed in by_seed}),
        "eps": 0.15,
        "runs": {name: list(by_seed.values()) for name, by_seed in runs.items()},
        "aggregate": aggregate,
        "paired": compare._paired(runs, aggregate),
    }


def over(*accuracies: float, pgd: float = 50.0) -> dict[int, tuple[float, float]]:
    """Accuracies under AutoAttack, seed by seed."""
    return {seed: (pgd, accuracy) for seed, accuracy in enumerate(accuracies)}


@pytest.mark.parametrize(
    ("direct", "told"),
    [
        # t of 2 degrees of freedom at level .975 is 6.2053; half the interval of 9, 10 and 11 is that / √3.
        (
            (89.0, 90.0, 91.0),
            "Direct SCORE is ahead of its best surrogate (+10.0 ± 3.6 points under AutoAttack, paired",
        ),
        (
            (69.0, 70.0, 71.0),
            "The best surrogate is ahead of direct SCORE (-10.0 ± 3.6 points under AutoAttack, paired",
        ),
        ((77.0, 81.0, 82.0), "These seeds do not tell direct SCORE and its best surrogate apart (+0.0 ± 9.5 points"),
        ((82.0,), "One seed cannot tell direct SCORE and its surrogates apart (+2.0 points under AutoAttack"),
    ],
)
def test_a_report_opens_with_its_conclusion(direct: tuple[float, ...], told: str) -> None:
    strong, weak = over(*[80.0] * len(direct)), over(*[70.0] * len(direct), pgd=60.0)
    found = {"pgd_at:kl": weak, "trades:kl": strong, "score_direct": over(*direct)}
    headline = report._headline(compared(found))
    assert headline.startswith(told)
    allows = ", and the 95 % interval allows for that choice" if len(direct) > 1 else ""
    choice = f"Both are the best of their kind here, among 1 direct objective and 2 surrogates{allows}. The best direct"
    assert choice in headline
    alone = report._headline(compared({name: found[name] for name in ("trades:kl", "score_direct")}))
    assert "Both are" not in alone


def test_the_best_are_chosen_by_what_they_are_judged_by() -> None:
    """Another direct objective is the best under PGD, and the worst of all under AutoAttack."""
    found = {
        "pgd_at:kl": {0: (81.0, 78.0), 1: (81.4, 78.4), 2: (80.8, 77.8)},
        "trades:kl": {0: (82.0, 70.0), 1: (82.0, 70.0), 2: (82.0, 70.0)},
        "score_direct:score_network": {0: (83.0, 70.0), 1: (83.4, 70.8), 2: (83.2, 70.4)},
        "score_direct:kernel_density": {0: (82.6, 81.0), 1: (82.6, 81.2), 2: (82.4, 80.8)},
    }
    comparison = compared(found)
    assert comparison["paired"]["against"] == "pgd_at:kl"
    headline = report._headline(comparison)
    assert headline.startswith("Direct SCORE is ahead of its best surrogate (+2.9 ± 0.6 points under AutoAttack")
    assert "(direct kernel density) keeps 81.0 ± 0.5 % under AutoAttack at eps 0.15 and the best surrogate" in headline
    assert "(PGD-AT KL) 78.1 ± 0.8 %; under PGD, 82.5 ± 0.3 % and 81.1 ± 0.8 %; clean, 90.0" in headline
    assert "among 2 direct objectives and 2 surrogates, and the 95 % interval allows for that choice." in headline

    by_pgd = compared(found, attacked=False)
    assert (by_pgd["paired"]["measure"], by_pgd["paired"]["against"]) == ("pgd_acc", "trades:kl")
    assert by_pgd["paired"]["verdict"]["direct"] == "score_direct:score_network"
    assert "direct score network) keeps 83.2 ± 0.5 % under PGD" in report._headline(by_pgd)


def test_the_shown_difference_is_that_of_the_shown_means() -> None:
    """One objective lacks a seed, on which the other two are far apart."""
    found = {
        "pgd_at:kl": {0: (81.0, 78.0), 1: (81.4, 78.4), 2: (80.8, 77.8)},
        "trades:kl": {0: (70.0, 70.0), 1: (70.0, 70.0)},
        "score_direct": {0: (81.6, 78.2), 1: (81.8, 78.8), 2: (60.0, 55.0)},
    }
    judged = compared(found)["paired"]["verdict"]
    ours, theirs = (judged["accuracies"][name]["autoattack_acc"]["mean"] for name in ("score_direct", "pgd_at:kl"))
    assert judged["seeds"] == [0, 1, 2]
    assert judged["difference"]["mean"] == pytest.approx(ours - theirs)
    assert ours == pytest.approx((78.2 + 78.8 + 55.0) / 3)
    assert "over the seeds" not in report._headline(compared(found))
    del found["score_direct"][1]
    assert ", over the seeds that both have (0, 2))." in report._headline(compared(found))


def test_equally_good_objectives_are_seldom_told_apart() -> None:
    """The best of 7 direct objectives, all as good as the surrogate, is ahead in 2.5 of 100 comparisons at most."""
    generator, repeated = np.random.default_rng(0), 2000
    counts = {"split": {"test": 360}}
    names = [f"direct {number}" for number in range(7)]
    shares = generator.normal(0.8, 0.012, (repeated, 8, 3))
    accuracies = 100 * (360 * shares).round() / 360
    found = []
    for replication in accuracies.tolist():
        runs = {
            name: {seed: {"pgd_acc": accuracy, **counts} for seed, accuracy in enumerate(values)}
            for name, values in zip(["surrogate", *names], replication, strict=True)
        }
        found.append(compare.verdict(runs, names, ["surrogate"], "pgd_acc", [0, 1, 2])["ahead"])
    assert found.count("direct") <= 0.035 * repeated
    assert found.count("surrogate") <= 0.035 * repeated
    assert found.count("direct") > 0, "it could be told"


def test_an_accuracy_is_known_to_one_sample_at_best() -> None:
    """Equal differences in all seeds are equal but for rounding, of standard deviation h / √6 with h = 100 / N."""
    found = compared({"pgd_at:kl": over(80.0, 81.0), "score_direct": over(80.4, 81.4)})
    gap = found["paired"]["differences"]["score_direct"]["autoattack_acc"]
    assert gap["high"] - gap["mean"] == pytest.approx(12.7062 * 100 / SAMPLES / 6**0.5 / 2**0.5, rel=1e-4)
    assert report._headline(found).startswith("These seeds do not tell")
    same = over_seeds([98.6, 98.6, 98.6], 100 / SAMPLES)
    assert same.high is not None
    assert same.high - same.mean == pytest.approx(4.3027 * 100 / SAMPLES / 12**0.5 / 3**0.5, rel=1e-4)
    assert over_seeds([1.0, 2.0, 3.0], 0.2)[:3] == estimate([1.0, 2.0, 3.0])[:3]


def test_a_lead_of_less_than_one_sample_is_none() -> None:
    """Half of 40 seeds differ by one sample: an interval above 0, and a lead of half a sample."""
    few = compared({"pgd_at:kl": over(*[80.0] * 40), "score_direct": over(*[80.0, 80.2] * 20)})
    assert few["paired"]["verdict"]["difference"]["low"] > 0
    headline = report._headline(few)
    assert headline.startswith("These seeds do not tell direct SCORE and its best surrogate apart (+0.1 ± 0.0 points")
    assert "paired by seed, less than one test sample)" in headline
    more = compared({"pgd_at:kl": over(*[80.0] * 40), "score_direct": over(*[80.2, 80.4] * 20)})
    assert report._headline(more).startswith("Direct SCORE is ahead")


def test_equal_values_of_other_measures_have_no_interval() -> None:
    for value in (0.25, 0.0):
        assert over_seeds([value] * 3) == (value, None, None, [value] * 3)
    nearly = [80.3 - 80.0, 81.4 - 81.1]
    assert nearly[0] != nearly[1]
    assert over_seeds(nearly).low is None


def test_lengths_of_other_data_are_no_pixels() -> None:
    def unit(name: str) -> str:
        figure = report.accuracy_figure({"data": name, "aggregate": {}, "norm": "linf", "eps": 0.15})
        return figure.axes[0].get_xlabel()

    assert unit("digits") == unit("folder") == "perturbation size eps (Linf, pixel values in [0, 1])"
    assert unit("my_data:points") == "perturbation size eps (Linf, input units)"


def test_the_same_objective_under_two_names_is_refused(tmp_path: Path) -> None:
    for names in (("pgd_at:kl", "pgd_at"), ("score_direct", "score_direct:kl:score_network"), ("trades", "trades")):
        with pytest.raises(InputError, match=f"objectives: {names[0]} and {names[1]} are the same, allowed: each once"):
            compare.plan(compare.CompareSettings(objectives=names), [], tmp_path, 1)


Plan = Callable[..., compare.Job]


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    """``planned(*options, data="digits")``: the one run of a comparison of PGD-AT in a folder."""

    def of(*options: str, data: str = "digits") -> compare.Job:
        settings = compare.CompareSettings(data=data, objectives=("pgd_at",), seeds=(0,))
        (job,) = compare.plan(settings, options, tmp_path / "here", 1)
        return job

    return of


@pytest.mark.parametrize(
    "option", [("--step-size", "0.001"), ("--steps-per-epoch", "2"), ("--attack-start", "uniform")]
)
def test_an_earlier_run_with_a_setting_that_is_left_open_now_is_refused(planned: Plan, option: tuple[str, str]) -> None:
    job = planned(*option)
    job.out.mkdir(parents=True)
    (job.out / "config.toml").write_text(tomli_w.dumps(config.as_table(job.settings)))
    planned(*option)
    planned(*option, "--threads", "3")
    name = option[0].removeprefix("--").replace("-", "_")
    with pytest.raises(InputError, match=f"here/runs/pgd_at-seed0 holds a run with {name} = .*, expected None"):
        planned()


def test_official_files_may_be_anywhere(planned: Plan, tmp_path: Path) -> None:
    job = planned("--data-root", str(tmp_path))
    job.out.mkdir(parents=True)
    (job.out / "config.toml").write_text(tomli_w.dumps(config.as_table(job.settings)))
    assert planned().settings.data_root is None


def test_finished_runs_on_other_data_are_refused(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "points_for_compare.py").write_text(POINTS)
    monkeypatch.chdir(tmp_path)
    name = "points_for_compare:points"
    job = planned(data=name)
    job.out.mkdir(parents=True)
    (job.out / "config.toml").write_text(tomli_w.dumps(config.as_table(job.settings)))
    (job.out / "summary.json").write_text("{}")
    now = load(job.settings.data_settings)
    others = dataclasses.replace(now, y_train=1 - now.y_train)

    def left(record: dict[str, Any] | None) -> None:
        checkpoint.save(job.out / "best.pt", epoch=1, settings={}, network={}, data=record)

    for same in (now.record(), None):
        left(same)
        planned(data=name)
    left(others.record())
    message = (
        "here/runs/pgd_at-seed0/best.pt was trained on: other labels, or in another order; the runs of a comparison "
        "have the same data, give another --out"
    )
    with pytest.raises(InputError, match=message):
        planned(data=name)
    (job.out / "summary.json").unlink()
    planned(data=name)  # the run looks by itself when it goes on


class Played:
    """A run that a comparison starts, without a process: it ends when it is asked for the third time."""

    started: ClassVar[list["Played"]] = []
    most = 0  # that were under way at once

    def __init__(self, command: list[str], **options: Any) -> None:
        self.command, self.environment, self.asked = command, options["env"], 0
        self.out = Path(command[command.index("--resume" if "--resume" in command else "--out") + 1])
        Played.started.append(self)
        Played.most = max(Played.most, sum(run.asked < 3 for run in Played.started))

    returncode = 0

    def poll(self) -> int | None:
        self.asked += 1
        if self.asked < 3:
            return None
        (self.out / "summary.json").write_text("{}")
        return 0


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    monkeypatch.setattr(Played, "started", [])
    monkeypatch.setattr(Played, "most", 0)
    monkeypatch.setattr(compare.subprocess, "Popen", Played)
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.0)
    return Played


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_as_many_runs_side_by_side_as_are_wished(jobs: int, played: type[Played], tmp_path: Path) -> None:
    settings = compare.CompareSettings(objectives=("standard", "pgd_at"), seeds=(0, 1))
    planned = compare.plan(settings, [], tmp_path, jobs)
    planned[0].out.mkdir(parents=True)
    (planned[0].out / "config.toml").write_text("")  # it had begun
    planned[1].out.mkdir(parents=True)
    (planned[1].out / "summary.json").write_text("{}")
    assert compare.run_all(planned, jobs) == []
    assert [run.out for run in played.started] == [job.out for job in (planned[0], *planned[2:])]
    assert played.most == jobs
    assert ["--resume" in run.command for run in played.started] == [True, False, False]
    for run in played.started:
        assert run.environment["PYTHONPATH"].split(os.pathsep)[0] == str(compare.ROOT)
    threads = {job.arguments[job.arguments.index("--threads") + 1] for job in planned if "--threads" in job.arguments}
    assert threads == ({"1"} if jobs > 1 else set())
    if jobs > 1:
        assert {run.environment["OMP_NUM_THREADS"] for run in played.started} == {"1"}


def test_runs_of_a_comparison_that_was_killed_are_waited_for(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three still run, and fill both places; they end at different times."""
    planned = compare.plan(compare.CompareSettings(objectives=("standard",), seeds=(0, 1, 2)), [], tmp_path, 2)
    asked = 0

    def is_claimed(out: Path) -> bool:
        nonlocal asked
        asked += 1
        number = [job.out for job in planned].index(out)
        claimed = number < 2 and asked < 10 * (1 + number)
        if claimed:
            assert not played.started or number == 1, "both places were taken"
        elif number < 2:
            out.mkdir(parents=True, exist_ok=True)
            (out / "summary.json").write_text("{}")
        return claimed

    monkeypatch.setattr(compare, "is_claimed", is_claimed)
    assert compare.run_all(planned, 2) == []
    assert capsys.readouterr().out == "still running: standard-seed0, standard-seed1\n"
    assert [run.out for run in played.started] == [planned[2].out]


def test_an_accuracy_counts_samples_of_its_own_attack() -> None:
    summaries = [
        {"split": {"test": 500}, "autoattack_samples": 50},
        {"split": {"test": 400}, "autoattack_samples": 100},
    ]
    assert compare._one_sample("pgd_acc", summaries) == 0.25
    assert compare._one_sample("autoattack_acc", summaries) == 2.0
    assert compare._one_sample("nll", summaries) == 0.0
    assert compare._one_sample("pgd_acc", [*summaries, {}]) == compare._one_sample("autoattack_acc", [{}]) == 0.0


@pytest.mark.parametrize(
    "wrong", [{"seeds": ()}, {"seeds": (0, 0)}, {"seeds": (0, -1)}, {"seeds": (2**32,)}, {"jobs": -1}]
)
def test_seeds_and_jobs_that_there_are_not(wrong: dict[str, Any]) -> None:
    compare._check(compare.CompareSettings())
    compare._check(compare.CompareSettings(seeds=(0, 2**32 - 1), jobs=0))
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name}: .* is out of range"):
        compare._check(compare.CompareSettings(**wrong))


def test_the_last_five_lines_of_a_log_are_shown(planned: Plan) -> None:
    job = planned()
    job.out.parent.mkdir(parents=True)
    job.out.with_suffix(".log").write_text("one\ntwo\n\nthree\rfour\n  \nfive\nsix\n\n")
    first, *shown = compare._failure(job, 3).splitlines()
    assert first == f"pgd_at-seed0 failed with status 3; the end of {job.out}.log:"
    assert shown == ["two", "three", "four", "five", "six"]


def test_a_lead_of_one_sample_is_one() -> None:
    """500 samples: 80.2 − 80.0 is one of them but for rounding, above it or below."""
    for low, high in ((80.0, 80.2), (64.4, 64.6)):
        behind, ahead = over(*[low] * 40), over(*[high] * 40)
        found = compared({"pgd_at:kl": behind, "score_direct": ahead})
        assert found["paired"]["verdict"]["ahead"] == "direct"
        found = compared({"pgd_at:kl": ahead, "score_direct": behind})
        assert found["paired"]["verdict"]["ahead"] == "surrogate"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("standard", "standard"),
        ("standard:se", "standard SE"),
        ("trades:se", "TRADES SE"),
        ("score_direct:kernel_density", "direct kernel density"),
        ("score_direct:se:kernel_density:generated", "direct kernel density SE, generated data too"),
    ],
)
def test_labels_name_what_is_not_usual(name: str, label: str) -> None:
    assert compare.parse_entry(name).label == label


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_every_state_of_the_progress(
    terminal: bool, played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log would have two lines a second."""
    shown = []
    monkeypatch.setattr(tqdm, "refresh", lambda self, **options: shown.append(options))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    planned = compare.plan(compare.CompareSettings(objectives=("standard",), seeds=(0,)), [], tmp_path, 1)
    assert compare.run_all(planned, 1) == []
    assert shown.count({}) == (3 if terminal else 0), "what update and the beginning show has options"


def test_the_published_table_is_that_of_the_stored_comparison() -> None:
    docs = Path(__file__).parent.parent.parent / "docs"
    table = report.markdown_table(json.loads((docs / "evidence" / "digits-comparison.json").read_text()))
    assert (docs / "figures" / "digits-table.md").read_text() == table + "\n"
    assert table in (docs / "results.md").read_text()
