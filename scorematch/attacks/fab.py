"""Fast adaptive boundary attack (Croce & Hein, ICML 2020): the nearest misclassified point, whatever its distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..inputs import check_instance
from ..ops.fab_step import fab_step
from ..threat_model import DUAL_ORDERS, ThreatModel
from .ascent import SETTLE_EVERY, beside
from .classifier import Classifier
from .losses import difference
from .parts import Batch, run_alone
from .randomness import start_at_distance
from .settings import AttackSettings
from .targets import check_target_classes, target_of

HELD = 1 << 24  # numbers in the gradients of several classes that are held at once


@dataclass
class FAB(AttackSettings):
    """FAB, targeted (the boundary to the classes of rank 2, 3, … in turn) or to the nearest boundary.

    A sample is done once a misclassified point within eps was found. The first restart starts at x and draws no random
    numbers. Up to that point, what it finds for a sample therefore does not depend on eps.

    Args:
        threat_model: norm, radius and a finite box; its step size is not used.
        targeted: one class at a time, with one gradient in each step instead of one for each class.
        n_iter: steps of one run, at least 1.
        n_restarts: runs (of each target), at least 1.
        n_target_classes: how many classes are tried when targeted, at most L − 1.
        target_classes: int64 [N, T], the classes that are tried when targeted for each sample of the data set (of the
            batch, where the attack runs by itself), in this order; ``n_target_classes`` then has no effect. No row may
            hold a class twice, or the label. None takes the likeliest classes.
        alpha_max: largest weight of the original point in a step, in [0, 1].
        eta: factor on a step towards the hyperplane, at least 0; above 1 the step crosses it.
        beta: share of the distance to the original that is kept after a success, in [0, 1].

    Raises:
        TypeError: threat_model is none.
        ValueError: an argument is outside its range.
    """

    threat_model: ThreatModel
    targeted: bool = True
    n_iter: int = 100
    n_restarts: int = 1
    n_target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    target_classes: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for settings outside their range, TypeError for a threat model that is none."""
        check_instance("threat_model", self.threat_model, ThreatModel)
        self.check_counts("n_iter", "n_restarts", "n_target_classes")
        self.check_share("alpha_max")
        self.check_share("beta")
        check_target_classes(self.target_classes)
        if self.target_classes is not None and not self.targeted:
            raise ValueError("target_classes is for targeted=True, got targeted=False")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be finite and at least 0, got {self.eta}")
        if not abs(self.threat_model.upper - self.threat_model.lower) < float("inf"):
            raise ValueError(
                f"FAB needs a finite box, the threat model has [{self.threat_model.lower}, {self.threat_model.upper}]"
            )

    @property
    def name(self) -> str:
        return "fab-t" if self.targeted else "fab"

    def parts(self, num_classes: int) -> int:
        """How many runs of :meth:`run_part` the attack consists of."""
        if self.target_classes is not None:
            return self.n_restarts * self.target_classes.shape[1]
        return self.n_restarts * (min(self.n_target_classes, num_classes - 1) if self.targeted else 1)

    def cost(self) -> tuple[int, int]:
        """Forward and backward passes of one part on a sample that it does not fool.

        Untargeted, the backward passes are those of one class.
        """
        return 2 * self.n_iter, self.n_iter

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
        """Misclassified points within eps of a batch, x itself where none was found.

        Args:
            model: maps [N, …] to logits [N, L]; used in eval mode and left as found.
            x: [N, …] inside the box.
            y: int64 [N].
            seed: of the random starts of later restarts.

        Returns:
            [N, …] inside B(x).
        """
        return run_alone(self, model, x, y, seed)

    def run_part(self, classifier: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """One run, which cannot be interrupted in between.

        Returns:
            The nearest misclassified points [N, …], x itself where none was found, and bool [N], whether the point is
            misclassified and within eps.
        """
        x, part = batch.x, batch.part
        target = None
        if self.targeted:
            target = target_of(classifier, x, batch.samples, self.target_classes, part // self.n_restarts)
        start = x
        if part % self.n_restarts:
            start = self._random_start(batch)
        return self._descend(classifier, x, batch.y, target, start)

    def _random_start(self, batch: Batch) -> Tensor:
        """A point at distance eps / 2, clipped to the box."""
        model, x, radius = self.threat_model, batch.x, self.threat_model.eps / 2
        if model.norm != "l1":
            return start_at_distance(model, radius, x, batch.samples, batch.noise)
        raw = batch.noise.start(batch.samples, x, model.norm).to(x)
        length = raw.flatten(1).abs().sum(1).clamp_min(1e-12)
        return (x + raw * beside(radius / length, x)).clamp(model.lower, model.upper)

    def _descend(
        self, classifier: Classifier, x0: Tensor, y: Tensor, target: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        model = self.threat_model
        found, fooled = x0.clone(), torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        rows, x = torch.arange(len(x0), device=x0.device), start
        near_x = start  # of the samples in rows: the nearest misclassified point, and its distance
        nearest = x0.new_full((len(x0),), torch.inf)
        for iteration in range(self.n_iter):
            if iteration % SETTLE_EVERY == 0:
                within = nearest <= model.eps
                if bool(within.any()):
                    found[rows[within]], fooled[rows[within]] = near_x[within], True
                    keep = (~within).nonzero().squeeze(1)
                    rows, x, near_x, nearest = rows[keep], x[keep], near_x[keep], nearest[keep]
                    if len(keep) == 0:
                        return found, fooled
                centre, labels = x0[rows], y[rows]
                boundary = self._boundary_to(target[rows] if target is not None else None, labels)
            value, normal = boundary(classifier, x)
            moved = fab_step(
                x,
                centre,
                normal,
                value.to(x.dtype),
                norm=model.norm,
                alpha_max=self.alpha_max,
                overshoot=self.eta,
                lower=model.lower,
                upper=model.upper,
            )
            # With an infinite difference of logits there is no hyperplane: all elements are NaN, and the point stays.
            goes = moved.sum(tuple(range(1, x.dim()))).isfinite()
            on_cpu = x.device.type == "cpu"  # elsewhere asking would wait for the device
            x = moved if on_cpu and bool(goes.all()) else torch.where(beside(goes, x), moved, x)
            crossed = classifier.label(x) != labels
            length = distance(x, centre, model.norm)
            nearer = crossed & (length < nearest)
            near_x = torch.where(beside(nearer, x), x, near_x)
            nearest = torch.where(nearer, length, nearest)
            x = torch.where(beside(crossed, x), centre + (x - centre) * self.beta, x)
        known = nearest.isfinite()
        found[rows[known]], fooled[rows] = near_x[known], nearest <= model.eps
        return found, fooled

    def _boundary_to(self, target: Tensor | None, y: Tensor) -> Callable[[Classifier, Tensor], tuple[Tensor, Tensor]]:
        """The linearised boundary at x: the value d [N] of z_t − z_y there, and its gradient [N, …]."""
        if target is not None:

            def targeted(classifier: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
                _, value, gradient = classifier.gradient(x, difference, y, target, judge=False)
                return value, gradient

            return targeted

        def nearest(classifier: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
            logits, gradient_of = classifier.class_gradients(x)
            values = (logits - logits.gather(1, y[:, None])).to(x.dtype)  # [N, L]
            classes, every = values.shape[1], torch.arange(len(x), device=x.device)
            held = max(HELD // x.numel(), 1)
            own = gradient_of(y) if held < classes else None
            least = x.new_full((len(x),), torch.inf)
            value, normal = torch.zeros_like(least), torch.zeros_like(x)
            for some in torch.arange(classes, device=x.device).split(held):
                gradients = torch.stack([gradient_of(c.expand_as(y)) for c in some], 1)  # [N, K, …]
                if own is None:
                    own = gradients[every, y]
                normals = gradients.sub_(own[:, None])
                flat = normals.flatten(2)
                dual = flat.norm(dim=2, p=DUAL_ORDERS[self.threat_model.norm])
                distances = (values[:, some].abs() / (1e-12 + dual)).nan_to_num(nan=torch.inf, posinf=torch.inf)
                distances = distances.masked_fill(some == y[:, None], torch.inf)
                choice = distances.argmin(1)
                nearer = distances[every, choice] < least
                least = torch.where(nearer, distances[every, choice], least)
                value = torch.where(nearer, values[every, some[choice]], value)
                normal = torch.where(beside(nearer, x), normals[every, choice], normal)
            return value, normal

        return nearest


def distance(x: Tensor, x0: Tensor, norm: str) -> Tensor:
    """‖x − x0‖ of each sample, [N]."""
    offset = (x - x0).flatten(1)
    if norm == "l1":
        return offset.abs().sum(1)
    return offset.abs().amax(1) if norm == "linf" else offset.square().sum(1).sqrt()
