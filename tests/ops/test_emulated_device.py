"""The kernels of csrc/cuda, run on the CPU: a stand-in for the CUDA runtime takes the place of a GPU.

What it is: emulated_device/cuda_runtime.h. Mutants of the sources show what these tests find.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from .emulated_device import build
from .processes import LONG, ROOT, end_of, run_pytest

OPERATORS = ["apgd_step", "divergence", "fab_step", "keyed_uniform", "l1_step", "score_step", "square", "threat_model"]
KERNELS = {
    name
    for source in (ROOT / "csrc/cuda").glob("*.cu")
    for name in re.findall(r"__global__ void (\w+)\(", source.read_text())
}

# Every operator, dtype and norm, NaN, empty batches; of the parameters those that make a kernel do something else.
SELECTED = (
    "(reference or empty or nan or one_hot or best_point or out_of_range or corner_outside)"
    " and not (bad_input or bit_for_bit or opcheck or alpha_max or lower or -1.0- or 0.25 or -inf or -one-)"
    " and not (1000 or -2- or -10- or -17- or -31- or -32- or -100-)"
)
# Once with all dtypes is enough: what another order of the threads changes does not depend on them.
SCHEDULES = {
    "first": SELECTED,
    "last": f"{SELECTED} and not (float16 or float64)",
    "1": f"{SELECTED} and not (float16 or float64)",
}

pytestmark = [
    pytest.mark.skipif(build.runtime_libraries() is None, reason="needs g++ with its address sanitizer (libasan)"),
    pytest.mark.skipif("SCOREMATCH_EMULATED_DEVICE" in os.environ, reason="these tests make processes like this one"),
]


def run_tests(
    library: Path, operators: list[str], selected: str, schedule: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    tests = [f"tests/ops/test_{operator}.py" for operator in operators]
    variables = {**build.variables(library), **environment, "SCOREMATCH_SCHEDULE": schedule}
    return run_pytest(tests, variables, "-k", selected)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("emulated_device"))


class Run(NamedTuple):
    result: subprocess.CompletedProcess[str]
    launches: list[tuple[str, int, int]]  # a kernel, the blocks that were asked for, the blocks that there were


@pytest.fixture(scope="module", params=["first", "last", pytest.param("1", marks=LONG)])
def whole_run(request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    log = tmp_path_factory.mktemp("launches") / "log"
    result = run_tests(library, OPERATORS, SCHEDULES[request.param], request.param, SCOREMATCH_LAUNCHES=str(log))
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return Run(result, [(name, int(asked_for), int(blocks)) for name, asked_for, blocks in lines])


def test_operators_are_the_reference(whole_run):
    assert whole_run.result.returncode == 0, end_of(whole_run.result)


def test_every_kernel_ran_and_met_its_grid_stride(whole_run):
    assert len(KERNELS) >= 13
    assert {name for name, _, _ in whole_run.launches} == KERNELS
    assert {name for name, asked_for, blocks in whole_run.launches if asked_for > blocks} == KERNELS


class Mutant(NamedTuple):
    changed: str  # a file of csrc
    old: str
    new: str
    source: str  # csrc/cuda/SOURCE.cu is compiled
    selected: str  # of its tests in SELECTED, those that find the mutant
    schedule: str = "first"
    found: str = "AssertionError"


STEP = "step_is_the_reference and float32 and -l2"
OUTSIDE = "AddressSanitizer: heap-buffer-overflow"
MUTANTS = {
    "no barrier before a reduction is read": Mutant(
        "lanes.h", "= v;\n    __syncthreads();", "= v;", "threat_model", STEP
    ),
    "no barrier before the next reduction": Mutant(
        "lanes.h", "    __syncthreads();  // the next reduction overwrites warp_results\n", "", "threat_model", STEP
    ),
    "no barrier before the channels are read": Mutant(
        "cuda/square.cu",
        "    __syncthreads();  // channels are read by all\n",
        "",
        "square",
        "move_is_the_reference and float32 and -l2 and -three",
        schedule="last",
    ),
    "a barrier that some threads pass by": Mutant(
        "cuda/square.cu",
        "    __syncthreads();  // channels are read by all\n",
        "    if (threadIdx.x < 32) __syncthreads();\n",
        "square",
        "move_is_the_reference and float32 and -l2 and -three",
        found="a block is stuck",
    ),
    "a shuffle by too little": Mutant(
        "lanes.h",
        "int offset = 16; offset != 0; offset >>= 1) v +=",
        "int offset = 8; offset != 0; offset >>= 1) v +=",
        "divergence",
        "are_the_reference and -33-probabilities",
    ),
    "a loop that goes on for one more": Mutant(
        "cuda/threat_model.cu",
        "i < count; i += index_stride())\n    out[i] = static_cast<S>(linf_step(",
        "i <= count; i += index_stride())\n    out[i] = static_cast<S>(linf_step(",
        "threat_model",
        "step_is_the_reference and float32 and -linf",
        found=OUTSIDE,
    ),
    "a row of the block instead of the loop": Mutant(
        "cuda/fab_step.cu", "difference[n]", "difference[blockIdx.x]", "fab_step", STEP
    ),
    "a grid stride that leaves rows out": Mutant(
        "cuda/divergence.cu",
        "n += int64_t(gridDim.x) * kWarps",
        "n += int64_t(gridDim.x) * kThreads",
        "divergence",
        "are_the_reference and -33-probabilities",
    ),
    "a grid stride that leaves elements out": Mutant(
        "cuda/launch.h",
        "int64_t(gridDim.x) * blockDim.x; }",
        "int64_t(gridDim.x) * blockDim.x + 1; }",
        "keyed_uniform",
        "is_the_reference and float32",
    ),
    "a read beyond the end": Mutant(
        "cuda/score_step.cu",
        "static_cast<A>(grad[i])",
        "static_cast<A>(grad[i + 1])",
        "score_step",
        "step_is_the_reference and float32",
        found=OUTSIDE,
    ),
}

SHORT = {  # a race, and rows left out; test_sanitizers.py has an address outside
    "no barrier before a reduction is read",
    "a grid stride that leaves rows out",
}


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(mutant, id=name, marks=[] if name in SHORT else LONG) for name, mutant in MUTANTS.items()],
)
def test_a_mutant_is_found(mutant, tmp_path):
    csrc = build.copy_sources(tmp_path)
    build.substitute(csrc / mutant.changed, mutant.old, mutant.new)
    mutated = build.compile_sources(csrc, [mutant.source])
    # Without the change these pass: they are a part of test_operators_are_the_reference.
    selected = f"{SCHEDULES[mutant.schedule]} and {mutant.selected}"
    result = run_tests(mutated, [mutant.source], selected, mutant.schedule)
    assert result.returncode != 0, end_of(result)
    assert mutant.found in result.stdout + result.stderr, end_of(result)
