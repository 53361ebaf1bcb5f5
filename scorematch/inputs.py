"""Checks of the data that objectives and attacks are given.

The most common mistakes have hints of their own in the messages: pixels in 0…255, and normalised images.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.data import RandomSampler

from .ops._checks import check_number
from .threat_model import Perturbations

SLACK = 1e-4  # of the width of the box, or of 1 where that is infinite, for rounding in the data pipeline of a training
OUTSIDE = 1e-6  # of its largest bound: what rounding may add to points that are attacked, eight steps of float32 at 1
MOVES, BOUNDS = ("random_start", "step", "project", "check_radius"), ("lower", "upper")  # of Perturbations
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose images on a GPU have been looked at


def check_inputs(model: nn.Module, x: Tensor, y: Tensor, threat_model: Perturbations | None) -> None:
    """Refuse a batch that an objective cannot use.

    Dtypes and shapes are checked in every call. On the CPU, so are the values of x. On another device a look at values
    has to wait for the device, so they are checked only in the first call with this model.

    Args:
        model: the model that is trained.
        x: [N, …] inputs.
        y: int64 [N] labels, or probabilities [N, L].
        threat_model: whose box x must lie in, up to a rounding of 1e-4 of its width, or of 1e-4 where that is
            infinite; None checks no values.

    Raises:
        TypeError: the model is not a module; x or y is not a tensor, is sparse, or has a dtype that no objective takes.
        ValueError: shapes or devices do not fit, x leaves the box or is not finite, or eps is larger than the box.
    """
    check_instance("model", model, nn.Module)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
    check_floating(x)
    for name, tensor in (("x", x), ("y", y)):
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} is sparse ({tensor.layout}), expected a dense tensor")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device} but x is on {x.device}")
    if x.dim() < 2 or y.dim() not in (1, 2) or len(x) != len(y):
        raise ValueError(f"x must be [N, …] and y [N] or [N, L], got x {list(x.shape)} and y {list(y.shape)}")
    if y.dim() == 1 and y.dtype != torch.int64:
        raise TypeError(f"y must be int64 labels [N] or probabilities [N, L], got {y.dtype} [N]; y.long() makes labels")
    if y.dim() == 2 and not y.dtype.is_floating_point:
        hint = "y[:, 0] makes labels" if y.shape[1] == 1 else "y.argmax(1) makes labels of a one-hot code"
        raise TypeError(f"y must be int64 labels [N] or probabilities [N, L], got {y.dtype} {list(y.shape)}; {hint}")
    if threat_model is not None:
        threat_model.check_radius(math.prod(x.shape[1:]))
    if threat_model is None or len(x) == 0 or not _looks(model, x.device):
        return
    width = threat_model.upper - threat_model.lower
    check_box(x, threat_model, SLACK * (width if math.isfinite(width) else 1.0))
    _seen.add(model)


def check_tensor(name: str, value: Tensor) -> None:
    """Refuse what is not a dense tensor, or has no values to look at.

    Raises:
        TypeError: as said; the message calls it ``name``.
    """
    check_strided(value, name)
    if value.is_meta:
        raise TypeError(f"{name} must have values, got a tensor on {value.device}")


def check_posterior(name: str, value: object) -> None:
    """Refuse what is no :class:`scorematch.posteriors.Posterior`, judged by what it can do.

    Raises:
        TypeError: as said; the message calls it ``name``.
    """
    if isinstance(value, type) or not callable(getattr(value, "trace", None)) or not hasattr(value, "num_classes"):
        raise TypeError(f"{name} must be a posterior, with num_classes and trace(x, y), got {type(value).__name__}")


def check_callable(name: str, value: object) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: as said; the message calls it ``name``.
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def check_attack(threat_model: Perturbations, steps: int) -> None:
    """Check the threat model and the number of steps of an attack during training.

    Args:
        threat_model: a :class:`scorematch.ThreatModel`, or a B(x) with what :class:`scorematch.Perturbations` names.
        steps: a whole number, at least 0.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
    """
    check_threat_model(threat_model)
    check_count("steps", steps, least=0)


def check_threat_model(threat_model: Perturbations) -> None:
    """Refuse what is not a B(x).

    Raises:
        TypeError: as said; the message names what it lacks.
    """
    told = "threat_model must be a ThreatModel, or have all of scorematch.Perturbations, got"
    if isinstance(threat_model, type):
        raise TypeError(f"{told} the class {threat_model.__name__} itself")
    lacking = [name for name in MOVES if not callable(getattr(threat_model, name, None))]
    lacking += [name for name in BOUNDS if not hasattr(threat_model, name)]
    if lacking:
        raise TypeError(f"{told} {type(threat_model).__name__}, which lacks {', '.join(lacking)}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a number of steps, repeats and the like that is not whole or is below ``least``.

    Raises:
        TypeError, ValueError: as said; the message calls it ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_shape(name: str, value: Any) -> None:
    """Refuse what is not a sequence of whole numbers, at least 0.

    Raises:
        TypeError, ValueError: as said; the message calls it ``name``.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of whole numbers, got {value!r}")
    for size in value:
        check_count(f"each of {name}", size, least=0)


def check_length(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a length or a standard deviation that is infinite, NaN or negative, or 0 unless ``zero`` allows it.

    Raises:
        TypeError, ValueError: as said, or it is no number; the message calls it ``name``.
    """
    check_number(name, value)
    if not (value > 0.0 or (zero and value == 0.0)) or value == math.inf:
        raise ValueError(f"{name} must be finite and {'not negative' if zero else 'positive'}, got {value}")


def check_seed(seed: int) -> None:
    """Refuse a seed that is no whole number.

    Raises:
        TypeError: as said.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, got {seed!r}")


def check_share(name: str, value: float, *, zero: bool = True) -> None:
    """Refuse a number outside [0, 1), or outside (0, 1) where ``zero`` is not allowed.

    Raises:
        TypeError, ValueError: as said, or it is no number; the message calls it ``name``.
    """
    check_number(name, value)
    if not (0.0 < value < 1.0 or (zero and value == 0.0)):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1), got {value}")


def check_real(x: Any, name: str = "x", batch: bool = True) -> None:
    """Refuse what is not a dense floating-point tensor, with ``batch`` one of [N, …]; it reads no values.

    Raises:
        TypeError, ValueError: as said; the message calls it ``name``.
    """
    check_strided(x, name)
    check_floating(x, name)
    if batch and x.dim() < 2:
        raise ValueError(f"{name} must be [N, …], got {list(x.shape)}")


def check_single(t: Tensor, name: str = "x") -> None:
    """Refuse a dtype in which there is no linear algebra.

    Raises:
        TypeError: as said; the message calls the tensor ``name``.
    """
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {t.dtype}")


def check_strided(t: Any, name: str) -> None:
    """Refuse what is not a dense tensor.

    Raises:
        TypeError: as said; the message calls it ``name``.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({t.layout}), expected a dense tensor")


def check_like(name: str, t: Any, x: Tensor, shape: Sequence[int] | None = None, other: str = "x") -> None:
    """Refuse what is not a dense tensor of the dtype and device of x, and of its shape or of ``shape``.

    Raises:
        TypeError, ValueError: as said; the message calls it ``name``, and x ``other``.
    """
    check_strided(t, name)
    shape = x.shape if shape is None else shape
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must be {x.dtype} as {other}, got {t.dtype}")
    if t.device != x.device or list(t.shape) != list(shape):
        where = f"{list(t.shape)} on {t.device}"
        raise ValueError(f"{name} must be {list(shape)} on {x.device} for {other} {list(x.shape)}, got {where}")


def check_finite(t: Any, name: str, *, batch: bool = False) -> None:
    """Refuse what is not a dense tensor of finite numbers; it reads them, so a GPU has to be waited for.

    Raises:
        TypeError, ValueError: as said; the message calls it ``name``.
    """
    check_real(t, name, batch)
    if t.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on {t.device}")
    if wrong := int((~t.isfinite()).sum()):
        raise ValueError(f"{name} must be finite, got {wrong} values that are NaN or infinite")


def check_instance(name: str, value: Any, kind: type) -> None:
    """Refuse what is not of this class.

    Raises:
        TypeError: as said; the message calls it ``name``.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def check_center(center: Any, x: Tensor | None = None) -> None:
    """Refuse a mean of data that is neither a finite number nor a tensor of them, on the device of x if that is given.

    A tensor that is used with x is read where that waits for nothing.

    Raises:
        TypeError, ValueError: as said; the message calls it ``center``.
    """
    if not isinstance(center, Tensor):
        if isinstance(center, bool):
            raise TypeError(f"center must be a number or a tensor, got {center}")
        check_number("center", center)
        if not math.isfinite(center):
            raise ValueError(f"center must be finite, got {center}")
        return
    check_real(center, "center", batch=False)
    broadcasts = x is None or (
        center.dim() <= x.dim() and all(a in (1, b) for a, b in zip(center.shape[::-1], x.shape[::-1], strict=False))
    )
    if x is not None and (center.device != x.device or not broadcasts):
        where = f"{list(center.shape)} on {center.device}"
        raise ValueError(f"center must be a number, or broadcast against x {list(x.shape)} on {x.device}, got {where}")
    if x is None or readable(center):
        check_finite(center, "center")


def check_labels(x: Tensor, y: Tensor, num_classes: int | None = None) -> None:
    """Refuse labels that are not int64 [N] in [0, L) for x [N, …]; it reads them, so a GPU has to be waited for.

    Without L they only have to be at least 0.

    Raises:
        TypeError: x or y is no tensor, is sparse, or has another dtype.
        ValueError: the shapes do not fit, or a label is not a class.
    """
    check_real(x, batch=False)
    check_classes(y, x, num_classes)


def check_samples(x: Tensor, y: Tensor, num_classes: int | None, least: int = 0) -> None:
    """:func:`check_labels` where values of x count, too: float32 or float64, finite, and at least so many samples.

    Raises:
        TypeError, ValueError: as said; the message names x or y.
    """
    check_finite(x, "x")
    check_single(x)
    check_tensor("y", y)
    check_labels(x, y, num_classes)
    if len(x) < least:
        raise ValueError(f"x and y must hold at least {least} samples, got {len(x)}")


def check_classes(y: Any, x: Tensor, num_classes: int | None, name: str = "y", *, values: bool = True) -> None:
    """:func:`check_labels` for an x that has been checked, with the values only where ``values`` says so.

    Raises:
        TypeError, ValueError: as there; the message calls the labels ``name``.
    """
    check_strided(y, name)
    if y.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 labels [N], got {y.dtype} {list(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device} but x is on {x.device}")
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x must be [N, …] and {name} [N], got x {list(x.shape)} and {name} {list(y.shape)}")
    if not values or not len(y) or y.is_meta:
        return
    low, high = (int(value) for value in torch.aminmax(y))
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "be at least 0" if num_classes is None else f"lie in [0, {num_classes})"
        raise ValueError(f"{name} must {allowed}, got values in [{low}, {high}]")


def check_levels(sigma: Any, x: Tensor, *, numbers: bool = False) -> None:
    """Refuse noise levels that are not positive and finite, [N] for x [N, …], or with ``numbers`` one number.

    The values of a tensor are read where that waits for nothing, see :func:`readable`.

    Raises:
        TypeError, ValueError: as said; the message calls them ``sigma``.
    """
    if numbers and not isinstance(sigma, Tensor):
        check_length("sigma", sigma)
        return
    check_real(sigma, "sigma", batch=False)
    if sigma.device != x.device:
        raise ValueError(f"sigma is on {sigma.device} but x is on {x.device}")
    if sigma.shape != x.shape[:1] and not (numbers and sigma.numel() == 1):
        raise ValueError(f"sigma must be [N] for x {list(x.shape)}, got {list(sigma.shape)}")
    if readable(sigma) and not bool(((sigma > 0) & (sigma < math.inf)).all()):
        raise ValueError(f"sigma must be positive and finite, got values in {torch.stack(sigma.aminmax()).tolist()}")


def handed(x: Tensor) -> Tensor:
    """x [N, …] as it is handed to a module whose gradient in x will be asked for.

    Hooks of all modules, such as those of ``torch.utils.flop_counter.FlopCounterMode``, may ask the engine about what
    a module was given, and it refuses to answer for a tensor at which a graph begins.
    """
    begins = x.requires_grad and x.is_leaf
    return x.view_as(x) if begins and torch_module._has_any_global_hook() else x


def output_at(network: nn.Module, x: Tensor, sigma: Tensor, conditions: Tensor | None = None) -> Any:
    """Whatever a network that is told the noise level returns for x [N, …] and sigma [N].

    With ``conditions`` [N, K], it is also told how x was augmented.

    Raises:
        TypeError: the network does not take them.
    """
    inputs = (x, sigma) if conditions is None else (x, sigma, conditions)
    if torch.compiler.is_compiling():
        return network(*inputs)
    try:
        return network(*map(handed, inputs))
    except TypeError as error:
        if (taken := _other_parameters(network.forward, *inputs)) is None:
            raise
        names = ", ".join(("x", "sigma", "conditions")[: len(inputs)])
        raise TypeError(f"network must take ({names}), got {type(network).__name__}, which takes ({taken})") from error


def _other_parameters(function: Callable[..., Any], *arguments: object) -> str | None:
    """The parameters of a function that does not take these arguments; None where it may."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function without a signature
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return ", ".join(signature.parameters)
    return None


def readable(t: Tensor) -> bool:
    """Whether to read values of t costs nothing: it is on the CPU, and nothing is being compiled."""
    return t.is_cpu and not torch.compiler.is_compiling()


def check_points(x: Tensor, y: Tensor, threat_model: Perturbations) -> None:
    """Refuse points around which a model and p_d are not compared; it reads them, so a GPU has to be waited for.

    Args:
        x: [N, …] floating point, inside the box of the threat model.
        y: [N] or [N, L].
        threat_model: its eps must not be larger than the box.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_tensor("x", x)
    check_tensor("y", y)
    check_threat_model(threat_model)
    check_floating(x)
    if x.dim() < 2 or y.dim() < 1 or len(x) != len(y):
        raise ValueError(f"x must be [N, …] and y [N], got x {list(x.shape)} and y {list(y.shape)}")
    if len(x):
        threat_model.check_radius(x[0].numel())
        check_box(x, threat_model)


def _looks(model: nn.Module, device: torch.device) -> bool:
    """Whether the values of a batch are looked at; the meta device has none."""
    return device.type == "cpu" or (device.type != "meta" and model not in _seen)


def clean_batch(
    x: Tensor, y: Tensor, threat_model: Perturbations, names: tuple[str, str] = ("x", "y")
) -> tuple[Tensor, Tensor]:
    """A batch and its labels, checked and in the form that attacks take.

    It reads the values of x, so a GPU has to be waited for. Training steps use :func:`check_inputs` instead.

    Args:
        x: [N, …] inside the box of the threat model, or outside by at most 1e-6 of its largest bound; then it is
            clamped.
        y: class indices of any integer type, [N] or [N, 1]. One-hot labels are refused.
        threat_model: its box is checked.
        names: what errors call x and y.

    Returns:
        x [N, …] in the box, without a graph, and y int64 [N]. The tensors given are not written to.

    Raises:
        TypeError: x or y is not a dense tensor, or x is not floating point.
        ValueError: shapes do not fit, labels are not class indices, x leaves the box or is not finite, or eps is larger
            than the box.
    """
    x_name, label_name = names
    for name, tensor in ((x_name, x), (label_name, y)):
        check_strided(tensor, name)
    check_floating(x, x_name)
    labels = y.squeeze(1) if y.dim() == 2 and y.shape[1] == 1 else y
    if y.dim() == 2 and labels is y and len(x) == len(y):
        raise ValueError(
            f"{label_name} must be class indices [N], got labels {list(y.shape)}: of one-hot labels pass "
            f"{label_name}.argmax(1)"
        )
    if x.dim() < 2 or labels.dim() != 1 or len(x) != len(y):
        given = f"{x_name} {list(x.shape)} and {label_name} {list(y.shape)}"
        raise ValueError(f"{x_name} must be [N, …] and {label_name} [N], got {given}")
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise ValueError(f"{label_name} must be class indices of an integer dtype, got {y.dtype}")
    x, labels = (t.clone() if t.is_inference() else t for t in (x.detach(), labels.long()))  # those take no gradients
    if len(x) == 0:
        return x, labels
    threat_model.check_radius(math.prod(x.shape[1:]))
    lower, upper = threat_model.lower, threat_model.upper
    rounding = OUTSIDE * max((abs(bound) for bound in (lower, upper) if math.isfinite(bound)), default=0.0)
    low, high = check_box(x, threat_model, rounding, x_name)
    return (x if lower <= low and high <= upper else x.clamp(lower, upper)), labels


def joined(x: Any, y: Any, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """x and y as they are, or all batches (x, y) of an iterable put together.

    Args:
        x: [N, …], or an iterable of pairs of tensors such as a ``DataLoader``; then y is None.
        y: [N], or None.
        ordered: whether the order of the samples matters.

    Returns:
        x [N, …] and y [N].

    Warns:
        UserWarning: the order matters, and x is a loader that shuffles.

    Raises:
        TypeError: x is neither of the two, y is missing, or y is given beside batches.
        ValueError: there are no batches, or their samples have different shapes.
    """
    if isinstance(x, Tensor) or not isinstance(x, Iterable):
        if y is None:
            raise TypeError(f"y_orig is missing; it may be left out for batches (x, y), got {type(x).__name__}")
        return x, y
    if y is not None:
        raise TypeError(f"x_orig must be a torch.Tensor where y_orig is given, got {type(x).__name__}")
    if ordered and isinstance(getattr(x, "sampler", None), RandomSampler):
        told = "x_orig gives its samples in random order: points and verdicts come in the order of this one pass"
        warnings.warn(told, stacklevel=4)  # for the line that called a method of AutoAttack
    batches = []
    for batch in x:
        if not (isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
            raise TypeError(f"x_orig must be a tensor or give batches (x, y) of tensors, got a {type(batch).__name__}")
        batches.append(batch)
    if not batches:
        raise ValueError("x_orig gives no batches")
    shapes = {tuple(images.shape[1:]) for images, _ in batches}
    if len(shapes) > 1:
        raise ValueError(f"x_orig gives samples of different shapes: {', '.join(map(str, sorted(shapes)))}")
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def check_floating(x: Tensor, name: str = "x") -> None:
    """Refuse an x that is not floating point; the message calls it ``name``.

    Raises:
        TypeError: x has another dtype.
    """
    if not x.is_floating_point():  # of the dtype TorchScript could not ask it
        hint = "; divide pixels in 0…255 by 255: x.float() / 255" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{name} must be floating point, got {x.dtype}{hint}")


def check_box(x: Tensor, threat_model: Perturbations, slack: float = 0.0, name: str = "x") -> tuple[float, float]:
    """Refuse an x that leaves the box; return its smallest and its largest value.

    Args:
        x: [N, …], N ≥ 1.
        threat_model: gives the box.
        slack: how far x may leave it, in input units, at least 0.
        name: what errors call x.

    Raises:
        ValueError: a value is outside, or is not finite.
    """
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    lower, upper = threat_model.lower, threat_model.upper
    if low >= lower - slack and high <= upper + slack and low > -torch.inf and high < torch.inf:
        return low, high
    hint = ""
    if (lower, upper) == (0.0, 1.0):
        if low >= 0.0 and 1.5 < high <= 255.0:
            hint = "; divide pixels in 0…255 by 255"
        elif low < -0.1:
            hint = "; if images are normalised, do that in the model, so that eps counts in pixels"
    raise ValueError(
        f"{name} must lie in the box [{lower}, {upper}] of the threat model, got values in [{low!r}, {high!r}]{hint}"
    )
