"""Training with Gaussian noise and certified accuracy, by the programs."""

import json
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from tqdm import tqdm

from scorematch import objectives, smoothing
from scorematch.objectives import Outcome
from training import compare, evaluate, measures, run
from training.measures import certification
from training.settings import config
from training.settings.config import tomllib
from training.settings.errors import run_program

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
    assert "L2, σ 0.2, 20 and 100 noise vectors a sample, alpha 0.001" in ending.out
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
    clean, abstained = measures.correct(model, x, y), found.classes == smoothing.ABSTAIN
    assert clean.sum() != abstained.sum(), "the test needs two different numbers"
    for name, one in (("clean_acc", clean), ("abstained", abstained)):
        assert results[name] == measures.per_cent(one)
        interval = list(measures.wilson(int(one.sum()), 20))
        assert results[f"{name.removesuffix('_acc')}_interval"] == pytest.approx(interval)
    largest = 0.2 * NormalDist().inv_cdf(0.001 ** (1 / 100))
    grid = [largest * k / 100 for k in range(101)]
    assert results["largest_radius"] == pytest.approx(largest)
    assert [p["radius"] for p in results["curve"]] == pytest.approx(grid)
    expected = smoothing.certified_accuracy(found, y, [p["radius"] for p in results["curve"]])
    assert [p["acc"] for p in results["curve"]] == [100 * p.accuracy for p in expected]
    assert results["samples"] == 20
    assert results["threat_model"] is None
    accuracies = [point["acc"] for point in results["curve"]]
    assert accuracies == sorted(accuracies, reverse=True)
    for point in results["certified"]:
        assert f"{point['radius']:.4f}" in ending.out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_a_bar(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = []
    stream = SimpleNamespace(isatty=lambda: terminal)
    monkeypatch.setattr(certification, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(certification, "tqdm", lambda disable, **_: hidden.append(disable) or tqdm(disable=True))
    model = torch.nn.Linear(2, 2)
    settings = {"sigma": 0.25, "n0": 2, "n": 20, "alpha": 0.1, "seed": 0, "batch": 4}
    certification.certify(model, torch.rand(3, 2), torch.tensor([0, 1, 0]), **settings)  # type: ignore[arg-type]
    assert hidden == [not terminal]


def test_radii_by_default_go_as_far_as_the_votes(call: Any, trained: Path, tmp_path: Path) -> None:
    ending = call("evaluate", "--run", trained, *FAST, "--batch-size", "7", "--out", "report.json")
    assert ending.status == 0, ending
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["sigma"] == 0.25
    assert [point["radius"] for point in results["certified"]] == [0.0, 0.125, 0.25, 0.375]
    assert 0.375 < results["largest_radius"] < 0.5
    assert max(results["radii"]) <= results["largest_radius"]


def test_radii_beyond_what_the_votes_can_certify_are_marked(call: Any, trained: Path) -> None:
    ending = call("evaluate", "--run", trained, *FAST, "--radii", "0.1", "0.4", "0.9")
    assert ending.status == 0, ending
    lines = {line.split()[0]: line for line in ending.out.splitlines() if line.startswith("      0.")}
    told = "more than 100 votes can certify, at most 0.37"
    assert [told in lines[radius] for radius in ("0.1000", "0.4000", "0.9000")] == [False, True, True]


@pytest.mark.parametrize(
    ("training", "sigma"),
    [
        ("--sigma 0.5", 0.5),
        ("--sigma 0.1 0.3", 0.3),
        ("--sigma 0.5 --final-sigma 0.1", 0.1),
        ("--sigma 0.1 --final-sigma 0.4", 0.4),
    ],
)
def test_a_run_is_certified_under_the_noise_of_its_end(
    call: Any, tiny: list[str], tmp_path: Path, training: str, sigma: float
) -> None:
    options = ["--objective", "gaussian", *training.split(), "--out", "run"]
    assert call("run", *tiny, *options).status == 0
    ending = call("evaluate", "--run", "run", *FAST, "--limit", "2", "--out", "report.json")
    assert ending.status == 0, ending
    assert json.loads((tmp_path / "report.json").read_text())["sigma"] == sigma
    assert f"L2, σ {sigma:g}, 20 and" in ending.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sigma", "0"], "sigma: 0.0 is out of range, allowed: a finite number above 0"),
        (["--n", "0"], "n: 0 is out of range, allowed: at least 1"),
        (["--n", "9"], "n: 9 with alpha 0.001 certifies nothing, allowed: at least 10"),
        (["--n", "6", "--alpha", "0.01"], "n: 6 with alpha 0.01 certifies nothing, allowed: at least 7"),
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


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_with_noise(call: Any, tiny: list[str], tmp_path: Path) -> None:
    """A run whose evaluation takes its σ, and its metrics: the two losses of Eq. (36)."""
    options = ["--objective", "gaussian", "--sigma", "0.1", "0.3", "--gamma", "0.5", "--out", "noisy"]
    ending = call("run", *options, *tiny)
    assert ending.status == 0, ending
    for entry in lines(tmp_path / "noisy"):
        assert entry["loss"] == pytest.approx(2 * entry["noisy"] - entry["natural"], rel=1e-4)
        assert 0 <= entry["train_attacked_acc"] <= 100
    summary = json.loads((tmp_path / "noisy" / "summary.json").read_text())
    assert (summary["sigma"], summary["gamma"], summary["final_sigma"]) == ([0.1, 0.3], 0.5, None)
    assert call("evaluate", "--run", "noisy", *FAST, "--out", "report.json").status == 0
    assert json.loads((tmp_path / "report.json").read_text())["sigma"] == 0.3


def test_noise_belongs_to_the_batch_not_to_its_parts(call: Any, tiny: list[str], tmp_path: Path) -> None:
    options = ["--objective", "gaussian", "--sigma", "0.1", "0.5", "--alignment", "0.2", "--epochs", "1"]
    for parts in (1, 3):
        assert call("run", *tiny, *options, "--accumulate", parts, "--out", f"parts{parts}").status == 0
    one, three = (lines(tmp_path / f"parts{parts}")[0] for parts in (1, 3))
    for key in ("loss", "natural", "noisy", "gradient_norm", "weight_norm"):
        assert three[key] == pytest.approx(one[key], rel=1e-3), key


def test_annealing_in_a_run(call: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """σ falls from step to step to its last value, and the coefficient of the alignment stays."""
    seen = []
    original = objectives.gaussian

    def watched(*arguments: Any, sigma: torch.Tensor, **options: Any) -> Outcome:
        seen.append((float(sigma.min()), float(sigma.max()), options["alignment"], options["antithetic"]))
        return original(*arguments, sigma=sigma, **options)

    monkeypatch.setattr(objectives, "gaussian", watched)
    options = ["--objective", "gaussian", "--sigma", "0.4", "--final-sigma", "0.1", "--gamma", "0.5", "--antithetic"]
    assert call("run", *options, *tiny, "--out", "annealed").status == 0
    assert all(low == high for low, high, *_ in seen)
    levels = [high for _, high, *_ in seen]
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == pytest.approx((0.4, 0.1), rel=1e-6)
    assert [alignment for *_, alignment, _ in seen] == pytest.approx([0.16] * len(seen))
    assert all(pairs for *_, pairs in seen)


def test_weights_are_picked_by_clean_accuracy(call: Any, tiny: list[str], tmp_path: Path) -> None:
    ending = call("run", "--objective", "gaussian", *tiny, "--epochs", "4", "--out", "noisy")
    assert ending.status == 0, ending
    summary = json.loads((tmp_path / "noisy" / "summary.json").read_text())
    best = max(lines(tmp_path / "noisy"), key=lambda e: (e["val_acc"], e["val_pgd_acc"]))
    chosen = lines(tmp_path / "noisy")[summary["selected_epoch"] - 1]
    assert (chosen["val_acc"], chosen["val_pgd_acc"]) == (best["val_acc"], best["val_pgd_acc"])


def test_a_comparison_names_it(tmp_path: Path) -> None:
    settings = compare.CompareSettings(objectives=("gaussian", "gaussian:se", "standard"), seeds=(0,))
    jobs = compare.plan(settings, ["--sigma", "0.5", "--gamma", "0.3"], tmp_path, 1)
    assert [job.entry.label for job in jobs] == ["Gaussian", "Gaussian SE", "standard"]
    assert [(job.settings.objective, job.settings.divergence) for job in jobs[:2]] == [
        ("gaussian", "kl"),
        ("gaussian", "se"),
    ]
    assert jobs[0].settings.sigma == (0.5,)
    assert jobs[0].settings.gamma == 0.3


def test_settings_with_noise_are_read_back() -> None:
    settings = config.parse(["--objective", "gaussian", "--sigma", "0.1", "0.5", "--gamma", "-1"])
    saved = config.from_table(tomllib.loads(tomli_w.dumps(config.as_table(settings))), "here")
    assert (saved.sigma, saved.gamma, saved.alignment) == ((0.1, 0.5), -1.0, None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            "--sigma 0.5 0.1",
            "sigma: (0.5, 0.1) is out of range, allowed: a finite number above 0, or two",
        ),
        ("--gamma 0.5 --alignment 0.1", "gamma: 0.5 with alignment, which decides it, allowed: one of the two"),
        ("--sigma 0.1 0.2 --final-sigma 0.1", "final_sigma: 0.1 with a range of sigma, allowed: with one sigma"),
        ("--awp 0.01", "awp: 0.01 with gaussian training, allowed: with an adversarial objective"),
        ("--graph on", "graph: 'on' with gaussian training, which has no attack to record"),
        ("--posterior kernel_density", "posterior: 'kernel_density' with gaussian, which asks none"),
    ],
)
def test_bad_options_of_training(call: Any, options: str, told: str) -> None:
    ending = call("run", "--objective", "gaussian", *options.split())
    assert ending.status == 2, ending
    assert told in ending.err
