"""What an objective returns, and what all of them check of models, labels and clipping."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attacks.classifier import check_logits, output_of
from ..attacks.console import frames_of_the_package
from ..attacks.inspection import probabilities
from ..divergences import clip_bound
from ..inputs import check_classes, readable
from ..modes import own_precision
from ..ops.divergence import divergence
from ..posteriors.base import Posterior, check_values

SUM_ERROR = 1e-3  # of probabilities, as the kernels allow it
CLIP_FORMS = ("total", "robust", "threshold")
_heard: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose logits have been looked at


class Outcome(NamedTuple):
    """What an objective returns.

    Attributes:
        loss: [N], differentiable in the parameters of the model; the caller reduces it.
        x_adv: [N, …] the points at which the robust term was taken (x itself for ``standard``), without a graph.
        metrics: named scalars (0-dim tensors, without a graph), for logging. All objectives have ``accuracy``, the
            share in [0, 1] of the samples that are classified as y at ``x_adv``, in the mode of training.
    """

    loss: Tensor
    x_adv: Tensor
    metrics: dict[str, Tensor]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of samples whose largest logit is that of the label.

    Args:
        logits: [N, L].
        y: int64 [N] labels, or probabilities [N, L], of which the largest counts.

    Returns:
        A float32 scalar in [0, 1], without a graph.
    """
    labels = y if y.dim() == 1 else y.argmax(1)
    return (logits.detach().argmax(1) == labels).float().mean()


def soft_targets(posterior: Posterior, x: Tensor, y: Tensor) -> Tensor:
    """The class probabilities p(·|x) of a posterior at clean inputs, for use as y of an objective.

    Args:
        posterior: estimate of p_d(y|x), fixed; read outside of autocast.
        x: [N, …] clean inputs.
        y: int64 [N] labels, or probabilities [N, L]; read only by posteriors that are anchored at labels, whose p(·|x)
            is the smoothed label.

    Returns:
        [N, L] probabilities, without a graph.

    Raises:
        ValueError: the posterior does not give log-probabilities; looked at on the CPU alone.
    """
    with torch.no_grad(), own_precision(x):
        log_p = posterior.clean_log_prob(x, y)
        check_values(log_p)
        return log_p.exp()


class Clip(NamedTuple):
    """relu(total − of_total), and relu(robust term − of_robust)."""

    of_total: float
    of_robust: float


def clipping(clip: float, form: str, kind: str, num_classes: int) -> Clip:
    """The two bounds of a clipping form (section 5.2; see :func:`scorematch.divergences.clip_bound`)."""
    if form not in CLIP_FORMS:
        raise ValueError(f"clip_form must be one of {', '.join(CLIP_FORMS)}, got {form!r}")
    if form == "threshold":
        if not clip >= 0.0:
            raise ValueError(f"clip must not be negative, got {clip}")
        return Clip(0.0, clip)
    if not 0.0 <= clip < 1.0:
        raise ValueError(f"clip must lie in [0, 1), got {clip}")
    bound = clip_bound(kind, clip, num_classes)
    return Clip(bound, 0.0) if form == "total" else Clip(0.0, bound)


def training_logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a model returns for x [N, …]: [N, L], no narrower than x, since autocast gives logits in half precision.

    Raises:
        ValueError: they are not logits.
        RuntimeError, TypeError, ValueError: the model fails; see :func:`scorematch.attacks.classifier.output_of`.
    """
    logits = output_of(model, x)
    check_logits(logits, x)
    return logits.to(torch.promote_types(logits.dtype, x.dtype))


def warn_of_probabilities(model: nn.Module, logits: Tensor) -> None:
    """Warn if a model returns probabilities; its logits [N, L] are looked at once, since a GPU has to be waited for."""
    if torch.compiler.is_compiling() or model in _heard or not len(logits) or logits.is_meta:
        return
    _heard.add(model)
    if probabilities(logits.detach()) is not None:
        warnings.warn(
            "the model seems to return probabilities: objectives need logits, without the softmax",
            stacklevel=frames_of_the_package() + 1,
        )


def divergence_from(y: Tensor, logits: Tensor, kind: str, clip: float = 0.0) -> Tensor:
    """relu(D(y ‖ softmax(logits)) − clip) of every sample, [N], for the y that an objective was given.

    Raises:
        TypeError, ValueError: y does not fit the logits [N, L]; its values are read on the CPU alone.
    """
    if torch.compiler.is_compiling():
        return divergence(logits, y, kind=kind, clip=clip)
    try:
        return divergence(logits, y, kind=kind, clip=clip)
    except (TypeError, ValueError) as error:
        refused = error  # it calls y the target
    check_target(y, logits)
    if y.dim() == 2:
        _check_probabilities(y, logits)
    raise refused


def check_comparable(logits: Tensor, target: Tensor) -> None:
    """Refuse a posterior whose log p [N, L] cannot be compared with the logits of the model.

    Raises:
        ValueError: as said.
    """
    if target.shape != logits.shape or target.dtype != logits.dtype:
        given = f"{target.dtype} {list(target.shape)} for logits {logits.dtype} {list(logits.shape)}"
        raise ValueError(f"posterior must give log p of the shape and dtype of the model's logits, got {given}")


def check_target(y: Tensor, logits: Tensor) -> None:
    """Refuse labels, or probabilities, of other classes than the logits [N, L]; labels are read on the CPU alone.

    Raises:
        ValueError: as said.
    """
    if y.dim() == 1:
        check_classes(y, logits, logits.shape[1], values=readable(y))
    elif y.shape != logits.shape:
        raise ValueError(f"y must be labels [N] or probabilities {list(logits.shape)}, got {list(y.shape)}")


def _check_probabilities(y: Tensor, logits: Tensor) -> None:
    """Refuse a y [N, L] of another dtype than the logits, or on the CPU one that holds no distributions."""
    if y.dtype != logits.dtype:
        raise TypeError(f"y must be {logits.dtype} as the logits, got {y.dtype}")
    if readable(y) and len(y):
        low, sums = float(y.min()), y.detach().sum(1)
        least, most = float(sums.min()), float(sums.max())
        if not (low >= 0.0 and abs(least - 1.0) <= SUM_ERROR and abs(most - 1.0) <= SUM_ERROR):
            given = f"values from {low:g} on and sums in [{least:g}, {most:g}]"
            raise ValueError(
                f"y must be probabilities [N, L], at least 0 and with sums of 1 ± {SUM_ERROR}, got {given}"
            )
