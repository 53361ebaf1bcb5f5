"""What every data posterior offers.

A posterior stands for p(y|x') of one density p_σ, the data convolved with Gaussian noise of standard deviation σ.
An attack asks two things of it, again and again along its path: the value log p(y|x'), and the pull-back of weights
w_y to Σ_y w_y ∇ₓ log p(y|x'). :class:`Trace` answers both, and remembers the path for estimators that need it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import check_finite, check_length, check_like, check_real, check_single, check_strided
from ..modes import own_precision
from ..ops._checks import accumulator
from ..ops.score_step import score_step


class Trace(ABC):
    """log p(y|x') followed along one attack that starts at clean x.

    Attributes:
        x: [N, …] the current point.
        log_p: [N, L] log p(y|x) there, normalised, without a graph.
    """

    x: Tensor
    log_p: Tensor

    @abstractmethod
    def move(self, x: Tensor) -> None:
        """Go on to x [N, …]; updates ``x`` and ``log_p``."""

    @abstractmethod
    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        """grad + Σ_y c_y ∇ₓ log p(y|x) at the current point.

        Args:
            weights: [N, L], c_y = ∂D/∂ log p_y. With centring by the posterior, adding λ p_y to them changes nothing.
            grad: [N, …] what is added to, usually the model gradient.

        Returns:
            [N, …].
        """


class Posterior(nn.Module, ABC):
    """Estimate of p_d(y|x) over ``num_classes`` classes; a module, so it moves between devices and saves its state.

    It is fixed before robust training begins, and never trained on adversarial examples.
    """

    num_classes: int
    centering: str = "posterior"

    @abstractmethod
    def trace(self, x: Tensor, y: Tensor) -> Trace:
        """Begin a trace at clean inputs.

        Args:
            x: [N, …] clean inputs.
            y: their labels, int64 [N], or probabilities [N, L]; only estimators that anchor at labels read them.

        Returns:
            A trace whose current point is x.
        """

    def clean_log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y|x) [N, L] at clean inputs, without a graph: where :meth:`trace`, of the same arguments, begins."""
        return self.trace(x, y).log_p


NORMALISED = 1e-2  # how far the logarithm of the sum of all classes may be from 0, beside rounding


def begin_trace(posterior: Posterior, x: Tensor, y: Tensor, *, nan: bool = False) -> Trace:
    """``posterior.trace(x, y)``, whose first values are looked at; only with ``nan`` may some of them be NaN.

    Raises:
        ValueError: they are no log-probabilities.
    """
    trace = posterior.trace(x, y)
    check_values(trace.log_p)
    if not nan and trace.log_p.is_cpu:
        check_known(trace.log_p)
    return trace


def check_known(log_p: Tensor) -> None:
    """Refuse log p [N, …, L] that is NaN somewhere; it reads the values, so a GPU has to be waited for.

    Raises:
        ValueError: as said.
    """
    unknown = log_p.isnan().any(-1)
    if wrong := int(unknown.sum()):
        given = f"NaN at {wrong} of {unknown.numel()} points"
        raise ValueError(f"posterior must give log p(y|x) at every point, got {given}")


def check_scores(trace: Trace, x: Tensor) -> None:
    """Refuse class scores that are NaN at x [N, …], where the trace is; a GPU has to be waited for.

    An attack would leave such a sample where it is, and find nothing. A feature of NaN among others is no reason, and a
    sample whose log p is NaN has been told.

    Raises:
        ValueError: as said.
    """
    likeliest = torch.nn.functional.one_hot(trace.log_p.argmax(1), trace.log_p.shape[1]).to(trace.log_p.dtype)
    gradient = trace.pull_back(likeliest, torch.zeros_like(x))
    refuse_lost(gradient.isnan().flatten(1).all(1) & ~trace.log_p.isnan().any(1))


def refuse_lost(lost: Tensor) -> None:
    """Refuse a posterior whose gradient is NaN at the samples ``lost``, bool [N]; a GPU has to be waited for.

    Raises:
        ValueError: as said.
    """
    if wrong := int(lost.sum()):
        given = f"a gradient of NaN at {wrong} of {len(lost)} points"
        raise ValueError(f"posterior must give scores that are numbers, got {given}")


def check_values(log_p: Tensor) -> None:
    """Refuse what a posterior gives as log p [N, L] and is none: probabilities would train a model without a word.

    Only on the CPU; a GPU would have to be waited for.

    Raises:
        ValueError: as said.
    """
    if not log_p.is_cpu:
        return
    if (given := wrong_sum(log_p)) is not None:
        raise ValueError(
            "posterior must give log p(y|x), whose exponentials sum to 1 over the classes, got a sum of "
            f"{given:.4g} (logits need .log_softmax(1), probabilities .log())"
        )


def wrong_sum(log_p: Tensor) -> float | None:
    """The sum of Σ_y p_y that is furthest from 1, of log p [N, L]; None where rounding explains it.

    Rounding moves log p_y by at most half an eps of its size, and so the logarithm of the sum by half an eps of the
    entropy, which is at most log L; twice that is allowed. NaN is left to :func:`check_known`.
    """
    total = log_p.detach().double().logsumexp(1)
    rounding = torch.finfo(log_p.dtype).eps * math.log(max(log_p.shape[1], 1))
    if not (total.abs() > NORMALISED + rounding).any():
        return None
    return total[total.nan_to_num().abs().argmax()].exp().item()


def check_sums(p: Tensor, name: str) -> None:
    """Refuse p [N, L] whose rows do not sum to 1; it reads them, so a GPU has to be waited for.

    Raises:
        ValueError: as said; the message calls it ``name``.
    """
    sums = p.double().sum(1)
    if bool(((sums - 1).abs() > NORMALISED + torch.finfo(p.dtype).eps).any()):
        given = float(sums[(sums - 1).abs().argmax()])
        raise ValueError(f"{name} must be probabilities that sum to 1 over the classes, got a sum of {given:.4g}")


class PointwisePosterior(Posterior):
    """A posterior that has a value at every point, whatever the path. Calling it gives log p(y|x) [N, L]."""

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        del y
        return self._trace_at(x)

    @abstractmethod
    def _trace_at(self, x: Tensor) -> Trace: ...

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """log p(y|x), [N, L]; its gradient is that of the posterior, so that it can be attacked like a model."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y|x) [N, L] for x [N, …], differentiable in x."""
        log_p: Tensor = self(x)
        return log_p


class ClassScorePosterior(PointwisePosterior):
    """A posterior known by its values and by its class scores s_y = ∇ₓ log p(x|y)."""

    @abstractmethod
    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and class scores, without a graph.

        Args:
            x: [N, …].

        Returns:
            log p(y|x) [N, L], and s_y(x) [N, L, …] up to a field that is the same for all classes; both in the dtype of
            x. Anything else is refused by what uses them.
        """

    def _trace_at(self, x: Tensor) -> Trace:
        return _ClassScoreTrace(self, x)

    def forward(self, x: Tensor) -> Tensor:
        check_real(x)
        log_p: Tensor = _LogPosterior.apply(x, self)
        return log_p


class _ClassScoreTrace(Trace):
    def __init__(self, posterior: ClassScorePosterior, x: Tensor) -> None:
        self.posterior = posterior
        self.move(x)

    def move(self, x: Tensor) -> None:
        check_real(x)
        self.x = x.detach()
        self.log_p, self.scores = _values_and_scores(self.posterior, self.x)

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        check_pull(weights, grad, self)
        return score_step(centred(weights, self.log_p), self.scores, grad)


class _LogPosterior(torch.autograd.Function):
    """Forward: log p(y|x). Backward: c ↦ Σ_y w_y s_y with w = c − p Σ c, so the unconditional score cancels.

    ∇ₓ log p(y|x) = s_y − Σ_k p_k s_k (Eq. 34 with the unconditional score written as the posterior mean of s).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, posterior: ClassScorePosterior) -> Tensor:
        log_p, scores = _values_and_scores(posterior, x.detach())
        ctx.save_for_backward(log_p, scores)
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_p, scores = ctx.saved_tensors
        return score_step(centred(grad, log_p), scores, torch.zeros_like(scores[:, 0])), None


def _values_and_scores(posterior: ClassScorePosterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """``posterior.log_prob_and_scores(x)``, which may be that of a user; reads no values.

    Raises:
        TypeError, ValueError: it returns no log p [N, L] and scores [N, L, …] of the dtype and device of x.
    """
    with own_precision(x):
        found = posterior.log_prob_and_scores(x)
    shapes = [[len(x), posterior.num_classes], [len(x), posterior.num_classes, *x.shape[1:]]]
    parts = found if isinstance(found, tuple | list) else (found,)
    typed = len(parts) == 2 and all(isinstance(part, Tensor) for part in parts)
    typed = typed and parts[1].dtype == x.dtype and parts[0].dtype in (x.dtype, accumulator(x.dtype))
    if typed and [list(part.shape) for part in parts] == shapes and all(part.device == x.device for part in parts):
        return parts[0], parts[1]
    raise (ValueError if typed else TypeError)(
        f"posterior.log_prob_and_scores must return log p [N, L] = {shapes[0]} and scores [N, L, …] = {shapes[1]} like "
        f"x, {x.dtype} on {x.device}, got {' and '.join(map(_described, parts)) or 'nothing'}"
    )


def _described(part: object) -> str:
    """What a message says of something that may be a tensor."""
    if not isinstance(part, Tensor):
        return type(part).__name__
    return f"{part.dtype} {list(part.shape)} on {part.device}"


def check_point(x: Tensor, own: Tensor, shape: torch.Size | None = None, *, any_dtype: bool = True) -> None:
    """Refuse points [N, …] at which a posterior with buffers like ``own`` [M, D] has no value; reads no values.

    Args:
        x: the points.
        own: a buffer of the posterior.
        shape: that of one sample of its data, if it has data. Images of another shape may have as many features, in
            another order; flat samples [D] fit all.
        any_dtype: whether x may be of another dtype than the buffer.

    Raises:
        TypeError, ValueError: x has other features, or is of a dtype or on a device that does not fit.
    """
    check_real(x)
    if x.is_cpu and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}; on the CPU it must be torch.float32 or torch.float64")
    if x.device != own.device:
        raise ValueError(f"x is on {x.device} but the posterior is on {own.device}")
    if not any_dtype and x.dtype != own.dtype:
        raise TypeError(f"x is {x.dtype} but the posterior is {own.dtype}")
    features = x.shape[1:].numel()
    if features != own.shape[-1]:
        raise ValueError(f"x has {features} features a sample, the mixture {own.shape[-1]}")
    if shape is not None and len(shape) > 1 and x.dim() > 2 and x.shape[1:] != shape:
        raise ValueError(f"x has samples of shape {list(x.shape[1:])}, the posterior's data of {list(shape)}")


def check_pull(weights: Tensor, grad: Tensor, trace: Trace) -> None:
    """Refuse weights [N, L] and a gradient [N, …] that do not fit the point of a trace.

    Raises:
        TypeError, ValueError: as said; the message names the argument.
    """
    check_like("weights", weights, trace.log_p, other="log_p")
    check_strided(grad, "grad")
    if grad.shape != trace.x.shape or grad.device != trace.x.device or not grad.is_floating_point():
        given = f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        raise ValueError(f"grad must be like x, {list(trace.x.shape)} on {trace.x.device}, got {given}")


def check_parameters(means: Tensor, **others: Tensor) -> None:
    """Refuse parameters of a mixture that are not finite tensors of one dtype; means must be [L, K, D].

    Raises:
        TypeError, ValueError: as said; the message names the parameter.
    """
    for name, value in {"means": means, **others}.items():
        check_finite(value, name)
        check_single(value, name)
        check_like(name, value, means, value.shape, "means")
    if means.dim() != 3 or not means.numel():
        raise ValueError(f"means must be [L, K, D], got {list(means.shape)}")


def owned(parameter: Tensor) -> Tensor:
    """A copy that nobody else can change, without a graph."""
    return parameter.detach().clone(memory_format=torch.contiguous_format)


def log_shares(weights: Tensor | None, means: Tensor) -> Tensor:
    """The logarithms of the weights [L, K] of a mixture, normalised; None is equal weights.

    Raises:
        TypeError, ValueError: the weights are not what a mixture takes.
    """
    expected = list(means.shape[:2])
    if weights is None:
        weights = means.new_ones(expected)
    check_strided(weights, "weights")
    if weights.is_complex() or weights.device != means.device:
        raise TypeError(f"weights must be real numbers on {means.device}, got {weights.dtype} on {weights.device}")
    if weights.is_floating_point():
        check_like("weights", weights, means, weights.shape, "means")
    if list(weights.shape) != expected:
        raise ValueError(f"weights must be [L, K] = {expected}, got {list(weights.shape)}")
    shares = weights / weights.sum()
    if not (weights >= 0).all() or not (shares.sum(1) > 0).all():
        given = f"{int((weights < 0).sum())} negative values and the sums {weights.sum(1).tolist()}"
        raise ValueError(f"weights must be non-negative with a positive sum for each class, got {given}")
    return shares.log()


def check_deviation(sigma: float, like: Tensor, *, zero: bool = False) -> None:
    """Refuse a standard deviation whose square is no number of the dtype of ``like``.

    Raises:
        TypeError, ValueError: as said, or it is not positive; the message calls it ``sigma``.
    """
    check_length("sigma", sigma, zero=zero)
    kind = torch.finfo(like.dtype)
    if not (kind.tiny**0.5 <= sigma <= kind.max**0.5 or (zero and sigma == 0.0)):
        raise ValueError(f"sigma must have a square that {like.dtype} holds, got {sigma}")


def class_sizes(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """How many samples of each class [L] there are in labels y [M] of x [M, …], which are checked; it reads them.

    Raises:
        TypeError, ValueError: x or y do not fit; the message names it.
    """
    check_strided(x, "x")
    check_strided(y, "y")
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise TypeError(f"y must be int64 labels [M], got {y.dtype} {list(y.shape)}")
    if x.dim() < 2 or y.dim() != 1 or y.device != x.device:
        where = f"x {list(x.shape)} on {x.device} and y {list(y.shape)} on {y.device}"
        raise ValueError(f"x must be [M, …] and y [M] on one device, got {where}")
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples but y has {len(y)}")
    check_finite(x, "x", batch=True)
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number, at least 1, got {num_classes!r}")
    low, high = (int(value) for value in torch.aminmax(y)) if len(y) else (0, 0)
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {low if low < 0 else high} in y")
    return torch.bincount(y, minlength=num_classes)


def centred(weights: Tensor, log_p: Tensor) -> Tensor:
    """w = c − p Σ c for c [N, L] and log p [N, L]: the weights of the class scores in ∇ₓ of a function of log p."""
    return weights - log_p.exp() * weights.sum(1, keepdim=True)
