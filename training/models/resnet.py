"""ResNet-18 and PreActResNet-18 for small images, with the keys that most adversarial training gives them.

He et al., 2015 (https://arxiv.org/abs/1512.03385) and 2016 (https://arxiv.org/abs/1603.05027), with a 3×3 convolution
of stride 1 as the stem and without pooling after it. ResNet-18 takes raw pixels, as TRADES and its successors train
it; PreActResNet-18 normalises them inside, where Rice et al., 2020 (https://arxiv.org/abs/2002.11569) and the basic
setting of SCORE do so in front of the network.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from training.models.cifar import IMAGE_SHAPE, ImageClassifier, check_images, pooled


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Batch norm after each convolution, an activation after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Batch norm and activation before each convolution; a 1×1 shortcut takes the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def group(block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, outputs, stride), block(outputs, outputs, 1))


class ResNet(ImageClassifier):
    """Images [N, C, H, W] to logits [N, L], 18 layers, ReLU, no normalisation of the pixels."""

    normalises = False

    def __init__(self, num_classes: int, image_shape: Sequence[int] = IMAGE_SHAPE) -> None:
        super().__init__(image_shape)
        self.conv1 = conv3x3(self.channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = group(BasicBlock, 64, 64, 1)
        self.layer2 = group(BasicBlock, 64, 128, 2)
        self.layer3 = group(BasicBlock, 128, 256, 2)
        self.layer4 = group(BasicBlock, 256, 512, 2)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(self.normalised(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(pooled(out))


class PlainPreActResNet(ImageClassifier):
    """Images [N, C, H, W] to logits [N, L], 18 layers, ReLU.

    Beside :class:`training.models.preact_resnet.PreActResNet` it pads symmetrically, and its 1×1 shortcuts take the
    activated input.
    """

    def __init__(self, num_classes: int, image_shape: Sequence[int] = IMAGE_SHAPE) -> None:
        super().__init__(image_shape)
        self.conv1 = conv3x3(self.channels, 64)
        self.layer1 = group(PreActBlock, 64, 64, 1)
        self.layer2 = group(PreActBlock, 64, 128, 2)
        self.layer3 = group(PreActBlock, 128, 256, 2)
        self.layer4 = group(PreActBlock, 256, 512, 2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalised(x))))))
        return self.linear(pooled(functional.relu(self.bn(out))))


def resnet_18(input_shape: tuple[int, ...], num_classes: int) -> ResNet:
    check_images("resnet-18", input_shape)
    return ResNet(num_classes, input_shape)


def plain_preact_resnet_18(input_shape: tuple[int, ...], num_classes: int) -> PlainPreActResNet:
    check_images("preact-resnet-18-plain", input_shape)
    return PlainPreActResNet(num_classes, input_shape)
