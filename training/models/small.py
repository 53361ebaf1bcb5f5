"""Classifiers for small data."""

from torch import nn

from training.settings.errors import InputError


def digits_cnn(input_shape: tuple[int, ...], num_classes: int, *, batch_norm: bool = False) -> nn.Module:
    """Three convolutions of 32, 64 and 64 channels, the second with stride 2, and a hidden layer of 128, for 8×8."""
    if len(input_shape) != 3:
        raise InputError(f"model: digits_cnn takes images [C, H, W], the data has inputs of shape {list(input_shape)}")

    def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        norm: list[nn.Module] = [nn.BatchNorm2d(outputs)] if batch_norm else []
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not batch_norm), *norm, nn.ReLU()]

    channels, height, width = input_shape
    return nn.Sequential(
        *convolution(channels, 32, 1),
        *convolution(32, 64, 2),
        *convolution(64, 64, 1),
        nn.Flatten(),
        nn.Linear(64 * ((height + 1) // 2) * ((width + 1) // 2), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def digits_cnn_bn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """``digits_cnn`` with batch normalisation after each convolution."""
    return digits_cnn(input_shape, num_classes, batch_norm=True)


def toy_mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two hidden layers of 100 tanh units; with two classes the softmax is the paper's sigmoid output."""
    if len(input_shape) != 1:
        hint = f"; grey images have a channel, {[1, *input_shape]}" if len(input_shape) == 2 else ""
        raise InputError(f"model: toy_mlp takes vectors [D], the data has inputs of shape {list(input_shape)}{hint}")
    return nn.Sequential(
        nn.Linear(input_shape[0], 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, num_classes)
    )
