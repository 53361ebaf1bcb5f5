"""Bad arguments and input: exit status 2 and one line that says what was given and what is allowed."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training import evaluate, score
from training.__main__ import PROGRAMS
from training.settings import config

ROOT = Path(__file__).resolve().parents[2]

BAD = {
    "run without an objective": ("run", "", "--objective"),
    "unknown objective": ("run", "--objective madry", "'score_direct'"),
    "unknown option": ("run", "--objective standard --epoch 3", "--epochs"),
    "misspelt objective": ("run", "--objectiv standard", "--objectiv: unknown option, did you mean --objective"),
    "option without value": ("run", "--objective standard --epochs", "--epochs"),
    "text for a number": ("run", "--objective standard --eps much", "--eps"),
    "unknown data": ("run", "--objective standard --data mnist", "svhn, folder, module:function"),
    "unknown recipe": ("run", "--objective standard --recipe none", "own-vectors, svhn"),
    "unknown model": ("run", "--objective standard --model resnet", "digits_cnn"),
    "model that cannot be imported": ("run", "--objective standard --model nowhere:model", "module:function"),
    "wide network of impossible depth": ("run", "--objective standard --model wrn-12-1", "6 n + 4"),
    "network for other images": ("run", "--objective standard --data toy --model wrn-10-1", "images [C, H, W]"),
    "no folder of images": ("run", "--objective standard --data folder", "--data-root DIR or $SCOREMATCH_DATA"),
    "folder without images": ("run", "--objective standard --data folder --data-root none", "DIR/train/CLASS/*.png"),
    "a size for the digits": ("run", "--objective standard --image-size 16", "allowed: on folder"),
    "size of no pixel": ("run", "--objective standard --image-size 0", "at least 1 pixel"),
    "function that is not there": ("run", "--objective standard --data nowhere:data", "expected module:function"),
    "no folder of data": ("run", "--objective standard --data cifar10", "--data-root DIR"),
    "folder without data": ("run", "--objective standard --data cifar10 --data-root none", "none/cifar-10-batches-py"),
    "CutMix of more than all": ("run", "--objective standard --cutmix 1.5", "0 (off) to 1"),
    "CutMix of points": ("run", "--objective standard --data toy --cutmix 1", "no images to mix"),
    "CutMix with a posterior": ("run", "--objective score_direct --cutmix 1", "with standard, gaussian, pgd_at"),
    "CutMix with a target that the data move": (
        "run",
        "--objective trades --posterior kernel_density --cutmix 1",
        "with standard, gaussian, pgd_at and trades without one",
    ),
    "flip on points": ("run", "--objective standard --data toy --flip", "no images to mirror"),
    "weights of no timm model": ("run", "--objective standard --pretrained", "allowed: with timm:NAME"),
    "model for other data": ("run", "--objective standard --model toy_mlp", "vectors [D]"),
    "unknown divergence": ("run", "--objective standard --divergence chi2", "kl, se"),
    "eps": ("run", "--objective standard --eps -1", "above 0"),
    "no file of generated images": ("run", "--objective standard --generated no.npz", "no.npz is not a file"),
    "a batch of one with batch norm": (
        "run",
        "--objective standard --model digits_cnn_bn --batch-size 1149 --out here",
        "leaves a batch of 1, allowed: at least two samples each",
    ),
    "eps in pixel values": (
        "run",
        "--objective standard --eps 8",
        "eps: 8 in linf is out of range, allowed: at most 1",
    ),
    "eps in pixel values, told what to give": ("run", "--objective standard --eps 8", "8/255 is 0.03137"),
    "eps as a fraction": (
        "run",
        "--objective standard --eps 8/255",
        "error: Error parsing --eps: could not convert string to float: '8/255'; 8/255 is 0.03137\n",
    ),
    "a step as a fraction": (
        "run",
        "--objective standard --step-size 2/255",
        "error: Error parsing --step-size: could not convert string to float: '2/255'; 2/255 is 0.007843\n",
    ),
    "radii as fractions": ("evaluate", "--run . --attack autoattack --radii 2/255 4/255", "2/255 is 0.007843"),
    "a fraction of nothing": ("run", "--objective standard --eps 8/0", "float: '8/0'\n"),
    "a switch with a value": ("run", "--objective standard --flip True", "'True': no option takes it; a switch takes"),
    "steps in pixel values": (
        "run",
        "--objective pgd_at --step-size 2",
        "step_size: 2 in linf is out of range, allowed: at most 1, since values lie in [0, 1]; 2/255 is 0.007843",
    ),
    "eps beyond the diagonal": (
        "run",
        "--objective pgd_at --norm l2 --eps 9",
        "eps: 9 in l2 is out of range, allowed: at most 8,",
    ),
    "compare with eps in pixel values": ("compare", "-- --eps 8", "eps: 8 in linf"),
    "plan with eps in pixel values": ("plan", "--objective pgd_at --eps 8", "eps: 8 in linf"),
    "audit with eps in pixel values": ("score", "--limit 100 --audit --eps 8", "eps: 8 in linf"),
    "limit": ("run", "--objective standard --limit 2000", "10 to 1150"),
    "autoattack on points": ("run", "--objective standard --data toy --autoattack fast", "no images, allowed: none"),
    "unknown autoattack": ("run", "--objective standard --autoattack plus", "'fast', 'standard'"),
    "more samples than there are": ("run", "--objective standard --autoattack-samples 501", "500 test samples"),
    "oracle on images": ("run", "--objective score_direct --posterior oracle", "toy"),
    "posterior settings": ("run", "--objective score_direct --posterior-settings.sigma -1", "sigma"),
    "posterior file that is not there": ("run", "--objective score_direct --posterior-from none.pt", "none.pt"),
    "resume of nothing": ("run", "--resume none", "config.toml"),
    "folder in a file": ("run", "--objective standard --out file/run", "cannot be made"),
    "evaluate nothing": ("evaluate", "", "none given, expected exactly one"),
    "evaluate two": ("evaluate", "--run . --model-from w.pt", "run and model_from given, expected exactly one"),
    "evaluate a missing file": ("evaluate", "--checkpoint none.pt", "no such file"),
    "evaluate on a device that is not here": (
        "evaluate",
        "--checkpoint file --device fpga",
        "device: 'fpga' cannot be used here, allowed: auto, cpu, cuda, cuda:N",
    ),
    "evaluate on a device without values": ("evaluate", "--checkpoint file --device meta", "'meta' cannot be used"),
    "train on a device that is not here": ("run", "--objective standard --device xla", "'xla' cannot be used here"),
    "evaluate a text file": (
        "evaluate",
        "--checkpoint file",
        "error: file: is damaged, or holds more than tensors and plain values, expected a checkpoint of training.run\n",
    ),
    "generate with a text file": ("generate", "--out a.npz --posterior-from file", "file: is damaged, or holds"),
    "generate with no folder": ("generate", "--out a.npz --run none", "run: none is not a folder, expected that of"),
    "generate with a run that has no score network": (
        "generate",
        "--out a.npz --run .",
        "run: . holds no posterior.pt, expected the folder of training.score, or of a run with a score network",
    ),
    "evaluate no run": ("evaluate", "--run .", "config.toml"),
    "evaluate with unknown attack": ("evaluate", "--run . --attack fgsm", "'clean', 'pgd'"),
    "evaluate a run of another model": ("evaluate", "--run . --model digits_cnn", "is for --model-from"),
    "evaluate a run on other data": ("evaluate", "--run . --data digits", "is for --model-from"),
    "evaluate missing weights": ("evaluate", "--model-from none.pt --eps 0.1", "none.pt is not a file"),
    "evaluate unknown data": ("evaluate", "--model-from none.pt --data mnist", "svhn, folder, module:function"),
    "evaluate with infinite eps": ("evaluate", "--run . --eps inf", "a finite number above 0"),
    "evaluate with a negative limit": ("evaluate", "--run . --limit -1", "0 (all)"),
    "evaluate with no batch": ("evaluate", "--run . --batch-size 0", "at least 1"),
    "evaluate with unknown engine": ("evaluate", "--run . --engine theirs", "'native', 'official'"),
    "evaluate with unknown version": ("evaluate", "--run . --attack autoattack --version best", "'standard', 'plus'"),
    "evaluate with unknown type": ("evaluate", "--run . --search-dtype float8", "'bfloat16'"),
    "version of pgd": ("evaluate", "--run . --version plus", "version: is for --attack autoattack, got --attack pgd"),
    "steps of autoattack": ("evaluate", "--run . --attack autoattack --steps 3", "--attack pgd and obfuscation"),
    "plot of pgd": ("evaluate", "--run . --plot p.png", "plot: is for --attack obfuscation"),
    "official engine with a state": (
        "evaluate",
        "--run . --attack autoattack --engine official --state s.pt",
        "state: is for --engine native",
    ),
    "architecture of no second model": (
        "evaluate",
        "--run . --attack obfuscation --transfer-model wrn-28-10",
        "transfer_model: is for --transfer-from",
    ),
    "evaluate with no steps": ("evaluate", "--run . --steps 0", "at least 1"),
    "evaluate with unknown loss": ("evaluate", "--run . --losses hinge", "margin"),
    "compare on unknown data": ("compare", "--data mnist", "svhn, folder, module:function"),
    "score of unknown data": ("score", "--data mnist", "svhn, folder, module:function"),
    "compare unknown objectives": ("compare", "--objectives madry", "pgd_at"),
    "compare unknown divergence": ("compare", "--objectives trades:chi2", "js_distance"),
    "compare a surrogate with a posterior": ("compare", "--objectives pgd_at:oracle", "kl, se"),
    "compare soft targets of nothing": ("compare", "--objectives trades:soft", "such as trades:kernel_density:soft"),
    "compare soft targets of all": ("compare", "--objectives score_direct:soft", "kl, se"),
    "compare the same twice": ("compare", "--objectives trades trades", "once"),
    "compare the same seed twice": ("compare", "--seeds 1 1", "different seeds"),
    "compare with bad options of the runs": ("compare", "-- --eps 0", "above 0"),
}


@pytest.mark.parametrize(("program", "arguments", "told"), BAD.values(), ids=BAD.keys())
def test_bad_input(call: Any, tmp_path: Path, program: str, arguments: str, told: str) -> None:
    (tmp_path / "file").write_text("not a checkpoint")
    ending = call(program, *arguments.split())
    assert ending.status == 2, ending
    assert ending.err.count("\n") == 1, ending.err
    assert ending.err.startswith("error: ")
    assert told in ending.err
    assert {path.name for path in tmp_path.iterdir()} <= {"file"}, "refused before anything was written"


@pytest.mark.parametrize(
    ("option", "program", "told"),
    [
        ("--resume", "run", "resume: other is no folder of training.run, its config.toml names no objective\n"),
        ("--run", "evaluate", "run: other is no folder of training.run, its config.toml names no objective\n"),
        ("--resume", "score", "resume: trained is a folder of training.run, expected one of training.score\n"),
    ],
)
def test_a_folder_of_another_program(call: Any, tmp_path: Path, option: str, program: str, told: str) -> None:
    for name, settings in (("other", 'data = "digits"\n'), ("trained", 'objective = "trades"\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(settings)
    ending = call(program, option, "trained" if program == "score" else "other")
    assert (ending.status, ending.err) == (2, f"error: {told}")


def test_the_program_itself_ends_with_that_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.run", "--objective", "standard", "--eps", "0"]
    ending = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ending.returncode, ending.stdout) == (2, "")
    assert ending.stderr == "error: eps: 0.0 is out of range, allowed: a finite number above 0\n"


def test_output_that_nobody_reads() -> None:
    command = [sys.executable, "-m", "training.run", "--objective", "standard", "--dry-run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (1, "stopped: standard output is closed\n")


@pytest.mark.parametrize("program", ["run", "evaluate", "compare"])
def test_help_explains_the_options(program: str, call: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        call(program, "--help")
    assert end.value.code == 0
    assert "seed" in capfd.readouterr().out


LAID_OUT = {
    "run": (config.RunSettings, config.LAYOUT),
    "evaluate": (evaluate.EvaluateSettings, evaluate.LAYOUT),
    "score": (score.ScoreSettings, score.LAYOUT),
}


@pytest.mark.parametrize("program", LAID_OUT)
def test_long_help_has_every_option_once_in_groups(
    program: str, call: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    settings, layout = LAID_OUT[program]
    with pytest.raises(SystemExit) as end:
        call(program, "--help")
    text = capfd.readouterr().out
    assert end.value.code == 0
    assert max(map(len, text.splitlines())) <= 90
    names = re.findall(r"^  (--[a-z0-9.-]+)", text, flags=re.M)
    fields = [f.name.replace("_", "-") for f in dataclasses.fields(settings) if f.name != "posterior_settings"]
    assert sorted(name for name in names if "." not in name) == sorted(f"--{field}" for field in fields)
    assert len(names) == len(set(names))
    assert names[: len(layout.first)] == [f"--{field.replace('_', '-')}" for field in layout.first]
    titles = re.findall(r"^\S.*", text, flags=re.M)
    assert [title for title in titles if title in layout.groups] == list(layout.groups), "in the order of the fields"
    assert not re.findall(r"^  --.*\n(?:        )?\(default", text, flags=re.M), "an option without a word"


def test_short_help_has_what_matters_first(call: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("run", "-h", "--objective", "trades")
    text = capfd.readouterr().out
    names = re.findall(r"^  (--[a-z0-9.-]+)", text, flags=re.M)
    assert names == [f"--{field.replace('_', '-')}" for field in config.LAYOUT.first]
    assert re.search(r"python -m training.run --help explains all 1\d\d options", text)


def one_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_one_command_for_all_programs() -> None:
    listed = one_command()
    assert listed.returncode == 0
    for name in PROGRAMS:
        assert f"  {name} " in listed.stdout
    settings = one_command("run", "--objective", "trades", "--dry-run")
    assert (settings.returncode, settings.stderr) == (0, "")
    assert 'objective = "trades"' in settings.stdout
    refused = one_command("run", "--objective", "trades", "--eps", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: eps: 0.0 is out of range")


@pytest.mark.parametrize("program", [["training.run"], ["training", "run"]])
def test_an_interruption_of_the_imports_is_a_line(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "tomli_w.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ending = subprocess.run(
        [sys.executable, "-m", *program, "--objective", "standard"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ending.returncode, ending.stdout) == (1, "")
    assert re.fullmatch(r"stopped: SIGINT.*\n", ending.stderr)


def test_a_misspelt_program_is_named() -> None:
    ending = one_command("evalute", "--run", "x")
    assert (ending.returncode, ending.stdout) == (2, "")
    assert ending.stderr == "error: 'evalute' is not a program, did you mean evaluate; scorematch --help lists them\n"


def test_every_program_is_listed() -> None:
    """Whatever ``python -m training.NAME`` runs is among the programs of the one command."""
    files = [*(ROOT / "training").glob("*.py"), *(ROOT / "training").glob("*/__main__.py")]
    programs = {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in files
        if path != ROOT / "training" / "__main__.py" and "run_program(main)" in path.read_text()
    }
    assert programs == set(PROGRAMS)
