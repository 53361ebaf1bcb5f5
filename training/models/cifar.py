"""What the classifiers for 32×32 colour images share: input check, normalisation inside the network, convolutions."""

import math

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from training.errors import InputError

IMAGE_SHAPE = (3, 32, 32)
# Mean and standard deviation of each channel, by the number of classes: CIFAR-10 and CIFAR-100 as published weights
# of this field expect them. Any other number of classes takes those of CIFAR-10.
STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
NO_STATISTICS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def check_images(name: str, input_shape: tuple[int, ...]) -> None:
    if tuple(input_shape) != IMAGE_SHAPE:
        allowed = list(IMAGE_SHAPE)
        raise InputError(f"model: {name} takes images {allowed}, the data has inputs of shape {list(input_shape)}")


@fx.wrap  # a test of values ends tracing, and with it the folding of batch norm
def check_batch(x: Tensor) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != IMAGE_SHAPE:
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, 3, 32, 32]")


class ImageClassifier(nn.Module):
    """Images [N, 3, 32, 32] in [0, 1] to logits [N, L]; attacks see the pixels, the network normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int, *, normalise: bool = True) -> None:
        super().__init__()
        mean, std = STATISTICS.get(num_classes, STATISTICS[10]) if normalise else NO_STATISTICS
        # Published state dicts do not hold them.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

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
    """Convolutions from N(0, 2 / (k² outputs)); everything else keeps torch's own initialisation."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            nn.init.normal_(module.weight, 0.0, deviation)


def set_momentum(network: nn.Module, momentum: float) -> None:
    """Weight of a new batch in the running statistics of batch norm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
