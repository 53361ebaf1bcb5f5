"""Trained classifiers from files of several origins: what ``--model-from`` takes."""

import inspect
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import data, models
from training.data import STATISTICS, Data, Statistics, own_data
from training.engine import checkpoint
from training.settings.errors import InputError, unknown_name

# Where a file keeps its weights: SCORE's pipeline (averaged ones first), RobustBench.
CONTAINERS = ("model_state_dict", "state_dict")
# Left by data parallelism, wrappers that normalise, a sequential with the network first, torch.compile.
PREFIXES = ("module.", "model.", "0.", "_orig_mod.")
NAMED_KEYS = 4  # of those that are missing or unexpected


def load(
    source: str | Path,
    *,
    model: str | None = None,
    data: str | Data | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The classifier in a file or from a function, in eval mode.

    Args:
        source: a checkpoint of training.run (best.pt), SCORE's published .pt, any state dict of an architecture of
            :mod:`training.models` (RobustBench's among them), or ``module:function``. A function gets those of the
            arguments ``input_shape`` and ``num_classes`` that it names. Files are read with ``weights_only=True`` and
            loaded strictly.
        model: architecture, a name of :mod:`training.models`. A checkpoint of training.run names its own. For a bare
            state dict depth and width are inferred, but not ReLU or SiLU, which have no weights.
        data: data set whose inputs the classifier takes: a name, or the data themselves if they are the user's own.
            None is that of the checkpoint, and CIFAR-10 for everything else.
        num_classes: number of logits; None is that of the data set.
        input_shape: shape of one input; None is that of the data set.
        device: where the classifier goes.

    Raises:
        InputError: the file cannot be read or holds something else, the architecture is not known, or its weights do
            not fit ``model``, the number of classes, or the values that the data may take.
    """
    is_function = isinstance(source, str) and ":" in source and not Path(source).exists()
    state = {} if is_function else _read(Path(source))
    shape, classes = _expected(data, state)
    shape, classes = input_shape or shape, num_classes or classes
    if is_function:
        network = _from_function(str(source), shape, classes)
    elif state.get("format") == checkpoint.FORMAT:
        network = _from_run(state, Path(source), model, shape, classes, _box(data))
    else:
        # Published weights expect the statistics of their data set.
        named = data or ("cifar100" if classes == 100 else "cifar10")
        statistics = named.statistics if isinstance(named, Data) else STATISTICS.get(named)
        network = _from_weights(_weights(state, Path(source)), Path(source), model, shape, classes, statistics)
    return network.to(device).eval()


def export(model: nn.Module, path: Path) -> None:
    """Write the weights as a bare state dict on the CPU, the form that RobustBench's classes load strictly."""
    buffer = io.BytesIO()
    # Clones: a view would take its whole storage along.
    torch.save({key: value.detach().cpu().clone() for key, value in model.state_dict().items()}, buffer)
    checkpoint.write_atomically(path, buffer.getvalue())


def _expected(data: str | Data | None, state: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """The shape of one input and the number of classes that a classifier must have."""
    if isinstance(data, Data):
        return data.input_shape, data.num_classes
    if data is None and state.get("format") == checkpoint.FORMAT and "data" in state["settings"]:
        return _trained_on(state)
    return data_format(data or "cifar10")


def _trained_on(state: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """The shape of one input and the number of classes of what a checkpoint was trained on."""
    if "data" in state:
        return tuple(state["data"]["input_shape"]), state["data"]["num_classes"]
    return data_format(state["settings"]["data"])


def _box(named: str | Data | None) -> tuple[float, float] | None:
    """The smallest and the largest value that a feature of the data may take; None where no data are named."""
    if named is None:
        return None
    form = named.format if isinstance(named, Data) else data.format_of(data.DataSettings(named))
    return form.lower, form.upper


def data_format(name: str) -> tuple[tuple[int, ...], int]:
    """The shape of one input and the number of classes of a data set."""
    if name not in data.FORMATS:
        raise unknown_name("data", name, list(data.FORMATS))
    return data.FORMATS[name]


def infer(weights: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The architecture (its ReLU form) and the number of classes, inferred from the keys and shapes of a state dict.

    None if no network of this package has such keys.
    """
    head = weights.get("logits.weight", weights.get("linear.weight"))
    if head is None or head.ndim != 2:
        return None
    if "layer.0.block.0.conv_0.weight" in weights:
        indices = (re.match(r"layer\.0\.block\.(\d+)\.", key) for key in weights)
        blocks = 1 + max(int(match[1]) for match in indices if match)
        width = len(weights["layer.0.block.0.conv_0.weight"]) // 16
        return f"wrn-{6 * blocks + 4}-{width}", len(head)
    if "layer_0.0.conv_2d_1.weight" in weights:
        return "preact-resnet-18", len(head)
    if "layer1.0.conv1.weight" in weights:
        return "resnet-18" if "bn1.weight" in weights else "preact-resnet-18-plain", len(head)
    return None


def _from_function(source: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    function = models.imported(source)
    offered = {"input_shape": input_shape, "num_classes": num_classes}
    taken = inspect.signature(function).parameters
    named = {name: value for name, value in offered.items() if name in taken}
    how = "with those of the arguments input_shape and num_classes that it names"
    own_data.check_call(function, f"model_from: {source!r}", how, **named)
    network = own_data.result_of(function, f"model_from: {source}", **named)
    if not isinstance(network, nn.Module):
        raise InputError(f"model_from: {source} returned {type(network).__name__}, it must return a torch.nn.Module")
    return network


def _from_run(
    state: dict[str, Any],
    path: Path,
    model: str | None,
    input_shape: tuple[int, ...],
    num_classes: int,
    box: tuple[float, float] | None,
) -> nn.Module:
    """The classifier of a checkpoint, whose settings name its architecture and its data."""
    settings = state["settings"]
    if "model" not in settings:
        raise InputError(f"model_from: {path} holds no classifier, expected best.pt or checkpoint.pt of training.run")
    own = settings["model"]
    if model not in (None, own):
        raise InputError(f"model: {model!r} given, but {path} is a checkpoint of {own!r}")
    if _trained_on(state) != (tuple(input_shape), num_classes):
        wanted = f"{num_classes} classes of inputs {list(input_shape)}"
        raise InputError(f"model_from: {path} was trained on {settings['data']}, expected a classifier for {wanted}")
    saved = state.get("data")
    trained = (saved["lower"], saved["upper"]) if saved else _box(settings["data"])
    if box is not None and trained is not None and box != trained:
        (low, high), (lower, upper) = trained, box
        raise InputError(
            f"model_from: {path} was trained on {settings['data']}, values in [{low:g}, {high:g}], expected a "
            f"classifier for values in [{lower:g}, {upper:g}]"
        )
    statistics = statistics_of(state, settings["data"])
    pretrained = bool(settings.get("pretrained"))
    network = models.build(own, input_shape, num_classes, statistics, pretrained=pretrained, weights=False)
    return _fitted(network, state["network"], path, own)


def statistics_of(state: dict[str, Any], data_name: str) -> Statistics | None:
    """What the classifier of a checkpoint normalises its input with.

    Checkpoints from before this was saved have networks that normalise as for CIFAR, on SVHN too.
    """
    if "statistics" not in state:
        return STATISTICS["cifar100" if data_format(data_name)[1] == 100 else "cifar10"]
    if state["statistics"] is None:
        return None
    mean, deviation = state["statistics"]
    return tuple(mean), tuple(deviation)


def _from_weights(
    weights: Mapping[str, Tensor],
    path: Path,
    model: str | None,
    input_shape: tuple[int, ...],
    num_classes: int,
    statistics: Statistics | None,
) -> nn.Module:
    """The classifier of a bare state dict."""
    name = _architecture(weights, model, num_classes, path)
    return _fitted(models.build(name, input_shape, num_classes, statistics), weights, path, name)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"model_from: {path} is not a file, expected a checkpoint, a state dict or module:function")
    try:
        state = checkpoint.load_values(path)
    except Exception as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(f"model_from: {path} cannot be read as weights ({reason})") from None
    if not isinstance(state, dict):
        raise InputError(f"model_from: {path} holds a {type(state).__name__}, expected a state dict or a checkpoint")
    return state


def _weights(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefixes that all of its keys have."""
    container = next((name for name in CONTAINERS if isinstance(state.get(name), dict)), None)
    weights = state if container is None else state[container]
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(
            f"model_from: {path} holds {_listed(list(state))}, expected tensors by name, if need be in "
            f"{' or '.join(CONTAINERS)}"
        )
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _architecture(weights: Mapping[str, Tensor], model: str | None, num_classes: int, path: Path) -> str:
    """The name to build: ``model`` if the weights can be its, else what they tell."""
    inferred = infer(weights)
    if inferred is None:
        if model is None:
            raise InputError(f"model: {path} is of no architecture known here ({_listed(list(weights))}), name it")
        return model
    name, classes = inferred
    if classes != num_classes:
        raise InputError(f"{path}: weights of {name} with {classes} classes, expected {num_classes}")
    silu = f"{name}-silu"
    allowed = [name] if name in ("resnet-18", "preact-resnet-18-plain") else [name, silu]
    if model is not None and ":" not in model and model not in allowed:
        raise InputError(f"model: {model!r} given, but {path} has weights of {name}, allowed: {', '.join(allowed)}")
    if model is None and len(allowed) > 1:
        raise InputError(
            f"model: weights do not tell ReLU from SiLU, name the architecture of {path}: {name}, or {silu} as "
            "published by SCORE"
        )
    return model or name


def _fitted(network: nn.Module, weights: Mapping[str, Tensor], path: Path, name: str) -> nn.Module:
    """The network with the weights, all of them and no others."""
    own = network.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    if missing or unexpected:
        parts = [f"{kind} {_listed(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise InputError(f"{path}: its weights do not fit {name}: {'; '.join(parts)}")
    for key, value in own.items():
        if value.shape != weights[key].shape:
            shapes = f"{list(weights[key].shape)}, expected {list(value.shape)}"
            raise InputError(f"{path}: its weights do not fit {name}: {key} has shape {shapes}")
    network.load_state_dict(weights)
    return network


def _listed(keys: list[Any]) -> str:
    rest = len(keys) - NAMED_KEYS
    return ", ".join(str(key) for key in keys[:NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")
