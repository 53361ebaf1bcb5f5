"""Tests of the operators in a process of their own, on another library in the place of the kernels."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What is longer than the rest and finds little that the rest does not: with `make soak`.
LONG = [
    pytest.mark.soak,
    pytest.mark.skipif("SCOREMATCH_SOAK" not in os.environ, reason="takes long; others of its kind run here"),
]


def run_pytest(
    tests: Sequence[str], environment: Mapping[str, str], *options: str, timeout: float | None = 600
) -> subprocess.CompletedProcess[str]:
    # The processes of a soak test run whole tests, unless they are told to soak, too.
    inherited = {name: value for name, value in os.environ.items() if name != "SCOREMATCH_SOAK"}
    return subprocess.run(
        # -s: what the sanitizers print, as the process ends, is not to be captured in it
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests, *options],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def end_of(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout[-3000:] + result.stderr[:3000]
