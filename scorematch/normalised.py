"""Turns a model of normalised inputs into a model of pixels, so that attacks and eps count in pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .inputs import check_floating


class Normalised(nn.Module):
    """Takes x and hands (x − mean) / std to a model, channel by channel.

    Args:
        model: maps normalised inputs [N, C, …] to whatever this module returns.
        mean, std: a number for each of C channels (of vectors [N, C]: for each feature), or one number for all; in the
            units of x, std > 0. Kept as buffers in the default dtype, or that of a tensor of floating-point numbers. On
            the meta device they have no values yet, and none are looked at.

    Raises:
        TypeError: ``model`` is not a module; in a call: x is not floating point.
        ValueError: mean or std is not finite, they are not equally many, or a std is not positive; in a call: x has
            another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, _numbers(name, values))
        if self.mean.shape != self.std.shape:
            raise ValueError(f"mean and std must be equally many, got {len(self.mean)} and {len(self.std)}")
        if not (self.std.is_meta or bool((self.std > 0).all())):
            raise ValueError(f"std must be positive, got {std!r}")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(normalised(x, self.mean, self.std))


@fx.wrap  # a test of shapes ends tracing, and with it the folding of batch norm
def normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x − mean) / std in the dtype of x [N, C, …].

    Args:
        x: [N, C, …], floating point.
        mean, std: [C], or [1] for all channels.

    Raises:
        TypeError: x is not floating point.
        ValueError: x has another number of channels.
    """
    check_floating(x)
    if x.dim() < 2 or (len(mean) != 1 and len(mean) != x.shape[1]):
        channels = len(mean)
        raise ValueError(f"x must be [N, {channels}, …], as mean and std have {channels} channels, got {list(x.shape)}")
    shape = [-1] + [1] * (x.dim() - 2)
    return (x - mean.to(x.dtype).view(shape)) / std.to(x.dtype).view(shape)


def _numbers(name: str, values: float | Sequence[float]) -> Tensor:
    """One number, or several, as [C]."""
    try:
        given = torch.as_tensor(values).detach()
        numbers = (given if isinstance(values, Tensor) else given.to(torch.get_default_dtype())).flatten().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, or one for each channel, got {values!r}") from None
    if len(numbers) == 0 or not numbers.is_floating_point() or not (numbers.is_meta or bool(numbers.isfinite().all())):
        raise ValueError(f"{name} must be finite numbers, at least one, got {values!r}")
    return numbers
