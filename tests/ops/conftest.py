"""Devices and dtypes that the operator tests run on; tolerances stand beside the dtype."""

import os

import pytest
import torch

from scorematch import _extension
from scorematch.ops import _checks

# A library of csrc/cuda that takes tensors of the CPU, in place of the CPU kernels: see test_emulated_device.py.
EMULATED_DEVICE = os.environ.get("SCOREMATCH_EMULATED_DEVICE")
if EMULATED_DEVICE:
    torch.ops.load_library(EMULATED_DEVICE)
    _checks._CPU_DTYPES = _checks._CUDA_DTYPES

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and _extension.has_cuda_kernels else [])

# dtype: (rtol, atol) against the float64 reference
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-4, 2e-6),
    torch.float16: (2e-2, 4e-3),
    torch.bfloat16: (1e-1, 3e-2),
}
DEVICE_DTYPES = [
    (device, dtype)
    for device in DEVICES
    for dtype in TOLERANCES
    if device == "cuda" or EMULATED_DEVICE or dtype.itemsize >= 4
]


def runs_cuda_code(device: str) -> bool:
    """Whether the kernels for this device are those of csrc/cuda, on a GPU or on the emulated one."""
    return device == "cuda" or EMULATED_DEVICE is not None


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICE_DTYPES, ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}")
def device_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Against a reference computed in float64, with the tolerance of `dtype` (default: that of `actual`)."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=rtol, atol=atol, equal_nan=True)
