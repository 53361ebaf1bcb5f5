"""Small runs of each objective from end to end."""

import io
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import PGD, ThreatModel
from scorematch.attacks import AutoAttackWarning
from scorematch.attacks.precision import allow_tf32
from scorematch.divergences import KINDS
from scorematch.posteriors import KernelDensity
from training import measures, run
from training.engine import checkpoint, scores
from training.engine.loop import Trainer
from training.reports import plots
from training.reports import run as report
from training.settings.config import tomllib
from training.settings.errors import Interrupted

FILES = {"config.toml", "metrics.jsonl", "checkpoint.pt", "best.pt", "summary.json", "curve.json", "tensorboard"}
FILES |= {"report.html"}
KEYS = {
    "objective", "divergence", "posterior", "data", "model", "norm", "eps", "seed", "epochs", "clean_acc", "pgd_acc",
    "autoattack_acc", "train_seconds", "eval_seconds", "torch", "scorematch", "best_epoch", "selection", "split",
    "steps", "data_gradient_ratio", "sign_change_share", "commit",
}  # fmt: skip
SURROGATES = {
    "standard": ["--objective", "standard"],
    "pgd_at se": ["--objective", "pgd_at", "--divergence", "se", "--clip", "0.1"],
    "trades l2": ["--objective", "trades", "--norm", "l2", "--beta", "2", "--attack-mode", "eval"],
}
DIRECT = ["score_network", "joint_energies", "kernel_density", "noise_conditional_classifier"]


def files(out: Path) -> set[str]:
    """What lies in a run's folder, but for the images that fool the model: after two epochs there may be none."""
    return {path.name for path in out.iterdir()} - {"fooled.npz"}


def finished(out: Path) -> dict[str, Any]:
    """The summary of a run that has left everything in its folder."""
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    curve = json.loads((out / "curve.json").read_text())
    assert [point["eps"] for point in curve] == [0.0, summary["eps"], 2 * summary["eps"]]
    assert [point["acc"] for point in curve[:2]] == [summary["clean_acc"], summary["pgd_acc"]]
    assert not list(out.glob(".*.part"))
    page = (out / "report.html").read_text()
    assert f"right on {summary['clean_acc']:.1f} % of {summary['split']['test']:,} test samples" in page
    assert re.findall(r"(?:src|href)=.(?!data:)", page) == [], "self-contained"
    along = (out / "paths.json").exists() and summary["objective"] == "score_direct"
    assert page.count("<img ") == 2 + along + (out / "fooled.npz").exists() + (out / "toy.json").exists()
    return summary


@pytest.mark.pictures
@pytest.mark.parametrize("options", SURROGATES.values(), ids=SURROGATES.keys())
def test_surrogates_on_the_digits(call: Any, tiny: list[str], tmp_path: Path, options: list[str]) -> None:
    ending = call("run", *options, *tiny, "--out", "here")
    assert ending.status == 0, ending
    assert "clean accuracy" in ending.out
    summary = finished(tmp_path / "here")
    assert files(tmp_path / "here") == FILES
    assert summary["posterior"] is None
    assert summary["split"] == {"seed": 0, "train": 100, "validation": 147, "test": 500}

    again = call("evaluate", "--run", "here", "--attack", "clean", "--out", "evaluation.json")
    assert again.status == 0, again
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["clean_acc"] == summary["clean_acc"]
    low, high = evaluation["clean_interval"]
    assert low < evaluation["clean_acc"] < high


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.6), ("l2", 5.0)])
def test_the_curve_of_a_large_radius_ends_with_the_box(
    call: Any, tiny: list[str], tmp_path: Path, norm: str, eps: float
) -> None:
    options = ["--objective", "standard", "--norm", norm, "--eps", str(eps)]
    ending = call("run", *options, *tiny, "--out", "here")
    assert ending.status == 0, ending
    curve = json.loads((tmp_path / "here" / "curve.json").read_text())
    assert [point["eps"] for point in curve] == [0.0, eps]


def test_what_fools_a_classifier() -> None:
    """A linear classifier of one feature in [0, 1]: class 1 above .5. Within .2 the points next to .5 are fooled."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    x = torch.tensor([[0.1], [0.45], [0.6], [0.65], [0.95], [0.35]])
    y = torch.tensor([0, 0, 0, 1, 1, 0])
    attack = PGD(ThreatModel("linf", 0.2), steps=5)
    found = measures.fooled(model, x, y, attack, torch.Generator().manual_seed(0), 2)
    assert found["index"].tolist() == [1, 3], "the third is misclassified anyway, the last one too many"
    assert found["clean"].flatten().tolist() == pytest.approx([0.45, 0.65])
    assert (found["attacked"] - found["clean"]).abs().max() <= 0.2 + 1e-6
    assert (found["before"].argmax(1) == found["label"]).all()
    assert (found["after"].argmax(1) != found["label"]).all()
    everything = measures.fooled(model, x, y, attack, torch.Generator().manual_seed(0), 9)
    assert everything["index"].tolist() == [1, 3, 5]
    always_wrong = measures.fooled(model, x, 1 - (x[:, 0] > 0.5).long(), attack, torch.Generator(), 2)
    assert always_wrong["attacked"].shape == (0, 1)


@pytest.mark.pictures
def test_the_report_shows_what_fools_the_model(call: Any, tiny: list[str], tmp_path: Path) -> None:
    options = ["--objective", "standard", *tiny, "--limit", "400", "--epochs", "6", "--autoattack", "none"]
    ending = call("run", *options, "--out", "here")
    assert ending.status == 0, ending
    assert "here/report.html shows it" in ending.out
    with np.load(tmp_path / "here" / "fooled.npz", allow_pickle=False) as file:
        shown = dict(file)
    assert shown["clean"].shape == shown["attacked"].shape == (8, 1, 8, 8)
    assert np.abs(shown["attacked"] - shown["clean"]).max() <= 0.15 + 1e-6
    assert (shown["before"].argmax(1) == shown["label"]).all()
    assert (shown["after"].argmax(1) != shown["label"]).all()
    page = tmp_path / "here" / "report.html"
    assert "What fools it" in page.read_text()
    page.unlink()
    assert "finished already" in call("run", "--resume", "here").out
    assert "What fools it" in page.read_text(), "a run that ended before its report gets one"


def test_probabilities_along_an_attack_are_those_of_its_points() -> None:
    """The first row is of the clean samples, the last one of the final ones."""
    torch.manual_seed(0)
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Dropout(0.5)).train()
    density = KernelDensity(torch.rand(6, 1, 2, 2), torch.arange(6) % 2, num_classes=2, sigma=0.5)
    paths = measures.posteriors_along_attack(model, density, x, y, ThreatModel("linf", 0.1, step_size=0.02), 3)
    assert model.training
    model.eval()
    assert len(paths["model"]) == len(paths["posterior"]) == 4
    for row, name in ((0, "clean"), (-1, "final")):
        points = torch.tensor(paths[name])
        torch.testing.assert_close(torch.tensor(paths["model"][row]), model(points).softmax(1).detach())
        torch.testing.assert_close(torch.tensor(paths["posterior"][row]), density.log_prob(points).exp())
    assert 0.02 < (torch.tensor(paths["final"]) - x).abs().max() <= 0.0601
    label = torch.tensor(paths["model"]).gather(2, y.expand(4, 3)[..., None])
    assert (label.diff(dim=0) < 0).all(), "each step lowers the probability of the label"


def test_images_along_an_attack_are_drawn_in_their_box() -> None:
    x, y = torch.tensor([[-2.0, 0.0], [1.0, 3.0]]).reshape(1, 1, 2, 2), torch.tensor([1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    density = KernelDensity(torch.rand(6, 1, 2, 2), torch.arange(6) % 2, num_classes=2, sigma=0.5)
    threat_model = ThreatModel("linf", 0.5, lower=-2.0, upper=3.0)
    paths = json.loads(checkpoint.as_json(measures.posteriors_along_attack(model, density, x, y, threat_model, 2)))

    def ranges(paths: dict[str, Any]) -> set[tuple[float, float]]:
        figure = plots.posteriors_along_attack(paths, name="kernel density", family="kernel_density")
        found = {image.get_clim() for axes in figure.axes for image in axes.images}
        plots.rendered(figure, "png")
        return found

    assert ranges(paths) == {(-2.0, 3.0)}
    assert ranges({**paths, "final": paths["clean"], "box": [None, None]}) == {(-2.0, 3.0)}, "an infinite box"
    del paths["box"]
    assert ranges(paths) == {(0.0, 1.0)}, "of an earlier version"


def test_lines_of_one_objective_differ_in_their_dashes() -> None:
    lines = [
        plots.Series(kind, "pgd_at", kind, [0, 1], [2, 1], generated=generated)
        for kind in KINDS
        for generated in (False, True)
    ]
    figure = plots.training_curves({"loss": lines})
    drawn = figure.axes[0].lines
    assert len({line.get_color() for line in drawn}) == 1
    assert len({str(line._dash_pattern) for line in drawn}) == len(drawn) == 16
    plots.rendered(figure, "png")


@pytest.mark.parametrize("epochs", [[1], [1, 2]])
def test_the_training_curve_of_one_epoch_is_a_point(epochs: list[int]) -> None:
    line = plots.Series("PGD-AT", "pgd_at", "kl", epochs, [2.3] * len(epochs))
    figure = plots.training_curves({"loss": [line]})
    axes = figure.axes[0]
    (drawn,) = axes.lines
    assert drawn.get_marker() == ("o" if len(epochs) == 1 else "None")
    low, high = axes.get_xlim()
    assert (low, high) == ((0.5, 1.5) if len(epochs) == 1 else pytest.approx((0.95, 2.05)))
    figure.draw_without_rendering()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == epochs


def test_names_of_classes_are_no_formulas_and_fit_over_their_images() -> None:
    """Folders of images may be called anything; matplotlib reads what stands between two dollars as TeX."""
    names = ["$5_$10", "cat", "American Staffordshire terrier\n(adult)", "soft-coated_wheaten_terrier", "M" * 40]
    count = len(names)
    examples = {
        "label": np.arange(count),
        "clean": np.zeros((count, 3, 8, 8)),
        "attacked": np.ones((count, 3, 8, 8)),
        "before": np.eye(count),
        "after": np.roll(np.eye(count), 1, 0),
    }
    figure = plots.fooled(examples, names, (0.0, 1.0))
    figure.savefig(io.BytesIO())
    for row in (figure.axes[:count], figure.axes[count : 2 * count]):
        boxes = [axes.title.get_window_extent() for axes in row]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    shown = [axes.get_title().splitlines() for axes in figure.axes[:count]]
    assert [title[0] for title in shown[:2]] == names[:2]
    for (title, percent), name in zip(shown[2:], names[2:], strict=True):
        assert percent == "100 %"
        assert title.endswith("…")
        assert name.replace("\n", " ").startswith(title[:-1])
        assert len(title) > 8
    assert b"<svg" in plots.rendered(figure, "svg")


def test_the_report_tells_what_of_the_calibration_error_is_expected(call: Any, tiny: list[str], tmp_path: Path) -> None:
    ending = call("run", "--objective", "standard", *tiny, "--out", "here")
    assert ending.status == 0, ending
    summary = finished(tmp_path / "here")
    error, by_chance = summary["calibration_error"], summary.pop("calibration_error_by_chance")
    assert f"{error:.1f} points ({by_chance:.1f} are expected by chance); −log p" in ending.out
    told = dict(report.rows(summary))["expected calibration error, clean"]
    assert told.startswith(f"{error:.1f} points; −log p"), "a summary of an earlier version"


@pytest.mark.pictures
@pytest.mark.parametrize("posterior", DIRECT)
def test_direct_on_the_digits(
    call: Any, tiny: list[str], small_posterior: list[str], tmp_path: Path, posterior: str
) -> None:
    options = ["--objective", "score_direct", "--posterior", posterior, *small_posterior]
    ending = call("run", *options, *tiny, "--out", "here")
    assert ending.status == 0, ending
    summary = finished(tmp_path / "here")
    trainings = {
        "score_network": {"score-network"},
        "joint_energies": {f"fold-{k}" for k in range(4)},
        "kernel_density": set(),
        "noise_conditional_classifier": {"classifier"},
    }
    assert files(tmp_path / "here") == FILES | {"posterior.pt", "paths.json"} | trainings[posterior]
    assert summary["posterior"] == posterior
    assert summary["data_gradient_ratio"] > 0
    assert 0 <= summary["sign_change_share"] <= 1
    paths = json.loads((tmp_path / "here" / "paths.json").read_text())
    assert len(paths["posterior"]) == len(paths["model"]) == 3  # the clean point and two steps
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in paths["posterior"][0])

    given = ["--posterior-from", "here/posterior.pt", "--out", "there"]
    ending = call("run", "--objective", "score_direct", "--posterior", posterior, *tiny, *given)
    assert ending.status == 0, ending
    assert finished(tmp_path / "there")["pgd_acc"] == summary["pgd_acc"]
    settings = [tomllib.loads((tmp_path / name / "config.toml").read_text()) for name in ("here", "there")]
    assert settings[0]["posterior_settings"] == settings[1]["posterior_settings"]

    # the scale of its network comes from the data it saw
    ending = call(
        "run", *options, *tiny, "--limit", "90", "--posterior-from", "here/posterior.pt", "--out", "elsewhere"
    )
    assert ending.status == 2
    assert "here/posterior.pt is of limit 100, expected 90 as in this run" in ending.err
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            "trades --posterior kernel_density",
            {"soft_targets": False, "transport": 1.0, "target_mix": None, "data_gradient": None},
        ),
        (
            "pgd_at --posterior kernel_density --soft-targets",
            {"soft_targets": True, "transport": 0.0, "target_mix": None, "data_gradient": None},
        ),
        (
            "score_direct --posterior kernel_density --target-mix 0.5 --data-gradient noise",
            {"soft_targets": False, "transport": 0.0, "target_mix": 0.5, "data_gradient": "noise"},
        ),
    ],
)
def test_between_surrogates_and_direct_score(
    call: Any, tiny: list[str], tmp_path: Path, options: str, told: dict[str, Any]
) -> None:
    ending = call("run", "--objective", *options.split(), *tiny, "--out", "here")
    assert ending.status == 0, ending
    summary = finished(tmp_path / "here")
    assert files(tmp_path / "here") == FILES | {"posterior.pt", "paths.json"}
    assert summary["posterior"] == "kernel_density"
    assert {key: summary[key] for key in told} == told
    assert summary["posterior_robust_acc"] <= summary["posterior_clean_acc"]
    assert (summary["data_gradient_ratio"] is None) == options.startswith("pgd_at")
    again = call("evaluate", "--run", "here", "--attack", "clean", "--out", "evaluation.json")
    assert again.status == 0, again
    assert json.loads((tmp_path / "evaluation.json").read_text())["clean_acc"] == summary["clean_acc"]
    assert "finished already" in call("run", "--resume", "here").out


def test_a_resumed_direct_run_keeps_its_posterior(
    call: Any, tiny: list[str], small_posterior: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--objective", "score_direct", *small_posterior, *tiny]
    assert call("run", *options, "--out", "whole").status == 0

    step, calls = Trainer._step, iter(range(100))

    def interrupted(trainer: Trainer, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if next(calls) == 3:
            raise Interrupted("SIGTERM")
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    ending = call("run", *options, "--out", "parts")
    assert ending.status == 1
    assert ending.err.endswith("1 of 2 epochs are saved; continue with: python -m training.run --resume parts\n")
    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(scores, "train", None)  # nothing is trained again
    assert call("run", "--resume", "parts").status == 0
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoint.pt")["network"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.pictures
@pytest.mark.parametrize("options", ["pgd_at", "score_direct --posterior oracle"])
def test_toy(call: Any, tiny: list[str], tmp_path: Path, options: str) -> None:
    ending = call("run", "--data", "toy", "--objective", *options.split(), *tiny, "--out", "here")
    assert ending.status == 0, ending
    summary = finished(tmp_path / "here")
    assert summary["r_score"] > 0
    assert dict(report.rows(summary))["R_SCORE"].endswith(" nat (exact, up to a grid with steps of eps / 500)")
    assert summary["r_madry"] > 0
    curves = json.loads((tmp_path / "here" / "toy.json").read_text())
    assert len(curves["x"]) == len(curves["p_d"]) == len(curves["p_theta"])


def test_autoattack_after_a_run(call: Any, tiny: list[str], tmp_path: Path) -> None:
    ensemble = ["--autoattack", "fast", "--autoattack-samples", "40", "--seed", "3"]
    ending = call("run", "--objective", "standard", *tiny, "--eps", "0.05", *ensemble, "--out", "here")
    assert ending.status == 0, ending
    assert "AutoAttack accuracy, fast" in ending.out
    summary = finished(tmp_path / "here")
    assert files(tmp_path / "here") == FILES
    report = summary["autoattack"]
    assert (report["samples"], report["seed"], report["eps"], report["norm"]) == (40, 3, 0.05, "linf")
    assert list(report["attacks"]) == ["apgd-ce", "apgd-t"]
    assert summary["autoattack_samples"] == 40
    assert summary["autoattack_version"] == "fast"
    assert summary["autoattack_acc"] == 100 * report["robust_accuracy"] <= 100 * report["clean_accuracy"]
    low, high = summary["autoattack_interval"]
    assert low <= summary["autoattack_acc"] <= high
    assert summary["autoattack_seconds"] > 0

    options = ["--attack", "autoattack", "--version", "fast", "--limit", "40", "--seed", "3", "--out", "again.json"]
    ending = call("evaluate", "--run", "here", *options)
    assert ending.status == 0, ending
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["autoattack_acc"] == summary["autoattack_acc"]
    assert again["autoattack"]["attacks"]["apgd-t"]["forwards"] == report["attacks"]["apgd-t"]["forwards"]


def test_warnings_of_autoattack_are_lines(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "mine_with_noise.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Noise(nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x + 0.1 * torch.randn_like(x))\n"
        "def noisy(input_shape, num_classes):\n"
        "    return nn.Sequential(Noise(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = [
        "--model",
        "mine_with_noise:noisy",
        *tiny,
        "--autoattack",
        "fast",
        "--autoattack-samples",
        "10",
    ]
    ending = call("run", "--objective", "standard", *options, "--out", "here")
    assert ending.status == 0, ending
    assert "warning: the model seems to be randomised" in ending.out
    assert not [warning for warning in recwarn if issubclass(warning.category, AutoAttackWarning)]
    told = json.loads((tmp_path / "here" / "summary.json").read_text())["autoattack"]["warnings"]
    assert any("randomised" in text for text in told)
    assert not any("training mode" in text for text in told)


def test_a_posterior_of_another_kind_is_refused(call: Any, tiny: list[str]) -> None:
    options = ["--objective", "score_direct", *tiny]
    assert call("run", *options, "--posterior", "kernel_density", "--out", "a").status == 0
    ending = call("run", *options, "--posterior", "score_network", "--posterior-from", "a/posterior.pt", "--out", "b")
    assert ending.status == 2
    assert "holds a kernel_density, expected score_network" in ending.err
    assert not Path("b").exists()


def test_a_folder_with_a_run_is_not_overwritten(call: Any, tiny: list[str], tmp_path: Path) -> None:
    options = ["--objective", "standard", *tiny]
    assert call("run", *options, "--out", "here").status == 0
    before = (tmp_path / "here" / "summary.json").read_bytes()
    ending = call("run", *options, "--out", "here")
    assert ending.status == 2
    assert "--resume here" in ending.err
    assert (tmp_path / "here" / "summary.json").read_bytes() == before
    assert "finished already" in call("run", "--resume", "here").out
    contradiction = call("run", "--resume", "here", "--eps", "0.3")
    assert contradiction.status == 2
    assert "eps: 0.3 contradicts" in contradiction.err
    for option, value in (("recipe", "table2"), ("out", "elsewhere")):
        ending = call("run", "--resume", "here", f"--{option}", value)
        assert (ending.status, f"{option}: " in ending.err and "with --resume, allowed: " in ending.err) == (2, True)


@pytest.mark.parametrize("kept", ["checkpoint.pt", "summary.json", "posterior.pt", "score-network"])
def test_what_another_run_has_left_is_not_gone_on_from(kept: str, call: Any, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / kept).touch()
    ending = call("run", "--objective", "standard", *tiny, "--out", "here")
    assert (ending.status, ending.out) == (2, "")
    assert f"out: here holds {kept} without a config.toml, allowed: another folder" in ending.err
    assert [path.name for path in (tmp_path / "here").iterdir()] == [kept]


def interrupted(call: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """How a run of two epochs ends that is stopped before its second."""
    epoch = Trainer._epoch

    def stopping(self: Trainer, *args: Any) -> Any:
        if self.epoch == 1:
            raise Interrupted("stopped")
        return epoch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stopping)
        return call("run", *options)


def test_a_run_that_torchrun_starts_again_finds_its_folder(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--objective", "standard", *tiny, "--save-every", "1"]
    assert call("run", *options).status == 0  # an earlier one, finished
    assert "1 of 2 epochs are saved" in interrupted(call, monkeypatch, *options).err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = call("run", *options)
    assert again.status == 0, again
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits-standard-kl-seed0",
        "digits-standard-kl-seed0-2",
    ]
    assert [
        (tmp_path / "runs" / f"digits-standard-kl-seed0{end}" / "metrics.jsonl").read_text().count("\n")
        for end in ("", "-2")
    ] == [2, 2]


def test_an_interruption_tells_what_is_saved_and_how_to_go_on(
    call: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = interrupted(
        call,
        monkeypatch,
        "--objective",
        "standard",
        *tiny,
        "--validate-every",
        "2",
        "--save-every",
        "2",
        "--out",
        "my runs/a b",
    )
    assert "0 of 2 epochs are saved; continue with: python -m training.run --resume 'my runs/a b'" in ending.err


def test_short_epochs_are_saved_as_often_as_steps(call: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One step an epoch, so that only its end can be the time."""
    options = ["--objective", "standard", *tiny, "--limit", "50", "--save-every", "1000", "--save-minutes", "1e-9"]
    assert "1 of 2 epochs are saved" in interrupted(call, monkeypatch, *options, "--out", "here").err


@pytest.mark.parametrize(("lost", "told"), [("metrics.jsonl", "a file is missing"), ("best.pt", "holds no best.pt")])
def test_a_run_that_has_lost_a_file_says_so_before_it_goes_on(
    lost: str, told: str, call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(call, monkeypatch, "--objective", "standard", *tiny, "--save-every", "1", "--out", "here")
    (tmp_path / "here" / lost).unlink()
    path = tmp_path / "here" / "checkpoint.pt"
    saved = checkpoint.load(path)
    saved["training"]["step"] = 1  # else the weights of best.pt are in it
    torch.save(saved, path)
    ending = call("run", "--resume", "here")
    assert ending.status == 2
    assert told in ending.err
    assert "step/s" not in ending.err


def test_a_resumed_run_needs_neither_the_place_of_its_posterior_nor_the_same_number_of_threads(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = ["--objective", "score_direct", "--posterior", "kernel_density", *tiny, "--save-every", "1"]
    assert call("run", *direct, "--out", "first").status == 0
    given = [*direct, "--posterior-from", "first/posterior.pt", "--out", "second"]
    interrupted(call, monkeypatch, *given)
    assert tomllib.loads((tmp_path / "second" / "config.toml").read_text())["posterior_from"] == str(
        tmp_path / "first" / "posterior.pt"
    )
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = ["--threads", "2", "--device", "cpu"]
    ending = call("run", "--resume", "second", *moved, "--out", tmp_path / "second")
    assert ending.status == 0, ending
    assert tomllib.loads((tmp_path / "second" / "config.toml").read_text())["threads"] == 2
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("moved", "second")]
    assert summaries[1]["threads"] == 2
    assert summaries[0]["split"] == summaries[1]["split"]


def test_without_a_folder_each_run_gets_a_fresh_one(call: Any, tiny: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert call("run", "--objective", "standard", *tiny).status == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["digits-standard-kl-seed0", "digits-standard-kl-seed0-2"]


def test_a_loss_that_is_not_finite_ends_with_status_1(call: Any, tiny: list[str]) -> None:
    ending = call("run", "--objective", "standard", *tiny, "--lr", "1e30", "--optimizer", "sgd", "--out", "here")
    assert ending.status == 1
    assert "the loss is not finite" in ending.err
    assert "Traceback" not in ending.err


def test_dry_run_prints_the_settings_and_writes_nothing(call: Any, tmp_path: Path) -> None:
    ending = call("run", "--objective", "trades", "--beta", "3", "--dry-run")
    assert ending.status == 0
    assert "beta = 3.0" in ending.out
    assert not list(tmp_path.iterdir())


def test_a_model_of_ones_own(call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def linear(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ending = call("run", "--objective", "standard", "--model", "mine:linear", *tiny, "--out", "here")
    assert ending.status == 0, ending
    assert call("evaluate", "--run", "here", "--attack", "clean").status == 0
    planned = call("plan", "--objective", "standard", "--model", "mine:linear")
    assert planned.status == 0, planned


def test_a_ratio_that_is_not_finite(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's gradient is zero at first, so the data gradient is infinitely larger."""
    (tmp_path / "blank.py").write_text(
        "from torch import nn\n"
        "def zeros(input_shape, num_classes):\n"
        "    linear = nn.Linear(64, num_classes)\n"
        "    nn.init.zeros_(linear.weight)\n"
        "    return nn.Sequential(nn.Flatten(), linear)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--objective", "score_direct", "--posterior", "kernel_density", "--model", "blank:zeros"]
    ending = call("run", *options, *tiny, "--epochs", 1, "--out", "here")
    assert ending.status == 0, ending
    assert json.loads(Path("here/summary.json").read_text())["data_gradient_ratio"] is None
    assert "Infinity" not in Path("here/metrics.jsonl").read_text()
    assert "signs of steps that the data gradient changes" in Path("here/report.html").read_text()


@pytest.mark.parametrize(("test", "said"), [("if x.sum() > -1:", True), ("if self.head.bias is not None:", False)])
def test_folding_that_finds_nothing_says_so(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test: str, said: bool
) -> None:
    """A test of the input cannot be traced, one of the module itself can."""
    (tmp_path / "with_a_test.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, input_shape, num_classes):\n"
        "        super().__init__()\n"
        "        self.conv, self.norm = nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4)\n"
        "        self.head = nn.Linear(4, num_classes)\n"
        "    def forward(self, x):\n"
        f"        {test}\n"
        "            x = self.norm(self.conv(x))\n"
        "        return self.head(x.flatten(1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "with_a_test", raising=False)
    options = ["--objective", "trades", "--model", "with_a_test:Net", "--fold", *tiny, "--out", "here"]
    ending = call("run", *options)
    assert ending.status == 0, ending
    assert ("nothing is folded" in ending.out) == said
    assert ("batch norm folded" in ending.out) != said


def test_the_time_of_evaluation_has_that_before_an_interruption(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoAttack counts its own, also over several processes."""
    original = measures.autoattack

    def begun_before(*arguments: Any, **options: Any) -> dict[str, Any]:
        report = original(*arguments, **options)
        return {**report, "seconds": report["seconds"] + 1e6}

    monkeypatch.setattr(measures, "autoattack", begun_before)
    ensemble = ["--autoattack", "fast", "--autoattack-samples", "10"]
    assert call("run", "--objective", "standard", *tiny, *ensemble, "--out", "here").status == 0
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["eval_seconds"] > summary["autoattack_seconds"] > 1e6


def test_evaluate_prints_intervals_and_takes_another_threat_model(call: Any, tiny: list[str], tmp_path: Path) -> None:
    assert call("run", "--objective", "standard", *tiny, "--out", "here").status == 0
    attack = ["--steps", "2", "--restarts", "1", "--losses", "ce"]
    ending = call("evaluate", "--checkpoint", "here/checkpoint.pt", *attack, "--norm", "l2", "--eps", "0.5")
    assert ending.status == 0, ending
    assert "l2, eps 0.5, step 0.125" in ending.out
    assert "95 % interval" in ending.out
    missing = call("evaluate", "--run", "here", *attack, "--norm", "l2")
    assert missing.status == 2
    assert "eps: none given" in missing.err


def test_a_posterior_anchored_at_labels_has_no_clean_accuracy(
    call: Any, tiny: list[str], small_posterior: list[str], tmp_path: Path
) -> None:
    """It is given the labels there: 100 % says nothing."""
    anchor = ["--posterior-settings.anchor", "label"]
    ending = call("run", "--objective", "score_direct", *anchor, *small_posterior, *tiny, "--out", "here")
    assert ending.status == 0, ending.err
    summary = finished(tmp_path / "here")
    assert summary["posterior_clean_acc"] is None
    assert 0 <= summary["posterior_robust_acc"] <= 100
    assert "anchored at the labels, " in ending.out
    assert f"({summary['posterior_samples']} samples)" in ending.out


def test_the_audit_of_a_posterior_takes_few_samples(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "AUDITED", 20)
    ending = call("run", "--objective", "score_direct", "--posterior", "kernel_density", *tiny, "--out", "here")
    assert ending.status == 0, ending.err
    summary = finished(tmp_path / "here")
    assert summary["posterior_samples"] == 20
    assert 100 * summary["posterior_robust_acc"] % 500 == 0, "of twenty"
    assert "% clean, " in ending.out


def test_a_posterior_is_trained_with_the_arithmetic_of_its_run(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, train = [], scores.train

    def look(trainer: scores.ScoreTrainer) -> None:
        found.append(torch.get_float32_matmul_precision())
        train(trainer)

    monkeypatch.setattr(scores, "train", look)
    allow_tf32(True)
    options = ["--posterior-settings.steps", "4", "--precision", "float32"]
    assert call("run", *tiny, "--objective", "score_direct", *options, "--out", tmp_path / "run").status == 0
    assert set(found) == {"highest"}


def test_the_time_of_a_posterior_counts_what_earlier_processes_spent(
    call: Any, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--posterior", "joint_energies", "--posterior-settings.folds", "2", "--posterior-settings.steps", "4"]
    call("run", *tiny, "--objective", "score_direct", *options, "--out", out)
    logs = [checkpoint.read_metrics(out / f"fold-{fold}" / "classifier" / "metrics.jsonl") for fold in (0, 1)]
    spent = sum(entry["seconds"] for log in logs for entry in log)
    (out / "summary.json").unlink()  # as if it had been killed before its end
    assert call("run", "--resume", out).status == 0
    assert json.loads((out / "summary.json").read_text())["posterior_seconds"] > spent > 0
