"""What a kernel cannot be faster than, and whether it has become slower: the arithmetic of both."""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]
Result = dict[str, Any]
SMALLEST_PROBE = 2**18  # bytes; less is moved in no time that could be told from that of a call
THRESHOLD = 1.15  # a regression is at least so many times as slow


@dataclass(frozen=True)
class Work:
    """What one call has to do by its definition, however it is programmed."""

    read: int  # bytes
    written: int  # bytes
    operations: float  # additions, multiplications, comparisons, …; a division or a root counts as one
    exponentials: float = 0  # and logarithms, which take as long
    turns: int = 1  # other calls' data pass before a call's own comes again
    backward: bool = False  # forward and backward through autograd


def work(
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    operations: float,
    exponentials: float = 0,
    turns: int = 1,
    backward: bool = False,
) -> Work:
    return Work(bytes_of(reads), bytes_of(writes), operations, exponentials, turns, backward)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Probes:
    """Seconds that the machine takes for simple things, on data that come round as often as the case's."""

    moved: int  # bytes that a reading reads, and that `copied` reads and writes together
    read: float  # in one run
    read_in_two: float  # in two at once, which is faster from memory and slower from the nearest cache
    copied: float
    call: float  # of torch's smallest operator
    backward: float  # the same, forward and backward


@dataclass(frozen=True)
class Peak:
    operations: float  # a second
    exponentials: float  # a second


def probe_runs(case: Work, device: str) -> tuple[int, dict[str, Run]]:
    """Bytes moved, and what is to be timed for `Probes`."""
    moved = max(case.read + case.written, SMALLEST_PROBE) // 8 * 8
    buffers = [torch.rand(moved // 4, device=device) for _ in range(case.turns)]
    to_read = itertools.cycle(buffers)
    halves, to_copy = (itertools.cycle([b.chunk(2) for b in buffers]) for _ in range(2))
    one = torch.ones(1, device=device)
    differentiable = torch.ones(2, device=device, requires_grad=True)
    upstream = torch.ones(2, device=device)

    def read_in_two() -> Tensor:
        a, b = next(halves)
        return torch.dot(a, b)

    def copy() -> None:
        source, target = next(to_copy)
        target.copy_(source)

    runs: dict[str, Run] = {
        "read": lambda: next(to_read).sum(),
        "read_in_two": read_in_two,
        "copied": copy,
        "call": one.neg,
    }
    if case.backward:
        runs["backward"] = lambda: torch.autograd.grad(differentiable.neg(), differentiable, upstream)
    return moved, runs


def floor_of(case: Work, probes: Probes, peak: Peak, cache_bytes: int) -> Result:
    """The least time of a call, in µs: that of a call as such, and the longer of moving its bytes and computing.

    A byte read takes as long as in the fastest of a sum, a dot product and a copy, a byte written as long as it adds to
    the copy.
    """
    overhead = probes.backward if case.backward else probes.call
    copied = max(probes.copied - probes.call, 0.0) / probes.moved
    seconds_a_byte = min(max(min(probes.read, probes.read_in_two) - probes.call, 0.0) / probes.moved, copied)
    seconds_a_byte_written = 2 * copied - seconds_a_byte
    moving = case.read * seconds_a_byte + case.written * seconds_a_byte_written
    computing = case.operations / peak.operations + case.exponentials / peak.exponentials
    size = case.read + case.written
    store = "memory" if size * case.turns > cache_bytes else "cache"
    bounds = {"call": overhead, store: moving, "arithmetic": computing}
    return {
        "bytes_read": case.read,
        "bytes_written": case.written,
        "operations": case.operations,
        "exponentials": case.exponentials,
        "footprint": size * case.turns,
        "call_us": overhead * 1e6,
        "moving_us": moving * 1e6,
        "computing_us": computing * 1e6,
        "floor_us": (overhead + max(moving, computing)) * 1e6,
        "bound": max(bounds, key=lambda name: bounds[name]),
    }


def measure_peak(device: str, seconds: Callable[[Run, int, str], float]) -> Peak:
    """By a product of matrices and by exponentials, the best of many: on a CPU in a near cache, on a GPU large enough
    to keep all of it busy."""
    side, count, repeats = (256, 2**14, 300) if device == "cpu" else (8192, 2**26, 20)
    a, z = torch.rand(side, side, device=device), torch.rand(count, device=device)
    product, exponentials = torch.empty_like(a), torch.empty_like(z)
    best = {}
    for name, run in (
        ("product", lambda: torch.mm(a, a, out=product)),
        ("exponentials", lambda: torch.exp(z, out=exponentials)),
    ):
        run()
        best[name] = min(seconds(run, 5, device) for _ in range(repeats))
    return Peak(2 * side**3 / best["product"], len(z) / best["exponentials"])


def measure_bandwidth(device: str, seconds: Callable[[Run, int, str], float], large: int) -> list[dict[str, float]]:
    """Bytes a second of a sum and of a triad a + 2 b, for arrays of several sizes; the best of several."""
    lines = []
    for size in (2**18, 2**21, 2**24, 2**27, large):
        whole = torch.rand(size // 4, device=device)
        a, b, out = (torch.rand(size // 12, device=device) for _ in range(3))
        line: dict[str, float] = {"bytes": size}
        for name, run in (("sum", whole.sum), ("triad", lambda a=a, b=b, out=out: torch.add(a, b, alpha=2, out=out))):
            run()
            calls = max(1, int(2**24 / size))
            best = min(seconds(run, calls, device) for _ in range(7))
            line[f"{name}_bytes_a_second"] = size / best
        lines.append(line)
    return lines


def last_cache(device: str) -> int:
    """Bytes of the last cache; of a virtual machine it may be shared with others."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=2**25)


def larger_than_caches(device: str) -> int:
    """Bytes of arrays that no cache holds, within a quarter of the memory."""
    if device != "cpu":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(4 * last_cache(device), memory // 4)


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """95 % and more, without an assumption about the distribution: two of the ordered values, of six at least."""
    ordered, n = sorted(values), len(values)
    below, beyond = 0, 1 / 2**n  # chance that no more than `below` of the values are on one side of the true median
    while beyond + math.comb(n, below + 1) / 2**n <= 0.025:
        below += 1
        beyond += math.comb(n, below) / 2**n
    return ordered[below], ordered[n - 1 - below]


def lower_decile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10)[0]


def spread(values: Sequence[float]) -> dict[str, float]:
    """In µs."""
    low, high = interval_of_median(values)
    upper_decile = statistics.quantiles(values, n=10)[-1]
    named = {
        "median": statistics.median(values),
        "p10": lower_decile(values),
        "p90": upper_decile,
        "low": low,
        "high": high,
    }
    return {f"{name}_us": value * 1e6 for name, value in named.items()}


class Unusable(Exception):
    """Two files that cannot be compared."""


def regressions(old: Result, new: Result, threshold: float = THRESHOLD) -> list[str]:
    """A line for each case that has become slower.

    The median must be `threshold` times as long and the intervals apart, both for the time and for the time beside
    eager PyTorch in the same rounds: a slower machine changes the first alone, another version of PyTorch may change
    the second alone.
    """
    for what in ("device", "threads"):
        if old[what] != new[what]:
            raise Unusable(f"{what} must be the same in both files, got {old[what]!r} and {new[what]!r}")
    for name, record in (("the old", old), ("the new", new)):
        if any("low_us" not in result["ours"] for result in record["results"]):
            raise Unusable(f"{name} file has no intervals: it is from before they were stored, measure again")
    earlier = {result["name"]: result for result in old["results"]}
    lines = []
    for result in new["results"]:
        if result["name"] not in earlier:
            continue
        before = earlier[result["name"]]
        slower = result["ours"]["median_us"] / before["ours"]["median_us"]
        beside_eager = before["eager/ours"] / result["eager/ours"]
        apart = result["ours"]["low_us"] > before["ours"]["high_us"]
        apart_beside_eager = result["eager/ours_interval"][1] < before["eager/ours_interval"][0]
        if min(slower, beside_eager) > threshold and apart and apart_beside_eager:
            lines.append(
                f"{result['name']}: {slower:.2f} times as long "
                f"({before['ours']['median_us']:.1f} to {result['ours']['median_us']:.1f} µs), "
                f"{beside_eager:.2f} times beside eager PyTorch"
            )
    return lines


def only_in_one(old: Result, new: Result) -> list[str]:
    """Names of cases that cannot be compared."""
    names = [{result["name"] for result in record["results"]} for record in (old, new)]
    return sorted(names[0] ^ names[1])
