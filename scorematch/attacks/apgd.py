"""Auto-PGD (Croce & Hein, ICML 2020 and, for l1, 2021): gradient ascent whose step size adapts to each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..inputs import check_instance
from ..ops.apgd_step import apgd_step
from ..threat_model import ThreatModel
from .apgd_l1 import ascend_sparsely
from .ascent import SETTLE_EVERY, Ascent
from .classifier import Classifier, Loss, predicted
from .losses import UNTARGETED, own_loss, targeted_dlr_loss
from .parts import Batch, run_alone
from .randomness import start_at_distance
from .settings import AttackSettings
from .targets import check_target_classes, target_of

MOMENTUM = 0.75  # weight of the new step against the last move
LOSSES = ("ce", "dlr", "dlr-targeted")
LARGER_RADII = ((3.0, 0.3), (2.0, 0.3))  # in units of eps, and the share of the steps at each; what is left is at eps


@dataclass
class APGD(AttackSettings):
    """Auto-PGD with cross-entropy, DLR or targeted DLR.

    Every iterate is judged, the start included. A sample that is misclassified leaves the batch a few steps later, so
    the point that is returned is misclassified but not the one of highest loss. Where a verdict takes several passes of
    a randomised model, the sample stays to the end, and the point of the largest margin is returned.

    In l1 steps are sparse: only the features of the largest gradients move, and their number adapts to each sample.

    Args:
        threat_model: norm, radius and box; its step size and share are not used.
        loss: ``"ce"`` (cross-entropy), ``"dlr"`` (difference of logits ratio), or ``"dlr-targeted"``, which tries the
            classes of rank 2, 3, … of the clean logits. Or a function of your own, from logits [N, L] and labels int64
            [N] to one value for each sample, [N], that is larger where the sample is closer to being misclassified.
        n_iter: steps of one run, at least 1.
        n_restarts: random starts (of each target), at least 1.
        n_target_classes: how many classes the targeted loss tries, at most; there are never more than L − 1.
        target_classes: int64 [N, T], the classes that the targeted loss tries for each sample of the data set (of the
            batch, where the attack runs by itself), in this order; ``n_target_classes`` then has no effect. No row may
            hold a class twice, or the label. None takes the likeliest classes.
        eot_iter: how many gradients of a randomised model are averaged in each step, at least 1.
        rho: the step size is halved if the loss rose in at most this share of the steps since the last checkpoint, in
            [0, 1]; not used in l1.
        use_largereps: for l1 only: the first 30 % of the steps are taken in the ball of radius 3 eps and the next 30 %
            in that of 2 eps, each from the projection of the best point so far, as in the paper on l1.

    Raises:
        TypeError: threat_model is none.
        ValueError: an argument is outside its range.
    """

    threat_model: ThreatModel
    loss: str | Callable[[Tensor, Tensor], Tensor] = "ce"
    n_iter: int = 100
    n_restarts: int = 1
    n_target_classes: int = 9
    eot_iter: int = 1
    rho: float = 0.75
    use_largereps: bool = False
    target_classes: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for settings outside their range, TypeError for a threat model that is none."""
        check_instance("threat_model", self.threat_model, ThreatModel)
        if not callable(self.loss) and self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, or a function, got {self.loss!r}")
        self.check_counts("n_iter", "n_restarts", "n_target_classes", "eot_iter")
        self.check_share("rho")
        check_target_classes(self.target_classes)
        if self.target_classes is not None and self.loss != "dlr-targeted":
            raise ValueError(f"target_classes is for loss dlr-targeted, got loss {self.loss!r}")
        if self.use_largereps and self.threat_model.norm != "l1":
            raise ValueError(f"use_largereps is for norm l1, got norm {self.threat_model.norm}")

    @property
    def name(self) -> str:
        if callable(self.loss):
            return f"apgd-{getattr(self.loss, '__name__', type(self.loss).__name__)}"
        return {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}[self.loss]

    def parts(self, num_classes: int) -> int:
        """How many runs of :meth:`run_part` the attack consists of."""
        if self.target_classes is not None:
            return self.target_classes.shape[1] * self.n_restarts
        targets = min(self.n_target_classes, num_classes - 1) if self.loss == "dlr-targeted" else 1
        return targets * self.n_restarts

    def cost(self) -> tuple[int, int]:
        """Forward and backward passes of one part on a sample that it does not fool."""
        gradients = (self.n_iter + len(self._radii())) * self.eot_iter
        return gradients, gradients

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
        """Adversarial points for a batch, x itself where none was found.

        Args:
            model: maps [N, …] to logits [N, L]; used in eval mode and left as found.
            x: [N, …] inside the box.
            y: int64 [N].
            seed: of the random starts; sample n draws the same numbers in any batch that has it at place n.

        Returns:
            [N, …] inside B(x).
        """
        return run_alone(self, model, x, y, seed)

    def run_part(self, classifier: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """One run, which cannot be interrupted in between.

        Returns:
            Points [N, …], and bool [N], whether the point is misclassified.
        """
        loss = own_loss(self.loss) if callable(self.loss) else UNTARGETED.get(self.loss, targeted_dlr_loss)
        goals: tuple[Tensor, ...] = (batch.y,)
        if self.loss == "dlr-targeted":
            index = batch.part // self.n_restarts
            goals = (batch.y, target_of(classifier, batch.x, batch.samples, self.target_classes, index))
        if self.threat_model.norm == "l1":
            return self._ascend_in_l1(classifier, batch, loss, goals)
        start = start_at_distance(self.threat_model, self.threat_model.eps, batch.x, batch.samples, batch.noise)
        return self._ascend(classifier, batch.x, loss, goals, start)

    def _radii(self) -> Sequence[tuple[float, int]]:
        """In which balls the ascent runs, one after the other: their radii, and the steps in each."""
        eps = self.threat_model.eps
        if not self.use_largereps:
            return [(eps, self.n_iter)]
        larger = [(factor * eps, math.ceil(share * self.n_iter)) for factor, share in LARGER_RADII]
        return [*larger, (eps, max(self.n_iter - sum(steps for _, steps in larger), 0))]

    def _ascend_in_l1(
        self, classifier: Classifier, batch: Batch, loss: Loss, goals: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Sparse steps in each ball in turn; points beyond eps, met in the larger ones, do not count."""
        radii = self._radii()
        x = start_at_distance(self.threat_model, radii[0][0], batch.x, batch.samples, batch.noise)
        for radius, steps in radii:
            ball = self.threat_model.replace(eps=radius)
            if self.use_largereps:
                batch.noise.skip_start(batch.samples, batch.x)
                x = ball.project(x, batch.x)
            x, found, fooled = ascend_sparsely(
                classifier,
                batch.x,
                loss,
                goals,
                x,
                ball=ball,
                steps=steps,
                eot_iter=self.eot_iter,
                random_start=not self.use_largereps,
                counts=radius == self.threat_model.eps,
            )
        return found, fooled

    def _ascend(
        self,
        classifier: Classifier,
        x0: Tensor,
        loss: Loss,
        goals: tuple[Tensor, ...],
        start: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 1 of the paper from ``start``; ``goals`` are the labels and, for a targeted loss, the targets."""
        found, fooled = start.clone(), torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        logits, value, grad = classifier.gradient(start, loss, *goals, passes=self.eot_iter)
        state = _State.begin(start, value, grad, predicted(logits) != goals[0], 2 * self.threat_model.eps)
        if not classifier.is_sure:
            state.clearer(state.wrong, logits, goals[0])
        interval, since = max(int(0.22 * self.n_iter), 1), 0
        shorter, shortest = max(int(0.03 * self.n_iter), 1), max(int(0.06 * self.n_iter), 1)

        for iteration in range(self.n_iter):
            if iteration % SETTLE_EVERY == 0:
                if classifier.is_sure and state.settle(found, fooled):
                    return found, fooled
                centre, here = x0[state.rows], [goal[state.rows] for goal in goals]
            apgd_step(
                state.x,
                state.x_prev,
                centre,
                state.grad,
                state.best_x,
                state.best_grad,
                state.step_size,
                state.improved,
                state.restart,
                norm=self.threat_model.norm,
                eps=self.threat_model.eps,
                momentum=1.0 if iteration == 0 else MOMENTUM,
                lower=self.threat_model.lower,
                upper=self.threat_model.upper,
            )
            logits, value, state.grad = classifier.gradient(state.x, loss, *here, passes=self.eot_iter)
            fell = predicted(logits) != here[0]
            state.take(fell if classifier.is_sure else state.clearer(fell, logits, here[0]), value)
            since += 1
            if since == interval:
                state.adapt(self.rho * interval)
                since, interval = 0, max(interval - shorter, shortest)
        state.settle(found, fooled)
        return found, fooled


@dataclass
class _State(Ascent):
    """What a run in linf or l2 remembers besides."""

    x_prev: Tensor
    improved: Tensor  # whether x is the new best
    restart: Tensor  # whether the next step starts at the best point
    rises: Tensor  # steps since the checkpoint in which the loss rose
    previous_value: Tensor
    checkpoint_value: Tensor  # best loss at the last checkpoint
    halved: Tensor  # whether the step size was halved there

    @classmethod
    def begin(cls, x: Tensor, value: Tensor, grad: Tensor, wrong: Tensor, step_size: float) -> _State:
        zeros = torch.zeros_like(value)
        return cls(
            rows=torch.arange(len(x), device=x.device),
            x=x.clone(),
            x_prev=x.clone(),
            grad=grad,
            wrong=wrong,
            fallen_x=x.clone(),
            clearness=torch.full_like(value, -torch.inf),
            best_x=x.clone(),
            best_grad=torch.empty_like(x).copy_(grad),  # dense, and in the memory format of x
            best_value=value,
            improved=torch.ones_like(wrong),
            restart=torch.zeros_like(wrong),
            step_size=x.new_full((len(x),), step_size),
            rises=zeros,
            previous_value=zeros,  # as in the reference, where the first comparison is with 0
            checkpoint_value=value,
            halved=torch.ones_like(wrong),
        )

    def take(self, fell: Tensor, value: Tensor) -> None:
        """Take in the verdict and the loss of the new x."""
        self.judge(fell)
        self.improved = value > self.best_value
        self.best_value = torch.where(self.improved, value, self.best_value)
        self.rises = self.rises + (value > self.previous_value)
        self.previous_value = value
        self.restart = torch.zeros_like(fell)

    def adapt(self, enough_rises: float) -> None:
        """A checkpoint: halve the step size of the samples that make no progress, and send them to their best point."""
        stuck = ~self.halved & (self.checkpoint_value >= self.best_value)
        self.restart = self.halved = (self.rises <= enough_rises) | stuck
        self.step_size = torch.where(self.restart, self.step_size / 2, self.step_size)
        self.checkpoint_value = self.best_value
        self.rises = torch.zeros_like(self.rises)
