"""The ascent of Auto-PGD in l1 (Croce & Hein, Mind the box, ICML 2021): steps as sparse as the best point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.l1_step import l1_step
from ..threat_model import ThreatModel
from .ascent import SETTLE_EVERY, Ascent, beside
from .classifier import Classifier, Loss, predicted

FIRST_SHARE = 0.2  # of the features move in the first steps from a random start
SPARSER = 1.5  # a step moves so many times fewer features than the best point has changed
SHRINKS = 0.95  # fewer than this share of the features changed at the last checkpoint: progress
SHORTER = 1.5  # a step is so many times shorter without progress
SHORTEST = 10.0  # but never more than so many times shorter than eps


def ascend_sparsely(
    classifier: Classifier,
    x0: Tensor,
    loss: Loss,
    goals: tuple[Tensor, ...],
    start: Tensor,
    *,
    ball: ThreatModel,
    steps: int,
    eot_iter: int,
    random_start: bool,
    counts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ascent of the paper in one ball.

    Args:
        x0: [N, …] clean samples.
        goals: the labels [N] and, for a targeted loss, the targets [N].
        start: [N, …] in the ball.
        ball: an l1 ball and its box.
        random_start: whether the features that ``start`` changes say nothing about how many should.
        counts: whether misclassified points end the attack on a sample.

    Returns:
        The points of the largest loss [N, …] if ``counts`` is False, misclassified points [N, …], bool [N] whether
        there is one.
    """
    found, fooled = start.clone(), torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    logits, value, grad = classifier.gradient(start, loss, *goals, passes=eot_iter)
    state = _State.begin(x0, start, value, grad, predicted(logits) != goals[0], ball.eps, random_start)
    if not classifier.is_sure:
        state.clearer(state.wrong, logits, goals[0])
    centre, here = x0, list(goals)
    interval = max(int(0.04 * steps), 1)
    for iteration in range(steps):
        if counts and iteration % SETTLE_EVERY == 0:
            if classifier.is_sure and state.settle(found, fooled):
                break
            centre, here = x0[state.rows], [goal[state.rows] for goal in goals]
        state.step(centre, ball)
        logits, value, state.grad = classifier.gradient(state.x, loss, *here, passes=eot_iter)
        fell = predicted(logits) != here[0]
        state.take(fell if classifier.is_sure else state.clearer(fell, logits, here[0]), value)
        if (iteration + 1) % interval == 0:
            state.adapt(centre, ball.eps)
    if counts:
        state.settle(found, fooled)
        return found, found, fooled
    return state.best_x, found, fooled


@dataclass
class _State(Ascent):
    """What the ascent in l1 remembers besides."""

    share: Tensor  # of the features, how many the next step moves
    changed: Tensor  # features that differ from x0 at the best point of the last checkpoint

    @classmethod
    def begin(
        cls,
        x0: Tensor,
        x: Tensor,
        value: Tensor,
        grad: Tensor,
        wrong: Tensor,
        eps: float,
        random_start: bool,
    ) -> _State:
        features, changed = x0[0].numel() if len(x0) else 0, _changed(x, x0)
        if random_start:
            share, changed = torch.full(changed.shape, FIRST_SHARE, device=x.device), torch.full_like(changed, features)
        else:
            share = changed / features / SPARSER
        return cls(
            rows=torch.arange(len(x), device=x.device),
            x=x.clone(),
            grad=grad,
            wrong=wrong,
            fallen_x=x.clone(),
            clearness=torch.full_like(value, -torch.inf),
            best_x=x.clone(),
            best_grad=grad.clone(),
            best_value=value,
            step_size=x.new_full((len(x),), eps),
            share=share,
            changed=changed,
        )

    def step(self, x0: Tensor, ball: ThreatModel) -> None:
        """Along the signs of the largest gradients, all features equally far, back into the ball and the box."""
        features = x0[0].numel() if len(x0) else 0
        moving = (features - ((1.0 - self.share) * features).long()).clamp_min(1)
        box = {"eps": ball.eps, "lower": ball.lower, "upper": ball.upper}
        self.x = l1_step(self.x, self.grad, x0, self.step_size, moving, **box)

    def take(self, fell: Tensor, value: Tensor) -> None:
        """Take in the verdict and the loss of the new x."""
        self.judge(fell)
        improved = value > self.best_value
        self.best_value = torch.where(improved, value, self.best_value)
        self.best_x = torch.where(beside(improved, self.x), self.x, self.best_x)
        self.best_grad = torch.where(beside(improved, self.x), self.grad, self.best_grad)

    def adapt(self, x0: Tensor, eps: float) -> None:
        """A checkpoint. Where the best point has become sparser steps are long again and go on from it; elsewhere they
        become shorter. They move as many features as the best point says."""
        changed = _changed(self.best_x, x0)
        sparser = changed / self.changed < SHRINKS
        self.step_size = torch.where(sparser, eps, self.step_size / SHORTER).clamp(eps / SHORTEST, eps)
        self.share = changed / x0[0].numel() / SPARSER
        self.changed = changed
        self.x = torch.where(beside(sparser, self.x), self.best_x, self.x)
        self.grad = torch.where(beside(sparser, self.x), self.best_grad, self.grad)


def _changed(x: Tensor, x0: Tensor) -> Tensor:
    """How many features of x [N, …] are not those of x0, int64 [N]."""
    return (x != x0).flatten(1).sum(1)
