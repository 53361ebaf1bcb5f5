"""Free adversarial training: one backward pass gives the gradients of the weights and of the input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .divergences import check_kind
from .inputs import check_count, check_inputs, check_instance
from .objectives.outcome import Outcome, accuracy, divergence_from, training_logits, warn_of_probabilities
from .ops.pgd_step import pgd_step
from .threat_model import ThreatModel

FREE_NORMS = ("linf", "l2")


class FreeAttack:
    """The perturbation of free adversarial training (Shafahi et al., NeurIPS 2019, Alg. 1).

    A minibatch is trained on ``replays`` times in a row. Each backward pass moves the perturbation by one step along
    the gradient that it leaves in the input; the perturbation is carried over to the next replay and to the next
    minibatch, by position in the batch, and starts at 0::

        for _ in range(free.replays):
            outcome = free.step(model, x, y)
            optimizer.zero_grad()
            outcome.loss.mean().backward()  # moves the perturbation too
            optimizer.step()

    One replay costs what a step of standard training costs. The published schedule divides the number of epochs by
    ``replays``, so that the number of weight updates is that of standard training: 96 epochs become 24 with 4 replays.
    A schedule by steps counts weight updates: epochs × minibatches × replays.

    A NaN in the gradient of the input counts as 0, and an infinite value as the largest finite one, so that one bad
    backward pass does not stay in the perturbation.

    Args:
        threat_model: eps, norm (linf or l2) and box.
        replays: passes over one minibatch, at least 1.
        divergence: name of D in the loss D(y ‖ q(x + δ)).
        step_size: length of one step, in the units of the input; None is eps, as published.

    Raises:
        TypeError: threat_model is none, or replays is not a whole number.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self, threat_model: ThreatModel, replays: int = 4, divergence: str = "kl", *, step_size: float | None = None
    ) -> None:
        check_kind(divergence)
        check_instance("threat_model", threat_model, ThreatModel)
        if threat_model.norm not in FREE_NORMS:
            raise ValueError(
                f"threat_model must have norm {' or '.join(FREE_NORMS)} for free training, got {threat_model.norm}"
            )
        check_count("replays", replays)
        if step_size is not None and not (step_size > 0.0 and math.isfinite(step_size)):
            raise ValueError(f"step_size must be positive and finite, or None for eps, got {step_size}")
        # which refuses a step that is too long
        self.threat_model = threat_model if step_size is None else threat_model.replace(step_size=step_size)
        self.replays = replays
        self.divergence = divergence
        self.step_size = threat_model.eps if step_size is None else step_size
        self.perturbation: Tensor | None = None  # [largest N so far, …], inside the ball of radius eps around 0

    def step(self, model: nn.Module, x: Tensor, y: Tensor) -> Outcome:
        """The loss at x + δ; its backward pass, to be done once, moves δ.

        Args:
            model: maps [N, …] to logits [N, L], in the mode of training.
            x: [N, …] inputs inside the box. A smaller batch than before uses the first N perturbations.
            y: int64 [N] labels, or probabilities [N, L].

        Returns:
            An outcome whose ``x_adv`` is x + δ, clipped to the box.

        Raises:
            TypeError, ValueError: x or y cannot be used, see :func:`scorematch.inputs.check_inputs`, or the samples
                have another shape than those before.
        """
        check_inputs(model, x, y, self.threat_model)
        point = self.threat_model.project(x + self._held(x), x).requires_grad_()
        point.register_hook(self._advance)
        logits = training_logits(model, point)
        warn_of_probabilities(model, logits)
        loss = divergence_from(y, logits, self.divergence)
        return Outcome(loss, point.detach(), {"accuracy": accuracy(logits, y)})

    def _held(self, x: Tensor) -> Tensor:
        """The first N perturbations; those of positions not met before are 0."""
        held = x.new_zeros(0, *x.shape[1:]) if self.perturbation is None else self.perturbation
        if held.shape[1:] != x.shape[1:]:
            raise ValueError(f"x has samples of shape {list(x.shape[1:])}, the perturbation {list(held.shape[1:])}")
        if len(held) < len(x):
            held = torch.cat([held, x.new_zeros(len(x) - len(held), *x.shape[1:])])
        self.perturbation = held
        return held[: len(x)]

    @torch.no_grad()
    def _advance(self, gradient: Tensor) -> None:
        assert self.perturbation is not None
        moved = self.perturbation[: len(gradient)]
        moved.copy_(
            pgd_step(
                moved,
                gradient.nan_to_num(nan=0.0),
                torch.zeros_like(moved),
                norm=self.threat_model.norm,
                step_size=self.step_size,
                eps=self.threat_model.eps,
                lower=-math.inf,
                upper=math.inf,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """What is carried over, for exact resumption."""
        return {"perturbation": self.perturbation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave."""
        held = state["perturbation"]
        self.perturbation = None if held is None else held.clone()
