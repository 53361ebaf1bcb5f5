"""Projected gradient ascent (Madry et al., ICLR 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..divergences import KINDS
from ..inputs import check_callable, check_classes, check_count, check_like, check_threat_model, clean_batch
from ..model_state import as_found
from ..modes import outside_inference_mode
from ..ops.divergence import divergence
from ..threat_model import Perturbations, ThreatModel
from .classifier import check_unwritten, gradient_at, logits_of
from .console import frames_of_the_package
from .inspection import AutoAttackWarning, probabilities
from .losses import margin_loss

LOSSES = ("ce", "margin", *KINDS)


def ascend(
    x: Tensor,
    gradient: Callable[[Tensor], Tensor],
    threat_model: Perturbations,
    *,
    steps: int,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Follow a gradient inside B(x) and return the last iterate.

    Args:
        x: [N, …] clean inputs.
        gradient: maps x' [N, …] to the direction of ascent there, same shape.
        threat_model: B(x) and the step size.
        steps: number of steps, at least 0.
        start: [N, …] first iterate; None draws it uniformly from B(x).
        generator: randomness of the start.

    Returns:
        [N, …], inside B(x), without a graph.

    Raises:
        TypeError, ValueError: the step of a B(x) of your own returns something else than points like x.
    """
    with torch.no_grad():
        x_adv = threat_model.random_start(x, generator) if start is None else start
        for _ in range(steps):
            x_adv = _next(threat_model, x_adv, gradient(x_adv), x)
    return x_adv


def _next(threat_model: Perturbations, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
    """``threat_model.step``; of a B(x) of one's own it is looked at what that returns, but for the values."""
    moved = threat_model.step(x, grad, x0)
    if not isinstance(threat_model, ThreatModel):
        check_like("what threat_model.step returns", moved, x0)
    return moved


def input_gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient with respect to its input of a function from x [N, …] to one value a sample [N]."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return gradient_at(x, loss(x))

    return gradient


class PGD:
    """PGD with restarts that keeps, for each sample, the worst point it has seen.

    A misclassified point counts as worse than any correctly classified one. Among correctly classified points the one
    of higher loss is worse; values are compared only within one loss. Every iterate is judged, not only the last, and a
    sample is not attacked further once it is misclassified. The model is used in eval mode and left as found: no
    gradient in its parameters, no mode changed. A NaN among the logits counts as misclassified. Where an element of a
    gradient is NaN, its pixel stays as it is.

    Args:
        threat_model: B(x) and the step size; a ThreatModel, or a B(x) of your own.
        steps: steps of one restart, at least 1.
        restarts: random starts for each loss, at least 1.
        losses: the losses to increase, each with all restarts: ``"ce"`` (cross-entropy), ``"margin"`` (largest other
            logit minus the label's), or the name of a divergence from the one-hot label.
        random_start: start at a uniform point of B(x) (else at x).

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
    """

    def __init__(
        self,
        threat_model: Perturbations,
        *,
        steps: int = 40,
        restarts: int = 1,
        losses: Sequence[str] = ("ce",),
        random_start: bool = True,
    ) -> None:
        check_threat_model(threat_model)
        check_count("steps", steps)
        check_count("restarts", restarts)
        if isinstance(losses, str):
            losses = (losses,)
        for loss in losses:
            if loss not in LOSSES:
                raise ValueError(f"losses must be among {', '.join(LOSSES)}, got {loss!r}")
        if not losses:
            raise ValueError(f"losses is empty; choose among {', '.join(LOSSES)}")
        self.threat_model = threat_model
        self.steps = steps
        self.restarts = restarts
        self.losses = tuple(losses)
        self.random_start = random_start

    @outside_inference_mode
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial points for a batch.

        Args:
            model: maps [N, …] to logits [N, L].
            x: [N, …] clean inputs inside the box; values that rounding put outside, by at most 1e-6 of the largest
                bound, are clamped.
            y: class indices [N] or [N, 1], of any integer type.
            generator: randomness of the starts; the same numbers are drawn whatever the model does.

        Returns:
            [N, …] inside B(x).

        Raises:
            TypeError: x is not floating point, or the model cannot be called.
            ValueError: x is outside the box, shapes or labels do not fit, or the model changes its input in place.
            TypeError, ValueError: the step of a B(x) of your own returns something else than points like x.

        Warns:
            AutoAttackWarning: the model seems to return probabilities.
        """
        check_callable("model", model)
        x, y = clean_batch(x, y, self.threat_model)
        with as_found(model):
            worst = x.clone()
            fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            if len(x):
                with torch.no_grad():
                    logits = logits_of(model, worst)
                    check_classes(y, x, logits.shape[1])
                    fooled = misclassified(logits, y)
                check_unwritten(worst, model)
                if (doubt := probabilities(logits)) is not None:
                    warnings.warn(doubt, AutoAttackWarning, stacklevel=frames_of_the_package() + 1)
            for loss in self.losses:
                best = x.new_full((len(x),), -torch.inf)
                for _ in range(self.restarts):
                    start = self.threat_model.random_start(x, generator) if self.random_start else x
                    alive = (~fooled).nonzero().squeeze(1)
                    if len(alive):
                        self._restart(model, x, y, start, alive, loss, worst, best, fooled)
        return worst

    def _restart(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        start: Tensor,
        alive: Tensor,
        loss: str,
        worst: Tensor,
        best: Tensor,
        fooled: Tensor,
    ) -> None:
        """One restart on the samples ``alive``; updates worst, best and fooled in place."""
        x_adv = start[alive]
        for step in range(self.steps + 1):
            last = step == self.steps
            with torch.set_grad_enabled(not last):
                x_adv = x_adv.detach().requires_grad_(not last)
                logits = logits_of(model, x_adv)
                value = attack_loss(logits, y[alive], loss)
            with torch.no_grad():
                wrong = misclassified(logits, y[alive])
                improved = wrong | (value > best[alive])
                worst[alive[improved]] = x_adv.detach()[improved]
                best[alive] = torch.where(improved, value.detach().to(best.dtype), best[alive])
                fooled[alive[wrong]] = True
            if last or bool(wrong.all()):
                return
            with torch.enable_grad():  # the caller may evaluate without gradients
                gradient = gradient_at(x_adv, value)
            gradient = gradient.nan_to_num(nan=0.0)  # a pixel of NaN stays where it is
            keep = ~wrong
            alive = alive[keep]
            x_adv = _next(self.threat_model, x_adv.detach()[keep], gradient[keep], x[alive])


def attack_loss(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    """One of :data:`LOSSES` for each sample, [N]."""
    if loss == "margin":
        return margin_loss(logits, labels)
    return divergence(logits, labels, kind="kl" if loss == "ce" else loss)


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the true class is not the strict maximum, [N]; a NaN anywhere counts as misclassified."""
    return ~(margin_loss(logits, labels) < 0)
