"""Programs in unusual surroundings: streams that are closed or full, other encodings, variables left over."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from training import __main__ as one_command
from training import compare, evaluate, run
from training.engine import checkpoint, distributed
from training.reports import run as report
from training.settings import command_line, config
from training.settings.errors import InputError, StopError, run_program

ROOT = Path(__file__).resolve().parents[2]
DRY = ("--objective", "standard", "--dry-run")
LOCALE_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_shell(
    redirection: str, *arguments: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m ARGUMENTS`` with a redirection of the shell; its status is that of the program."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(unbuffered: str) -> None:
    ending = in_shell(">/dev/full", "training", "--help", variables={"PYTHONUNBUFFERED": unbuffered})
    assert (ending.returncode, ending.stderr) == (
        1,
        "stopped: standard output cannot be written (No space left on device)\n",
    )


def test_help_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The text is short enough to wait in a buffer until the program ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["scorematch", "--help"])
        with pytest.raises(SystemExit) as end:
            one_command.main()
    assert (end.value.code, capfd.readouterr().err) == (1, "stopped: standard output is closed\n")


def test_streams_that_are_closed(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    status = run_program(run.main, ["--objective", "standard", "--data", "toy", *tiny, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    assert status == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_status_of_an_error_that_cannot_be_told() -> None:
    assert in_shell("2>/dev/full", "training", "evalute").returncode == 2


def test_settings_are_utf_8_and_output_is_what_the_locale_can_show(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('objective = "standard"\nmodel = "größe:model"\n', encoding="utf-8")
    ending = in_shell("", "training.run", "--recipe", str(recipe), "--dry-run", variables=LOCALE_C)
    assert (ending.returncode, ending.stderr) == (0, "")
    assert r'model = "gr\xf6\xdfe:model"' in ending.stdout


def test_a_name_that_is_no_text_in_the_locale(call: Any) -> None:
    ending = call("run", *DRY, "--out", os.fsdecode(b"r\xffn"))
    assert ending.status == 2
    assert re.fullmatch(
        r"error: 'r\\udcffn': is not text in the encoding of this shell .*LC_ALL=C\.UTF-8\n", ending.err
    )


def test_the_log_of_a_failed_run_in_another_encoding(tmp_path: Path) -> None:
    settings = config.parse(DRY)
    job = compare.Job(compare.parse_entry("standard"), 0, tmp_path / "one", [], settings)
    (tmp_path / "one.log").write_bytes("größer\n".encode("latin-1"))
    assert compare._failure(job, 1).endswith("\ngr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}er")


@pytest.mark.parametrize("given", [["--out", ""], ["--out="], ["--generated", "x", ""]])
def test_an_empty_value_is_not_the_current_folder(call: Any, given: list[str]) -> None:
    ending = call("run", *DRY, *given)
    option = given[0].rstrip("=")
    assert (ending.status, ending.out) == (2, "")
    assert ending.err == f"error: {option}: the value is empty, allowed: one that is not, or to leave the option out\n"


@pytest.mark.parametrize("columns", ["1", "8", "20"])
def test_help_in_a_narrow_terminal(
    call: Any, columns: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        call("run", "-h")
    assert end.value.code == 0
    assert "--objective" in capfd.readouterr().out


def test_a_name_too_long_is_a_line(call: Any) -> None:
    ending = call("run", "--resume", "x" * 5000)
    assert (ending.status, ending.err) == (
        1,
        f"stopped: {'x' * 5000}/config.toml cannot be used (File name too long)\n",
    )


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is a device or a pipe, expected a file to write"):
        checkpoint.check_writable(pipe)
    with pytest.raises(StopError, match="is a device or a pipe"):
        checkpoint.write_atomically(pipe, "content")
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_devices_are_known_by_their_names(name: str) -> None:
    """Their place is never tried: the superuser could take it."""
    assert checkpoint.is_special(Path(name))
    assert not checkpoint.is_special(Path("/dev/shm/file"))


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MASTER_ADDR", "", "MASTER_ADDR: is not set in the environment"),
        ("MASTER_PORT", "", "MASTER_PORT: is not set in the environment"),
        ("MASTER_PORT", "http", "MASTER_PORT: 'http' in the environment is not a number"),
        ("RANK", "first", "RANK: 'first' in the environment is not a number"),
        ("RANK", "1", "RANK: 1 with WORLD_SIZE 1"),
        ("WORLD_SIZE", "-1", "WORLD_SIZE: '-1' in the environment is not a number"),
    ],
)
def test_variables_of_torchrun_left_over(
    call: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    for variable, usual in {**TORCHRUN, name: value}.items():
        monkeypatch.setenv(variable, usual)
    ending = call("run", "--objective", "standard", "--data", "toy")
    assert (ending.status, ending.out) == (2, "")
    assert ending.err.startswith(f"error: {told}")
    assert ending.err.endswith("to run alone, neither RANK nor WORLD_SIZE\n")


def test_empty_variables_of_torchrun_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert not distributed.started_by_torchrun()
    assert distributed.planned_world_size() == 1


def test_a_port_in_use(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("gloo: address already in use")

    for variable, usual in TORCHRUN.items():
        monkeypatch.setenv(variable, usual)
    monkeypatch.setattr(distributed.distributed, "rendezvous", refused)
    ending = call("run", "--objective", "standard", "--data", "toy")
    place = "MASTER_ADDR:MASTER_PORT, 127.0.0.1:29500"
    told = f"stopped: the processes cannot meet at {place} (gloo: address already in use)\n"
    assert (ending.status, ending.err) == (1, told)


HUNG_UP = """
import signal as signals, sys, time
from pathlib import Path
from training.settings.errors import interrupts_deferred, run_program

signals.signal(signals.SIGHUP, signals.SIG_DFL)  # the tests may run under nohup

def program(arguments):
    with interrupts_deferred() as signal:
        print("begun", flush=True)
        while signal() is None:
            time.sleep(0.01)
        print("a bar of progress", file=sys.stderr, flush=True)
        Path(arguments[0]).write_text(signal())

sys.exit(run_program(program))
"""


def test_a_terminal_that_hangs_up(tmp_path: Path) -> None:
    """As when a connection breaks: what is to be saved is saved, though nothing can be shown any more."""
    ours, terminal = os.openpty()
    # The first process of a session takes the terminal that it opens for the one that controls it.
    shell = ["bash", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(terminal)]
    process = subprocess.Popen(
        [*shell, sys.executable, "-c", HUNG_UP, str(tmp_path / "saved")], cwd=ROOT, start_new_session=True
    )
    shown = b""
    while b"begun" not in shown:
        shown += os.read(ours, 4096)
    os.close(terminal)
    os.close(ours)
    assert process.wait() == 1
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_a_program_under_nohup_goes_on(untouched_process: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_program(lambda _: os.kill(os.getpid(), signal.SIGHUP), []) == 0
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert run_program(lambda _: os.kill(os.getpid(), signal.SIGHUP), []) == 1


@pytest.mark.parametrize("folder", ["-o my runs", "runs of $USER; 'x'"])
def test_commands_to_copy_are_ones_of_a_shell(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    out, settings = Path(folder), config.parse([*DRY, f"--out={folder}"])
    (out / "config.toml").write_text(tomli_w.dumps(config.as_table(settings)), encoding="utf-8")
    summary = {"autoattack_acc": 1.0, "autoattack_version": "standard"}
    words = [shlex.split(line) for line in (run.saved(settings, out), report.commands(out, summary).splitlines()[0])]
    assert config.parse(words[0][words[0].index("training.run") + 1 :]).resume == out
    evaluation = command_line.parse(
        evaluate.EvaluateSettings, words[1][words[1].index("training.evaluate") + 1 :], program="", description=""
    )
    assert evaluation.run == out


def test_a_comparison_in_a_folder_that_starts_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = compare.CompareSettings("toy", ("standard",), seeds=(0,))
    (job,) = compare.plan(settings, [], Path("-c"), 1)
    assert job.out == job.settings.out == Path("-c/runs/standard-seed0")


@pytest.fixture
def other_repository(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    return folder


def test_the_commit_of_another_repository_is_not_ours(other_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = run.commit()
    monkeypatch.setenv("GIT_DIR", str(other_repository / ".git"))
    assert run.commit() == ours, "as within a hook of it"
    monkeypatch.delenv("GIT_DIR")
    installed = other_repository / "venv" / "training" / "run.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(run, "__file__", str(installed))
    assert run.commit() is None, "as installed within it"


def test_the_commit_where_git_says_what_is_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nprintf 'caf\\351'\n", encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert run.commit() == "caf\N{REPLACEMENT CHARACTER}+"
