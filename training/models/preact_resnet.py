"""PreActResNet-18 of the DeepMind line, with the keys and the layout of its published weights.

He et al., 2016 (https://arxiv.org/abs/1603.05027); this variant: Gowal et al., 2020
(https://arxiv.org/abs/2010.03593). Its shortcuts are 3×3 convolutions of the raw input; the PreActResNet-18 of most
other adversarial training is :class:`training.models.resnet.PlainPreActResNet`.
"""

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


class Block(nn.Module):
    """Two 3×3 convolutions after batch norm and activation; where the shape changes, a 3×3 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, silu: bool) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = SameConv2d(inputs, outputs, stride)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = SameConv2d(outputs, outputs)
        self.activation = activation(silu)
        self.shortcut = SameConv2d(inputs, outputs, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        out = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(x))


class PreActResNet(ImageClassifier):
    """Images [N, C, H, W] to logits [N, L], 18 layers.

    Args:
        num_classes: L.
        silu: SiLU instead of ReLU.
        image_shape: [C, H, W] of one image.
    """

    def __init__(self, num_classes: int, *, silu: bool = False, image_shape: Sequence[int] = IMAGE_SHAPE) -> None:
        super().__init__(image_shape)

        def group(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(Block(inputs, outputs, stride, silu), Block(outputs, outputs, 1, silu))

        self.conv_2d = SameConv2d(self.channels, 64)
        self.layer_0 = group(64, 64, 1)
        self.layer_1 = group(64, 128, 2)
        self.layer_2 = group(128, 256, 2)
        self.layer_3 = group(256, 512, 2)
        self.batchnorm = nn.BatchNorm2d(512)
        self.activation = activation(silu)
        self.logits = nn.Linear(512, num_classes)
        initialise(self)
        set_momentum(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d(self.normalised(x))
        for group in (self.layer_0, self.layer_1, self.layer_2, self.layer_3):
            out = group(out)
        return self.logits(pooled(self.activation(self.batchnorm(out))))


def preact_resnet_18(input_shape: tuple[int, ...], num_classes: int) -> PreActResNet:
    check_images("preact-resnet-18", input_shape)
    return PreActResNet(num_classes, image_shape=input_shape)


def preact_resnet_18_silu(input_shape: tuple[int, ...], num_classes: int) -> PreActResNet:
    check_images("preact-resnet-18-silu", input_shape)
    return PreActResNet(num_classes, silu=True, image_shape=input_shape)
