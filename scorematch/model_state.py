"""Borrow a model for an attack and give it back as it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

ATTACK_MODES = ("eval", "train", "frozen")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm as they are: in training mode it uses those of the batch alone."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        # Without tracking, batch norm in training mode neither reads nor writes its running statistics.
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def by_itself(model: nn.Module) -> Iterator[None]:
    """Let ``DistributedDataParallel``, around the model or a part of it, compute without a word to other processes.

    It counts on a backward pass of the parameters after its forward passes. With those of an attack in between, a
    static graph sums no gradients at all, and processes that make different numbers of them wait forever.
    """
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    before = [vars(wrapper).get("forward") for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            vars(wrapper)["forward"] = wrapper.module.__call__
        yield
    finally:
        for wrapper, forward in zip(wrappers, before, strict=True):
            if forward is None:
                del vars(wrapper)["forward"]
            else:
                vars(wrapper)["forward"] = forward


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over processes (FSDP, tensor parallelism).

    Each pass waits for all processes, which make different numbers of them in an evaluation.

    Raises:
        TypeError: as said.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    kinds = (("torch.distributed.fsdp", "FullyShardedDataParallel"), ("torch.distributed.tensor", "DTensor"))
    # Slow to import; there is none where nobody has.
    known = tuple(getattr(sys.modules.get(name), kind, ()) for name, kind in kinds)
    if any(isinstance(part, known) for part in (*model.modules(), *model.parameters())):
        raise TypeError(
            "model must be whole in each process, but its parameters are spread over several (FSDP): gather its state "
            "dict and load it into a copy"
        )


class _Loan:
    """What a model was like before it was borrowed."""

    def __init__(self, model: nn.Module) -> None:
        self.borrowers = 0
        self.training = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # a frozen script has none
        # Those that were made in inference mode take no gradients, and could not be given back.
        self.trainable = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
        self.kept = ExitStack()
        self.kept.enter_context(by_itself(model))

    def end(self) -> None:
        self.kept.close()
        for module, was_training in self.training:
            module.training = was_training
        for parameter in self.trainable:
            parameter.requires_grad_(True)


_loans: dict[int, _Loan] = {}  # of models in eval mode, by their id
_lending = threading.Lock()


@contextmanager
def borrowed(model: nn.Module, attack_mode: str = "eval") -> Iterator[None]:
    """Put a model into the mode of an attack, without parameter gradients; restore everything on leaving.

    Several threads may borrow a model in eval mode at a time; the last to leave restores it. Passes through
    ``DistributedDataParallel`` are meanwhile those of its module, see :func:`by_itself`.

    Args:
        model: any module.
        attack_mode: what batch normalisation (and dropout) does meanwhile:
            ``"eval"``: running statistics are used (TRADES, and evaluation);
            ``"train"``: batch statistics are used and the running ones updated (PGD-AT as published);
            ``"frozen"``: batch statistics are used, the running ones stay untouched (the generated-data pipeline).
            The last two leave the mode of every module as it is: a batch norm, or a model, that you have put into eval
            mode goes on with its running statistics.

    Raises:
        ValueError: ``attack_mode`` is none of these.
    """
    if attack_mode not in ATTACK_MODES:
        raise ValueError(f"attack_mode must be one of {', '.join(ATTACK_MODES)}, got {attack_mode!r}")
    with _lending:
        loan = (_loans.get(id(model)) if attack_mode == "eval" else None) or _Loan(model)
        loan.borrowers += 1
        if attack_mode == "eval":
            _loans[id(model)] = loan
    try:
        for parameter in loan.trainable:
            parameter.requires_grad_(False)
        if loan.training and attack_mode == "eval":
            with suppress(NotImplementedError):  # of torch.export: it stays in the mode that it was exported in
                model.eval()
        with frozen_statistics(model) if attack_mode == "frozen" else nullcontext():
            yield
    finally:
        with _lending:
            loan.borrowers -= 1
            if not loan.borrowers:
                if attack_mode == "eval":
                    del _loans[id(model)]
                loan.end()


@contextmanager
def unchanged_buffers(model: Any, warn: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Give the buffers of a module back as they were, with a warning if inference changed them."""
    if not isinstance(model, nn.Module):
        yield
        return
    kept = [
        (module, name, buffer, buffer.clone(), f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    changed = []
    try:
        yield
    finally:
        for module, name, buffer, values, full_name in kept:
            now = getattr(module, name, None)  # a pass may have put another tensor, of any shape, in its place
            if not _equal(now, values):
                changed.append(full_name)
            if now is not buffer:
                module._buffers[name] = buffer
            if buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer.data = values
            elif not _equal(buffer, values):
                buffer.copy_(values)
    if changed:
        warn(f"the model changes its buffers while it predicts ({', '.join(changed[:3])}); they were restored")


def _equal(now: Tensor | None, before: Tensor) -> bool:
    """Whether a tensor is what it was, NaN being equal to NaN."""
    if now is None or now.shape != before.shape or now.dtype != before.dtype or now.layout != before.layout:
        return False
    now, before = plain(now), plain(before)
    return bool(((now == before) | (now.isnan() & before.isnan())).all())


def plain(t: Tensor) -> Tensor:
    """The values of a tensor that is sparse, quantised or a view of other values, in one that can be compared."""
    if t.layout != torch.strided:
        t = t.to_dense()
    if t.is_quantized:
        t = t.int_repr()
    return t.resolve_conj().resolve_neg()


@contextmanager
def as_found(model: Any) -> Iterator[None]:
    """Borrow a model in eval mode and give its buffers back, too; a callable that is no module is used as it is.

    Raises:
        TypeError: its parameters are spread over processes, see :func:`check_whole`.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    check_whole(model)
    with borrowed(model, "eval"), unchanged_buffers(model):
        yield
