"""What the classifiers for 32×32 colour images share: input check, normalisation inside the network, convolutions."""

import math

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from training.data import Statistics
from training.errors import InputError

IMAGE_SHAPE = (3, 32, 32)


def check_images(name: str, input_shape: tuple[int, ...]) -> None:
    if tuple(input_shape) != IMAGE_SHAPE:
        allowed = list(IMAGE_SHAPE)
        raise InputError(f"model: {name} takes images {allowed}, the data has inputs of shape {list(input_shape)}")


@fx.wrap  # a test of values ends tracing, and with it the folding of batch norm
def check_batch(x: Tensor) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != IMAGE_SHAPE:
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, 3, 32, 32]")


class ImageClassifier(nn.Module):
    """Images [N, 3, 32, 32] in [0, 1] to logits [N, L]; attacks see the pixels, the network normalises them itself.

    The statistics belong to the data set: :func:`training.models.build` sets them, and a checkpoint keeps them. Until
    then they are 0 and 1.
    """

    mean: Tensor
    std: Tensor
    normalises = True  # whether this architecture normalises at all, as it is published

    def __init__(self) -> None:
        super().__init__()
        # Published state dicts do not hold them.
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(3, 1, 1), persistent=False)

    def set_statistics(self, statistics: Statistics) -> None:
        """Normalise with this mean and this standard deviation of each channel."""
        for buffer, values in zip((self.mean, self.std), statistics, strict=True):
            buffer.copy_(torch.tensor(values).view(3, 1, 1))

    def normalised(self, x: Tensor) -> Tensor:
        check_batch(x)
        return (x - self.mean) / self.std


class SameConv2d(nn.Conv2d):
    """A 3×3 convolution without bias; with stride 2 it pads right and bottom by one only, as TensorFlow's SAME does."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.stride == (1, 1) else functional.pad(x, (0, 1, 0, 1)))


def activation(silu: bool) -> nn.Module:
    return nn.SiLU() if silu else nn.ReLU()


def initialise(network: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k² outputs)), no bias at first, the rest as torch does it: as published."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            nn.init.normal_(module.weight, 0.0, deviation)


def set_momentum(network: nn.Module, momentum: float) -> None:
    """Weight of a new batch in the running statistics of batch norm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
