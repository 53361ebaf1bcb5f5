"""Batch normalisation folded into the convolution before it, while a model is in eval mode."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights


class Folding:
    """Finds each convolution whose output goes to a batch norm and nowhere else, by tracing the model.

    In a model that ``torch.fx`` cannot trace, no pairs are found. Modules that are called more than once are left out.
    Code that tests values, such as the shape of its input, cannot be traced unless it is a function under
    ``torch.fx.wrap``. A module with hooks is not looked into.

    Args:
        model: any module; it is not changed, since a copy is traced. One that cannot be copied has no pairs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pairs: list[tuple[_ConvNd, _BatchNorm]] = []
        self._folded: list[tuple[Tensor, Tensor]] = []
        self._versions: tuple[int, ...] = ()
        try:
            with _TRACING:
                graph = _Tracer().trace(copy_sharing_tensors(model))
        except Exception:  # whatever a model raises when it is copied, or called without values
            return
        modules = dict(model.named_modules())
        called = [node.target for node in graph.nodes if node.op == "call_module"]
        for node in graph.nodes:
            if node.op != "call_module" or called.count(node.target) > 1 or not node.args:
                continue
            norm, source = modules[node.target], node.args[0]
            if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
                continue
            if not isinstance(source, fx.Node) or source.op != "call_module" or called.count(source.target) > 1:
                continue
            conv = modules[str(source.target)]
            # A weight that is computed anew at each call (weight norm) is no parameter that could be replaced.
            if not isinstance(conv, _ConvNd) or conv._parameters.get("weight") is None:
                continue
            own = "forward" in vars(conv) or "forward" in vars(norm)  # does something else
            if not conv.transposed and len(source.users) == 1 and not own:
                self.pairs.append((conv, norm))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which each convolution also does the work of its batch norm, and the batch norm does nothing.

        It is for inference and for gradients with respect to the input: the folded weights take no gradients.
        """
        self._refresh()
        kept = [(conv._parameters["weight"], conv._parameters["bias"]) for conv, _ in self.pairs]
        try:
            for (conv, norm), (weight, bias) in zip(self.pairs, self._folded, strict=True):
                conv._parameters["weight"], conv._parameters["bias"] = weight, bias  # type: ignore[assignment]
                norm.forward = _identity  # type: ignore[assignment,method-assign]
            yield
        finally:
            for (conv, norm), (old_weight, old_bias) in zip(self.pairs, kept, strict=True):
                conv._parameters["weight"], conv._parameters["bias"] = old_weight, old_bias
                norm.__dict__.pop("forward", None)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Fold anew if a weight or a statistic has changed since.

        What is written through ``.data`` does not show, nor what a fused optimiser of torch writes: call
        ``torch.autograd.graph.increment_version`` after it.
        """
        tensors = [t for pair in self.pairs for module in pair for t in (*module.parameters(), *module.buffers())]
        # A CUDA graph has to fold by itself: what was folded before it was recorded is of those weights, and what
        # another graph has folded changes when that one is replayed. Each is recorded on a stream of its own.
        places = (place for t in tensors for place in (id(t), t.data_ptr(), t._version))
        versions = (_recording(tensors), *places)
        if versions == self._versions:
            return
        self._versions, self._folded = versions, []
        for conv, norm in self.pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            self._folded.append((weight.detach(), bias.detach()))


# While it traces, torch.fx puts functions of its own in the place of two methods of all modules, and then what it has
# found there back: two traces at a time would leave them there.
_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Convolutions and batch norms are leaves, those of derived classes too; so is what has hooks, which do not run.

    Modules that other threads call meanwhile do what they always do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = bool(m._forward_hooks or m._forward_pre_hooks)
        return hooked or isinstance(m, (_ConvNd, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of a model with the same parameters, buffers and other tensors in its attributes."""
    holders = [kept for m in model.modules() for kept in (vars(m), m._parameters, m._buffers)]
    shared = {id(value): value for kept in holders for value in kept.values() if isinstance(value, Tensor)}
    return copy.deepcopy(model, shared)


def _recording(tensors: Sequence[Tensor]) -> int:
    """The stream on which a CUDA graph is being recorded, 0 for none; only asked where there is a device."""
    if not (tensors and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return 0
    return torch.cuda.current_stream(tensors[0].device).cuda_stream


def _identity(x: Tensor) -> Tensor:
    return x
