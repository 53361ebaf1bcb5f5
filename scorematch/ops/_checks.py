"""Argument checks shared by the wrappers: each names the argument, what was given and what is allowed.

On little data the checks take a good part of the time of a call. So each asks about the usual case first, by the
cheapest question.
"""

from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

from .. import _extension

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny

_CPU_DTYPES = (torch.float32, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape(t: Tensor) -> str:
    return str(list(t.shape))


def check_tensor(name: str, t: Tensor) -> None:
    """A floating-point tensor of a dtype and on a device that the kernels support."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    check_dense(name, t)
    if t.is_cpu:
        if t.dtype not in _CPU_DTYPES:
            raise TypeError(f"{name} is {t.dtype}; on the CPU it must be torch.float32 or torch.float64")
    else:
        if not t.is_cuda or not _extension.has_cuda_kernels:
            _refuse_device(name, t)
        if t.dtype not in _CUDA_DTYPES:
            raise TypeError(
                f"{name} is {t.dtype}; on CUDA it must be torch.float32, torch.float64, torch.float16 or torch.bfloat16"
            )


def _refuse_device(name: str, t: Tensor) -> NoReturn:
    raise RuntimeError(f"{name} is on {t.device}, but {_extension.missing_kernel_message(t.device)}")


def check_same_kind(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """The dtype and device of another argument."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != other.dtype:
        raise TypeError(f"{name} is {t.dtype} but {other_name} is {other.dtype}")
    check_same_device(name, t, other_name, other)


def check_dense(name: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({t.layout}), expected a dense tensor")


def check_same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    check_dense(name, t)
    if t.device != other.device:
        raise ValueError(f"{name} is on {t.device} but {other_name} is on {other.device}")


def check_alike(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """The dtype, device and shape of another argument."""
    check_same_kind(name, t, other_name, other)
    if t.shape != other.shape:
        raise ValueError(f"{name} has shape {shape(t)} but {other_name} has shape {shape(other)}")


def check_companion(
    name: str, t: Tensor, dtype: torch.dtype, other_name: str, other: Tensor, expected: tuple[int, ...]
) -> None:
    """A tensor of this dtype and shape, on the device of another argument."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise TypeError(f"{name} is {t.dtype}, expected {dtype}")
    check_same_device(name, t, other_name, other)
    if t.shape != expected:
        raise ValueError(
            f"{name} has shape {shape(t)} but {other_name} has shape {shape(other)}: expected {list(expected)}"
        )


def check_batch(name: str, t: Tensor) -> None:
    if t.dim() < 1:
        raise ValueError(f"{name} has shape [], but must be a batch [N, ...]")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, (float, int, Real)):  # to ask an abstract class takes ten times as long
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_ball_and_box(eps: float, lower: float, upper: float) -> None:
    check_number("eps", eps)
    check_number("lower", lower)
    check_number("upper", upper)
    if not eps >= SMALLEST:
        allowed = f"greater than 0{f', and at least {SMALLEST:.3g}' if eps > 0 else ''}"
        raise ValueError(f"eps must be {allowed}, got {eps}")
    if not lower < upper:
        raise ValueError(f"the box is empty: lower must be less than upper, got lower={lower} and upper={upper}")


def choice(name: str, value: str, allowed: dict[str, int]) -> int:
    """The kernels' number for a named option."""
    number = allowed.get(value) if isinstance(value, str) else None
    if number is None:
        raise ValueError(f"{name} must be one of {{{', '.join(allowed)}}}, got {value!r}")
    return number


def without_graph(t: Tensor) -> Tensor:
    """For the operators that no gradient passes through."""
    return t.detach() if t.requires_grad else t


def in_accumulator(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t`, which no gradient passes through, in the dtype that kernels for `dtype` compute in."""
    wanted = accumulator(dtype)
    return without_graph(t if t.dtype == wanted else t.to(wanted))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in: float64 for itself, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dense_format(x: Tensor) -> Tensor:
    """What the elementwise kernels make of `x`: itself if contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous():
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    return x.contiguous()
