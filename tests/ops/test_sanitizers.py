"""The kernels of csrc/cpu under the address, undefined-behaviour and thread sanitizers.

How they are built: sanitized/build.py. Mutants of the sources show what these tests find.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from .emulated_device.build import substitute
from .processes import end_of, run_pytest
from .sanitized import build

# Not what is about Python; nor what the oldest instruction set, whose sums are the longest, rounds worse than allowed.
SELECTED = (
    "not (opcheck or bad_input or compile or gradcheck or lower)"
    " and not (l1_squared and 1000) and not (fab_step and 31)"
)
# Operators whose threads write to something that they share; tests/soak/test_sanitized_operators.py has the others.
SHARING = ["divergence", "square"]

pytestmark = [
    pytest.mark.skipif(
        any(build.runtime_libraries(name) is None for name in build.SANITIZERS), reason="needs g++ with its sanitizers"
    ),
    pytest.mark.skipif(
        "SCOREMATCH_KERNELS" in os.environ or "SCOREMATCH_EMULATED_DEVICE" in os.environ,
        reason="these tests make processes like this one",
    ),
]


def run_tests(library: Path, sanitizer: str, operators: list[str], selected: str) -> subprocess.CompletedProcess[str]:
    tests = [f"tests/ops/test_{operator}.py" for operator in operators]
    if operators == build.OPERATORS:
        tests.append("tests/soak/test_operators.py")
    return run_pytest(tests, build.variables(library, sanitizer), "-k", selected)


@pytest.mark.parametrize(
    ("sanitizer", "operators", "selected"),
    [
        ("memory", build.OPERATORS, SELECTED),
        ("threads", SHARING, f"{SELECTED} and (reference or every_row_is_refused)"),
    ],
    ids=build.SANITIZERS,
)
def test_operators_pass(sanitizer, operators, selected, tmp_path):
    library = build.compile_sources(build.copy_sources(tmp_path, sanitizer), sanitizer, operators)
    result = run_tests(library, sanitizer, operators, selected)
    assert result.returncode == 0, end_of(result)


class Mutant(NamedTuple):
    sanitizer: str
    changed: str  # a file of csrc
    old: str
    new: str
    source: str  # csrc/cpu/SOURCE.cpp is compiled
    selected: str  # of its tests, those that find the mutant
    found: str


OUTSIDE = "AddressSanitizer: heap-buffer-overflow"
RACE = "ThreadSanitizer: data race"
MUTANTS = {
    "an element too far is read": Mutant(
        "memory",
        "cpu/pack.h",
        "return j + P::size <= count ? P::load(data + j)",
        "return j + P::size <= count + 1 ? P::load(data + j)",
        "l1_step",
        "step_is_the_reference",
        OUTSIDE,
    ),
    "a product that overflows": Mutant(
        "memory",
        "philox.h",
        "uint64_t product0 = uint64_t(0xD2511F53u) * words[0][i]",
        "int64_t product0 = int64_t(0xD2511F53u) * words[0][i]",
        "keyed_uniform",
        "is_the_reference",
        "runtime error: signed integer overflow",
    ),
    "samples share their scratch": Mutant(
        "threads",
        "cpu/job_bodies.h",
        "channels = job.channel + n * image.channels;",
        "channels = job.channel;",
        "square",
        "move_is_the_reference",
        RACE,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_a_mutant_is_found(mutant, tmp_path):
    csrc = build.copy_sources(tmp_path, mutant.sanitizer)
    substitute(csrc / mutant.changed, mutant.old, mutant.new)
    mutated = build.compile_sources(csrc, mutant.sanitizer, [mutant.source])
    # Without the change these pass: they are a part of test_operators_pass.
    result = run_tests(mutated, mutant.sanitizer, [mutant.source], f"{SELECTED} and {mutant.selected}")
    assert result.returncode != 0, end_of(result)
    assert mutant.found in result.stdout + result.stderr, end_of(result)
