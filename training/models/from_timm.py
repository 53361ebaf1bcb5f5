"""Architectures of the ``timm`` library, where it is installed: ``timm:NAME``."""

import difflib
from typing import Any

import torch
from torch import nn

from training.errors import InputError, unknown_name

PREFIX = "timm:"
SIMILAR = 5  # names that an error lists


def timm_model(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The architecture ``name`` (without the prefix) of timm, untrained; it takes pixels as they are, in [0, 1].

    Args:
        name: a name that ``timm.list_models()`` lists.
        input_shape: (C, H, W); networks of a fixed image size are built for H × W.
        num_classes: number of logits.

    Raises:
        InputError: timm is not installed, has no such model, or cannot build it for such images.
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
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **options).eval()
        with torch.no_grad():
            network(torch.zeros(1, *input_shape))  # small images end some networks half-way
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"model: {PREFIX}{name} cannot be built for {list(input_shape)} inputs ({reason})") from None
    return network.train()
