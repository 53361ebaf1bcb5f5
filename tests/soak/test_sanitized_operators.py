"""Every operator on random inputs, under each sanitizer, on every instruction set of this processor; in a soak only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scorematch import _C
from tests.ops.sanitized import build

from .drawing import SOAKING

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.soak
WIDEST = list(build.INSTRUCTION_SETS).index(_C.instruction_set)


@pytest.mark.skipif(not SOAKING, reason="takes hours; tests/ops/test_sanitizers.py is the short form")
@pytest.mark.parametrize("instruction_set", list(build.INSTRUCTION_SETS)[: WIDEST + 1])
@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_sanitized_operators(sanitizer, instruction_set, tmp_path):
    if build.runtime_libraries(sanitizer) is None:
        pytest.skip(f"needs g++ with {build.SANITIZERS[sanitizer].library}")
    library = build.build(tmp_path, sanitizer, instruction_set)
    environment = {
        **os.environ,
        **build.variables(library, sanitizer),
        "SCOREMATCH_SOAK_DONE": f"build/soak-done-{sanitizer}-{instruction_set}.txt",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "tests/soak/test_operators.py",
    ]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[:3000]
