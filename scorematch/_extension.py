"""Loads the compiled kernels and explains a failure. There is no slow path to fall back to."""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_BUILD = "python setup.py build_ext --inplace"

try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    _found = sorted(path.name for path in _PACKAGE.glob("_C.*"))
    _why = f"{', '.join(_found)} cannot be loaded: {error}" if _found else f"no compiled _C lies in {_PACKAGE}"
    raise ImportError(
        f"scorematch's kernels are not built for this Python and torch {torch.__version__} ({_why}). "
        f"Run `{_BUILD}` in the source folder."
    ) from error
if Path(_C.__file__).parent != _PACKAGE:  # an editable install of another source folder brings its own
    raise ImportError(
        f"no compiled _C lies in {_PACKAGE}, and {_C.__file__} is of another source folder. "
        f"Run `{_BUILD}` in the source folder."
    )


def _load_cuda_kernels() -> bool:
    if torch.version.cuda is None:
        return False
    library = next(iter(sorted(_PACKAGE.glob("_C_cuda*.so"))), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library.name} cannot be loaded with torch {torch.__version__} (CUDA {torch.version.cuda}): {error}. "
            f"Run `SCOREMATCH_CUDA=1 {_BUILD}` in the source folder, or delete the file to use the CPU only."
        ) from error
    return True


has_cuda_kernels: bool = _load_cuda_kernels()


def build_info() -> dict[str, str]:
    """What the kernels were built with, and which instruction set they use on this processor."""
    return {
        "torch": _C.torch_version,
        "compiler": _C.compiler,
        "cuda": "built" if has_cuda_kernels else "not built",
        "instruction_set": _C.instruction_set,
    }


def missing_kernel_message(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, or None if one does."""
    if device.type == "cpu" or (device.type == "cuda" and has_cuda_kernels):
        return None
    if device.type == "cuda":
        return (
            f"scorematch was built without its CUDA kernels: run `SCOREMATCH_CUDA=1 {_BUILD}` where nvcc is installed"
        )
    return "scorematch has kernels for cpu and cuda"
