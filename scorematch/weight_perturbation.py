"""Adversarial weight perturbation: the loss is taken at weights that were moved to increase it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from .inputs import check_instance
from .model_state import by_itself, frozen_statistics


class WeightPerturbation:
    """Adversarial weight perturbation (Wu et al., NeurIPS 2020): min over w of max over v of L(w + v), ‖v_l‖ ≤ γ ‖w_l‖.

    l counts the parameter tensors. The maximum is sought by one step of ascent: each tensor of two or more dimensions
    moves by γ ‖w_l‖ along its normalised gradient; biases and the parameters of normalisation stay. The training step
    around it::

        with WeightPerturbation(model, 5e-3) as weights:
            outcome = objectives.pgd_at(model, x, y, threat_model=threat_model, weights=weights)
            optimizer.zero_grad()
            outcome.loss.mean().backward()
        optimizer.step()

    The objective searches x' at w, calls :meth:`perturb`, and takes its loss at w + v. Leaving the block restores w bit
    for bit, whatever happened in it; the gradient of w + v stays in ``.grad``.

    Args:
        model: the module whose parameters move.
        gamma: γ, length of the step relative to the norm of the weights, above 0.
        reduce: called with the list of gradients before the step, to sum them in place over the processes of
            distributed training; without it every process perturbs by its own samples.

    Raises:
        TypeError: model is not a module.
        ValueError: gamma is not positive and finite.
    """

    def __init__(
        self, model: nn.Module, gamma: float = 5e-3, *, reduce: Callable[[Sequence[Tensor]], object] | None = None
    ) -> None:
        check_instance("model", model, nn.Module)
        if not (gamma > 0.0 and math.isfinite(gamma)):
            raise ValueError(f"gamma must be positive and finite, got {gamma}")
        self.model = model
        self.gamma = gamma
        self.reduce = reduce
        self._entered = False
        self._saved: list[tuple[Tensor, Tensor]] = []

    def perturb(self, loss: Callable[[], Tensor]) -> None:
        """Move the weights one step up the gradient of a loss.

        Args:
            loss: computes a scalar that depends on the parameters of the model; only the direction of its gradient
                matters. Batch norm keeps its mode, but its running statistics stay untouched, as the loss of training
                updates them afterwards.

        Raises:
            RuntimeError: outside a ``with`` block, or called twice in one.
            ValueError: the loss is that of another model.
        """
        if not self._entered:
            raise RuntimeError(
                "perturb works inside `with WeightPerturbation(...) as weights:`, which restores the weights"
            )
        if self._saved:
            raise RuntimeError("perturb was called twice in one `with` block, the weights are perturbed already")
        weights = [p for p in self.model.parameters() if p.requires_grad and p.dim() > 1]
        with frozen_statistics(self.model), by_itself(self.model), torch.enable_grad():
            gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        if weights and all(gradient is None for gradient in gradients):
            raise ValueError("model must be the one whose loss is taken: the loss depends on none of its weights")
        moved = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
        if self.reduce is not None:
            self.reduce([g for _, g in moved])
        with torch.no_grad():
            for weight, gradient in moved:
                self._saved.append((weight, weight.clone()))
                length = gradient.norm()
                scale = torch.where(length > 0, self.gamma * weight.norm() / length, length)
                weight.add_(gradient * scale)
        torch.clear_autocast_cache()  # which holds the weights as they were

    def __enter__(self) -> WeightPerturbation:
        self._entered = True
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for weight, value in self._saved:
            weight.copy_(value)
        torch.clear_autocast_cache()
        self._saved.clear()
        self._entered = False
