"""The attack of a training step as one CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

Attack = Callable[..., dict[str, Tensor]]


class AttackGraphs:
    """Runs attacks, from the fourth batch of a shape on by replaying a CUDA graph of all their kernels.

    An attack of ten steps launches thousands of kernels one by one; a GPU that works through them faster than Python
    launches them waits. A replay launches all of them at once and computes the same.

    A graph is recorded once and holds for whatever lies in the same memory later: the weights and the running
    statistics of the model may change in place, as optimisers and batch norm change them. Everything else is fixed in
    it, so an AttackGraphs serves one objective with one model, one threat model, one posterior, and an attack that
    asks the device for no value. Replaced parameters (``model.to(…)`` after the first batches) go unnoticed.

    Args:
        warmup: batches of each shape that run without a graph; libraries choose and load their kernels meanwhile.

    Raises:
        ValueError: ``warmup`` is below 1; in a call: an input is not on a CUDA device.
    """

    def __init__(self, warmup: int = 3) -> None:
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        self.warmup = warmup
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, attack: Attack, *inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of ``attack(*inputs)``.

        Args:
            attack: from tensors to named tensors without a graph of automatic differentiation.
            inputs: on one CUDA device.
        """
        self._check(inputs)
        key = tuple((value.shape, value.stride(), value.dtype, value.device) for value in inputs)
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= self.warmup:
                return attack(*inputs)
            self._recordings[key] = _Recording(attack, inputs)
        return self._recordings[key].replay(inputs)

    @staticmethod
    def _check(inputs: tuple[Tensor, ...]) -> None:
        for value in inputs:
            if not value.is_cuda:
                raise ValueError(f"AttackGraphs records CUDA kernels, got an input on {value.device}")


class _Recording:
    """One graph, with the memory of its inputs and outputs."""

    def __init__(self, attack: Attack, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.detach().clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = attack(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        # The next replay writes to the same memory.
        return {name: value.clone() for name, value in self.outputs.items()}
