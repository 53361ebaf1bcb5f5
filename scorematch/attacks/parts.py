"""One attack by itself on one batch: its runs in turn, each on the samples that are not yet misclassified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..inputs import clean_batch
from ..model_state import as_found
from ..modes import outside_inference_mode
from ..threat_model import ThreatModel
from .classifier import Classifier, check_unwritten, predicted
from .randomness import KeyedNoise, Noise
from .targets import check_targets_fit


@dataclass
class Search:
    """How far a run has come: enough to go on with it later.

    Attributes:
        queries: proposals made so far.
        best: [N, …], the point of lowest margin of each sample of the batch.
        margin: [N], z_y − max of the others at ``best``.
        asked: int64 [N, K], which proposals were asked since ``best`` last moved; [N, 0] where none is remembered.
    """

    queries: int
    best: Tensor
    margin: Tensor
    asked: Tensor

    def of(self, rows: Tensor) -> Search:
        """That of some samples of the batch, int64 [K]."""
        return Search(self.queries, self.best[rows], self.margin[rows], self.asked[rows])

    def to(self, device: torch.device) -> Search:
        return Search(self.queries, self.best.to(device), self.margin.to(device), self.asked.to(device))

    def clone(self) -> Search:
        return Search(self.queries, self.best.clone(), self.margin.clone(), self.asked.clone())


@dataclass(frozen=True)
class Batch:
    """What a part of an attack runs on.

    Attributes:
        x: [N, …] samples that are classified correctly.
        y: int64 [N] their labels.
        samples: int64 [N] which samples of the data set they are, for numbers that belong to a sample.
        part: which part of the attack it is.
        noise: the random numbers.
        search: where an interrupted run of the same batch stopped.
        pause: called now and then with how far the run has come.
    """

    x: Tensor
    y: Tensor
    samples: Tensor
    part: int
    noise: Noise
    search: Search | None = None
    pause: Callable[[Search], None] | None = None


@runtime_checkable
class Attack(Protocol):
    """What AutoAttack needs of an attack, its own or one of yours. An attack consists of parts, run one after another.

    A part that takes long goes on from the ``search`` of its batch, and calls ``pause``. Other parts ignore both, and
    are done anew after an interruption. A state file recognises an attack by its attributes, except those that begin
    with _.

    Attributes:
        threat_model: norm, box and a radius of at most that of the evaluation.
        n_restarts: random starts.
        images_only: whether x must be [N, C, H, W].
        name: what the report calls it; no other attack of the evaluation has it.

    Methods:
        check: raises ValueError for settings outside their range.
        parts: how many calls of ``run_part`` the attack consists of, for L classes.
        cost: forward and backward passes of one part on a sample that it does not fool, for the progress bar.
        run_part: returns points [N, …], and bool [N], whether the search saw them misclassified and inside B(x). The
            answer is checked with the model itself. A misclassified point outside B(x) does not count, but may be of
            use at larger radii (``nearest`` of the report). Calls the model through the classifier that it is given.
    """

    threat_model: ThreatModel
    n_restarts: int
    images_only: bool

    @property
    def name(self) -> str: ...
    def check(self) -> None: ...
    def parts(self, num_classes: int) -> int: ...
    def cost(self) -> tuple[int, int]: ...
    def run_part(self, classifier: Classifier, batch: Batch) -> tuple[Tensor, Tensor]: ...


@outside_inference_mode
def run_alone(
    attack: Attack, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, seed: int, verdict_passes: int = 1
) -> Tensor:
    """All parts of ``attack`` on the samples of x [N, …] that the model gets right; [N, …]."""
    attack.check()
    x, y = clean_batch(x, y, attack.threat_model)
    adversarial = x.clone()
    if len(x) == 0:
        return adversarial
    with as_found(model):
        classifier = Classifier(model, verdict_passes=verdict_passes)
        logits = classifier.logits(adversarial)
        check_unwritten(adversarial, model)
        check_targets_fit(attack, y, logits.shape[1])
        alive = ((predicted(logits) == y) & (y >= 0)).nonzero().squeeze(1)  # y may be what the model predicted
        for part in range(attack.parts(logits.shape[1])):
            if len(alive) == 0:
                break
            noise = KeyedNoise(seed, attack.name, part)
            found, inside = attack.run_part(classifier, Batch(adversarial[alive], y[alive], alive, part, noise))
            fooled = inside & (classifier.label(found) != y[alive])
            adversarial[alive[fooled]] = found[fooled]
            alive = alive[~fooled]
    return adversarial
