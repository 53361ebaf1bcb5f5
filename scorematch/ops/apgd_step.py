"""One iteration of Auto-PGD: bookkeeping of the best point, a step, its projection and the momentum, in place."""

import torch
from torch import Tensor

from ._checks import (
    accumulator,
    check_alike,
    check_ball_and_box,
    check_batch,
    check_companion,
    check_number,
    check_tensor,
    choice,
    in_accumulator,
    without_graph,
)
from .pgd_step import NORMS


def check_per_sample(name: str, t: Tensor, x: Tensor) -> None:
    """One value a sample, [N], in the dtype of `x` or, for half precision, float32."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != x.dtype and t.dtype != accumulator(x.dtype):
        raise TypeError(f"{name} is {t.dtype} but x is {x.dtype}")
    check_companion(name, t, t.dtype, "x", x, (x.shape[0],))


def check_flags(name: str, t: Tensor, x_name: str, x: Tensor) -> None:
    """A bool a sample, [N]."""
    check_companion(name, t, torch.bool, x_name, x, (x.shape[0],))


def _dense_format(x: Tensor) -> torch.memory_format | None:
    """The memory format in which `x` has no gaps, or None."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for memory_format in (torch.contiguous_format, formats.get(x.dim())):
        if memory_format is not None and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None


def apgd_step(
    x: Tensor,
    x_prev: Tensor,
    x0: Tensor,
    grad: Tensor,
    best_x: Tensor,
    best_grad: Tensor,
    step_size: Tensor,
    improved: Tensor,
    restart: Tensor,
    *,
    norm: str,
    eps: float,
    momentum: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    r"""One iteration of Auto-PGD on `x`, `x_prev`, `best_x` and `best_grad`, **in place**. For each sample:

    .. math::
        \text{where improved:}\quad & best\_x \leftarrow x,\; best\_grad \leftarrow grad \\
        & (c, g) = (best\_x, best\_grad) \text{ where restart, else } (x, grad) \\
        & z = P(c + step\_size \cdot \operatorname{dir} g) \\
        & (x, x\_prev) \leftarrow (P(c + momentum \, (z - c) + (1 - momentum)(c - x\_prev)),\; c)

    linf: dir g = sign g, and P clips to [x0 - eps, x0 + eps], then to the box. l2: dir g = g / ‖g‖₂ (0 for a zero
    gradient), and P projects to the ball, then clips to the box. linf is, bit for bit, what PyTorch's float32 makes of
    these formulas. A NaN makes the next point NaN: in that element (linf) or in the whole sample (l2). No gradient
    passes through.

    Args:
        x: the current point, `[N, ...]`; float32 or float64, on CUDA also float16 or bfloat16. The four tensors written
            are contiguous or channels_last, all alike, and share no memory with another argument.
        x_prev: the point before it, like `x`; at the first iteration a copy of `x`.
        x0: the centre of the ball, like `x`, in any memory format.
        grad: the gradient of the loss to increase at `x`, like `x`, in any memory format.
        best_x, best_grad: the point of the highest loss so far and its gradient, like `x`.
        step_size: length of the step of each sample, `[N]`, finite, in the dtype of `x` (float32 is also allowed with
            half precision).
        improved: whether `x` has a higher loss than `best_x`, bool `[N]`.
        restart: whether the step starts at the best point instead of `x`, bool `[N]`.
        norm: `"linf"` or `"l2"` (of each sample).
        eps: radius of the ball, greater than 0; may be infinite.
        momentum: weight of the new step in [0, 1]; 1 - momentum is that of the one before.
        lower, upper: the box, `lower < upper`; either may be infinite.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks, ICML 2020, Algorithm 1.
    """
    check_tensor("x", x)
    check_batch("x", x)
    written = {"x": x, "x_prev": x_prev, "best_x": best_x, "best_grad": best_grad}
    for name, t in {**written, "x0": x0, "grad": grad}.items():
        check_alike(name, t, "x", x)
    memory_format = _dense_format(x)
    if memory_format is None:
        raise ValueError(f"x is written in place and must be contiguous or channels_last, got strides {x.stride()}")
    for name, t in written.items():
        if not t.is_contiguous(memory_format=memory_format):
            raise ValueError(
                f"{name} is written in place and must be in the memory format of x: x has strides {x.stride()}, "
                f"{name} {t.stride()}"
            )
    check_per_sample("step_size", step_size, x)
    check_flags("improved", improved, "x", x)
    check_flags("restart", restart, "x", x)
    number = choice("norm", norm, NORMS)
    check_ball_and_box(eps, lower, upper)
    check_number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    torch.ops.scorematch.apgd_step.default(
        without_graph(x),
        without_graph(x_prev),
        without_graph(x0),
        without_graph(grad),
        without_graph(best_x),
        without_graph(best_grad),
        in_accumulator(step_size, x.dtype),
        improved,
        restart,
        number,
        eps,
        momentum,
        lower,
        upper,
    )
    # A graph that saved one of them must refuse its backward pass instead of using the new values.
    torch.autograd.graph.increment_version(list(written.values()))


@torch.library.register_fake("scorematch::apgd_step")
def _(
    x: Tensor,
    x_prev: Tensor,
    x0: Tensor,
    grad: Tensor,
    best_x: Tensor,
    best_grad: Tensor,
    step_size: Tensor,
    improved: Tensor,
    restart: Tensor,
    norm: int,
    eps: float,
    momentum: float,
    lower: float,
    upper: float,
) -> None:
    return None
