"""The experiments run, go on where they were, and the page says what the results say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training.experiments import estimators, gradients, mixtures, page, problems, runner, students


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quick results: two seeds of the mixtures, one of the others, which has no intervals."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evidence")
    for seed in range(2):
        mixtures.run(mixtures.Cell(4, 120, seed, folder / "mixtures", quick=True))
    mixtures.run(mixtures.Cell(None, 120, 0, folder / "digits", quick=True))
    gradients.run(gradients.Cell(0, folder / "gradients", quick=True))
    torch.set_num_threads(threads)
    return folder


def test_every_entry_is_there(evidence: Path) -> None:
    cell = json.loads((evidence / "mixtures" / "d4-n120-seed0.json").read_text())
    entries = cell["entries"]
    for name in ("oracle", *estimators.ESTIMATORS):
        assert entries[f"posterior {name}"]["kl"] >= -1e-6
        assert entries[f"student direct:kl {name}"]["last"]["r_score"] > 0
    for name in mixtures.SURROGATES:
        assert {"last", "best", "seconds"} <= set(entries[f"student {name}"])
    for name in mixtures.ABLATED:
        ratios = {k: entries[f"student {o} {name}"]["data_gradient_ratio"] for k, o in mixtures.ABLATION.items()}
        assert ratios["A"] == ratios["B"] == 0.0
        assert ratios["C"] > 0.0
        assert ratios["D"] > 0.0
    assert entries["posterior oracle"]["gradient"]["relative"] == 0.0


def test_an_experiment_goes_on_where_it_was(evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d4-n120-seed0.json"
    whole = json.loads((evidence / "mixtures" / path.name).read_text())
    dropped = ("student trades:kl:1", "student direct:kl classifier_ensemble")
    rest = {name: entry for name, entry in whole["entries"].items() if name not in dropped}
    path.write_text(json.dumps({**whole, "entries": rest}))
    trained = []
    train = students.train

    def watched(*arguments: Any, **options: Any) -> students.Student:
        trained.append(arguments)
        return train(*arguments, **options)

    monkeypatch.setattr(students, "train", watched)
    mixtures.run(mixtures.Cell(4, 120, 0, tmp_path, quick=True))
    assert len(trained) == 2
    again = json.loads(path.read_text())["entries"]
    for name, entry in whole["entries"].items():
        assert {**again[name], "seconds": 0} == {**entry, "seconds": 0}


def test_the_page_is_made_of_the_results(evidence: Path, tmp_path: Path) -> None:
    page.main(["--evidence", str(evidence), "--docs", str(tmp_path)])
    text = (tmp_path / "direct-score.md").read_text()
    assert (tmp_path / "figures" / "direct-law.png").stat().st_size > 10_000
    cells = page.read(evidence / "mixtures")
    mean = sum(page.of_direct(cell, "energy")["r_score"] for cell in cells) / 2
    rows = [line for line in text.splitlines() if line.startswith("| direct, joint energy |")]
    assert len(rows) == 2  # of the mixtures, then of the digits
    assert f"| {mean:.3f} ± " in rows[0]
    for hypothesis in ("H1", "H2", "H3", "H5", "G1", "G2", "G3"):
        assert hypothesis in text
    page.main(["--evidence", str(evidence), "--docs", str(tmp_path)])
    assert (tmp_path / "direct-score.md").read_text() == text


def made_up(kl: float, r_score: float, clean: float = 90.0, robust: float = 60.0) -> dict[str, Any]:
    measures = {"kl": kl, "r_score": r_score, "disagrees": 0.0, "clean": clean, "robust": robust}
    return {"last": measures, "best": measures, "data_gradient_ratio": None, "seconds": 1.0}


def cells_of(direct: list[dict[str, Any]], surrogates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "entries": {
                **{f"student {name}": surrogate for name in mixtures.SURROGATES},
                "student direct:kl oracle": one,
            }
        }
        for one, surrogate in zip(direct, surrogates, strict=True)
    ]


def test_a_win_needs_every_measure() -> None:
    """Ahead in KL and in R_SCORE beyond the interval, and not clearly behind in an accuracy."""
    jitter = (-0.001, 0.0, 0.001)
    surrogates = [made_up(0.10 + j, 0.30) for j in jitter]

    def holds(**changes: float) -> bool:
        values = {"kl": 0.05, "r_score": 0.20, **changes}
        direct = [made_up(**{**values, "kl": values["kl"] + 2 * j}) for j in jitter]
        return page._holds(cells_of(direct, surrogates), lambda cell: page.of_direct(cell, "oracle"))

    assert holds()
    assert not holds(kl=0.10)
    assert not holds(r_score=0.31)
    assert not holds(clean=89.0)
    assert not holds(robust=59.0)
    assert holds(robust=61.0)


def test_the_oracle_is_worth_following() -> None:
    """Direct SCORE with p_d itself is closer to p_d in the ball than adversarial training, after a short training."""
    torch.set_num_threads(1)
    problem = problems.gaussian_mixture(4, 500, 0, test=500, choice=50)
    budget = students.Budget(steps=300, attack_steps=3)
    found = {}
    for name, posterior in (("pgd_at:kl", None), ("direct:kl", problem.oracle)):
        objective = students.objective_of(name, problem, posterior, budget)
        student = students.train(problem, objective, 0, budget, picked=False)
        assert student.best is None
        found[name] = students.measure(problem, student.last, 0)
    assert found["direct:kl"]["r_score"] < 0.5 * found["pgd_at:kl"]["r_score"]
    assert found["direct:kl"]["kl"] < found["pgd_at:kl"]["kl"]


def test_folds_are_disjoint_and_cover_the_data() -> None:
    problem = problems.gaussian_mixture(4, 102, 0, test=10, choice=10)
    held = [problem.fold(k)[2] for k in range(problems.FOLDS)]
    assert sum(len(part) for part in held) == 102
    assert torch.cat(held).unique(dim=0).shape[0] == 102
    x, y, x_held, _ = problem.fold(1)
    assert len(x) + len(x_held) == 102
    assert len(x) == len(y)


def test_the_known_digits_are_as_hard_as_they_say() -> None:
    problem = problems.known_digits(400, 0, test=2000, choice=20)
    found = mixtures.facts(problem)
    assert found["bayes_accuracy"] == pytest.approx(90, abs=2)
    assert problem.x.shape == (400, 64)
    other = problems.known_digits(400, 1, test=2000, choice=20)
    assert not torch.equal(problem.x, other.x)
    assert torch.equal(problem.oracle.means, other.oracle.means)


def test_a_notebook_computes_an_entry_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"value": len(calls)}

    for _ in range(2):
        notebook = runner.Notebook(tmp_path / "deep" / "cell.json", {"seed": 3})
        assert notebook.once("one", compute)["value"] == 1
    assert json.loads((tmp_path / "deep" / "cell.json").read_text())["seed"] == 3


def test_the_program(call: Any) -> None:
    options = ["--quick", "--seeds", "0", "--dimensions", "2", "--counts", "80", "--jobs", "1", "--out", "here"]
    ending = call("experiments", *options)
    assert ending.status == 0, ending
    assert "1 cells in here" in ending.out
    assert Path("here/d2-n80-seed0.json").is_file()
    ending = call("experiments", "--counts", "10")
    assert (ending.status, "counts" in ending.err) == (2, True)
    ending = call("page", "--evidence", "nowhere")
    assert (ending.status, "evidence: nowhere/mixtures holds no results" in ending.err) == (2, True)
