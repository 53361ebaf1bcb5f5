"""A target that moves with the data during an attack, and the direction of ascent of Eq. (33)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..attacks.classifier import gradient_at
from ..inputs import readable
from ..modes import own_precision
from ..ops.divergence import divergence as divergence_of
from ..ops.logit_divergence import logit_divergence
from ..posteriors.base import Trace, refuse_lost
from .outcome import check_comparable, training_logits

LOWEST = -1e30  # log p of a class of probability 0 where two of them are subtracted: −∞ would give NaN


class MovingTarget:
    """The target of an attack, moving with the data: softmax(base + share (log p(·|x') − log p(·|x))).

    Without a base it is p(·|x') itself.
    """

    def __init__(self, trace: Trace, base: Tensor | None = None, share: float = 1.0) -> None:
        if base is not None:
            check_comparable(base, trace.log_p)
        self.trace, self.base, self.share = trace, base, share
        self.clean = trace.log_p if base is None else trace.log_p.clamp(min=LOWEST)

    def move(self, x: Tensor) -> None:
        if self.share:
            with own_precision(x):
                self.trace.move(x)

    def shift(self) -> Tensor:
        """share (log p(·|x') − log p(·|x)) [N, L], finite."""
        return self.share * (self.trace.log_p.clamp(min=LOWEST) - self.clean)

    def logits(self) -> Tensor:
        """[N, L], whose softmax is the target; with no base normalised."""
        return self.trace.log_p if self.base is None else self.base + self.shift()

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        """grad + Σ_y c_y ∇ₓ logits_y for the weights c [N, L], up to what all classes have in common."""
        with own_precision(grad):
            return self.trace.pull_back(weights if self.share == 1.0 else self.share * weights, grad)


class DirectAscent:
    """The direction of Eq. (33) along one attack, and how much of it comes from the data.

    Args:
        model: maps [N, …] to logits [N, L].
        target: what the model is compared with.
        kind: name of D.
        literal: see :func:`direct_weights`.
        scores: whether the data have a part in the direction.
        noise: none, or [steps, N, …], whose directions stand for that of the data gradient, one a step.
    """

    def __init__(
        self,
        model: nn.Module,
        target: MovingTarget,
        kind: str,
        *,
        literal: bool = False,
        scores: bool = True,
        noise: Sequence[Tensor] = (),
    ) -> None:
        self.model = model
        self.target = target
        self.kind = kind
        self.literal = literal
        self.scores = scores and target.share > 0.0
        self.noise = iter(noise[0]) if noise else None
        self.data_norm: Tensor | float = 0.0
        self.model_norm: Tensor | float = 0.0
        self.sign_changes: Tensor | float = 0.0
        self.features = 0
        self.last: Tensor | None = None

    def gradient(self, x: Tensor) -> Tensor:
        self.target.move(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = training_logits(self.model, x)
        target = self.target.logits()
        check_comparable(logits, target)
        weights, grad_logits = direct_weights(logits.detach(), target, self.kind, literal=self.literal)
        model_gradient = gradient_at(x, logits, grad_logits)
        total = self._with_data(weights, model_gradient)
        if self.scores and self.last is None and readable(total):
            refuse_lost(_broken(total) & ~_broken(model_gradient) & ~_broken(weights))
        self._measure(model_gradient, total)
        return total

    def _with_data(self, weights: Tensor, model_gradient: Tensor) -> Tensor:
        if not self.scores:
            return model_gradient
        if self.noise is None:
            return self.target.pull_back(weights, model_gradient)
        length = _lengths(self.target.pull_back(weights, torch.zeros_like(model_gradient)))
        direction = next(self.noise)
        return model_gradient + direction * (length / _lengths(direction))

    def _measure(self, model_gradient: Tensor, total: Tensor) -> None:
        self.data_norm = self.data_norm + (total - model_gradient).flatten(1).norm(dim=1).sum()
        self.model_norm = self.model_norm + model_gradient.flatten(1).norm(dim=1).sum()
        self.sign_changes = self.sign_changes + (total.sign() != model_gradient.sign()).sum()
        self.features += total.numel()
        self.last = total

    def metrics(self) -> dict[str, Tensor]:
        if self.last is None:
            return {}
        return {
            "data_gradient_ratio": torch.as_tensor(self.data_norm / self.model_norm),
            "sign_change_share": torch.as_tensor(self.sign_changes / self.features),
            "zero_gradient_share": (self.last == 0).float().mean(),
        }


def _broken(x: Tensor) -> Tensor:
    """Whether there is a NaN in each sample of x [N, …], bool [N]."""
    return x.isnan().flatten(1).any(1)


def _lengths(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample of x [N, …], [N, 1, …]."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def direct_weights(logits: Tensor, log_p: Tensor, kind: str, *, literal: bool = False) -> tuple[Tensor, Tensor]:
    """Derivatives of D(p ‖ softmax(logits)) that the two gradients of Eq. (33) need.

    Args:
        logits: [N, L] of the model.
        log_p: [N, L] log posterior; normalised where ``literal``, else logits p = softmax(log_p).
        kind: name of D.
        literal: give c = ∂D/∂ log p as Eq. (33) writes it (for KL: p (log p − log q), without the constant that
            cancels), instead of its projection w = c − p Σ c. Needed when the scores are centred by an estimated
            unconditional score, which does not cancel exactly.

    Returns:
        weights of the class scores [N, L] and ∂D/∂ logits [N, L].
    """
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        if not literal:
            t = log_p.detach().requires_grad_()
            grad_z, weights = torch.autograd.grad(logit_divergence(z, t, kind=kind).sum(), [z, t])
            return weights, grad_z
        p = log_p.detach().exp().requires_grad_()
        grad_z, grad_p = torch.autograd.grad(divergence_of(z, p, kind=kind).sum(), [z, p])
    if kind == "kl":
        grad_p = grad_p - 1.0
    return p.detach() * grad_p, grad_z
