"""Divergences between a target distribution and the softmax of logits."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._checks import (
    accumulator,
    check_alike,
    check_number,
    check_same_device,
    check_tensor,
    choice,
    shape,
)

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

    Differentiable once, with respect to the logits and to a probability target. Where a target probability is 0, its
    gradient is 0. Where D = 0, the gradient of l2 and js_distance is 0. Where D <= clip and clip > 0, all gradients are
    0. If several classes are equally far apart, the gradient of linf goes to the first of them.

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
        RuntimeError: there are no kernels for the device; or on a second differentiation.

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
    if not torch.is_grad_enabled() or not (logits.requires_grad or target.requires_grad):
        return torch.ops.scorematch.divergence.default(logits, target, number, clip, False, False)[0]
    return _Divergence.apply(logits, target, number, clip, logits.requires_grad, target.requires_grad)


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


# The kernel computes the gradients beside the loss, where the probabilities are at hand, so that the backward pass is
# one product. The class below is what connects them to autograd, in eager mode and under torch.compile: registration
# with the dispatcher costs tens of microseconds more a call.
class GradientsBesideLoss(torch.autograd.Function):
    @staticmethod
    def save(ctx: Any, logits: Tensor, target: Tensor, logit_gradient: Tensor, target_gradient: Tensor) -> None:
        ctx.save_for_backward(logits, target, logit_gradient, target_gradient)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, logit_gradient, target_gradient = ctx.saved_tensors
        scale = grad_loss.unsqueeze(1)
        by_logits = (scale * logit_gradient).to(logits.dtype) if ctx.needs_input_grad[0] else None
        by_target = (scale * target_gradient).to(logits.dtype) if ctx.needs_input_grad[1] else None
        # With create_graph=True gradients are recorded here. What the kernel gave has no graph, and would silently
        # count as constant. (A compiled graph refuses a second backward by itself.)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            by_logits = None if by_logits is None else _FirstOrderOnly.apply(by_logits, logits, target)
            by_target = None if by_target is None else _FirstOrderOnly.apply(by_target, logits, target)
        return by_logits, by_target, None, None, None, None


class _FirstOrderOnly(torch.autograd.Function):
    """The identity of its first argument, which cannot be differentiated by any."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "scorematch's divergences can be differentiated once (first order only); "
            "for second derivatives write the divergence in PyTorch"
        )


class _Divergence(GradientsBesideLoss):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, kind: int, clip: float, want_logits: bool, want_target: bool
    ) -> Tensor:
        loss, logit_gradient, target_gradient = torch.ops.scorematch.divergence.default(
            logits, target, kind, clip, want_logits, want_target
        )
        GradientsBesideLoss.save(ctx, logits, target, logit_gradient, target_gradient)
        return loss


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
