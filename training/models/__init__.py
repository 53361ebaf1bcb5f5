"""The registry of classifiers: a name, or ``module:function`` for one of your own.

A builder takes the shape of one input and the number of classes and returns a module from inputs [N, ...] to logits
[N, L].
"""

import importlib
from collections.abc import Callable

from torch import nn

from training.errors import InputError, unknown_name
from training.models.small import digits_cnn, digits_cnn_bn, toy_mlp

Builder = Callable[[tuple[int, ...], int], nn.Module]

MODELS: dict[str, Builder] = {"digits_cnn": digits_cnn, "digits_cnn_bn": digits_cnn_bn, "toy_mlp": toy_mlp}


def build(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The classifier called ``name``, freshly initialised from torch's global generator."""
    builder = _imported(name) if ":" in name else MODELS.get(name)
    if builder is None:
        raise unknown_name("model", name, [*MODELS, "module:function"])
    model = builder(input_shape, num_classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: {name} returned {type(model).__name__}, it must return a torch.nn.Module")
    return model


def _imported(name: str) -> Builder:
    module_name, function_name = name.split(":", 1)
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"model: {name!r} cannot be imported ({error}), expected module:function") from None
