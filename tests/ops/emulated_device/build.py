"""Builds csrc/cuda for the CPU: the same sources, with g++ and the cuda_runtime.h beside this file.

env $(python tests/ops/emulated_device/build.py FOLDER) python -m pytest tests/ops/test_square.py

runs tests on it: a library is built in FOLDER, and the variables printed put its kernels in the place of those for the
CPU (see conftest.py), with the address sanitizer in the process.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
# In every source, in launch.h: tensors are on the CPU.
IN_SOURCES = ("STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m)")
IN_LAUNCH = ("torch::stable::accelerator::DeviceGuard", "emulated::DeviceGuard")
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror",
    "-fsanitize=address,undefined",
    # They check every reference, which is a third of g++'s work; "address" sees a wrong one where memory is touched.
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
]


def path_of_library(name: str) -> str | None:
    """Where g++ has a library of its own, or None without g++ or the library."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if Path(path).is_absolute() else None


def runtime_libraries() -> list[str] | None:
    """What must be loaded before python; None where g++ or its address sanitizer is missing."""
    paths = [path_of_library(name) for name in ("libasan.so", "libstdc++.so")]
    return None if None in paths else [str(path) for path in paths]


def substitute(path: Path, old: str, new: str) -> None:
    """`old` must be there, once."""
    text = path.read_text()
    count = text.count(old)
    if count != 1 or old == new:
        raise ValueError(f"{path.name} has {old!r} {count} times, expected once, to become {new!r}")
    path.write_text(text.replace(old, new))


def copy_folder(folder: Path) -> Path:
    """csrc in `folder`."""
    return Path(shutil.copytree(CSRC, folder / "csrc"))


def copy_sources(folder: Path) -> Path:
    """csrc in `folder`, for tensors on the CPU."""
    csrc = copy_folder(folder)
    for source in csrc.glob("cuda/*.cu"):
        substitute(source, *IN_SOURCES)
    substitute(csrc / "cuda/launch.h", *IN_LAUNCH)
    return csrc


def compile_sources(csrc: Path, names: Sequence[str]) -> Path:
    """A library of csrc/cuda/NAME.cu for each name, as one source: most of g++'s work is in what they all include."""
    source, library = csrc / "cuda/library.cpp", csrc.parent / "emulated_device.so"
    source.write_text("".join(f'#include "{name}.cu"\n' for name in names))
    includes = [f"-I{HERE}", *(f"-isystem{path}" for path in include_paths())]
    compile_library(source, library, [*FLAGS, "-DSCOREMATCH_EMULATED_DEVICE", *includes])
    return library


def compile_library(source: Path, library: Path, flags: Sequence[str]) -> None:
    torch = [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-shared", *flags, str(source), *torch, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")


def build(folder: Path) -> Path:
    """The whole of csrc/cuda."""
    csrc = copy_sources(folder)
    return compile_sources(csrc, sorted(source.stem for source in csrc.glob("cuda/*.cu")))


def variables(library: Path) -> dict[str, str]:
    """The environment of a process that has `library` in the place of the CPU's kernels."""
    return {
        "LD_PRELOAD": ":".join(runtime_libraries() or []),
        # Leaks and doubles are of python and torch; what a kernel leaves unwritten is garbage.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:max_malloc_fill_size=1000000000",
        "SCOREMATCH_EMULATED_DEVICE": str(library),
    }


if __name__ == "__main__":
    if runtime_libraries() is None:
        sys.exit("g++ with its address sanitizer is needed")
    print(*(f"{name}={value}" for name, value in variables(build(Path(sys.argv[1]))).items()))
