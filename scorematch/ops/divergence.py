"""Divergences between a target distribution and the softmax of logits."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import (
    accumulator,
    check_alike,
    check_number,
    check_same_device,
    check_tensor,
    choice,
    shape,
)

Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]

DIVERGENCES = {  # csrc/divergence.h
    "kl": 0,
    "se": 1,
    "l2": 2,
    "l1": 3,
    "linf": 4,
    "js": 5,
    "js_distance": 6,
    "l1_squared": 7,
}


def divergence(logits: Tensor, target: Tensor, *, kind: str = "se", clip: float = 0.0) -> Tensor:
    r"""relu(D(P ‖ Q) - clip) of every sample, with P = target and Q = softmax(logits).

    With natural logarithms and M = (P + Q)/2, D is (Pang et al., Table 1):

    | kind | D(P ‖ Q) |
    | --- | --- |
    | kl | Σ P log(P/Q) |
    | se | Σ (P - Q)² |
    | l2 | √Σ (P - Q)² |
    | l1 | Σ abs(P - Q) |
    | linf | max abs(P - Q) |
    | js | ½ KL(P ‖ M) + ½ KL(Q ‖ M) |
    | js_distance | √js |
    | l1_squared | (Σ abs(P - Q))² |

    Computed from log-probabilities: accurate for logits of ±1e4, one-hot targets and probabilities that underflow.
    Logits may be -inf (a class that the model excludes). With class indices, kl is the cross-entropy.

    Differentiable once, with respect to the logits and to a probability target: by autograd, in forward mode, by
    `torch.func`, through `torch.vmap`, compiled and exported. Where a target probability is 0, its gradient is 0. Where
    D = 0, the gradient of l2 and js_distance is 0. Where D <= clip and clip > 0, all gradients are 0. If several
    classes are equally far apart, the gradient of linf goes to the first of them.

    Args:
        logits: `[N, L]`; float32 or float64, on CUDA also float16 or bfloat16 (computed in float32).
        target: class indices int64 `[N]` in [0, L), or probabilities `[N, L]` of the logits' dtype, at least 0 and with
            row sums within 1e-3 of 1 (1e-2 for half precision).
        kind: a name of the table above.
        clip: at least 0, in the units of D; a divergence up to it gives a loss of 0 (the clipping of Table 2).

    Returns:
        `[N]`, in the logits' dtype, but float32 for half precision. NaN logits give NaN.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On the CPU also for labels out of range
            and targets that are not probabilities. On CUDA that would force a synchronisation: there the loss and the
            gradient of such a row are NaN.
        RuntimeError: there are no kernels for the device; or on a second differentiation, which only a graph of
            `torch.compile(backend="eager")` does not notice: there the second derivative misses a part.

    References:
        Pang et al., Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, ICML 2022, Table 1.
    """
    check_tensor("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {shape(logits)}, but must be [N, L]")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype == torch.int64:
        if target.shape != logits.shape[:1]:
            raise ValueError(
                f"target has shape {shape(target)} but logits has shape {shape(logits)}: "
                f"class indices must be [{logits.shape[0]}]"
            )
        check_same_device("target", target, "logits", logits)
    elif target.is_floating_point():
        _check_probabilities(logits, target)
    else:
        raise TypeError(f"target is {target.dtype}; it must be torch.int64 class indices or probabilities")
    number = check_kind_and_clip(kind, clip)
    return differentiable(torch.ops.scorematch.divergence.default, logits, target, number, clip)


def _check_probabilities(logits: Tensor, target: Tensor) -> None:
    if target.shape != logits.shape:
        raise ValueError(f"logits has shape {shape(logits)} but target has shape {shape(target)}")
    check_alike("target", target, "logits", logits)


def check_kind_and_clip(kind: str, clip: float) -> int:
    number = choice("kind", kind, DIVERGENCES)
    check_number("clip", clip)
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, got {clip}")
    return number


def differentiable(operator: Operator, logits: Tensor, target: Tensor, kind: int, clip: float) -> Tensor:
    """The loss of an operator that computes the gradients beside it, where they are at hand, if it is told to."""
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        # Within torch.func and in forward mode, requires_grad does not tell whether a derivative is wanted.
        return _Transformed.apply(operator, logits, target, kind, clip)[0]
    if not torch.is_grad_enabled() or not (logits.requires_grad or target.requires_grad):
        return _loss_and_gradients(operator, logits, target, kind, clip, False, False)[0]
    return _GradientsBesideLoss.apply(operator, logits, target, kind, clip, logits.requires_grad, target.requires_grad)


def _loss_and_gradients(operator: Operator, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A call that leaves autograd out, whose registered way takes tens of microseconds more."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _GradientsBesideLoss(torch.autograd.Function):
    """What eager code and torch.compile differentiate: the backward pass is one product."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        logits: Tensor,
        target: Tensor,
        kind: int,
        clip: float,
        want_logits: bool,
        want_target: bool,
    ) -> Tensor:
        loss, *gradients = _loss_and_gradients(operator, logits, target, kind, clip, want_logits, want_target)
        ctx.save_for_backward(logits, target, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_gradients(ctx, grad_loss, ctx.needs_input_grad[1:3]), None, None, None, None)


def _gradients(ctx: Any, grad_loss: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Of logits and target, as far as they are wanted."""
    logits, target, logit_gradient, target_gradient = ctx.saved_tensors
    scale = grad_loss.unsqueeze(1)
    by_logits = (scale * logit_gradient).to(logits.dtype) if wanted[0] else None
    by_target = (scale * target_gradient).to(logits.dtype) if wanted[1] else None
    # With create_graph=True gradients are recorded here. What the kernel gave has no graph, and would silently count as
    # constant. (A compiled graph refuses a second backward by itself, but for that of the backend "eager".)
    if torch.is_grad_enabled():
        by_logits = None if by_logits is None else _FirstOrderOnly.apply(by_logits, logits, target)
        by_target = None if by_target is None else _FirstOrderOnly.apply(by_target, logits, target)
    return by_logits, by_target


class _Transformed(torch.autograd.Function):
    """What torch.func and forward mode differentiate; autograd calls it in a slower way."""

    @staticmethod
    def forward(
        operator: Operator, logits: Tensor, target: Tensor, kind: int, clip: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_and_gradients(operator, logits, target, kind, clip, True, target.is_floating_point())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, logits, target, *_ = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.save_for_backward(logits, target, *gradients)
        ctx.save_for_forward(logits, target, *gradients)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_gradients(ctx, grad_loss, ctx.needs_input_grad[1:3]), None, None)

    @staticmethod
    def jvp(ctx: Any, _: None, by_logits: Tensor | None, by_target: Tensor | None, *__: None) -> tuple[Any, ...]:
        logits, target, logit_gradient, target_gradient = ctx.saved_tensors
        tangent = 0.0 if by_logits is None else (logit_gradient * by_logits).sum(1)
        if by_target is not None and target.is_floating_point():
            tangent = tangent + (target_gradient * by_target).sum(1)
        return _FirstOrderOnly.apply(tangent, logits, target), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], operator: Operator, logits: Tensor, target: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """The rows of all are the rows of one call."""
        both = zip((logits, target), in_dims[1:3], strict=True)
        moved = [t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in both]
        rows = moved[0].shape[:2]
        loss, by_logits, by_target = _Transformed.apply(operator, *(t.flatten(0, 1) for t in moved), *options)
        if target.is_floating_point():
            return (loss.unflatten(0, rows), by_logits.unflatten(0, rows), by_target.unflatten(0, rows)), (0, 0, 0)
        return (loss.unflatten(0, rows), by_logits.unflatten(0, rows), by_target), (0, 0, None)


class _FirstOrderOnly(torch.autograd.Function):
    """The identity of its first argument, which cannot be differentiated by any."""

    @staticmethod
    def forward(gradient: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "scorematch's divergences can be differentiated once (first order only); "
            "for second derivatives write the divergence in PyTorch"
        )

    jvp = backward

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int | None]:
        return _FirstOrderOnly.apply(*arguments), in_dims[0]


def register_gradients(name: str) -> None:
    """Of the bare operator, which a program of torch.export holds."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, target, _, _, *ctx.has = inputs
        ctx.save_for_backward(logits, target, *output[1:])

    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        if any(want and not has for want, has in zip(wanted, ctx.has, strict=True)):
            raise RuntimeError(f"{name} was called without a gradient that is asked for now")
        return (*_gradients(ctx, grad_loss, wanted), None, None, None, None)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def fake_divergence(
    logits: Tensor, target: Tensor, kind: int, clip: float, want_logit_gradient: bool, want_target_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(logits.dtype)
    rows, classes = logits.shape
    return (
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((rows, classes) if want_logit_gradient else (0,), dtype=dtype),
        logits.new_empty((rows, classes) if want_target_gradient else (0,), dtype=dtype),
    )


torch.library.register_fake("scorematch::divergence", fake_divergence)
register_gradients("scorematch::divergence")
