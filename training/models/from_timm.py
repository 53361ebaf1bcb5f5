"""Architectures of the ``timm`` library, where it is installed: ``timm:NAME``, untrained or with trained weights."""

import difflib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from training.settings.errors import InputError, unknown_name

PREFIX = "timm:"
SIMILAR = 5  # names that an error lists


class Pretrained(nn.Module):
    """A network whose weights are trained on normalised images; this takes pixels in [0, 1] and normalises them.

    Args:
        network: takes the normalised images.
        mean: of each channel.
        std: of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        # As for the architectures of this package, the statistics are no weights.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


def timm_model(
    name: str, input_shape: tuple[int, ...], num_classes: int, *, pretrained: bool = False, weights: bool = True
) -> nn.Module:
    """The architecture ``name`` (without the prefix) of timm; it takes pixels as they are, in [0, 1].

    Args:
        name: a name that ``timm.list_models()`` lists, with a tag of its weights if you like (``resnet18.a1_in1k``).
        input_shape: (C, H, W); networks of a fixed image size are built for H × W.
        num_classes: number of logits; the last layer is a new one if the trained weights have another number.
        pretrained: with trained weights, from timm's cache or downloaded, and normalised as these expect; otherwise
            untrained, and with pixels as they are.
        weights: False builds what ``pretrained`` asks for and leaves the weights out, for those of a checkpoint.

    Raises:
        InputError: timm is not installed, has no such model, cannot build it for such images, or its weights are not
            at hand.
    """
    try:
        import timm
    except ImportError:
        raise InputError(f"model: {PREFIX}{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), SIMILAR)
        raise unknown_name(
            "model", PREFIX + name, [*(PREFIX + other for other in close), "those of timm.list_models()"]
        )
    if len(input_shape) != 3:
        raise InputError(f"model: {PREFIX}{name} takes images, got inputs of shape {list(input_shape)}")
    channels, height, width = input_shape
    options: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes}
    configuration = timm.get_pretrained_cfg(name)
    if configuration is not None and configuration.fixed_input_size:
        options["img_size"] = (height, width)
    if pretrained and (configuration is None or not configuration.has_weights):
        raise InputError(f"pretrained: timm has no weights for {PREFIX}{name}, {_with_weights(timm, name)}")
    load = pretrained and weights
    if load:
        network = _with_its_weights(timm, name, options)
    try:
        if not load:
            network = timm.create_model(name, pretrained=False, **options)
        network = network.eval()
        with torch.no_grad():
            network(torch.zeros(1, *input_shape))  # small images end some networks half-way
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"model: {PREFIX}{name} cannot be built for {list(input_shape)} inputs ({reason})") from None
    if pretrained:
        network = Pretrained(network, *(_of_channels(configuration, kind, channels) for kind in ("mean", "std")))
    return network.train()


def _with_its_weights(timm: ModuleType, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # what a download raises depends on the library that does it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"pretrained: the weights of {PREFIX}{name} are not at hand ({reason}); they come from timm's cache "
            "($HF_HOME, ~/.cache/huggingface), or over the network"
        ) from None
    return network


def _with_weights(timm: ModuleType, name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_pretrained(), SIMILAR)
    return f"allowed: {', '.join([*(PREFIX + other for other in close), 'those of timm.list_pretrained()'])}"


def _of_channels(configuration: Any, kind: str, channels: int) -> Sequence[float]:
    """Means or deviations of so many channels; timm fits weights of three to another number, and so are these."""
    values = tuple(getattr(configuration, kind))
    return values if len(values) == channels else (sum(values) / len(values),) * channels
