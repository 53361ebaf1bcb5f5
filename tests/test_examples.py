"""The examples and the notebooks run, quickly, and come to what they say."""

import importlib
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def ran(path: Path) -> dict[str, Any]:
    """The names that a notebook leaves, its code cells executed in order without a kernel."""
    names: dict[str, Any] = {"__name__": path.stem}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def no_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)


def test_a_network_of_ones_own() -> None:
    found = importlib.import_module("examples.own_model").main()
    assert set(found) == {"PGD-AT", "direct SCORE"}
    assert all(clean > 0.5 and 0.3 < robust <= clean for clean, robust in found.values())


def test_a_pretrained_model() -> None:
    clean, robust = importlib.import_module("examples.attack_pretrained").main()
    assert 0.6 < clean <= 1.0
    assert robust < clean


def test_a_score_network() -> None:
    found = importlib.import_module("examples.score_network").main()
    assert all(-1.1 < likelihood < 0.0 for likelihood in found.values())  # better than a guess among three


def test_the_toy_notebook() -> None:
    errors = ran(EXAMPLES / "toy.ipynb")["errors"]
    assert errors["direct SCORE"].r_score.mean() < 0.25 * errors["PGD-AT"].r_score.mean()


def test_the_digits_notebook() -> None:
    report = ran(EXAMPLES / "digits_autoattack.ipynb")["adversary"].report
    assert 0.1 < report["robust_accuracy"] <= report["clean_accuracy"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_notebooks_are_small_and_valid(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < 20_000
    assert not any(cell.get("outputs") for cell in book.cells)
