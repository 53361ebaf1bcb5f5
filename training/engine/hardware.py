"""Decides every ``auto`` among the settings for speed: what is fastest on the hardware at hand.

None of it changes what is computed, except for rounding. Weights, losses, gradients of the weights and final verdicts
are always float32.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from scorematch.attacks.precision import allow_tf32

Precision = Literal["float32", "tf32", "bfloat16"]
PrecisionWish = Literal["auto", "float32", "tf32", "bfloat16"]
Switch = Literal["auto", "on", "off"]

# Compiling takes minutes; a shorter run does not earn them back. 110 epochs of CIFAR-10 with PGD-10 are half a million.
PASSES_WORTH_COMPILING = 50_000


@dataclass(frozen=True)
class Hardware:
    """What a device can do."""

    kind: str  # "cuda" or "cpu"
    name: str
    bfloat16: bool  # multiplies bfloat16 matrices faster than float32 ones
    compiler: bool  # torch.compile makes networks faster, and its compiler is at hand


# What plans are made for.
GPU = Hardware("cuda", "GPUs that multiply bfloat16", bfloat16=True, compiler=True)


def hardware_of(device: torch.device) -> Hardware:
    """What ``device``, which must be at hand, can do."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        triton = importlib.util.find_spec("triton") is not None
        return Hardware(
            "cuda", torch.cuda.get_device_name(device), capability >= (8, 0), triton and capability >= (7, 0)
        )
    # On a CPU torch.compile slows these networks down: docs/training.md has the figures.
    return Hardware(device.type, "the CPU", _multiplies_bfloat16(), compiler=False)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AVX-512 BF16 or AMX); without them bfloat16 is slower than float32."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class Speed:
    """How the network of a run is called."""

    precision: Precision = "float32"
    compile: bool = False  # torch.compile
    graph: bool = False  # the attack of a step as one CUDA graph
    fold: bool = False  # batch norm into convolutions, in attacks in eval mode
    channels_last: bool = False
    fused: bool = False  # the optimiser as one kernel

    def __str__(self) -> str:
        parts = {
            "compiled": self.compile,
            "the attack as a CUDA graph": self.graph,
            "batch norm folded": self.fold and not self.compile,
            "channels_last": self.channels_last,
            "fused optimiser": self.fused,
        }
        return ", ".join([self.precision, *(part for part, on in parts.items() if on)])


def precision_of(wish: PrecisionWish, hardware: Hardware) -> Precision:
    """bfloat16 where the hardware multiplies it faster, float32 elsewhere."""
    if wish != "auto":
        return wish
    return "bfloat16" if hardware.bfloat16 else "float32"


def compiles(wish: Switch, hardware: Hardware, passes: int) -> bool:
    """Whether to compile a network that is called ``passes`` times."""
    return wish == "on" or (wish == "auto" and hardware.compiler and passes >= PASSES_WORTH_COMPILING)


def records(wish: Switch, hardware: Hardware, *, possible: bool) -> bool:
    """Whether to record the attack as a CUDA graph; ``possible`` is whether this attack can be."""
    return wish == "on" or (wish == "auto" and hardware.kind == "cuda" and possible)


def prepare(device: torch.device, precision: Precision, *, deterministic: bool) -> None:
    """What torch decides for the whole process: TF32 products, and convolutions timed before one is chosen."""
    allow_tf32(precision == "tf32")
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic


def only_deterministic() -> None:
    """What may give other bits in another run becomes an error. To be called before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # earlier versions of torch ask for it
    torch.use_deterministic_algorithms(True)


@contextmanager
def sizes_vary() -> Iterator[None]:
    """For attacks whose batches shrink: cuDNN takes the convolution that it expects to be fast.

    Else it would time several anew for each size that it meets, for longer than the passes themselves take.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def parameters_of(network: nn.Module) -> str:
    """The number of parameters, to be read."""
    count = sum(parameter.numel() for parameter in network.parameters())
    return f"{count / 1e6:.1f} M parameters" if count >= 1e5 else f"{count} parameters"
