"""Work in processes of their own ends with the program that wants it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import os, time
from training.engine.side_by_side import processes

if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def runs(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] not in "XZ"


def test_workers_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        worker = int(program.stdout.readline())
        assert runs(worker)
        program.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while runs(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(worker)
