"""Two programs in the same folder: the second is refused, and a killed one leaves no lock behind."""

import signal
import time
from pathlib import Path

import pytest
from killing import Hit, Start, status

from training.engine.claims import claimed, is_claimed
from training.settings.errors import InputError

RUN = (
    "--objective standard --model digits_cnn_bn --epochs 2 --limit 60 --batch-size 10 --validation-steps 1 "
    "--eval-steps 1 --eval-restarts 1 --curve-points 0 --autoattack none --threads 1"
)
SCORE = "--data digits --limit 60 --samples 0 --threads 1 --posterior-settings.steps 10 --posterior-settings.width 8"


def test_a_second_claim_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with claimed(folder):
        with pytest.raises(InputError, match=f"another program is writing into {folder}, wait"), claimed(folder):
            pass
        with claimed(tmp_path / "a"):
            pass
    assert not is_claimed(folder)
    assert not is_claimed(tmp_path / "nowhere")
    with claimed(folder):
        assert is_claimed(folder)
        assert list(folder.iterdir()) == [], "nothing is left behind"


def test_a_claim_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path):
        raise ZeroDivisionError
    with claimed(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/run cannot be made \(Not a directory\)"),
        claimed(tmp_path / "file/run"),
    ):
        pass
    with pytest.raises(InputError, match=r"file cannot be made \(File exists\)"), claimed(tmp_path / "file"):
        pass


@pytest.mark.parametrize("name", ["run", "score"])
def test_a_second_program_is_refused(name: str, tmp_path: Path, start: Start, log: Path) -> None:
    """While the first one stands still within a step; after it was killed, the next one goes on."""
    out = tmp_path / "run"
    options, step = (RUN.split(), "step") if name == "run" else (SCORE.split(), "score step")
    first = start([*options, "--out", str(out)], Hit(step, 2, signal.SIGSTOP), name=name)
    try:
        while (state := state_of(first.pid)) != "T":
            assert state not in "XZ", log.read_text()
            time.sleep(0.05)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for arguments in (["--resume", str(out)], [*options, "--out", str(out)]):
            assert status(start(arguments, name=name)) == 2, log.read_text()
            assert f"error: out: another program is writing into {out}, wait" in log.read_text().splitlines()[-1]
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    finally:
        first.kill()
    assert status(first) == -signal.SIGKILL
    assert status(start(["--resume", str(out)], name=name)) == 0, log.read_text()


def state_of(pid: int | None) -> str:
    """Of a process, as ps shows it: T has been stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_comparison_and_generated_images(call, tmp_path: Path, tiny: list[str]) -> None:
    with claimed(tmp_path / "comparison"):
        ending = call("compare", "--data", "digits", "--seeds", 0, "--out", tmp_path / "comparison", "--", *tiny)
    assert (ending.status, list((tmp_path / "comparison").iterdir())) == (2, [])
    assert "another program is writing into" in ending.err
