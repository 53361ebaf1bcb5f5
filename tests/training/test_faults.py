"""A disk that is full, memory that runs out: one line says so, the last good state stays, and the run can go on."""

from pathlib import Path

import pytest
import torch
from killing import FULL_DISK, NO_MEMORY, Hit, Start, status

from training.engine import checkpoint
from training.settings.errors import out_of_memory, run_program

RUN = (
    "--objective pgd_at --model digits_cnn_bn --epochs 3 --limit 60 --batch-size 10 --steps 2 --validation-steps 1 "
    "--eval-steps 1 --eval-restarts 1 --curve-points 0 --autoattack none --threads 1"
)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (FULL_DISK, "stopped: {out}/checkpoint.pt cannot be written (File too large); the file that was there is"),
        (NO_MEMORY, "stopped: out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_faults_of_a_run(fault: int, told: str, tmp_path: Path, start: Start, log: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert status(start([*RUN.split(), "--out", str(whole)])) == 0, log.read_text()
    assert status(start([*RUN.split(), "--out", str(out)], Hit("step", 9, fault))) == 1, log.read_text()
    assert told.format(out=out) in log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()
    assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 1, "the second epoch was not through"
    assert not list(out.glob(".*.part"))
    if fault == NO_MEMORY:
        assert f"1 of 3 epochs are saved; continue with: python -m training.run --resume {out}" in log.read_text()
    assert status(start(["--resume", str(out)])) == 0, log.read_text()
    expected, actual = (checkpoint.load(folder / "checkpoint.pt")["training"]["model"] for folder in (whole, out))
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_what_is_an_error_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def greedy(arguments: list[str]) -> None:
        torch.empty(2**50)

    assert run_program(greedy, []) == 1
    assert capsys.readouterr().err.startswith("stopped: out of memory (DefaultCPUAllocator: can't allocate memory: you")
    assert out_of_memory(MemoryError()) == "MemoryError"
    assert (
        out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB.")) == "CUDA out of memory. Tried 1 GiB."
    )
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    with pytest.raises(ZeroDivisionError):
        run_program(lambda arguments: print(1 // 0), [])
