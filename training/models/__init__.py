"""The registry of classifiers: a name, ``timm:NAME``, or ``module:function`` for one of your own.

A builder takes the shape of one input and the number of classes and returns a module from inputs [N, ...] to logits
[N, L].
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scorematch.attacks.inspection import probabilities
from training.data import Statistics, own_data
from training.models import from_timm, wide_resnet
from training.models.cifar import ImageClassifier
from training.models.preact_resnet import preact_resnet_18, preact_resnet_18_silu
from training.models.resnet import plain_preact_resnet_18, resnet_18
from training.models.small import digits_cnn, digits_cnn_bn, toy_mlp
from training.settings.errors import InputError, unknown_name

Builder = Callable[[tuple[int, ...], int], nn.Module]

MODELS: dict[str, Builder] = {
    "digits_cnn": digits_cnn,
    "digits_cnn_bn": digits_cnn_bn,
    "toy_mlp": toy_mlp,
    "preact-resnet-18": preact_resnet_18,
    "preact-resnet-18-silu": preact_resnet_18_silu,
    "preact-resnet-18-plain": plain_preact_resnet_18,
    "resnet-18": resnet_18,
}


def build(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    statistics: Statistics | None = None,
    *,
    pretrained: bool = False,
    weights: bool = True,
) -> nn.Module:
    """The classifier called ``name``, freshly initialised from torch's global generator.

    Args:
        name: of the registry, ``timm:NAME`` or ``module:function``.
        input_shape: shape of one input.
        num_classes: L.
        statistics: of the data set, for architectures of this package that normalise; None leaves the pixels alone.
        pretrained: for ``timm:NAME``, with its trained weights, see :func:`training.models.from_timm.timm_model`.
        weights: False leaves these weights out, for a network that gets those of a checkpoint.

    Raises:
        InputError: there is no such classifier, it cannot be built for such inputs, or a function of one's own fails.
    """
    if pretrained and not name.startswith(from_timm.PREFIX):
        raise InputError(f"pretrained: True with model {name}, allowed: with {from_timm.PREFIX}NAME")
    builder = _builder(name, pretrained, weights)
    if builder is None:
        raise unknown_name("model", name, [*MODELS, wide_resnet.PATTERN, "timm:NAME", "module:function"])
    if is_own(name):
        model = own_data.result_of(builder, f"model: {name}", input_shape, num_classes)
    else:
        model = builder(input_shape, num_classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: {name} returned {type(model).__name__}, it must return a torch.nn.Module")
    if is_own(name):
        _try(model, name, input_shape, num_classes)
    if isinstance(model, ImageClassifier) and model.normalises and statistics is not None:
        model.set_statistics(statistics)
    return model


def is_own(name: str) -> bool:
    """Whether a name is ``module:function``."""
    return ":" in name and not name.startswith(from_timm.PREFIX)


def _try(model: nn.Module, name: str, input_shape: tuple[int, ...], num_classes: int) -> None:
    """One pass of a network of one's own, which also gives lazy layers their sizes.

    Raises:
        InputError: it fails, or returns anything but logits of the classes.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *input_shape))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model: {name} takes no float32 inputs {[2, *input_shape]} ({reason})") from None
    for module, training in modes:
        module.training = training
    given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if given != [2, num_classes]:
        raise InputError(
            f"model: {name} gives {given} for inputs {[2, *input_shape]}, it must give logits {[2, num_classes]}"
        )
    if probabilities(logits) is not None:
        raise InputError(f"model: {name} gives probabilities, it must give logits: leave its softmax out")


def _builder(name: str, pretrained: bool, weights: bool) -> Builder | None:
    if name.startswith(from_timm.PREFIX):
        short = name.removeprefix(from_timm.PREFIX)
        return functools.partial(from_timm.timm_model, short, pretrained=pretrained, weights=weights)
    if ":" in name:
        function = imported(name)
        how = "with two arguments, input_shape and num_classes"
        own_data.check_call(function, f"model: {name!r}", how, "input_shape", "num_classes")
        return function
    if wide_resnet.NAME.fullmatch(name):
        return functools.partial(wide_resnet.wide_resnet, name)
    return MODELS.get(name)


def imported(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    return own_data.imported(name, "model")
