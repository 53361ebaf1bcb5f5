"""What the classifiers for images share: input check, normalisation inside the network, convolutions, pooling."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from training.data import Statistics
from training.settings.errors import InputError

IMAGE_SHAPE = (3, 32, 32)  # of CIFAR and SVHN; the networks take any other [C, H, W] that they are built for


def check_images(name: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise InputError(
            f"model: {name} takes images [C, H, W] of any size, the data has inputs of shape {list(input_shape)}"
        )


@fx.wrap  # a test of values ends tracing, and with it the folding of batch norm
def check_batch(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        channels, height, width = shape
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, {channels}, {height}, {width}]")


def pooled(x: Tensor) -> Tensor:
    """The mean over all pixels of x [N, C, H, W], [N, C]."""
    return functional.avg_pool2d(x, x.shape[-2:]).flatten(1)


class ImageClassifier(nn.Module):
    """Images [N, C, H, W] to logits [N, L]; attacks see the pixels, the network normalises them itself.

    The statistics belong to the data set: :func:`training.models.build` sets them, and a checkpoint keeps them. Until
    then they are 0 and 1.

    Args:
        image_shape: [C, H, W] of one image.
    """

    mean: Tensor
    std: Tensor
    normalises = True  # whether this architecture normalises at all, as it is published

    def __init__(self, image_shape: Sequence[int] = IMAGE_SHAPE) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        # Published state dicts do not hold them.
        self.register_buffer("mean", torch.zeros(self.channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(self.channels, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        return self.image_shape[0]

    def set_statistics(self, statistics: Statistics) -> None:
        """Normalise with this mean and this standard deviation of each channel."""
        for buffer, values in zip((self.mean, self.std), statistics, strict=True):
            buffer.copy_(torch.tensor(values).view(self.channels, 1, 1))

    def normalised(self, x: Tensor) -> Tensor:
        check_batch(x, self.image_shape)
        return (x - self.mean) / self.std


class SameConv2d(nn.Conv2d):
    """A 3×3 convolution without bias that pads as TensorFlow's SAME does.

    With stride 2 and an even size that is right and bottom by one only, with an odd size all sides.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1):
            x = functional.pad(x, (x.shape[-1] % 2, 1, x.shape[-2] % 2, 1))
        return super().forward(x)


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


def set_momentum(network: nn.Module, momentum: float = 0.01) -> None:
    """Weight of a new batch in the running statistics of batch norm; the published networks of this line have .01."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
