"""Runs killed without warning, at chosen points of their work, and resumed until they end."""

import json
import signal
from pathlib import Path

import pytest
import torch
from killing import Hit, Start, status, without_times

from training import run
from training.engine import checkpoint

EPOCHS, STEPS = 25, 6
OPTIONS = (
    f"--objective pgd_at --model digits_cnn_bn --epochs {EPOCHS} --limit 60 --batch-size 10 --steps 3 "
    "--validation-steps 1 --shift 1 --averaging 0.5 --eval-steps 1 --eval-restarts 1 --curve-points 0 "
    "--autoattack none --threads 1"
)
# By SIGKILL, after which a run goes on from its last checkpoint, or SIGTERM, upon which it writes one.
HITS = [
    Hit("step", 1),
    Hit("step", STEPS),
    Hit("replace", 1),
    Hit("step", STEPS + 3),
    Hit("step", 3, signal.SIGTERM),
    Hit("step", 2),
    Hit("step", STEPS, signal.SIGTERM),
    Hit("step", STEPS + 1, signal.SIGTERM),
    Hit("validation", 1),
    Hit("validation", 2),
    Hit("validation", 2, signal.SIGTERM),
    Hit("log", 1),
    Hit("log", 3),
    Hit("log", 1, signal.SIGTERM),
    Hit("save", 1),
    Hit("save", 2),
    Hit("save", 1, signal.SIGTERM),
    Hit("replace", 2),
    Hit("replace", 4),
    Hit("step", 8, signal.SIGTERM),
    Hit("step", 9, signal.SIGTERM),
]


def final(out: Path) -> tuple[dict, list[dict], dict]:
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["training"]["model"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    return weights, without_times(lines), without_times(summary)


def test_killed_runs_end_with_the_same_bits(tmp_path: Path, start: Start, log: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert status(start([*OPTIONS.split(), "--out", str(whole)])) == 0, log.read_text()

    within_an_epoch = 0
    for hit in HITS:
        begun = (out / "config.toml").exists()
        ended = status(start(["--resume", str(out)] if begun else [*OPTIONS.split(), "--out", str(out)], hit))
        assert ended == (-signal.SIGKILL if hit.number == signal.SIGKILL else 1), (hit, log.read_text())
        if (out / "checkpoint.pt").exists():
            within_an_epoch += torch.load(out / "checkpoint.pt", weights_only=True)["training"]["step"] > 0
    assert within_an_epoch >= 5
    assert status(start(["--resume", str(out)])) == 0, log.read_text()

    weights, lines, summary = final(whole)
    weights_of_parts, lines_of_parts, summary_of_parts = final(out)
    assert all(torch.equal(value, weights_of_parts[name]) for name, value in weights.items())
    assert lines == lines_of_parts
    assert summary == summary_of_parts


def test_autoattack_goes_on_inside_itself(tmp_path: Path, start: Start, log: Path) -> None:
    options = [*OPTIONS.split(), "--epochs", "3", "--eps", "0.03", "--autoattack", "standard"]
    options += ["--autoattack-samples", "20"]
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert status(start([*options, "--out", str(whole)])) == 0, log.read_text()

    state = out / run.STATE
    # 65 passes tell what the model computes, the first attack has at least 100.
    assert status(start([*options, "--out", str(out)], Hit("pass", 240, signal.SIGTERM))) == 1, log.read_text()
    assert log.read_text().splitlines()[-1].endswith(f"python -m training.run --resume {out}")
    assert torch.load(state, weights_only=True)["finished"].max() > 0, "the signal came after the first attack"
    assert log.read_text().count("robust accuracy after square") == 1, "of the whole run alone"
    # A kill leaves the state that the signal before it saved.
    assert status(start(["--resume", str(out)], Hit("pass", 20))) == -signal.SIGKILL
    assert status(start(["--resume", str(out)])) == 0, log.read_text()
    assert log.read_text().count(f"resumed from {state}") == 2
    assert not state.exists()
    assert final(out)[2] == final(whole)[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path, start: Start, log: Path) -> None:
    out = tmp_path / "run"
    assert status(start([*OPTIONS.split(), "--out", str(out)], Hit("step", 2 * STEPS + 2, number))) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"stopped: {number.name}")
    assert last.endswith(f"python -m training.run --resume {out}")
    saved = checkpoint.load(out / "checkpoint.pt")
    assert (saved["epoch"], saved["training"]["step"]) == (2, 2), "the step under way was taken to its end"


def test_a_kill_between_a_checkpoint_and_the_best_weights(tmp_path: Path, start: Start, log: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    options = [*OPTIONS.split(), "--epochs", "2"]
    assert status(start([*options, "--out", str(whole)])) == 0, log.read_text()
    # Before them come the settings, the checkpoint before the first step, the empty log and that checkpoint.
    assert status(start([*options, "--out", str(out)], Hit("replace", 5))) == -signal.SIGKILL
    assert checkpoint.load(out / "checkpoint.pt")["training"]["best"]["epoch"] == 1
    assert not (out / "best.pt").exists()
    assert status(start(["--resume", str(out)], Hit("step", 1))) == -signal.SIGKILL
    assert checkpoint.load(out / "best.pt")["epoch"] == 1
    assert status(start(["--resume", str(out)])) == 0, log.read_text()
    assert final(out)[1:] == final(whole)[1:]
    weights = [checkpoint.load(folder / "best.pt")["network"] for folder in (out, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("hit", [Hit("step", STEPS, signal.SIGTERM), Hit("validation", 1, signal.SIGTERM)])
def test_a_signal_need_not_wait_for_a_validation(hit: Hit, tmp_path: Path, start: Start, log: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    options = [*OPTIONS.split(), "--epochs", "2"]
    assert status(start([*options, "--out", str(whole)])) == 0, log.read_text()
    assert status(start([*options, "--out", str(out)], hit)) == 1, log.read_text()
    saved = checkpoint.load(out / "checkpoint.pt")
    assert (saved["epoch"], saved["training"]["step"]) == (0, STEPS)
    assert not checkpoint.read_metrics(out / "metrics.jsonl")
    assert status(start(["--resume", str(out)])) == 0, log.read_text()
    assert all(torch.equal(value, final(out)[0][name]) for name, value in final(whole)[0].items())
    assert final(out)[1:] == final(whole)[1:]


def test_checkpoints_of_some_epochs(tmp_path: Path, start: Start, log: Path) -> None:
    """``--save-every``: what comes after the last checkpoint is trained again, to the same bits."""
    whole, out = tmp_path / "whole", tmp_path / "parts"
    options = [*OPTIONS.split(), "--epochs", "8", "--save-every", "3", "--validate-every", "8"]
    assert status(start([*options, "--out", str(whole)])) == 0, log.read_text()
    assert status(start([*options, "--out", str(out)], Hit("step", 5 * STEPS + 2))) == -signal.SIGKILL
    assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 3
    assert len(checkpoint.read_metrics(out / "metrics.jsonl")) == 5
    assert status(start(["--resume", str(out)])) == 0, log.read_text()
    weights, lines, _ = final(whole)
    assert all(torch.equal(value, final(out)[0][name]) for name, value in weights.items())
    assert lines == final(out)[1]
