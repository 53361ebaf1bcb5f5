"""The attack of a training step as one CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Attack = Callable[..., dict[str, Tensor]]


class AttackGraphs:
    """Runs attacks as CUDA graphs: after a few batches of a shape, all kernels of an attack are replayed as one graph.

    An attack of ten steps launches thousands of kernels one by one. A GPU that works through them faster than Python
    launches them has to wait. A replay launches all of them at once and computes the same.

    A graph is recorded once and holds for whatever lies in the same memory later: the weights and the running
    statistics of the model may change in place, as optimisers and batch norm change them. Everything else is fixed in
    it, so an AttackGraphs serves one objective with one model, one threat model and one posterior. What a recording
    forbids, and what notices it:

    ==============================================  ==========================================================
    an attack that asks the device for a value      the recording fails, with this explanation
    an input in other memory, or of another shape   inputs are copied; each shape has a recording of its own
    a module in another mode, another autocast      each has a recording of its own
    parameters or buffers in other memory           an error before the next replay
    another momentum of a batch norm, a number      an error before the next replay
    weights cast before, in the cache of autocast   an error instead of the recording
    a generator that torch does not know of         the recording fails: give random numbers as inputs
    processes that wait for each other              not noticed: keep communication out of the attack
    ==============================================  ==========================================================

    Memory that an attack takes while it is recorded is the recording's own, and outputs are copied out of it.

    Args:
        warmup: how many batches of each shape first run without a graph, at least 1; libraries choose and load their
            kernels meanwhile.

    Raises:
        ValueError: ``warmup`` is below 1; in a call: an input is not on a CUDA device.
        RuntimeError: in a call: one of the things above.
    """

    def __init__(self, warmup: int = 3) -> None:
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        self.warmup = warmup
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._fixed: _Fixed | None = None

    def __call__(self, attack: Attack, *inputs: Tensor, modules: Sequence[object] = ()) -> dict[str, Tensor]:
        """The outputs of ``attack(*inputs)``.

        Args:
            attack: maps tensors to named tensors, without a graph of automatic differentiation.
            inputs: on one CUDA device.
            modules: what the attack calls; those that are an ``nn.Module`` are watched.
        """
        self._check(inputs)
        key = key_of(inputs, modules)
        if key not in self._recordings:
            _refuse_cached_casts(inputs)
            self._calls[key] += 1
            if self._calls[key] <= self.warmup:
                return attack(*inputs)
            self._fixed = self._fixed or _Fixed(modules)
            self._recordings[key] = _Recording(attack, inputs)
        if self._fixed is not None:
            self._fixed.check(modules)
        return self._recordings[key].replay(inputs)

    @staticmethod
    def _check(inputs: tuple[Tensor, ...]) -> None:
        for value in inputs:
            if not value.is_cuda:
                raise ValueError(f"AttackGraphs records CUDA kernels, got an input on {value.device}")


def key_of(inputs: Sequence[Tensor], modules: Sequence[object]) -> tuple[object, ...]:
    """What must be the same for a recording to be replayed: the inputs but for their values, modes, and autocast."""
    device = inputs[0].device.type if inputs else "cuda"
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    modes = (inner.training for module in modules if isinstance(module, nn.Module) for inner in module.modules())
    kinds = ((value.shape, value.stride(), value.dtype, value.device) for value in inputs)
    return (*kinds, autocast, *modes)


def _refuse_cached_casts(inputs: tuple[Tensor, ...]) -> None:
    """A weight that autocast has cast before would be in the graph as it was then."""
    device = inputs[0].device.type if inputs else "cuda"
    if torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "an attack cannot be recorded under autocast, which may have cast the weights before: call it with "
            "torch.autocast(…, cache_enabled=False), or let the model alone use autocast"
        )


class _Fixed:
    """What a recording takes for granted about modules: where their tensors lie, and numbers of batch norms."""

    def __init__(self, modules: Sequence[object]) -> None:
        self.found = self._read(modules)

    def check(self, modules: Sequence[object]) -> None:
        now = self._read(modules)
        if now == self.found:
            return
        changed = [name for name in {**self.found, **now} if self.found.get(name) != now.get(name)]
        raise RuntimeError(
            f"{changed[0]} ({len(changed)} in all) has been replaced or set anew since an attack on it was recorded as "
            "a CUDA graph, which would go on with what was there before: change values in place, or use another "
            "AttackGraphs"
        )

    @staticmethod
    def _read(modules: Sequence[object]) -> dict[str, object]:
        found: dict[str, object] = {}
        for number, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                continue
            prefix = f"module {number}: "
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                found[prefix + name] = tensor.data_ptr()
            for name, inner in module.named_modules():
                if isinstance(inner, _BatchNorm):
                    found[f"{prefix}{name}.momentum"] = inner.momentum
        return found


class _Recording:
    """One graph, with the memory of its inputs and outputs."""

    def __init__(self, attack: Attack, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.detach().clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # torch's own stream for recordings is on the device that was the current one when it first recorded. And by
        # default no other thread may take or give back pinned memory meanwhile.
        stream = torch.cuda.Stream(self.inputs[0].device if self.inputs else None)
        failed: Exception | None = None
        try:
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                try:
                    self.outputs = attack(*self.inputs)
                except Exception as error:
                    failed = error  # then the recording cannot be ended either, with an error that says nothing
                    raise
        except RuntimeError as error:
            first = failed or error
            if not isinstance(first, RuntimeError) or isinstance(first, torch.OutOfMemoryError):
                raise first from None
            reason = " ".join(str(first).split())[:300]
            raise RuntimeError(
                f"the attack cannot be recorded as a CUDA graph ({reason}); usual reasons: it reads a value of the "
                "device, as batch norm with momentum None does, or it uses a generator that torch does not know of"
            ) from first

    def replay(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        # The next replay writes to the same memory.
        return {name: value.clone() for name, value in self.outputs.items()}
