"""What all benchmarks do: check what is asked for before they measure, and write down how a result was made."""

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from training.engine import checkpoint, distributed
from training.settings import config
from training.settings.errors import InputError

COUNT: config.Check = (lambda v: v >= 1, "at least 1")
COUNTS: config.Check = (lambda v: all(n >= 1 for n in v), "numbers of at least 1")
NUMBER: config.Check = (lambda v: v >= 0, "0 or more")
LENGTH: config.Check = (lambda v: 0 < v < float("inf"), "a finite number above 0")


class Asked(Protocol):
    """The settings of a benchmark, a dataclass."""

    @property
    def threads(self) -> int: ...  # CPU threads; 0 is all
    @property
    def out(self) -> Path | None: ...


def check(settings: Asked, ranges: dict[str, config.Check]) -> torch.device:
    """Refuse values out of range and a file that cannot be written; the threads of torch are set.

    Returns:
        The device, the CPU where the settings name none.

    Raises:
        InputError: as said.
    """
    config.check_ranges(settings, {**ranges, "threads": config.RANGES["threads"]})
    if settings.out is not None:
        checkpoint.check_writable(settings.out)
    torch.set_num_threads(config.resolve_threads(settings.threads))
    return config.resolve_device(getattr(settings, "device", "cpu"))


def check_names(what: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse no name at all, and names that nothing has.

    Raises:
        InputError: as said.
    """
    unknown = [name for name in given if name not in allowed]
    if unknown or not given:
        said = f"{', '.join(map(repr, unknown))} is unknown" if unknown else "none given"
        raise InputError(f"{what}: {said}, allowed: {', '.join(allowed)}")


def write(out: Path | None, module: str, arguments: Sequence[str], device: torch.device, **results: Any) -> None:
    """Write a result with the command that made it, the device and the versions, if it has a file."""
    if out is None:
        return
    count = distributed.world_size()
    launcher = "python" if count == 1 else f"torchrun --standalone --nproc-per-node {count}"
    head = {
        "command": f"{launcher} -m benchmarks.{module} {shlex.join(arguments)}".strip(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    checkpoint.write_json(out, {**head, **results})


def device_name(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.processor()
