"""Data of one's own: what functions return, images in folders, and every program on both."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from scorematch import ThreatModel
from scorematch.posteriors import GaussianMixture
from training import data, evaluate, measures, run, score
from training.data import Data, DataSettings, Format, checked, generated, load, own_data
from training.engine import checkpoint, posteriors, scores
from training.engine.loop import Trainer
from training.measures import judge
from training.reports import audit
from training.settings import config
from training.settings.errors import InputError
from training.settings.posterior import PosteriorSettings

Make = Callable[..., Path]

MODULE = """
import torch
from training.data import Data

def blobs(shape, count_of_classes, upper=1.0, validation=30, **more):
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(count_of_classes, *shape, generator=generator)
    def part(count):
        y = torch.arange(count) % count_of_classes
        noise = 0.1 * torch.randn(count, *shape, generator=generator)
        return upper * (centres[y] + noise).clamp(0, 1), y
    return Data("blobs", count_of_classes, *part(120), *part(validation), *part(40), upper=upper, **more)

def grey():
    return blobs((1, 8, 8), 4, split_seed=7)

def colour():
    return blobs((3, 18, 20), 3)

def points():
    return blobs((5,), 3, upper=20.0)

def unvalidated():
    return blobs((5,), 3, validation=0)

def soft():
    data = blobs((1, 8, 8), 4)
    import dataclasses
    return dataclasses.replace(data, p_train=torch.full((120, 4), 0.25))

def known():
    import dataclasses, math
    from scorematch.posteriors import GaussianMixture
    p_d = GaussianMixture(2 * torch.eye(3)[:, None], torch.ones(3, 1))
    parts = [p_d.sample(n, torch.Generator().manual_seed(n)) for n in (120, 30, 40)]
    data = Data("known", 3, *(tensor for part in parts for tensor in part), lower=-math.inf, upper=math.inf, p_d=p_d)
    return data

def endless():
    import dataclasses, math
    return dataclasses.replace(blobs((1, 8, 8), 3), upper=math.inf)

def head(input_shape, num_classes):
    return torch.nn.Linear(5, num_classes)

def failing():
    raise OSError("the disk is gone")

def one_more(x):
    return x

number = 5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module ``my_data`` in the current folder, which Python does not search."""
    path = tmp_path / "my_data.py"
    path.write_text(MODULE)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def rewritten(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Change the module, as between two programs."""

    def rewrite(old: str, new: str) -> None:
        assert old in mine.read_text()
        mine.write_text(mine.read_text().replace(old, new))
        monkeypatch.delitem(sys.modules, "my_data", raising=False)

    return rewrite


def blobs(shape: tuple[int, ...] = (1, 4, 4), kinds: int = 3, **changes: Any) -> Data:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.rand(n, *shape, generator=generator), torch.arange(n) % kinds) for n in (30, 6, 9)]
    return dataclasses.replace(Data("blobs", kinds, *(t for part in parts for t in part)), **changes)


def test_a_function_in_the_current_folder(mine: Path) -> None:
    found = load(DataSettings("my_data:grey"))
    assert (found.name, found.num_classes, found.input_shape) == ("my_data:grey", 4, (1, 8, 8))
    assert found.sizes == {"train": 120, "validation": 30, "test": 40}
    assert found.source == str(mine)
    assert str(mine.parent) not in sys.path
    assert load(DataSettings("my_data:grey")).x_train.data_ptr() == found.x_train.data_ptr(), "called once"
    assert data.format_of(DataSettings("my_data:points")) == Format((5,), 3, 0.0, 20.0, 120, 30)
    few = load(DataSettings("my_data:grey", limit=10))
    assert torch.bincount(few.y_train).tolist() == [3, 3, 2, 2]


def test_statistics_of_the_training_images_where_none_are_given() -> None:
    shape = (3, 4, 4)
    x = torch.rand(30, *shape) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    found = checked(blobs(shape, x_train=x), "m:f").statistics
    assert found is not None
    mean, deviation = found
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert deviation[:2] == pytest.approx(x.permute(1, 0, 2, 3).flatten(1).std(1, correction=0)[:2].tolist(), abs=1e-6)
    assert deviation[2] == 1.0, "a constant channel is not divided by nothing"
    given = ((0.5,) * 3, (0.25,) * 3)
    assert checked(blobs(shape, statistics=given), "m:f").statistics == given
    assert checked(blobs((4,)), "m:f").statistics is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_classes": 1}, "num_classes is 1, allowed: at least 2"),
        ({"num_classes": "many"}, "num_classes, lower, upper are 'many'"),
        ({"lower": 1.0}, "lower 1, upper 1, allowed: lower below upper"),
        ({"lower": 0.5}, r"x_train has values from 0\.\d+ to 0\.9\d+, allowed: lower 0.5 to upper 1"),
        (
            {"x_train": torch.rand(30, 1, 4, 4).double()},
            r"x_train is torch.float64 \[30, 1, 4, 4\], allowed: .*float32",
        ),
        ({"x_train": np.zeros((30, 1, 4, 4))}, "x_train is ndarray, allowed: a tensor float32"),
        ({"x_train": torch.rand(30)}, r"x_train is torch.float32 \[30\]"),
        (
            {"x_train": torch.rand(30, 8, 8, 3)},
            r"x_train is \[30, 8, 8, 3\], which looks like \[N, H, W, C\], allowed: images \[N, C, H, W\]; x.permute",
        ),
        ({"x_train": torch.full((30, 1, 4, 4), torch.nan)}, "x_train has 480 values that are not finite"),
        ({"x_test": torch.rand(9, 1, 4, 5)}, r"x_test is \[9, 1, 4, 5\], allowed: \[N, 1, 4, 4\]"),
        ({"x_test": torch.rand(0, 1, 4, 4), "y_test": torch.zeros(0, dtype=torch.int64)}, "x_test is empty"),
        ({"y_train": torch.zeros(30)}, r"y_train is torch.float32 \[30\], allowed: a tensor int64 \[30\]"),
        ({"y_validation": torch.zeros(5, dtype=torch.int64)}, r"y_validation is .*\[5\], allowed: .*int64 \[6\]"),
        ({"y_test": torch.full((9,), 3)}, "y_test has labels from 3 to 3, allowed: 0 to 2"),
        ({"y_train": torch.zeros(30, dtype=torch.int64)}, "y_train has no label 1, allowed: all of 0 to 2 occur"),
        ({"p_d": 3}, "p_d is int, allowed: None or a scorematch.posteriors.Posterior"),
        (
            {"p_d": GaussianMixture(torch.zeros(2, 1, 16), torch.ones(2, 1))},
            "p_d has 2 classes, allowed: 3, as the data",
        ),
        ({"p_train": torch.rand(30, 2)}, r"p_train is torch.float32 \[30, 2\], allowed: .*\[30, 3\]"),
        ({"p_train": torch.full((30, 3), 0.5)}, "p_train has rows that are not distributions"),
        ({"classes": ("a", "b")}, r"classes is \['a', 'b'\], allowed: None or 3 names"),
        (
            {"statistics": ((0.5,), (0.0,))},
            r"statistics is .*means, standard deviations above 0",
        ),
        ({"statistics": ((0.5, 0.5), (0.1, 0.1))}, ".*1 of each"),
        ({"statistics": 3}, "statistics is 3"),
    ],
)
def test_what_is_not_allowed_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=f"^data: m:f: {told}"):
        checked(blobs(**changes), "m:f")


def test_another_type() -> None:
    with pytest.raises(InputError, match=r"^data: m:f returned tuple, expected training\.data\.Data"):
        checked((1, 2), "m:f")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my_data:nothing", "cannot be imported .*no attribute 'nothing'.*expected module:function"),
        ("no_data:make", "cannot be imported .*No module named 'no_data'"),
        ("my_data:number", "is of type int, expected a function"),
        ("my_data:one_more", "is called without arguments, which it does not allow .*'x'"),
        ("my_data:failing", r"failed \(OSError: the disk is gone, in .*my_data.py:\d+\)"),
    ],
)
def test_functions_that_cannot_be_used(name: str, told: str, mine: Path) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load(DataSettings(name))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data: ")


def test_a_module_that_does_not_compile(mine: Path) -> None:
    mine.write_text("def grey(:\n")
    with pytest.raises(InputError, match=r"cannot be imported \(SyntaxError"):
        load(DataSettings("my_data:grey"))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 28, 28), "small-images"),
        ((1, 64, 64), "images"),
        ((3, 16, 16), "small-images"),
        ((3, 32, 32), "images"),
        ((5,), "vectors"),
        ((2, 100), "vectors"),
    ],
)
def test_defaults_by_the_shape(shape: tuple[int, ...], kind: str) -> None:
    assert config.own_kind(shape) == kind
    assert (config.RECIPES / f"own-{kind}.toml").is_file()


def test_defaults_of_a_run(mine: Path) -> None:
    def parsed(name: str, *more: str) -> config.RunSettings:
        return config.parse(["--objective", "score_direct", "--data", f"my_data:{name}", "--device", "cpu", *more])

    grey, colour, points = (parsed(name) for name in ("grey", "colour", "points"))
    assert [s.data for s in (grey, colour, points)] == ["my_data:grey", "my_data:colour", "my_data:points"]
    assert [s.model for s in (grey, colour, points)] == ["digits_cnn", "preact-resnet-18", "toy_mlp"]
    assert colour.eps == pytest.approx(8 / 255)
    assert points.autoattack == "none"
    assert grey.posterior_settings.network == "mlp"
    assert colour.posterior_settings.network == "conv", "18 pixels cannot be halved twice"
    assert colour.posterior_settings.sigma_max == 10.0
    over = parsed("grey", "--recipe", "cifar10-cpu")
    assert (over.model, over.data) == ("wrn-10-2", "my_data:grey")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--data my_data:points --shift 1", r"shift: 1 on my_data:points, whose inputs \[5\] are not images"),
        ("--data my_data:points --flip", "flip: True on my_data:points"),
        ("--data my_data:points --autoattack fast", r"autoattack: 'fast' on my_data:points, .*\[5\] from 0 to 20"),
        ("--data my_data:points --model wrn-10-1", r"takes images \[C, H, W\]"),
        ("--data my_data:unvalidated", "selection: 'best' on my_data:unvalidated, .*allowed: --selection last"),
        (
            "--data my_data:soft --label-smoothing 0.1",
            "label_smoothing: given on my_data:soft, whose targets",
        ),
        ("--data my_data:grey --validation-size 5", "validation_size: 5 on my_data:grey, whose split is fixed"),
        ("--data my_data:grey --image-size 5", "image_size: 5 on my_data:grey, allowed: on folder"),
        ("--data my_data:grey --limit 3", "limit: 3 training points, allowed: 0 .all. or 4 to 120"),
        ("--data my_data:grey --autoattack-samples 50", "up to 40 test samples"),
    ],
)
def test_options_that_the_data_do_not_allow(arguments: str, told: str, mine: Path, call: Any, tiny: list[str]) -> None:
    wanted = arguments.split()
    if "--limit" in wanted:
        tiny[tiny.index("--limit") : tiny.index("--limit") + 2] = []
    if "--autoattack-samples" in wanted:
        tiny[tiny.index("--autoattack") + 1] = "fast"
    ending = call("run", "--objective", "pgd_at", *tiny, *wanted)
    assert ending.status == 2, ending
    assert ending.err.count("\n") == 1
    assert re.search(told, ending.err), ending.err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grey", "--objective score_direct --posterior kernel_density --shift 1 --autoattack fast"),
        ("colour", "--objective trades --divergence se --flip --model wrn-10-1"),
        ("points", "--objective pgd_at --eps 2"),
        ("soft", "--objective pgd_at"),
    ],
)
def test_a_run_and_its_evaluation(name: str, options: str, mine: Path, call: Any, tiny: list[str]) -> None:
    ending = call("run", "--data", f"my_data:{name}", *tiny, *options.split())
    assert ending.status == 0, ending
    (folder,) = Path("runs").iterdir()
    assert ":" not in folder.name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"] == f"my_data:{name}"
    assert summary["split"] == {"seed": 7 if name == "grey" else 0, "train": 100, "validation": 30, "test": 40}
    saved = checkpoint.load(folder / "best.pt")
    assert saved["data"]["source"] == str(mine)
    assert (saved["statistics"] is None) == (name == "points")
    ending = call("evaluate", "--run", folder, "--attack", "pgd", "--steps", 2, "--out", "report.json")
    assert ending.status == 0, ending
    assert ending.err == "" or "samples than" not in ending.err
    assert json.loads(Path("report.json").read_text())["clean_acc"] == pytest.approx(summary["clean_acc"], abs=0.01)
    ending = call("run", "--resume", folder)
    assert (ending.status, "finished already" in ending.out) == (0, True)
    if name != "points":
        return
    ending = call("evaluate", "--run", folder, "--attack", "autoattack")
    assert "allowed: images in a finite box" in ending.err


def test_data_that_bring_their_posterior(mine: Path, call: Any, tiny: list[str]) -> None:
    """It can be trained towards, and the distance to it is measured, by the run and by an evaluation alike."""
    options = ["--data", "my_data:known", "--norm", "l2", "--eps", "1", *tiny, "--epochs", "2"]
    ending = call("run", "--objective", "score_direct", "--posterior", "oracle", *options, "--out", "direct")
    assert ending.status == 0, ending
    assert "another class than p_d's in the ball, at least" in ending.out
    summary = json.loads(Path("direct/summary.json").read_text())
    assert 0 <= summary["kl"] <= summary["r_score"]
    assert 0 <= summary["disagrees"] <= 100
    assert re.search(rf"R_SCORE, at least +{summary['r_score']:.5f} nat\n", ending.out)
    assert f"<td>R_SCORE, at least</td><td>{summary['r_score']:.5f} nat</td>" in Path("direct/report.html").read_text()
    ending = call("evaluate", "--run", "direct", "--attack", "pgd", "--steps", 2, "--out", "report.json")
    assert ending.status == 0, ending
    assert re.search("R_SCORE, at least .* nat .*\n.*another class in the ball, at least", ending.out)
    found = json.loads(Path("report.json").read_text())
    assert found["kl"] == pytest.approx(summary["kl"], rel=1e-4)
    low, high = found["kl_interval"]
    assert low < found["kl"] < high
    searched = [found["r_score"]]
    for restarts in (1, 30):
        options = ["--attack", "pgd", "--steps", 2, "--restarts", restarts, "--out", "report.json"]
        assert call("evaluate", "--run", "direct", *options).status == 0
        searched.append(json.loads(Path("report.json").read_text())["r_score"])
    assert searched[0] == searched[1], "one random start unless told otherwise"
    assert searched[2] > searched[1]
    ending = call("evaluate", "--run", "direct", "--limit", 1, "--steps", 2, "--out", "report.json")
    assert (ending.status, ending.err) == (0, "")
    assert json.loads(Path("report.json").read_text())["kl_interval"] is None
    ending = call("run", "--objective", "score_direct", "--posterior", "oracle", "--data", "my_data:points", *tiny)
    assert ending.status == 2
    assert "posterior: 'oracle' on my_data:points, whose p_d(y|x) is not known" in ending.err


def test_a_posterior_of_an_earlier_run(mine: Path, rewritten: Any, call: Any, tiny: list[str]) -> None:
    direct = ["--objective", "score_direct", "--posterior", "kernel_density", "--data", "my_data:grey", *tiny]
    assert call("run", *direct, "--out", "first").status == 0
    again = call("run", *direct, "--posterior-from", "first/posterior.pt", "--out", "second")
    assert again.status == 0, again
    rewritten("blobs((1, 8, 8), 4, split", "blobs((1, 8, 8), 5, split")
    ending = call("run", *direct, "--posterior-from", "first/posterior.pt", "--out", "third")
    assert ending.status == 2
    assert "first/posterior.pt was trained on: number of classes 4, now 5" in ending.err


@pytest.fixture
def trained(mine: Path, call: Any, tiny: list[str]) -> Path:
    ending = call("run", "--objective", "standard", "--data", "my_data:grey", *tiny, "--out", "run")
    assert ending.status == 0, ending
    return Path("run")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("(1, 8, 8), 4, split", "(1, 8, 9), 4, split", "inputs [1, 8, 8], now [1, 8, 9]"),
        ("(1, 8, 8), 4, split", "(1, 8, 8), 5, split", "number of classes 4, now 5"),
        ("split_seed=7", "classes=('a', 'b', 'c', 'd')", "classes None, now ['a', 'b', 'c', 'd']"),
        ("split_seed=7", "lower=-1.0", "lower bound 0.0, now -1.0"),
        ("def grey", "def gray", "has no attribute 'grey'"),
    ],
)
def test_other_data_than_a_run_was_trained_on(
    old: str, new: str, told: str, trained: Path, rewritten: Any, mine: Path, call: Any
) -> None:
    rewritten(old, new)
    ending = call("evaluate", "--run", trained)
    assert ending.status == 2, ending
    assert ending.err.count("\n") == 1
    assert told in ending.err
    assert f"trained on {mine}" in ending.err or "is not what run/best.pt was trained on" in ending.err


def test_other_samples_are_named_in_an_evaluation_and_refused_by_a_resumed_run(
    mine: Path, rewritten: Any, call: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--objective", "standard", "--data", "my_data:grey", *tiny, "--limit", "0", "--out", "run"]
    assert call("run", *arguments).status == 0
    Path("run/summary.json").unlink()
    rewritten("part(120)", "part(100)")
    ending = call("evaluate", "--run", "run", "--attack", "clean")
    assert ending.status == 0
    assert "other samples than run/best.pt was trained with: 120 samples to train, now 100" in ending.err
    ending = call("run", "--resume", "run")
    assert ending.status == 2
    assert "is not what run/checkpoint.pt was trained on: 120 samples to train, now 100" in ending.err
    rewritten("part(100)", "(lambda p: (p[0].flip(0), p[1].flip(0)))(part(120))")
    ending = call("run", "--resume", "run")
    assert "was trained on: other labels, or in another order" in ending.err


def test_the_other_programs_on_a_function(mine: Path, call: Any, tiny: list[str]) -> None:
    small = "--posterior-settings.steps 20 --posterior-settings.width 16 --posterior-settings.depth 1"
    options = f"--samples 12 --levels 2 --steps-per-level 1 --judge-epochs 1 {small}".split()
    ending = call("score", "--data", "my_data:colour", *options)
    assert ending.status == 0, ending
    folder = Path("runs/score-my_data-colour-seed0")
    ending = call("generate", "--run", folder, "--count", 9, "--levels", 2, "--out", "more.npz")
    assert ending.status == 0, ending
    assert generated.read(Path("more.npz"))[0].shape == (9, 18, 20, 3)

    mixed = ["--generated", "more.npz", "--original-share", "0.5", "--model", "wrn-10-1"]
    ending = call("run", "--objective", "trades", "--data", "my_data:colour", *tiny, *mixed)
    assert ending.status == 0, ending

    ending = call("plan", "--objective", "trades", "--data", "my_data:colour", "--model", "wrn-10-1")
    assert "1 steps, 128 samples" in ending.out

    ending = call("score", "--data", "my_data:points", *options)
    assert ending.status == 2
    assert "data: my_data:points has inputs [5], allowed: images, and the toy" in ending.err


def test_a_posterior_of_another_split_is_refused(mine: Path, rewritten: Any, call: Any, tiny: list[str]) -> None:
    """Its training points may be test points here."""
    fitted = ["--posterior-settings.steps", "5", "--posterior-settings.width", "8"]
    options = ["--objective", "score_direct", "--posterior", "noise_conditional_classifier"]
    options += ["--data", "my_data:grey", *tiny, "--limit", "0"]
    assert call("run", *options, *fitted, "--out", "first").status == 0
    rewritten("y = torch.arange(count) % count_of_classes", "y = (torch.arange(count) + 1) % count_of_classes")
    given = ["--posterior-from", "first/posterior.pt"]
    for arguments in (["run", *options, *given, "--out", "second"], ["score", *given, "--audit"]):
        ending = call(*arguments)
        assert ending.status == 2, ending
        assert "first/posterior.pt was trained on: other labels, or in another order" in ending.err
    assert not Path("second").exists()


def test_lengths_are_counted_in_the_box_of_images(mine: Path) -> None:
    mine.write_text(f"{MODULE}\ndef bytes():\n    return blobs((1, 8, 8), 4, upper=255.0)\n")
    wide, plain = (
        config.parse(["--objective", "score_direct", "--data", f"my_data:{name}"]) for name in ("bytes", "grey")
    )
    assert wide.eps == pytest.approx(255 * plain.eps)
    for name in ("sigma", "sigma_min", "sigma_max"):
        levels = [getattr(settings.posterior_settings, name) for settings in (wide, plain)]
        assert levels[0] == pytest.approx(255 * levels[1])
    given = config.parse(
        ["--objective", "score_direct", "--data", "my_data:bytes", "--eps", "3", "--posterior-settings.sigma", "9"]
    )
    assert (given.eps, given.posterior_settings.sigma) == (3, 9)
    vectors = config.parse(["--objective", "pgd_at", "--data", "my_data:points"])
    assert vectors.eps == 0.1, "their units are anybody's guess"


def test_losses_are_measured_at_noise_levels_in_the_box_of_images(mine: Path, call: Any) -> None:
    """In the curves of a training, in its table, and in the audit, which also has the level of the settings."""
    mine.write_text(f"{MODULE}\ndef bytes():\n    return blobs((1, 8, 8), 4, upper=255.0)\n")
    options = "--data my_data:bytes --posterior noise_conditional_classifier --threads 1 --audit --out here"
    quick = "--device cpu --posterior-settings.steps 3 --posterior-settings.width 8 --posterior-settings.batch-size 8"
    ending = call("score", *options.split(), *quick.split())
    assert ending.status == 0, ending
    expected = [255 * sigma for sigma in scores.SIGMAS]
    table = json.loads(Path("here/score.json").read_text())
    assert [row["sigma"] for row in table["cross_entropy"]] == pytest.approx(expected)
    both = sorted([*expected, table["posterior_settings"]["sigma"]])
    line = json.loads(Path("here/classifier/metrics.jsonl").read_text().splitlines()[0])
    assert {float(name[9:]) for name in line if name.startswith("val_loss_")} >= set(expected)
    found = json.loads(Path("here/audit.json").read_text())
    assert sorted({row["sigma"] for row in found["evidence"]}) == pytest.approx(sorted(set(both)))
    assert scores.levels(1.0) == scores.SIGMAS


def test_images_in_another_box_are_shifted_and_attacked_within_it(mine: Path, call: Any, tiny: list[str]) -> None:
    mine.write_text(
        f"{MODULE}\ndef moved():\n"
        "    import dataclasses\n"
        "    data = blobs((1, 8, 8), 4)\n"
        "    parts = {f'x_{part}': getattr(data, f'x_{part}') + 1 for part in ('train', 'validation', 'test')}\n"
        "    return dataclasses.replace(data, lower=1.0, upper=2.0, **parts)\n"
    )
    tiny[tiny.index("--autoattack") + 1] = "fast"
    options = ["--data", "my_data:moved", "--shift", "2", "--autoattack-samples", "5"]
    ending = call("run", "--objective", "pgd_at", *tiny, *options, "--out", "here")
    assert ending.status == 0, ending
    assert "AutoAttack accuracy" in ending.out


def test_samples_of_images_without_bounds_are_refused_before_the_training(mine: Path, call: Any) -> None:
    small = ["--posterior-settings.steps", "5", "--posterior-settings.width", "16"]
    options = ["--data", "my_data:endless", *small, "--out", "here"]
    ending = call("score", *options)
    assert ending.status == 2, ending
    told = "samples: 1000 of my_data:endless, whose values lie in [0, inf], allowed: --samples 0, or data with finite"
    assert told in ending.err
    assert not Path("here").exists()
    ending = call("score", *options, "--samples", "0")
    assert ending.status == 0, ending


def test_a_split_without_samples(mine: Path, call: Any) -> None:
    weights = ["--model-from", "my_data:head", "--data", "my_data:unvalidated", "--eps", 1]
    ending = call("evaluate", *weights, "--split", "validation")
    assert ending.status == 2
    assert "split: 'validation' of my_data:unvalidated, which has no such samples, allowed: test" in ending.err


def test_data_that_are_sorted_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a few of them, in trainings of classifiers and of score networks, is a look at all classes."""
    assert data.spread(4, 9).tolist() == [0, 2, 4, 6]
    assert data.spread(5, 3).tolist() == [0, 1, 2]
    assert data.spread(5, 0).tolist() == []
    y, sizes = torch.arange(90) // 30, {"train": 90, "validation": 30, "test": 30}
    parts = [(torch.rand(n, 1, 8, 8), y[90 - n :]) for n in sizes.values()]
    settings = config.parse(["--objective", "standard", "--limit", "100", "--device", "cpu"])
    known = Data("sorted", 3, *(tensor for part in parts for tensor in part))
    trainer = Trainer(settings, known, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), None, tmp_path)
    seen: list[Tensor] = []
    correct = measures.correct
    monkeypatch.setattr(measures, "correct", lambda model, x, y, *more: seen.append(y) or correct(model, x, y, *more))
    trainer.validate()
    assert seen[0].bincount().tolist() == [10, 10, 10]


def test_tests_of_data_that_are_sorted_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack on some of the test samples, an evaluation with a limit, and the images that a report shows."""
    x, y = torch.rand(90, 1, 8, 8), torch.arange(90) // 30
    known = Data("my_data:ordered", 3, x, y, x, y, x, y)
    _, labels = evaluate._samples(evaluate.EvaluateSettings(limit=9), known)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    seen: list[Tensor] = []
    report = {"robust_accuracy": 0.0, "robust_interval": (0.0, 0.1), "seconds": 1.0}
    monkeypatch.setattr(measures, "autoattack", lambda attack, x, y, **more: seen.append(y) or report)
    settings = config.parse(["--objective", "standard", "--autoattack-samples", "6", "--device", "cpu"])
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(network[1].weight)
    run.attack_with_ensemble(settings, known, network, tmp_path)
    assert seen[0].tolist() == [0, 0, 1, 1, 2, 2]
    nn.init.normal_(network[1].weight)
    monkeypatch.setattr(run, "FOOLED_AMONG", 45)
    monkeypatch.setattr(measures, "correct", lambda model, x, y: torch.ones(len(x), dtype=torch.bool))
    run.save_fooled(dataclasses.replace(settings, eps=1.0), known, network, tmp_path)
    with np.load(tmp_path / run.report.EXAMPLES) as shown:
        assert len(shown["index"]) > 1
        np.testing.assert_array_equal(shown["clean"], x[shown["index"]].numpy())
        np.testing.assert_array_equal(shown["label"], y[shown["index"]].numpy())


def test_an_audit_of_data_that_are_sorted_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it looks at, and the tables of score.json, have each class as often as all of the data."""
    x, y = torch.rand(90, 1, 8, 8), torch.arange(90) // 30
    known = Data("my_data:ordered", 3, x, y, x, y, x, y)
    assert dataclasses.replace(known, name="digits").few(40, 90).tolist() == list(range(40)), "others are shuffled"
    small = PosteriorSettings("noise_conditional_classifier", network="mlp", steps=2, batch_size=8, width=8, depth=1)
    settings = config.resolved_posterior(small, known.name, known.format)
    posterior = posteriors.build(settings, known, seed=0, folder=tmp_path)
    for module, name, value in ((audit, "POINTS", 30), (audit, "ATTACKED", 15), (score, "AUDITED", 30)):
        monkeypatch.setattr(module, name, value)
    seen: dict[str, list[Tensor]] = {}

    def watch(module: Any, name: str, position: int = 2) -> None:
        function = getattr(module, name)

        def watched(*given: Any, **more: Any) -> Any:
            seen.setdefault(name, []).append(given[position])
            return function(*given, **more)

        monkeypatch.setattr(module, name, watched)

    for name in ("log_likelihood", "attacked_log_likelihood", "robust_accuracy", "calibration"):
        watch(audit.audit, name)
    watch(audit.audit, "agreement", 1)
    watch(posteriors, "losses_by_level")
    watch(measures, "correct")
    people = nn.functional.one_hot(y, 3).float()
    audit.write(posterior, settings, known, ThreatModel("linf", 0.1), seed=0, out=tmp_path, people=people)
    score.losses(posterior, settings, known, 0)
    monkeypatch.setattr(judge, "TRAINING_IMAGES", 60)
    judge.measure(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), x, y, known)
    assert len(seen) == 7
    for name, labels in seen.items():
        for some in labels:
            counts = (some.argmax(1) if some.dim() == 2 else some).bincount(minlength=3)
            assert len(some) < 90 or name == "correct"
            assert counts.unique().numel() == 1, name


@pytest.mark.usefixtures("quick_runs")
def test_a_comparison_on_a_function(mine: Path, call: Any, tiny: list[str]) -> None:
    ending = call("compare", "--data", "my_data:points", "--objectives", "pgd_at:se", "--seeds", 0, "--", *tiny)
    assert ending.status == 0, ending
    assert json.loads(Path("runs/compare-my_data-points/compare.json").read_text())["data"] == "my_data:points"


def test_weights_from_elsewhere_on_a_function(trained: Path, call: Any) -> None:
    source = ["--model-from", trained / "best.pt", "--data", "my_data:grey", "--eps", "0.1", "--steps", 2]
    ending = call("evaluate", *source)
    assert ending.status == 0, ending
    other = call("evaluate", "--model-from", trained / "best.pt", "--data", "my_data:colour", "--eps", "0.1")
    assert other.status == 2
    assert "was trained on my_data:grey, expected a classifier for 3 classes of inputs [3, 18, 20]" in other.err
    transferred = call(
        "evaluate", "--run", trained, "--attack", "obfuscation", "--transfer-from", trained / "checkpoint.pt",
        "--steps", 2, "--limit", 10, "--restarts", 1,
    )  # fmt: skip
    assert transferred.status == 0, transferred


# Folders of images.


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(train=20, test=6, size=(10, 12))``: an image folder of three classes, each of its own colour."""

    def folder(
        name: str = "images",
        *,
        train: int = 20,
        test: int = 6,
        validation: int = 0,
        size: tuple[int, int] = (10, 12),
        mode: str = "RGB",
        suffix: str = "png",
    ) -> Path:
        random = np.random.default_rng(0)
        for split, count in (("train", train), ("test", test), ("validation", validation)):
            for label, kind in enumerate(("cat", "dog", "eel")):
                if not count:
                    continue
                path = tmp_path / name / split / kind
                path.mkdir(parents=True)
                for number in range(count):
                    pixels = np.full((*size, 3), 40 + 80 * label) + random.integers(-30, 30, (*size, 3))
                    image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
                    image.save(path / f"{number:03d}.{suffix}")
        return tmp_path / name

    return folder


def test_a_folder(make: Make) -> None:
    root = make(size=(8, 10))
    found = load(DataSettings("folder", root=root))
    assert (found.name, found.classes, found.input_shape) == ("folder", ("cat", "dog", "eel"), (3, 8, 10))
    assert found.sizes == {"train": 54, "validation": 6, "test": 18}
    assert torch.bincount(found.y_validation).tolist() == [2, 2, 2]
    assert found.x_train.dtype == torch.float32
    pixels = np.asarray(Image.open(root / "test" / "dog" / "003.png"))
    same = (found.x_test == torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255).flatten(1).all(1)
    assert found.y_test[same].tolist() == [1]
    for labels in (found.y_train, found.y_validation, found.y_test):
        assert len(labels[:6].unique()) > 1, "the first ones are of several classes"
    again = load(DataSettings("folder", root=root))
    assert torch.equal(again.x_train, found.x_train)
    assert found.statistics is not None
    assert found.statistics[0] == pytest.approx(found.x_train.mean((0, 2, 3)).tolist(), abs=1e-5)
    both = torch.cat([found.x_train, found.x_validation]).flatten(1)
    assert len(both.unique(dim=0)) == 60, "no image both trains and validates"
    assert load(DataSettings("folder", root=root, limit=10)).sizes["train"] == 10
    assert data.format_of(DataSettings("folder", root=root)) == Format((3, 8, 10), 3, train=54, validation=6)


def test_sizes_of_the_validation_split(make: Make) -> None:
    root = make()
    assert load(DataSettings("folder", root=root, validation_size=7)).sizes["validation"] == 7
    assert load(DataSettings("folder", root=root, validation_size=0)).sizes["validation"] == 0
    for size in (58, -1):
        with pytest.raises(InputError, match=f"validation_size: {size} of 60 training images, allowed: 0 to 57"):
            load(DataSettings("folder", root=root, validation_size=size))
    own = make("own", validation=4)
    assert load(DataSettings("folder", root=own)).sizes == {"train": 60, "validation": 12, "test": 18}
    with pytest.raises(InputError, match=r"validation_size: 5, but .* has a folder validation"):
        load(DataSettings("folder", root=own, validation_size=5))


def test_classes_of_different_sizes_give_the_same_share() -> None:
    y = torch.tensor([0] * 100 + [1] * 25 + [2] * 5 + [3])
    mask = own_data.held_out(y, 13, seed=0)
    assert torch.bincount(y[mask], minlength=4).tolist() == [10, 2, 1, 0]
    assert torch.equal(mask, own_data.held_out(y, 13, seed=0))
    assert own_data.held_out(y, 127, seed=0).sum() == 127
    assert own_data.held_out(y, 0, seed=0).sum() == 0


def test_resizing_and_cutting_the_centre(make: Make, tmp_path: Path) -> None:
    root = make(size=(10, 20))
    Image.new("RGB", (31, 17), (255, 0, 0)).save(root / "test" / "cat" / "000.png")
    with pytest.raises(InputError, match=r"image_size: none given, and the images have 2 sizes: 10×20 \(77\), 17×31"):
        load(DataSettings("folder", root=root))
    found = load(DataSettings("folder", root=root, image_size=16))
    assert found.input_shape == (3, 16, 16)
    assert (found.x_test == torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)).flatten(1).all(1).sum() == 1
    # A picture of a horizontal ramp, 10×20: the shorter side becomes 10, and columns 5 to 14 stay.
    ramp = np.tile(np.arange(20, dtype=np.uint8)[None, :, None] * 10, (10, 1, 3))
    Image.fromarray(ramp).save(root / "test" / "cat" / "000.png")
    cut = load(DataSettings("folder", root=root, image_size=10)).x_test
    middle = torch.from_numpy(ramp[:, 5:15].copy()).permute(2, 0, 1).float() / 255
    assert (cut == middle).flatten(1).all(1).sum() == 1


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("P", 3), ("RGBA", 3)])
def test_modes(mode: str, channels: int, make: Make) -> None:
    found = load(DataSettings("folder", root=make(mode=mode)))
    assert found.input_shape == (channels, 10, 12)
    assert found.x_train.max() <= 1


def test_a_colour_image_among_grey_ones_makes_all_of_them_colour(make: Make) -> None:
    root = make(mode="L")
    Image.new("RGB", (12, 10)).save(root / "test" / "eel" / "005.png")
    assert load(DataSettings("folder", root=root)).input_shape == (3, 10, 12)


def broken_layout(root: Path, what: str) -> None:
    if what == "no test":
        (root / "test").rename(root / "tset")
    elif what == "another class":
        (root / "test" / "cat").rename(root / "test" / "cow")
    elif what == "an empty class":
        for path in (root / "train" / "cat").iterdir():
            path.unlink()
    elif what == "no classes":
        for path in (root / "train").iterdir():
            path.rename(root / path.name)
    elif what == "text":
        (root / "train" / "cat" / "000.png").write_text("no image")
    elif what == "cut short":
        path = root / "train" / "cat" / "000.png"
        path.write_bytes(path.read_bytes()[:100])
    elif what == "deep":
        Image.fromarray(np.zeros((10, 12), np.uint16)).save(root / "train" / "cat" / "000.png")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no test", "has no folder test, expected DIR/train/CLASS"),
        ("another class", "test and .*train differ in the classes cat, cow"),
        ("an empty class", "train cannot be used .*cat"),
        ("no classes", "train cannot be used"),
        ("text", "000.png cannot be read as an image"),
        ("cut short", "000.png cannot be read as an image"),
        ("deep", "000.png has pixels of mode I.*, allowed: 8 bits a channel"),
    ],
)
def test_folders_that_cannot_be_used(what: str, told: str, make: Make) -> None:
    root = make()
    broken_layout(root, what)
    with pytest.raises(InputError, match=f"^data_root: .*{told}") as caught:
        load(DataSettings("folder", root=root))
    assert "\n" not in str(caught.value)


def test_too_many_images_for_the_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make()
    monkeypatch.setattr(own_data, "available_memory", lambda: 1e3)
    with pytest.raises(InputError, match=r"54 images \[3, 10, 12\] take 0.0 GB, .* --limit or a smaller --image-size"):
        load(DataSettings("folder", root=root))


def test_one_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / split / "cat" / "0.png")
    with pytest.raises(InputError, match="has the one class cat, expected at least two"):
        load(DataSettings("folder", root=tmp_path))


def test_the_place_of_the_data_is_saved_as_an_absolute_path(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "cifar10"):
        options = ["--data", name, "--data-root", "images"]
        assert config.parse(["--objective", "standard", *options]).data_root == tmp_path / "images"
        assert score.parse(options).data_root == tmp_path / "images"
    monkeypatch.setenv(data.ROOT_VARIABLE, "images")
    assert score.parse(["--data", "folder"]).data_root == tmp_path / "images"


def test_a_run_on_a_folder_and_its_evaluation_from_elsewhere(
    make: Make, call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(size=(20, 26))
    tiny[tiny.index("--limit") + 1] = "30"
    options = ["--data", "folder", "--data-root", "images", "--image-size", "18", "--model", "wrn-10-1"]
    ending = call("run", "--objective", "pgd_at", *tiny, *options, "--out", "run")
    assert ending.status == 0, ending
    saved = checkpoint.load(Path("run/best.pt"))
    assert saved["settings"]["data_root"] == str(tmp_path / "images")
    assert saved["data"]["classes"] == ["cat", "dog", "eel"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("evaluate", "--run", "../run", "--attack", "clean").status == 0

    (tmp_path / "images").rename(tmp_path / "moved")
    own_data.folder.cache_clear()  # as between two programs
    ending = call("evaluate", "--run", "../run", "--attack", "clean")
    assert ending.status == 2
    assert f"{tmp_path / 'images'} is not a folder" in ending.err
    assert f"best.pt was trained on {tmp_path / 'images'}" in ending.err
    assert call("evaluate", "--run", "../run", "--attack", "clean", "--data-root", "../moved").status == 0
    for split in ("train", "test"):
        (tmp_path / "moved" / split / "eel").rename(tmp_path / "moved" / split / "fox")
    own_data.folder.cache_clear()
    ending = call("evaluate", "--run", "../run", "--attack", "clean", "--data-root", "../moved")
    assert "classes ['cat', 'dog', 'eel'], now ['cat', 'dog', 'fox']" in ending.err


@pytest.mark.usefixtures("quick_runs")
def test_the_other_programs_on_a_folder(make: Make, call: Any, tiny: list[str]) -> None:
    make(size=(8, 8))
    tiny[tiny.index("--limit") + 1] = "30"
    small = "--posterior-settings.steps 20 --posterior-settings.width 16 --posterior-settings.depth 1"
    options = f"--samples 12 --levels 2 --steps-per-level 1 --judge-epochs 1 {small}".split()
    source = ["--data", "folder", "--data-root", "images"]
    assert call("score", *source, "--image-size", 6, *options, "--out", "score").status == 0
    images = ["--count", 9, "--levels", 2, "--data-root", "images", "--out", "more.npz"]
    ending = call("generate", "--run", "score", *images)
    assert ending.status == 0, ending
    assert generated.read(Path("more.npz"))[0].shape == (9, 6, 6, 3)
    ending = call("generate", "--run", "score", *images[:-1], "other.npz", "--image-size", 8)
    assert ending.status == 2
    assert "image_size: 8, but score/posterior.pt was trained with 6" in ending.err

    ending = call(
        "compare", "--data", "folder", "--objectives", "pgd_at", "--seeds", 0, "--", "--data-root", "images", *tiny
    )
    assert ending.status == 0, ending
    assert "2 steps" in call("plan", "--objective", "pgd_at", *source).out  # 54 images in batches of 32

    ending = call("evaluate", "--model-from", "runs/compare-folder/runs/pgd_at-seed0/best.pt", *source, "--eps", "0.1")
    assert ending.status == 0, ending


def test_the_posterior_of_a_run_on_resized_images_can_be_audited(make: Make, call: Any, tiny: list[str]) -> None:
    make(size=(8, 8))
    quick = ["--posterior-settings.steps", "5", "--posterior-settings.width", "8"]
    direct = ["--objective", "score_direct", "--posterior", "noise_conditional_classifier", *quick]
    source = ["--data", "folder", "--data-root", "images", "--image-size", 4]
    ending = call("run", *direct, *source, *tiny, "--limit", 30, "--out", "here")
    assert ending.status == 0, ending
    ending = call("score", "--posterior-from", "here/posterior.pt", "--audit")
    assert ending.status == 0, ending
    assert Path("here/audit.html").exists()


# The worked example.

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def commands() -> list[list[str]]:
    """The commands of the page on the example."""
    section = PAGE.read_text().split("\n## A function of your own\n")[1].split("\n## ")[0]
    return [line.split()[1:] for line in section.splitlines() if line.startswith("    python -m training")]


@pytest.mark.usefixtures("quick_runs")
def test_the_commands_of_the_page(call: Any, tiny: list[str]) -> None:
    first, second, third = commands()
    ending = call("run", *first[2:], *tiny, "--limit", 90)
    assert ending.status == 0, ending
    ending = call("evaluate", *second[2:])
    assert ending.status == 0, ending
    words = third[2 : third.index("--") + 1]
    ending = call("compare", *words, *third[third.index("--") + 1 :], *tiny, "--limit", 90)
    assert ending.status == 0, ending


def test_the_shapes_can_be_learned() -> None:
    found = load(DataSettings("examples.own_data:shapes"))
    assert found.classes == ("disc", "square", "cross")
    assert found.sizes == {"train": 900, "validation": 150, "test": 300}
    nearest = torch.cdist(found.x_test.flatten(1), found.x_train.flatten(1)).argmin(1)
    assert (found.y_train[nearest] == found.y_test).float().mean() > 0.6
