"""A model as attacks use it: logits and input gradients, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


class Classifier:
    """Calls a model and counts its passes over samples.

    Args:
        model: maps [N, …] to logits [N, L]; its parameters should not ask for gradients meanwhile.
        dtype: None computes as the model does; bfloat16 or float16 runs it under autocast. Logits come back in float32
            either way (float64 stays).
        on_pass: called with the number of samples after each pass, forward or backward.
        chunk: samples that go through the model at once where no gradient is wanted; None is all.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
        on_pass: Callable[[int], None] = lambda samples: None,
        chunk: int | None = None,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._on_pass = on_pass
        self._chunk = chunk
        self.forwards = 0  # passes of one sample
        self.backwards = 0

    def _logits(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self._on_pass(len(x))
        if self._dtype is None:
            return self._model(x)
        with torch.autocast(x.device.type, self._dtype):
            return self._model(x).float()

    def logits(self, x: Tensor) -> Tensor:
        """[N, L], without a graph."""
        with torch.no_grad():
            if self._chunk is None or len(x) <= self._chunk:
                return self._logits(x)
            return torch.cat([self._logits(part) for part in x.split(self._chunk)])

    def label(self, x: Tensor) -> Tensor:
        """The predicted class, int64 [N]."""
        return self.logits(x).argmax(1)

    def gradient(self, x: Tensor, loss: Loss, passes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, L], loss [N] and its gradient like x [N, …].

        Args:
            x: [N, …].
            loss: from logits [N, L] to [N].
            passes: over how many evaluations of a randomised model the gradient is averaged; logits and loss are those
                of the last.
        """
        x = x.detach().requires_grad_()
        total: Tensor | None = None
        for _ in range(passes):
            with torch.enable_grad():
                logits = self._logits(x)
                value = loss(logits)
                (gradient,) = torch.autograd.grad(value.sum(), x)
            self.backwards += len(x)
            self._on_pass(len(x))
            total = gradient if total is None else total + gradient
        assert total is not None
        return logits.detach(), value.detach(), total if passes == 1 else total / passes

    def class_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, L] and the gradient of each, [N, L, …]: L backward passes."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(x)
        classes = logits.shape[1]
        self.backwards += classes * len(x)
        self._on_pass(classes * len(x))
        columns = [torch.autograd.grad(logits[:, c].sum(), x, retain_graph=c + 1 < classes)[0] for c in range(classes)]
        return logits.detach(), torch.stack(columns, 1)


def cache_chunk(model: Any, x: Tensor, cache: int = 1 << 20) -> int | None:
    """How many samples to pass through a model at once on the CPU, so that its widest layer stays in the cache.

    Beside other work a forward pass of a small network is up to three times as fast in such chunks; alone, no slower.

    Args:
        model: a module; anything else is not looked into.
        x: [N, …], N ≥ 1.
        cache: bytes, the second-level cache of common processors.

    Returns:
        A power of two from 32, or None for whole batches.
    """
    if x.device.type != "cpu" or not isinstance(model, nn.Module):
        return None
    widest = 1

    def measure(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal widest
        if isinstance(output, Tensor):
            widest = max(widest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(measure) for module in model.modules()]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return max(32, 1 << (max(cache // widest, 1).bit_length() - 1))


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 arithmetic without TF32 on CUDA."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
