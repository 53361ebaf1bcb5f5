"""Several processes under torchrun, one device each: which one this is, and what they do together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.settings.errors import InputError, StopError, lost_process

Result = TypeVar("Result")

PATIENCE = timedelta(hours=12)  # one process trains a posterior while the others wait


def started_by_torchrun() -> bool:
    return distributed.is_available() and all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))


def check_environment() -> None:
    """Refuse variables of torchrun that are left over from elsewhere, or cannot be.

    Raises:
        InputError: one is missing, no number, or out of range.
    """
    if not started_by_torchrun():
        return
    alone = "allowed: all as torchrun sets them, or, to run alone, neither RANK nor WORLD_SIZE"
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    for name, value in given.items():
        if not value:
            raise InputError(f"{name}: is not set in the environment, while RANK and WORLD_SIZE are, {alone}")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise InputError(f"{name}: {value!r} in the environment is not a number, {alone}")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise InputError(f"RANK: {given['RANK']} with WORLD_SIZE {given['WORLD_SIZE']} in the environment, {alone}")


def planned_world_size() -> int:
    """How many processes torchrun has started, also before they have joined; 1 without it."""
    check_environment()
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def restarts() -> int:
    """How often torchrun (``--max-restarts``) has started the processes again, after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def device_of_this_process(device: torch.device) -> torch.device:
    """The device of this process: ``device``, or for CUDA under torchrun a GPU of its own.

    Raises:
        InputError: a machine has fewer GPUs than processes.
    """
    check_environment()
    if not started_by_torchrun() or device.type != "cuda" or device.index is not None:
        return device
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if rank >= torch.cuda.device_count():
        raise InputError(
            f"device: process {rank} of this machine finds {torch.cuda.device_count()} CUDA devices, allowed: at most "
            "as many processes"
        )
    return torch.device("cuda", rank)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes of torchrun, if it has started this one."""
    if not started_by_torchrun():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=PATIENCE))
    except RuntimeError as error:
        if (told := lost_process(error)) is None:
            raise
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise StopError(f"the processes cannot meet at MASTER_ADDR:MASTER_PORT, {place} ({told})") from None
    # Processes that torchrun has started again must not find the addresses of those before them: with gloo they do.
    store = distributed.PrefixStore(f"start {restarts()}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_samples(count: int) -> Tensor:
    """Which of ``count`` samples are those of this process, int64: every ``world_size``-th; there may be none."""
    return torch.arange(count)[rank() :: world_size()]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        distributed.barrier()


def from_first(value: Any) -> Any:
    """What the first process has, a plain value."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def by_first(function: Callable[[], Path]) -> Path:
    """Call ``function`` in the first process; every process gets the path that it returns, or raises its InputError."""
    found: Path | str = ""
    if rank() == 0:
        try:
            found = function()
        except InputError as error:
            found = str(error)
    found = from_first(found)
    if isinstance(found, str):
        raise InputError(found)
    return found


def in_turns(function: Callable[[], Result]) -> Result:
    """Call ``function``, such as a download, in the first process, then in the first one of each machine, then in all.

    Later ones may find what earlier ones have left.

    Raises:
        InputError: one of them has raised it; then every process does.
    """
    if world_size() == 1:
        return function()
    own_turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    found: list[Result] = []
    for turn in range(3):
        told: list[str | None] = [None] * world_size()
        mine = None
        if turn == own_turn:
            try:
                found.append(function())
            except InputError as error:
                mine = str(error)
        distributed.all_gather_object(told, mine)  # and waits for all
        for message in told:
            if message is not None:
                raise InputError(message)
    return found[0]


def summed(values: Tensor) -> Tensor:
    """The sum over the processes of a tensor that has no graph, in place."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global generators for a step, on all devices: a function of the seed, the step and the process.

    What layers such as dropout draw is then different in every process, and the same after an interruption.
    """
    state = np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first one, such as the running statistics of batch norm, in place."""
    if world_size() == 1:
        return
    for buffer in module.buffers():
        dense = buffer.contiguous()  # which alone can be sent
        distributed.broadcast(dense, src=0)
        buffer.copy_(dense)


def interleaved(mine: Tensor) -> Tensor:
    """All rows of a tensor, in order, in every process; ``mine`` are every n-th of them, as each process has them."""
    world = world_size()
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    distributed.all_gather_object(parts, mine.cpu())
    whole = torch.empty(sum(map(len, parts)), *mine.shape[1:], dtype=mine.dtype)
    for number, part in enumerate(parts):
        whole[number::world] = part
    return whole.to(mine.device)


class _Total(torch.autograd.Function):
    """The sum of a tensor over the processes, and that of its gradients backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone())


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the samples of all processes, for any device (torch's own takes GPUs alone).

    Input [N, C] or [N, C, …] in any process, with any N.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"x must be [N, C, …], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or world_size() == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = wide.new_full((1,), x.numel() / x.shape[1])
        # Two passes, as the variance from sums of squares loses digits.
        total = _Total.apply(torch.cat([wide.sum(axes), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = wide - mean.view(shape)
        variance = _Total.apply(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    assert self.num_batches_tracked is not None
                    momentum: Any = 1.0 / self.num_batches_tracked
                else:
                    momentum = self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        y = centred * scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)


PLAIN_BATCHNORMS = (_BatchNorm.forward, SyncBatchNorm.forward, nn.SyncBatchNorm.forward)


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """``module`` with its batch normalisation over all processes: torch's on GPUs, ours elsewhere.

    Raises:
        InputError: a batch norm does something else besides, such as timm's, which has the activation in itself.
    """
    for name, norm in module.named_modules():
        if isinstance(norm, _BatchNorm) and type(norm).forward not in PLAIN_BATCHNORMS:
            raise InputError(
                f"sync_batchnorm: {name} is a {type(norm).__name__}, which does more than to normalise, allowed: "
                "--no-sync-batchnorm, with statistics of its own in each process"
            )
    if next(module.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return _with_our_batchnorm(module)


def _with_our_batchnorm(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        new = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        like = next(iter(module.state_dict().values()), torch.empty(0))
        new.to(like).load_state_dict(module.state_dict())
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _with_our_batchnorm(child))
    return module
