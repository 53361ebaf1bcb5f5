"""The evaluation program: sources of classifiers, AutoAttack with both engines, interruptions, several processes."""

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from scorematch import PGD, AutoAttack, ThreatModel, audit
from scorematch.attacks import AutoAttackWarning
from scorematch.posteriors import KernelDensity
from training import evaluate, measures, models, run
from training.engine import claims
from training.measures import certification
from training.reports import plots
from training.settings.errors import InputError, Interrupted, run_program

TRAINING = (
    "--objective pgd_at --eps 0.05 --epochs 8 --limit 300 --steps 2 --validate-every 8 --validation-steps 1 "
    "--eval-steps 1 --eval-restarts 1 --curve-points 0 --autoattack none --threads 1"
)
SAMPLES = 20
SIGNED = (  # images in [-1, 1]
    "import torch\n"
    "from training.data import Data\n"
    "def images():\n"
    "    x = 2 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1\n"
    "    y = torch.arange(60) % 10\n"
    "    return Data('signed', 10, x, y, x[:20], y[:20], x[20:40], y[20:40], lower=-1.0, upper=1.0)\n"
)
FAST = ["--attack", "autoattack", "--version", "fast", "--limit", str(SAMPLES), "--seed", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_program(run.main, [*TRAINING.split(), "--out", str(out)]) == 0
    return out


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with classifiers of one's own."""
    (tmp_path / "mine_to_evaluate.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def linear(input_shape, num_classes):\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def five_classes():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
        "def for_colours():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
        "def soft(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.Softmax(1))\n"
        "def pair(num_classes):\n"
        "    class Pair(nn.Linear):\n"
        "        def forward(self, x):\n"
        "            return super().forward(x.flatten(1)), x\n"
        "    return Pair(64, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_evaluate", raising=False)


def subject(trained: Path) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, loaded = evaluate.restore(trained / "best.pt", torch.device("cpu"))[1:3]
    return model, loaded.x_test[:SAMPLES], loaded.y_test[:SAMPLES]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_autoattack_says_what_the_library_says(call: Any, trained: Path, tmp_path: Path) -> None:
    ending = call("evaluate", "--run", trained, *FAST, "--batch-size", "16", "--out", "deep/report.json")
    assert ending.status == 0, ending
    assert "robust accuracy after apgd-t" in ending.out
    assert "forwards" in ending.out
    results = read(tmp_path / "deep" / "report.json")

    model, x, y = subject(trained)
    adversary = AutoAttack(model, "Linf", 0.05, seed=2, verbose=False, version="fast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        x_adv = adversary.run_standard_evaluation(x, y)
    stands = measures.correct(model, x_adv, y)
    clean = measures.correct(model, x, y)
    assert 0 < stands.sum() < clean.sum(), "the test needs survivors and fallen"
    assert results["clean_acc"] == pytest.approx(measures.per_cent(clean))
    assert results["clean_interval"] == pytest.approx(measures.wilson(int(clean.sum()), SAMPLES))
    assert results["autoattack_acc"] == measures.per_cent(stands)
    assert results["autoattack_interval"] == pytest.approx(measures.wilson(int(stands.sum()), SAMPLES))
    assert results["autoattack"]["attacks"].keys() == {"apgd-ce", "apgd-t"}
    assert results["samples"] == results["autoattack"]["samples"] == SAMPLES
    assert results["threat_model"] == {"norm": "linf", "eps": 0.05}


@pytest.mark.parametrize(
    ("options", "entry"),
    [
        (["--rng", "reference"], ("rng", "reference")),
        (["--search-dtype", "bfloat16"], ("search_dtype", "torch.bfloat16")),
        (["--version", "plus", "--limit", "2"], ("version", "plus")),
        (["--norm", "l2", "--eps", "0.3"], ("norm", "l2")),
    ],
)
def test_options_of_autoattack_reach_it(
    call: Any, trained: Path, tmp_path: Path, options: list[str], entry: tuple[str, Any]
) -> None:
    ending = call("evaluate", "--run", trained, *FAST, *options, "--out", "report.json")
    assert ending.status == 0, ending
    assert read(tmp_path / "report.json")["autoattack"][entry[0]] == entry[1]


def test_compile_reaches_autoattack(call: Any, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    assert call("evaluate", "--run", trained, *FAST, "--compile").status == 0
    assert len(compiled) == 1


def test_an_interrupted_autoattack_goes_on(
    call: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("evaluate", "--run", trained, *FAST, "--out", "whole.json").status == 0
    forward, calls = nn.Sequential.forward, 0

    def interrupted(module: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += module[-1].out_features == 10 if isinstance(module[-1], nn.Linear) else 0
        if calls == 400:
            raise Interrupted("SIGTERM")
        return forward(module, x)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Sequential, "forward", interrupted)
        ending = call("evaluate", "--run", trained, *FAST, "--state", "state.pt")
    assert ending.status == 1
    assert ending.err == "stopped: SIGTERM, what was found is in state.pt, the same command continues\n"
    ending = call("evaluate", "--run", trained, *FAST, "--state", "state.pt", "--out", "parts.json")
    assert ending.status == 0, ending
    assert "resumed from state.pt" in ending.out
    whole, parts = (read(tmp_path / f"{name}.json")["autoattack"] for name in ("whole", "parts"))
    for report in (whole, parts):
        del report["seconds"]
        for attack in report["attacks"].values():
            del attack["seconds"]
    assert parts == whole

    for options, told in (
        (["--limit", "41"], "another data set"),
        (["--eps", "0.06"], "another eps: 0.05, now 0.06"),
        (["--checkpoint", trained / "checkpoint.pt"], "another model"),
        (["--seed", "3"], "another seed: 2, now 3"),
    ):
        before = (tmp_path / "state.pt").read_bytes()
        source = [] if "--checkpoint" in options else ["--run", trained]
        weaken(trained, tmp_path)
        options = [tmp_path / "weak.pt" if o == trained / "checkpoint.pt" else o for o in options]
        refused = call("evaluate", *source, *FAST, *options, "--state", "state.pt")
        assert refused.status == 2, refused
        assert f"state.pt is of {told}" in refused.err
        assert refused.err.count("\n") == 1
        assert (tmp_path / "state.pt").read_bytes() == before
    (tmp_path / "state.pt").write_text("no state")
    refused = call("evaluate", "--run", trained, *FAST, "--state", "state.pt")
    assert refused.status == 2
    assert "not a readable state" in refused.err


def weaken(trained: Path, folder: Path) -> None:
    """The same run with other weights."""
    state = torch.load(trained / "best.pt", weights_only=True)
    state["network"] = {name: 0.9 * value for name, value in state["network"].items()}
    torch.save(state, folder / "weak.pt")


def test_exported_weights_are_bare_and_the_same(call: Any, trained: Path, tmp_path: Path) -> None:
    ending = call("evaluate", "--run", trained, "--attack", "clean", "--export", "weights.pt", "--out", "one.json")
    assert ending.status == 0, ending
    assert "weights.pt, a bare state dict" in ending.out
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    models.build("digits_cnn", (1, 8, 8), 10).load_state_dict(weights)
    source = ["--model-from", "weights.pt", "--model", "digits_cnn", "--data", "digits"]
    assert call("evaluate", *source, "--attack", "clean", "--out", "two.json").status == 0
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert one["clean_acc"] == two["clean_acc"] > 50
    assert two["objective"] is None

    attacked = call("evaluate", *source, *FAST, "--eps", "0.05", "--out", "three.json")
    assert attacked.status == 0, attacked
    assert call("evaluate", "--run", trained, *FAST, "--out", "four.json").status == 0
    assert read(tmp_path / "three.json")["autoattack_acc"] == read(tmp_path / "four.json")["autoattack_acc"]


@pytest.mark.parametrize("source", ["--run", "--checkpoint", "--model-from"])
@pytest.mark.parametrize("option", ["--export", "--out"])
def test_files_that_are_read_are_not_written_over(
    call: Any, trained: Path, tmp_path: Path, source: str, option: str
) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(trained, folder)
    given = [source, folder if source == "--run" else folder / "best.pt"]
    given += ["--data", "digits"] if source == "--model-from" else []
    for name in ("best.pt", "checkpoint.pt", "config.toml", "summary.json"):
        before = (folder / name).read_bytes()
        ending = call("evaluate", *given, "--attack", "clean", option, folder / ".." / "kept" / name)
        assert ending.status == 2, ending
        assert f"{name}: is read by this evaluation or belongs to a run, expected another file" in ending.err
        assert (folder / name).read_bytes() == before
    again = [*given, "--attack", "clean", option, folder / "new"]
    assert [call("evaluate", *again).status for _ in range(2)] == [0, 0], "a file of its own is written again"


@pytest.mark.parametrize(
    "options",
    [
        "--attack clean --export same --out same",
        "--attack clean --export same --out link",
        "--attack clean --export same --out folder/../same",
        "--attack certify --plot same.png --out same.png",
        "--attack autoattack --version fast --state same --out same",
        "--attack autoattack --version fast --state same --export same",
        "--attack autoattack --version fast --state same --radii 0.05 --out same.eps0.05",
        "--attack autoattack --version fast --state same --radii 0.05 --export same.rank0of2",
    ],
)
def test_no_file_is_written_twice(call: Any, trained: Path, tmp_path: Path, options: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "same").write_text("of an evaluation before")
    (tmp_path / "link").symlink_to("same")
    before = sorted(tmp_path.iterdir())
    ending = call("evaluate", "--run", trained, "--limit", "2", *options.split())
    assert (ending.status, ending.err.count("\n"), ending.out) == (2, 1, ""), ending
    assert "expected a file for each" in ending.err
    assert (tmp_path / "same").read_text() == "of an evaluation before"
    assert sorted(tmp_path.iterdir()) == before


def test_a_posterior_in_the_place_of_a_classifier_is_told(
    call: Any, tiny: list[str], trained: Path, tmp_path: Path
) -> None:
    direct = ["--objective", "score_direct", "--posterior", "kernel_density", "--out", "direct"]
    assert call("run", *tiny, *direct).status == 0
    ending = call("evaluate", "--checkpoint", "direct/posterior.pt")
    assert ending.status == 2
    told = "holds a posterior (kernel_density), expected best.pt or checkpoint.pt of training.run"
    assert ending.err == f"error: direct/posterior.pt: {told}\n"


def test_plots_are_png_and_name_their_samples(
    call: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = ["--run", trained, "--attack", "obfuscation", "--steps", "1", "--restarts", "1", "--limit", "2"]
    for name in ("plot.svg", "plot"):
        ending = call("evaluate", *attack, "--plot", name)
        assert (ending.status, ending.out) == (2, "")
        assert f"plot: {name} is written as PNG, expected a name that ends in .png" in ending.err
    labels = []
    render = plots.rendered

    def watched(figure: Figure, form: str) -> bytes:
        labels.append(figure.axes[0].get_ylabel())
        return render(figure, form)

    monkeypatch.setattr(plots, "rendered", watched)
    for split in ("test", "validation"):
        assert call("evaluate", *attack, "--split", split, "--plot", "plot.png").status == 0
    assert labels == [f"accuracy under PGD (% of {split} samples)" for split in ("test", "validation")]


def test_names_that_a_run_is_going_to_write_are_its_own(call: Any, trained: Path, mine: None, tmp_path: Path) -> None:
    assert not [path for path in trained.iterdir() if not claims.taken(path)], "all that a run writes is known"
    folder = tmp_path / "under-way"
    folder.mkdir()
    shutil.copy(trained / "config.toml", folder)
    shutil.copy(trained / "checkpoint.pt", folder)
    for source in (["--checkpoint", folder / "checkpoint.pt"], ["--run", trained]):
        for name in ("summary.json", "curve.json", "autoattack.pt", "epoch-0003.pt", "score-network/metrics.jsonl"):
            ending = call("evaluate", *source, "--attack", "clean", "--out", folder / name)
            assert (ending.status, "belongs to a run" in ending.err) == (2, True), ending
            assert not (folder / name).exists()
    own = tmp_path / "other"
    own.mkdir()
    (own / "config.toml").write_text("title = 'of another program'\n")
    assert call("evaluate", "--run", trained, "--attack", "clean", "--out", own / "summary.json").status == 0


def test_the_first_line_says_how_far_the_run_has_come(call: Any, trained: Path, tmp_path: Path) -> None:
    finished = call("evaluate", "--run", trained, "--attack", "clean")
    assert f"{trained}/best.pt: pgd_at on digits, 500 test samples\n" in finished.out, "validated after the last epoch"
    folder = tmp_path / "under-way"
    shutil.copytree(trained, folder)
    state = torch.load(folder / "best.pt", weights_only=True)
    torch.save({**state, "epoch": 2}, folder / "best.pt")
    assert f"{folder}/best.pt (epoch 2 of 8): pgd_at" in call("evaluate", "--run", folder, "--attack", "clean").out
    log = folder / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:3]))
    ending = call("evaluate", "--run", folder, "--attack", "clean")
    assert f"{folder}/best.pt (epoch 2; the run is at 3 of 8 epochs): pgd_at on digits" in ending.out


def test_a_checkpoint_of_a_run_on_values_in_another_box_is_refused(
    call: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boxed_to_evaluate.py").write_text(SIGNED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "boxed_to_evaluate", raising=False)
    source = ["--model-from", trained / "best.pt", "--data", "boxed_to_evaluate:images"]
    ending = call("evaluate", *source, "--eps", "0.1", "--attack", "clean")
    assert ending.status == 2, ending
    told = "was trained on digits, values in [0, 1], expected a classifier for values in [-1, 1]"
    assert told in ending.err
    assert call("evaluate", *source[:2], "--data", "digits", "--attack", "clean").status == 0


def test_a_function_as_the_source(call: Any, mine: None) -> None:
    source = ["--model-from", "mine_to_evaluate:linear", "--data", "digits"]
    ending = call("evaluate", *source, "--eps", "0.1", "--steps", "2", "--limit", "30", "--split", "validation")
    assert ending.status == 0, ending
    assert "mine_to_evaluate:linear: digits, 30 validation samples" in ending.out
    assert "linf, eps 0.1, step 0.025" in ending.out


@pytest.mark.parametrize("attack", [["--attack", "pgd", "--steps", "1"], ["--attack", "autoattack"]])
@pytest.mark.parametrize("source", ["soft", "linear"])
def test_probabilities_in_the_place_of_logits_are_told(call: Any, mine: None, attack: list[str], source: str) -> None:
    model = ["--model-from", f"mine_to_evaluate:{source}", "--data", "digits"]
    ending = call("evaluate", *model, "--eps", "0.1", "--limit", "4", *attack)
    assert (ending.status, ending.err) == (0, "")
    assert ending.out.count("warning: the model seems to return probabilities") == (source == "soft")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model-from mine_to_evaluate:linear --data digits", "eps: none given, needed with --model-from"),
        (
            "--model-from mine_to_evaluate:linear --data digits --eps 8",
            "eps: 8 in linf is out of range, allowed: at most 1",
        ),
        (
            "--model-from mine_to_evaluate:linear --data digits --eps 0.1 --step-size 2",
            "step_size: 2 in linf is out of range, allowed: at most 1",
        ),
        (
            "--model-from mine_to_evaluate:linear --data digits --attack autoattack --radii 0.1 8",
            "radii: 8 in linf is out of range",
        ),
        ("--model-from mine_to_evaluate:five_classes --data digits", "returned [1, 5], digits needs logits [1, 10]"),
        ("--model-from mine_to_evaluate:for_colours --data digits", "takes no inputs [1, 1, 8, 8] of digits"),
        ("--model-from mine_to_evaluate:pair --data digits", "returned tuple, digits needs logits [1, 10]"),
        ("--model-from mine_to_evaluate:absent --data digits --eps 1", "cannot be imported"),
        ("--model-from mine_to_evaluate:linear --eps 1", "data_root: none given, cifar10 needs"),
        ("--model-from mine_to_evaluate:linear --data digits --eps 1 --limit 501", "up to 500 of the test split"),
        ("--model-from mine_to_evaluate:linear --data toy --eps 1 --attack autoattack", "autoattack on toy, allowed"),
        ("--model-from mine_to_evaluate:linear --data toy --eps 1 --attack obfuscation", "obfuscation on toy, allowed"),
        ("--model-from mine_to_evaluate:linear --data digits --eps 1 --out .", "is a folder, expected a file"),
        ("--model-from mine_to_evaluate:linear --data digits --eps 1 --out file/a", "folder cannot be made"),
        (
            "--model-from mine_to_evaluate:linear --data digits --eps 1 --attack obfuscation --transfer-from none.pt",
            "transfer_from: model_from: none.pt is not a file",
        ),
        (
            "--model-from mine_to_evaluate:linear --data digits --eps 1 --attack obfuscation "
            "--transfer-from mine_to_evaluate:five_classes",
            "mine_to_evaluate:five_classes: returned [1, 5]",
        ),
    ],
)
def test_bad_sources(call: Any, mine: None, tmp_path: Path, arguments: str, told: str) -> None:
    (tmp_path / "file").write_text("")
    options = arguments.split()
    if "five_classes" in arguments or "for_colours" in arguments or "pair" in arguments:
        options += ["--eps", "1"] if "--eps" not in options else []
    ending = call("evaluate", *options)
    assert ending.status == 2, ending
    assert told in ending.err
    assert ending.err.count("\n") == 1


def test_the_official_engine_that_is_not_installed(call: Any, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autoattack", None)
    ending = call("evaluate", "--run", trained, *FAST, "--engine", "official")
    assert ending.status == 2
    assert ending.err.endswith("install it: pip install git+https://github.com/fra31/auto-attack\n")
    assert ending.err.count("\n") == 1


@pytest.mark.parametrize("version", ["standard", "fast"])
def test_the_official_engine_gets_the_same_task(
    call: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """A stand-in with the surface of the official class: it moves the first ten samples to another class's image."""
    calls = []

    class Official:
        def __init__(self, model: nn.Module, **options: Any) -> None:
            calls.append(options)

        def run_standard_evaluation(self, x: torch.Tensor, y: torch.Tensor, bs: int) -> torch.Tensor:
            calls.append((len(x), bs))
            return torch.cat([torch.zeros_like(x[:10]), x[10:]])

    monkeypatch.setitem(sys.modules, "autoattack", SimpleNamespace(AutoAttack=Official))
    options = [*FAST, "--version", version, "--engine", "official", "--batch-size", "10", "--out", "report.json"]
    ending = call("evaluate", "--run", trained, *options)
    assert ending.status == 0, ending
    own = {"standard": {"version": "standard"}, "fast": {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-t"]}}
    common = {"norm": "Linf", "eps": 0.05, "seed": 2, "verbose": True, "device": torch.device("cpu")}
    assert calls == [{**common, **own[version]}, (SAMPLES, 10)]
    model, x, y = subject(trained)
    results = read(tmp_path / "report.json")
    moved = torch.cat([torch.zeros_like(x[:10]), x[10:]])
    assert results["autoattack_acc"] == measures.per_cent(measures.correct(model, moved, y)) < results["clean_acc"]
    assert results["engine"] == "official"


def test_a_run_of_another_machine(call: Any, trained: Path, tmp_path: Path) -> None:
    """It is evaluated on the device of the evaluation, and compared; only a training needs what it was given."""
    folder = tmp_path / "away"
    shutil.copytree(trained, folder)
    state = torch.load(folder / "best.pt")
    state["settings"] |= {"device": "cuda:99", "precision": "tf32", "graph": "on"}
    torch.save(state, folder / "best.pt")
    lines = (folder / "config.toml").read_text().splitlines()
    kept = [line for line in lines if line.split(" = ")[0] not in ("device", "precision", "graph")]
    table = ['device = "cuda:99"', 'precision = "tf32"', 'graph = "on"', *kept]  # before the nested table
    (folder / "config.toml").write_text("\n".join(table))
    ending = call("evaluate", "--run", folder, "--limit", 4, "--steps", 1, "--device", "cpu")
    assert ending.status == 0, ending
    ending = call("run", "--resume", folder)
    assert (ending.status, "device: 'cuda:99' is not there" in ending.err) == (2, True)


def _rank(number: int, world: int, port: int, arguments: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        WORLD_SIZE=str(world), RANK=str(number), LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    sys.exit(run_program(evaluate.main, arguments))


def by_processes(context: ForkServerContext, world: int, arguments: list[str], folder: Path) -> list[str]:
    """Evaluate in ``world`` processes, as under torchrun; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"log{number}.txt" for number in range(world)]
    ranks = [context.Process(target=_rank, args=(n, world, port, arguments, logs[n])) for n in range(world)]
    for process in ranks:
        process.start()
    for process, log in zip(ranks, logs, strict=True):
        process.join(180)
        assert process.exitcode == 0, log.read_text()
    return [log.read_text() for log in logs]


@pytest.mark.parametrize("attack", ["autoattack", "pgd", "certify"])
def test_two_processes_say_what_one_says(
    call: Any, processes: ForkServerContext, trained: Path, tmp_path: Path, attack: str
) -> None:
    options = [*FAST, "--threads", "1"]
    if attack == "pgd":  # both steps reach the border of so small a ball: random starts do not matter
        options = ["--limit", "41", "--steps", "8", "--restarts", "1", "--threads", "1"]
    if attack == "certify":
        options = ["--attack", "certify", "--limit", "11", "--n", "100", "--threads", "1"]
    assert call("evaluate", "--run", trained, *options, "--out", "one.json").status == 0
    told = by_processes(processes, 2, ["--run", str(trained), *options, "--out", str(tmp_path / "two.json")], tmp_path)
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    found = ("classes", "radii") if attack == "certify" else (f"{attack}_acc",)
    for key in ("clean_acc", "samples", *found):
        assert one[key] == two[key]
    assert "95 % interval" in told[0]
    assert "95 % interval" not in told[1]


@pytest.mark.parametrize("attack", ["autoattack --version fast", "obfuscation --steps 2", "certify"])
def test_processes_without_a_sample(processes: ForkServerContext, trained: Path, tmp_path: Path, attack: str) -> None:
    options = ["--run", str(trained), "--attack", *attack.split(), "--limit", "1", "--threads", "1"]
    told = by_processes(processes, 3, [*options, "--out", str(tmp_path / "report.json")], tmp_path)
    assert ["95 % interval" in printed for printed in told] == [True, False, False]
    assert read(tmp_path / "report.json")["samples"] == 1


def test_verdicts_come_back_in_the_order_of_the_samples(trained: Path) -> None:
    model, x, y = subject(trained)
    assert torch.equal(
        measures.shared(lambda xs, ys: measures.correct(model, xs, ys), x, y), measures.correct(model, x, y)
    )
    assert measures.shared(lambda xs, ys: pytest.fail("called without samples"), x[:0], y[:0]).tolist() == []


def test_pgd_searches_in_a_low_precision_and_judges_in_full(call: Any, trained: Path, tmp_path: Path) -> None:
    attack = ["--attack", "pgd", "--steps", "5", "--restarts", "1", "--limit", "100"]
    found = {}
    for precision in ("float32", "bfloat16"):
        out = tmp_path / f"{precision}.json"
        ending = call("evaluate", "--run", trained, *attack, "--precision", precision, "--out", out)
        assert ending.status == 0, ending.err
        found[precision] = json.loads(out.read_text())
    model, loaded = evaluate.restore(trained / "best.pt", torch.device("cpu"))[1:3]
    x, y = loaded.x_test[:100], loaded.y_test[:100]
    pgd = PGD(ThreatModel("linf", 0.05), steps=5, restarts=1, losses=("ce", "margin"))
    stands = measures.robust(model, x, y, pgd, torch.Generator().manual_seed(0))
    for name, expected in (("clean", measures.correct(model, x, y)), ("pgd", stands)):
        assert found["float32"][f"{name}_acc"] == pytest.approx(measures.per_cent(expected))
        assert found["float32"][f"{name}_interval"] == pytest.approx(measures.wilson(int(expected.sum()), 100))
    assert found["bfloat16"]["clean_acc"] == found["float32"]["clean_acc"]
    assert found["bfloat16"]["pgd_acc"] == pytest.approx(found["float32"]["pgd_acc"], abs=3)
    ending = call("evaluate", "--run", trained, "--attack", "autoattack", "--precision", "bfloat16")
    assert ending.status == 2
    assert "precision: is for --attack pgd" in ending.err


def test_verdicts_are_given_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search may have it, and so has the look at what fools the search."""
    without = False

    @contextlib.contextmanager
    def full_precision(device: torch.device) -> Iterator[None]:
        nonlocal without
        without = True
        yield
        without = False

    class Watched(nn.Linear):
        seen: list[bool]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(without)
            return super().forward(x)

    monkeypatch.setattr(measures, "full_precision", full_precision)
    model, search = Watched(3, 2), Watched(3, 2)
    model.seen, search.seen = [], []
    search.load_state_dict(model.state_dict())
    attack = PGD(ThreatModel("linf", 0.1), steps=2)
    x = torch.rand(5, 3)
    measures.robust(model, x, model(x).argmax(1), attack, torch.Generator().manual_seed(0), search=search)
    assert (set(model.seen[1:]), set(search.seen)) == ({True}, {False})


@pytest.mark.parametrize("measure", ["autoattack", "accuracy_curve", "self_consistency", "certify"])
def test_what_is_measured_in_float32_is_so_on_a_gpu(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch takes TF32 in convolutions unless it is told otherwise."""
    within: list[torch.device] = []

    @contextlib.contextmanager
    def full_precision(device: torch.device) -> Iterator[None]:
        within.append(device)
        yield
        within.pop()

    for module in (measures, certification):
        monkeypatch.setattr(module, "full_precision", full_precision)
    torch.manual_seed(0)
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    model, seen = nn.Linear(3, 2), []
    ball = ThreatModel("linf", 0.1)
    adversary = AutoAttack(model, "Linf", 0.1, 0, False, version="custom", attacks_to_run=["apgd-ce"])
    posterior = KernelDensity(x, y, num_classes=2, sigma=1.0)
    model.register_forward_hook(lambda *_: seen.append(bool(within)))
    if measure == "autoattack":
        measures.autoattack(adversary, x, y)
    elif measure == "accuracy_curve":
        measures.accuracy_curve(adversary, x, y, [0.1])
    elif measure == "self_consistency":
        measures.self_consistency(model, posterior, x, y, ball, steps=1, seed=0)
    else:
        certification.certify(model, x, y, sigma=0.1, n0=2, n=20, alpha=0.1, seed=0, batch=10)
    assert len(seen) > 3
    assert all(seen[measure == "certify" :]), "the first pass of certify counts the classes"


@pytest.mark.parametrize("training", [True, False])
def test_calibration_is_that_of_the_model_in_eval_mode(training: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5)).train(training)
    x, y = torch.rand(30, 4), torch.arange(30) % 3
    found = measures.calibration(model, x, y, batch=7)
    assert model.training == training
    log_p = model[0](x).double().log_softmax(1).detach()
    assert found["nll"] == pytest.approx(torch.nn.functional.nll_loss(log_p, y).item())
    expected = audit.reliability(log_p, y)
    assert found["calibration_error"] == pytest.approx(100 * expected.error)
    assert found["calibration_error_by_chance"] == pytest.approx(100 * expected.chance)
    model[0].bias.data[1] = math.nan
    assert set(measures.calibration(model, x, y).values()) == {None}


def test_the_numbers_of_a_report_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of single attacks are shares in the report, all others per cent."""
    attack = {"accuracy": 0.625, "interval": [0.25, 0.75], "forwards": 1234, "backwards": 56, "seconds": 7.25}
    results = {
        **{"clean_acc": 90.0, "clean_interval": [80.0, 95.5], "autoattack": {"attacks": {"apgd-ce": attack}}},
        **{"autoattack_acc": 50.0, "autoattack_interval": [40.0, 61.0]},
        **{"kl": 0.5, "kl_interval": [0.25, 0.75], "r_score": 1.5, "r_score_interval": None},
        **{"disagrees": 12.5, "disagrees_interval": [2.0, 30.0]},
    }
    evaluate.print_accuracies(results)
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == "attack accuracy 95 % interval forwards backwards seconds"
    assert rows[1] == "clean 90.0 % 80.0 to 95.5 %"
    assert rows[2] == "apgd-ce 62.5 % 25.0 to 75.0 % 1,234 56 7.2"
    assert rows[3] == "autoattack 50.0 % 40.0 to 61.0 %"
    assert rows[5] == "KL(p_d, model) at clean points 0.5000 nat 0.2500 to 0.7500"
    assert rows[6] == "R_SCORE, at least 1.5000 nat"
    assert rows[7] == "another class in the ball, at least 12.5 % 2.0 to 30.0 %"


@pytest.mark.parametrize(("attack", "restarts"), [("pgd", 2), ("obfuscation", 5)])
def test_restarts_by_default(attack: Any, restarts: int) -> None:
    defaults = evaluate.EvaluateSettings(attack=attack)
    assert evaluate._pgd_options(defaults) == {"steps": 40, "restarts": restarts, "losses": ["ce", "margin"], "seed": 0}
    given = evaluate.EvaluateSettings(attack=attack, restarts=3)
    assert evaluate._pgd_options(given)["restarts"] == 3


def test_autoattack_at_several_radii(call: Any, trained: Path, tmp_path: Path) -> None:
    curve = ["--radii", "0.05", "0.02", "--state", "state.pt", "--out", "curve.json"]
    ending = call("evaluate", "--run", trained, *FAST, *curve)
    assert ending.status == 0, ending
    assert "| linf eps | accuracy, % | 95 % interval |" in ending.out
    results = read(tmp_path / "curve.json")
    model, x, y = subject(trained)
    adversary = AutoAttack(model, "Linf", 0.05, seed=2, verbose=False, version="fast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        expected = adversary.accuracy_curve(x, y, radii=[0.02, 0.05])
    assert results["accuracy_curve"]["robust_accuracy"] == list(expected.robust_accuracy.values())
    assert results["threat_model"] == {"norm": "linf", "eps": 0.05}
    assert 1 > results["accuracy_curve"]["robust_accuracy"][0] > results["accuracy_curve"]["robust_accuracy"][1] > 0
    assert {path.name for path in tmp_path.glob("state.pt*")} == {"state.pt.eps0.02", "state.pt.eps0.05"}
    assert "resumed from" in call("evaluate", "--run", trained, *FAST, *curve).out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--radii 0.05 0", "radii: (0.05, 0.0) is out of range, allowed with --attack autoattack: above 0"),
        ("--radii 0.05 --eps 0.1", "eps: is the radius of a single evaluation, --radii has several"),
        ("--radii 0.05 --engine official", "radii: is for --engine native"),
        ("--verdict-passes 0", "verdict_passes: 0 is out of range"),
        ("--verdict-passes 3 --engine official", "verdict_passes: is for --engine native"),
    ],
)
def test_options_of_autoattack_that_do_not_fit(call: Any, trained: Path, options: str, told: str) -> None:
    ending = call("evaluate", "--run", trained, "--attack", "autoattack", *options.split())
    assert ending.status == 2
    assert told in ending.err


def test_verdict_passes_reach_autoattack(call: Any, trained: Path, tmp_path: Path) -> None:
    ending = call("evaluate", "--run", trained, *FAST, "--verdict-passes", "2", "--out", "report.json")
    assert ending.status == 0, ending
    assert read(tmp_path / "report.json")["autoattack"]["verdict_passes"] == 2


def test_autoattack_on_images_in_another_box(
    call: Any, mine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images in [-1, 1] are attacked within it; the official package takes [0, 1] alone."""
    (tmp_path / "signed_to_evaluate.py").write_text(SIGNED)
    monkeypatch.delitem(sys.modules, "signed_to_evaluate", raising=False)
    source = ["--model-from", "mine_to_evaluate:linear", "--data", "signed_to_evaluate:images", "--eps", "0.1"]
    options = ["--attack", "autoattack", "--version", "fast", "--out", "report.json"]
    ending = call("evaluate", *source, *options)
    assert ending.status == 0, ending
    assert read(tmp_path / "report.json")["autoattack"]["box"] == [-1.0, 1.0]
    monkeypatch.setitem(sys.modules, "autoattack", SimpleNamespace())
    ending = call("evaluate", *source, *options, "--engine", "official")
    assert "allowed: images in [0, 1]; clean and pgd take others" in ending.err


def test_a_step_in_proportion_to_eps_is_at_most_as_long_as_the_ball_is_wide() -> None:
    assert measures.scaled(ThreatModel("linf", 0.1, 0.05), 0.2).step_size == pytest.approx(0.1)
    assert measures.scaled(ThreatModel("linf", 0.01, 0.5), 1.0).step_size == 2.0
    assert measures.scaled(ThreatModel("linf", 0.1), 0.2).step_size is None


LEAST: dict[str, dict[str, Any]] = {  # what is allowed, at the bounds where there are such
    "pgd": {"limit": 0, "batch_size": 1, "eps": 1e-9, "step_size": 1e-9, "steps": 1, "restarts": 1},
    "certify": {"sigma": 1e-9, "n0": 1, "alpha": 0.6, "n": 1, "radii": (0.0, 0.1)},
    "autoattack": {"verdict_passes": 1, "radii": (1e-9,)},
}
BEYOND = [
    *[("pgd", name, -1 if name == "limit" else 0) for name in LEAST["pgd"]],
    *[("pgd", name, math.inf) for name in ("eps", "step_size")],
    *[("certify", name, 0) for name in ("sigma", "n0", "n", "alpha")],
    *[("certify", "alpha", 1), ("certify", "sigma", math.inf)],
    *[("certify", "radii", (0.1, end)) for end in (-1e-9, math.inf)],
    *[("autoattack", "radii", (0.1, 0.0)), ("autoattack", "verdict_passes", 0)],
]


@pytest.mark.parametrize("attack", LEAST)
def test_the_least_that_is_allowed(attack: str) -> None:
    evaluate._check(evaluate.EvaluateSettings(run=Path("run"), attack=attack, **LEAST[attack]))


@pytest.mark.parametrize(("attack", "name", "value"), BEYOND)
def test_what_is_out_of_range_is_named(attack: str, name: str, value: Any) -> None:
    given = {**LEAST[attack], name: value}
    with pytest.raises(InputError, match=rf"^{name}: .*(is out of range|certifies nothing), allowed"):
        evaluate._check(evaluate.EvaluateSettings(run=Path("run"), attack=attack, **given))
