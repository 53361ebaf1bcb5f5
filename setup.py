"""Builds the kernels; the metadata is in pyproject.toml.

python setup.py build_ext            compiles scorematch._C and, with CUDA, scorematch._C_cuda, in place
pip install -e . --no-build-isolation
pip wheel . --no-build-isolation

SCOREMATCH_CUDA=auto|0|1   compile csrc/cuda; auto (default): if torch was built with CUDA and its major version of nvcc
                           is found
TORCH_CUDA_ARCH_LIST       GPU architectures; default 8.0;9.0+PTX where no GPU is visible
MAX_JOBS                   compilers at a time; default: the number of cores
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path

# nvcc on PATH may be a wrapper script, from whose place torch would guess a CUDA_HOME without headers.
if "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/include/cuda_runtime.h").exists():
    os.environ["CUDA_HOME"] = "/usr/local/cuda"
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

os.chdir(Path(__file__).resolve().parent)  # the paths below are of this folder, wherever it is called from

HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fno-math-errno",  # lets sqrt be one instruction
    "-fno-trapping-math",  # lets both sides of a select be computed
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # SIMD packs are passed between inlined functions only
]
# Warnings are errors in tests/ops/test_build.py alone: another nvcc may have its own, as of GPUs that it will give up.
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-DUSE_CUDA"]


def with_cuda() -> bool:
    wish = os.environ.get("SCOREMATCH_CUDA") or "auto"
    if wish not in {"auto", "0", "1"}:
        sys.exit(f"SCOREMATCH_CUDA must be auto, 0 or 1, got {wish!r}")
    nvcc = CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
    possible = torch.version.cuda is not None and nvcc
    if wish == "1" and not possible:
        sys.exit(
            f"SCOREMATCH_CUDA=1 needs a torch built with CUDA (torch {torch.__version__}: CUDA {torch.version.cuda}) "
            f"and nvcc (CUDA_HOME: {CUDA_HOME})"
        )
    if wish == "auto" and possible and (found := version_of_nvcc()):
        possible = found.partition(".")[0] == str(torch.version.cuda).partition(".")[0]  # else torch refuses it
        if not possible:
            print(
                f"scorematch is built for the CPU alone: torch {torch.__version__} is of CUDA {torch.version.cuda}, "
                f"nvcc of CUDA {found} (CUDA_HOME: {CUDA_HOME})",
                file=sys.stderr,
            )
    return possible and wish != "0"


def version_of_nvcc() -> str | None:
    """As nvcc says it; None where it says nothing of the kind."""
    command = [str(Path(str(CUDA_HOME), "bin", "nvcc")), "--version"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", told)
    return found and found[1]


def extensions() -> Iterator[Extension]:
    yield CppExtension(
        "scorematch._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=HEADERS,
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-s"],
    )
    if with_cuda():
        if not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
        yield CUDAExtension(
            "scorematch._C_cuda",
            sorted(glob("csrc/cuda/*.cu")),
            depends=HEADERS,
            extra_compile_args={"nvcc": NVCC_FLAGS},
            extra_link_args=["-s"],
            py_limited_api=True,
        )


class BuildInPlace(BuildExtension):
    """A plain `build_ext` also leaves the libraries beside the package, where `python -m training.run` finds them."""

    def finalize_options(self) -> None:
        # Wheels and editable installs reach this through other commands and choose for themselves.
        if "build_ext" in sys.argv:
            self.inplace = True
        super().finalize_options()


setup(ext_modules=list(extensions()), cmdclass={"build_ext": BuildInPlace})
