"""WideResNet-D-W of the DeepMind line, with the keys and the layout of its published weights.

Zagoruyko & Komodakis, 2016 (https://arxiv.org/abs/1605.07146); this variant: Gowal et al., 2020
(https://arxiv.org/abs/2010.03593), used by Rebuffi et al., 2021, and by SCORE with SiLU.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from training.models.cifar import (
    IMAGE_SHAPE,
    ImageClassifier,
    SameConv2d,
    activation,
    check_images,
    initialise,
    pooled,
    set_momentum,
)
from training.settings.errors import InputError

NAME = re.compile(r"wrn-(\d+)-(\d+)(-silu)?")
PATTERN = "wrn-D-W[-silu] with D = 6 n + 4"


class Block(nn.Module):
    """Two 3×3 convolutions after batch norm and activation; where the width changes, a 1×1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, silu: bool) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = SameConv2d(inputs, outputs, stride)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = SameConv2d(outputs, outputs)
        self.activation = activation(silu)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.batchnorm_0(x))
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(activated))))
        # The shortcut takes the activated input, the identity the raw one.
        return out + (x if self.shortcut is None else self.shortcut(activated))


class BlockGroup(nn.Module):
    """Blocks of one width; the first one has the stride."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int, silu: bool) -> None:
        super().__init__()
        rest = [Block(outputs, outputs, 1, silu) for _ in range(count - 1)]
        self.block = nn.Sequential(Block(inputs, outputs, stride, silu), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class WideResNet(ImageClassifier):
    """Images [N, C, H, W] to logits [N, L].

    Args:
        depth: convolutions on the longest path, 6 n + 4.
        width: factor of the channels 16, 32, 64 of the three groups.
        num_classes: L.
        silu: SiLU instead of ReLU.
        image_shape: [C, H, W] of one image.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        *,
        silu: bool = False,
        image_shape: Sequence[int] = IMAGE_SHAPE,
    ) -> None:
        super().__init__(image_shape)
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = SameConv2d(self.channels, channels[0])
        self.layer = nn.Sequential(
            *(
                BlockGroup(blocks, inputs, outputs, stride, silu)
                for inputs, outputs, stride in zip(channels, channels[1:], (1, 2, 2), strict=False)
            )
        )
        self.batchnorm = nn.BatchNorm2d(channels[-1])
        self.activation = activation(silu)
        self.logits = nn.Linear(channels[-1], num_classes)
        initialise(self)
        set_momentum(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer(self.init_conv(self.normalised(x)))
        return self.logits(pooled(self.activation(self.batchnorm(features))))


def wide_resnet(name: str, input_shape: tuple[int, ...], num_classes: int) -> WideResNet:
    """The network that ``name``, such as wrn-28-10-silu, describes."""
    match = NAME.fullmatch(name)
    assert match is not None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or depth % 6 != 4:
        raise InputError(f"model: {name!r} has depth {depth}, allowed: 6 n + 4 (10, 16, 22, 28, ...)")
    if width < 1:
        raise InputError(f"model: {name!r} has width {width}, allowed: at least 1")
    check_images(name, input_shape)
    return WideResNet(depth, width, num_classes, silu=match[3] is not None, image_shape=input_shape)
