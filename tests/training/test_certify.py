"""Training with Gaussian noise and certified accuracy, by the programs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scorematch import smoothing
from training import evaluate, measures, run
from training.errors import run_program

TRAINING = (
    "--objective standard --epochs 4 --limit 300 --validate-every 4 --validation-steps 1 --eval-steps 1 "
    "--eval-restarts 1 --curve-points 0 --autoattack none --threads 1"
)
FAST = ["--attack", "certify", "--limit", "20", "--n0", "20", "--n", "100", "--seed", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_program(run.main, [*TRAINING.split(), "--out", str(out)]) == 0
    return out


def test_certify_says_what_the_library_says(call: Any, trained: Path, tmp_path: Path) -> None:
    options = ["--sigma", "0.2", "--radii", "0", "0.1", "0.3", "--out", "report.json", "--plot", "figures/curve.png"]
    ending = call("evaluate", "--run", trained, *FAST, *options)
    assert ending.status == 0, ending
    assert "L2, 20 and 100 noise vectors a sample, alpha 0.001" in ending.out
    assert "certified     95 % interval" in ending.out
    assert (tmp_path / "figures" / "curve.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "report.json").read_text())

    model, loaded = evaluate.restore(trained / "best.pt", torch.device("cpu"))[1:3]
    x, y = loaded.x_test[:20], loaded.y_test[:20]
    smoothed = smoothing.SmoothedClassifier(model, num_classes=10, sigma=0.2)
    found = smoothed.certify(x, n0=20, n=100, generator=torch.Generator().manual_seed(3))
    assert results["classes"] == found.classes.tolist()
    assert results["radii"] == found.radius.tolist()
    expected = smoothing.certified_accuracy(found, y, [0.0, 0.1, 0.3])
    assert [p["radius"] for p in results["certified"]] == [0.0, 0.1, 0.3]
    assert [p["acc"] for p in results["certified"]] == [100 * p.accuracy for p in expected]
    assert [p["interval"] for p in results["certified"]] == [[100 * p.low, 100 * p.high] for p in expected]
    assert results["certified"][0]["acc"] > 0, "the test needs certified samples"
    assert results["abstained"] == measures.per_cent(found.classes == smoothing.ABSTAIN)
    assert results["samples"] == 20
    assert results["threat_model"] is None
    accuracies = [point["acc"] for point in results["curve"]]
    assert accuracies == sorted(accuracies, reverse=True)
    for point in results["certified"]:
        assert f"{point['radius']:.4f}" in ending.out


def test_radii_by_default_go_as_far_as_the_votes(call: Any, trained: Path, tmp_path: Path) -> None:
    ending = call("evaluate", "--run", trained, *FAST, "--batch", "7", "--out", "report.json")
    assert ending.status == 0, ending
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["sigma"] == 0.25
    assert [point["radius"] for point in results["certified"]] == [0.0, 0.125, 0.25, 0.375]
    assert 0.375 < results["largest_radius"] < 0.5
    assert max(results["radii"]) <= results["largest_radius"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sigma", "0"], "sigma: 0.0 is out of range, allowed: a finite number above 0"),
        (["--n", "0"], "n: 0 is out of range, allowed: at least 1"),
        (["--n0", "0"], "n0: 0 is out of range, allowed: at least 1"),
        (["--alpha", "1"], "alpha: 1.0 is out of range, allowed: between 0 and 1, exclusive"),
        (["--radii", "0.1", "-1"], "radii: (0.1, -1.0) is out of range"),
        (["--eps", "0.1"], "eps: is for --attack clean and pgd and autoattack and obfuscation, got --attack certify"),
        (["--norm", "linf"], "norm: is for --attack clean and pgd and autoattack and obfuscation"),
        (["--steps", "3"], "steps: is for --attack pgd and obfuscation, got --attack certify"),
        (["--attack", "pgd"], "n0: is for --attack certify, got --attack pgd"),
    ],
)
def test_bad_options(call: Any, trained: Path, options: list[str], told: str) -> None:
    ending = call("evaluate", "--run", trained, *FAST, *options)
    assert ending.status == 2, ending
    assert told in ending.err
    assert ending.err.count("\n") == 1
