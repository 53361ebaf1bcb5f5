"""Builds csrc/cpu with or without sanitizers, as a library in the place of the ordinary kernels.

env $(python -m tests.ops.sanitized.build memory FOLDER) python -m pytest tests/ops/test_square.py

runs tests on it: `memory` stands for the address and the undefined-behaviour sanitizer, `threads` for the thread
sanitizer, `plain` for none, which is quick to build. One instruction set is built, the one that every processor has;
SCOREMATCH_SIMD=avx2|avx512 builds another.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import include_paths

from ..emulated_device.build import CSRC, compile_library, copy_folder, path_of_library, substitute

HERE = Path(__file__).resolve().parent
OPERATORS = sorted(source.stem for source in CSRC.glob("cpu/*.cpp") if "IMPL(scorematch, CPU" in source.read_text())
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi"]
# Every reference is checked by "undefined", which takes g++ minutes and finds nothing that "address" does not.
UNDEFINED = "shift,signed-integer-overflow,integer-divide-by-zero,bounds,float-cast-overflow,bool,enum,return"


class Sanitizer(NamedTuple):
    library: str | None  # must be loaded before python
    flags: list[str]
    options: dict[str, str]  # environment of the process


SANITIZERS = {
    "memory": Sanitizer(
        "libasan.so",
        # Without use-after-scope: marking every inlined value makes g++ eight times as slow.
        [f"-fsanitize=address,{UNDEFINED}", "-fno-sanitize-recover=all", "-fno-sanitize-address-use-after-scope"],
        # Leaks and doubles are of python and torch; what a kernel leaves unwritten is garbage.
        {"ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:max_malloc_fill_size=1000000000"},
    ),
    "threads": Sanitizer(
        "libtsan.so", ["-fsanitize=thread"], {"TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0"}
    ),
}
# Without warnings: a mutant may leave a variable unused (see tests/mutation_of_kernels.py).
BUILDS = SANITIZERS | {"plain": Sanitizer(None, ["-g0", "-w"], {})}
INSTRUCTION_SETS = {  # bytes of a register, flags of g++
    "baseline": (16, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
}
# In parallel.h: threads that the sanitizer sees, and for as little work as two items.
THREADS = {
    "torch::stable::parallel_for(": "sanitized::parallel_for(",
    "if (items <= items_a_thread) return": "if (items < 2) return",
    '#include "jobs.h"': f'#include "jobs.h"\n#include "{HERE}/threads.h"',
}


def runtime_libraries(sanitizer: str) -> list[str] | None:
    """What must be loaded before python; None where g++ or its sanitizer is missing."""
    paths = [path_of_library(name) for name in (BUILDS[sanitizer].library, "libstdc++.so") if name]
    return None if None in paths else [str(path) for path in paths]


def copy_sources(folder: Path, sanitizer: str) -> Path:
    """csrc in `folder`; for the thread sanitizer with other threads."""
    csrc = copy_folder(folder)
    if sanitizer == "threads":
        for old, new in THREADS.items():
            substitute(csrc / "cpu/parallel.h", old, new)
    return csrc


def compile_sources(csrc: Path, sanitizer: str, operators: Sequence[str], instruction_set: str = "baseline") -> Path:
    """A library of csrc/cpu/NAME.cpp for each name, and of the jobs that they use; one source, so that it is quick."""
    width, for_instructions = INSTRUCTION_SETS[instruction_set]
    flags = [*FLAGS, *BUILDS[sanitizer].flags, *for_instructions]
    if width != 16:
        substitute(csrc / "cpu/parallel.h", "&run<16, Job>", f"&run<{width}, Job>")
    source, library = csrc / "library.cpp", csrc.parent / f"{sanitizer}.so"
    headers = '#include "cpu/instruction_set.h"\n#undef SCOREMATCH_X86\n#include "cpu/job_bodies.h"\n'
    source.write_text(headers + "".join(f'#include "cpu/{name}.cpp"\n' for name in operators))
    compile_library(source, library, [*flags, *(f"-isystem{path}" for path in include_paths())])
    return library


def build(folder: Path, sanitizer: str, instruction_set: str = "baseline") -> Path:
    """The whole of csrc/cpu."""
    return compile_sources(copy_sources(folder, sanitizer), sanitizer, OPERATORS, instruction_set)


def variables(library: Path, sanitizer: str) -> dict[str, str]:
    """The environment of a process that has `library` in the place of the ordinary kernels."""
    preloaded = ":".join(runtime_libraries(sanitizer) or [])
    return {"LD_PRELOAD": preloaded, "SCOREMATCH_KERNELS": str(library), **BUILDS[sanitizer].options}


def main(name: str, folder: str) -> None:
    instruction_set = os.environ.get("SCOREMATCH_SIMD", "baseline")
    for what, given, allowed in (
        ("the build", name, BUILDS),
        ("SCOREMATCH_SIMD", instruction_set, INSTRUCTION_SETS),
    ):
        if given not in allowed:
            sys.exit(f"{what} must be one of {{{', '.join(allowed)}}}, got {given!r}")
    if runtime_libraries(name) is None:
        sys.exit(f"g++ with {BUILDS[name].library or 'libstdc++.so'} is needed")
    library = build(Path(folder), name, instruction_set)
    print(*(f"{key}={value}" for key, value in variables(library, name).items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
