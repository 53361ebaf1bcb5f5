"""What the build must hold: every SIMD variant, CUDA code without spills, clear load errors."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scorematch
from scorematch import _C, _extension
from tests import mutation_of_kernels

from .processes import LONG

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [
    "apgd_step",
    "divergence",
    "fab_step",
    "keyed_uniform",
    "l1_step",
    "logit_divergence",
    "pgd_step",
    "random_start",
    "score_line_integral",
    "score_step",
    "square_l2",
    "square_linf",
]


SIMD_TESTS = ["apgd_step", "divergence", "fab_step", "keyed_uniform", "l1_step", "score_step", "square", "threat_model"]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **options)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_every_instruction_set_that_the_processor_would_choose(instruction_set):
    """The other tests run the widest; this runs some of them on what older processors choose."""
    if _C.instruction_set == "baseline" or instruction_set == _C.instruction_set:
        pytest.skip(f"the other tests run {_C.instruction_set}")
    selected = "float32 and reference and not 1000 and not 17 and not 31"
    tests = [str(ROOT / f"tests/ops/test_{name}.py") for name in SIMD_TESTS]
    result = run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", selected],
        env={**os.environ, "SCOREMATCH_SIMD": instruction_set, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.fixture(scope="module")
def nvcc() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    for home in ("/usr/local/cuda", CUDA_HOME):
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return str(Path(home, "bin/nvcc"))
    pytest.skip("no CUDA toolkit")


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=LONG), "sm_90"])
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu")))
def test_cuda_compiles_without_spills(source, architecture, nvcc, tmp_path):
    """The code for the device alone: the build compiles what runs on the host."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in include_paths()]
    flags = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    command = [nvcc, "-cubin", f"-arch={architecture}", *flags, *includes, str(ROOT / "csrc/cuda" / source)]
    result = run([*command, "-o", str(tmp_path / "kernel.cubin")])
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert len(spills) >= 2, report
    assert not any(spills), report
    assert f"for '{architecture}'" in report


def test_a_probability_is_rounded_before_another_one_is_subtracted(nvcc, tmp_path):
    """Where a product is fused with the difference, distributions that coincide differ, as the compiler pleases."""
    source = tmp_path / "difference.cu"
    source.write_text(
        f"""#include "{ROOT}/csrc/divergence.h"
        template <typename A>
        __device__ void difference(scorematch::LogSoftmax<A> q, scorematch::LogSoftmax<A> p, A* out) {{
          out[0] = q.from_exponential(out[1]) - p.from_exponential(out[2]);
        }}
        __global__ void in_float(scorematch::LogSoftmax<float> q, float* out) {{ difference(q, q, out); }}
        __global__ void in_double(scorematch::LogSoftmax<double> q, double* out) {{ difference(q, q, out); }}
        """
    )
    ptx = tmp_path / "difference.ptx"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
    result = run([nvcc, "-ptx", "-arch=sm_90", *flags, str(source), "-o", str(ptx)])
    assert result.returncode == 0, result.stderr
    products = re.findall(r"(?:mul|fma|mad)\S*\.f(?:32|64)", ptx.read_text())
    assert products == ["mul.rn.f32"] * 2 + ["mul.rn.f64"] * 2, "rn: not to be fused with anything"


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_are_registered(operator):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"scorematch::{operator}", "CPU")
    assert has_kernel(f"scorematch::{operator}", "CUDA") == _extension.has_cuda_kernels
    assert _extension.has_cuda_kernels == any(Path(scorematch.__file__).parent.glob("_C_cuda*.so"))


def test_build_facts():
    info = _extension.build_info()
    assert set(info) == {"torch", "compiler", "cuda", "instruction_set"}
    assert info["instruction_set"] in {"baseline", "avx2", "avx512"}


def planned(folder: Path, cases: list[tuple[str, dict[str, str]]]) -> list[list[str]]:
    """What setup.py would build without a GPU, with nvcc of a version and such variables: libraries, architectures."""
    code = f"""
import os, pathlib, runpy, setuptools
def setup(ext_modules, **options):
    print(*(extension.name for extension in ext_modules), os.environ.get("TORCH_CUDA_ARCH_LIST"))
setuptools.setup = setup
nvcc = pathlib.Path("bin/nvcc").absolute()
nvcc.parent.mkdir()
for version, variables in {cases!r}:
    nvcc.write_text("#!/bin/sh\\necho Cuda compilation tools, release " + version + ", V" + version + ".1")
    nvcc.chmod(0o755)
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    os.environ.update({{"SCOREMATCH_CUDA": "auto"}} | variables)
    runpy.run_path({str(ROOT / "setup.py")!r})
"""
    environment = {**os.environ, "CUDA_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    result = run([sys.executable, "-c", code], env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_what_is_built_for_which_gpus(tmp_path):
    """Code for 8.0 runs on 8.6 and 8.9, too, and PTX for 9.0 on all that come after it."""
    major = str(torch.version.cuda).partition(".")[0]
    both = ["scorematch._C", "scorematch._C_cuda"]
    cases = [
        (f"{major}.9", {}, [*both, "8.0;9.0+PTX"]),  # torch takes another minor version
        (f"{major}.9", {"TORCH_CUDA_ARCH_LIST": ""}, [*both, "8.0;9.0+PTX"]),  # of which torch would look for a GPU
        (f"{major}.9", {"TORCH_CUDA_ARCH_LIST": "7.5"}, [*both, "7.5"]),
        ("7.5", {}, ["scorematch._C", "None"]),  # torch refuses another major version
        ("7.5", {"SCOREMATCH_CUDA": "1"}, [*both, "8.0;9.0+PTX"]),  # and says so where CUDA was asked for
    ]
    assert planned(tmp_path, [case[:2] for case in cases]) == [case[2] for case in cases]


def package_copy(tmp_path: Path) -> Path:
    """The package's loader alone, without compiled libraries."""
    package = tmp_path / "scorematch"
    package.mkdir()
    shutil.copy(ROOT / "scorematch/_extension.py", package)
    (package / "__init__.py").write_text("from . import _extension\n")
    return package


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, r"no compiled _C lies in .*Run `python setup.py build_ext --inplace`"),
        ("_C.abi3.so", r"_C.abi3.so cannot be loaded: .*Run `python setup.py build_ext --inplace`"),
    ],
)
def test_missing_or_broken_library_says_what_to_run(library, message, tmp_path):
    package = package_copy(tmp_path)
    if library is not None:
        (package / library).write_text("not a library")
    # An editable install has a finder of its own, which would supply the real library to the copy.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import scorematch"
    result = run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 1
    assert re.search(r"ImportError: scorematch's kernels are not built.*" + message, result.stderr), result.stderr


def test_a_library_of_another_source_folder_is_refused(tmp_path):
    """An editable install of another clone offers its own where this one has none."""
    package = package_copy(tmp_path)
    library = _C.__file__
    code = f"""
import importlib.util, sys
class Offers:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {library!r}) if name == "scorematch._C" else None
sys.meta_path = [Offers()] + [f for f in sys.meta_path if 'editable' not in repr(f)]
import scorematch
"""
    result = run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 1
    told = f"ImportError: no compiled _C lies in {package}, and {library} is of another source folder."
    assert told in result.stderr, result.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="the library is only loaded by a torch with CUDA")
def test_broken_cuda_library_says_what_to_run(tmp_path):
    package = package_copy(tmp_path)
    for library in Path(scorematch.__file__).parent.glob("_C.*"):
        shutil.copy(library, package)
    (package / "_C_cuda.abi3.so").write_text("not a library")
    result = run([sys.executable, "-c", "import scorematch"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 1
    assert re.search(r"_C_cuda.abi3.so cannot be loaded.*Run `SCOREMATCH_CUDA=1", result.stderr), result.stderr


def test_a_device_without_kernels_is_refused_clearly(monkeypatch):
    x = torch.rand(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="x is on meta, but scorematch has kernels for cpu and cuda"):
        scorematch.pgd_step(x, x, x, norm="l2", step_size=0.1, eps=0.1)
    monkeypatch.setattr(_extension, "has_cuda_kernels", False)
    message = _extension.missing_kernel_message(torch.device("cuda"))
    assert message is not None
    assert "built without its CUDA kernels: run `SCOREMATCH_CUDA=1 python setup.py build_ext --inplace`" in message


def test_the_mutants_of_the_kernels_fit_the_sources():
    for mutant in mutation_of_kernels.mutants():
        assert mutation_of_kernels.places(mutant) == 1, mutant
