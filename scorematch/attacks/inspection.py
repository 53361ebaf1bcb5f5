"""Looks, before and after the attacks, for what makes a robustness evaluation doubtful."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .classifier import Classifier, predicted
from .losses import cross_entropy, dlr_loss
from .parts import Attack
from .watching import watch


class AutoAttackWarning(UserWarning):
    """The evaluation may be unreliable."""


Model = Callable[[Tensor], Tensor]


def doubts(
    model: Any,
    x: Tensor,
    y: Tensor,
    logits: Tensor,
    attacks: Sequence[Attack],
    version: str,
    verdict_passes: int = 1,
) -> dict[str, str | None]:
    """What makes the evaluation of a model doubtful, judged by its first batch.

    Args:
        model: in eval mode.
        x: [N, …], on the device of the model.
        y: int64 [N].
        logits: [N, L], of the model at x.
        attacks: those of the evaluation.
        version, verdict_passes: of :class:`scorematch.AutoAttack`; ``"rand"`` expects a randomised model.

    Returns:
        By the name of each check the text of its warning, or None if it found nothing.
    """
    names = [attack.name for attack in attacks]
    found = {"probabilities": probabilities(logits)}
    if version != "rand":
        found["randomised"] = randomised(model, x, y, verdict_passes)
    found["dynamic"] = dynamic(model, x)
    if any(backwards > 0 for _, backwards in (attack.cost() for attack in attacks)):
        classifier = Classifier(model)
        found["zero gradients"] = zero_gradients(classifier, x, y)
        known = predicted(logits) >= 0
        found["broken gradients"] = broken_gradients(classifier, x[known], y[known])
    ranked = [a for a in attacks if a.name.endswith("-t") and getattr(a, "target_classes", None) is None]
    targets = max((getattr(a, "n_target_classes", 0) for a in ranked), default=0)
    return {**found, "few classes": few_classes(logits.shape[1], names, targets)}


def no_classifier(logits: Tensor) -> None:
    """Refuse a model that returns a NaN among the logits [N, L] of every sample.

    Raises:
        ValueError: every sample has a NaN.
    """
    nan = int(logits.isnan().any(1).sum())
    if nan == len(logits):
        raise ValueError(f"the model returned NaN for {nan} of {len(logits)} points")


def nan_samples(samples: Tensor, what: str) -> str | None:
    """The warning about the samples int64 [K] at whose ``what`` points (clean or attacked) a logit is NaN."""
    if len(samples) == 0:
        return None
    first = ", ".join(str(int(n)) for n in samples[:10])
    return (
        f"the model returns NaN for {len(samples)} {what} samples ({first}{', …' if len(samples) > 10 else ''}): "
        "a NaN counts as misclassified"
    )


def broken_gradients(classifier: Classifier, x: Tensor, y: Tensor) -> str | None:
    """Whether some gradients at x [N, …] have elements that are NaN or infinite."""
    if len(x) == 0:
        return None
    classifier.take_broken()
    classifier.gradient(x, cross_entropy, y)
    if count := classifier.take_broken():
        return f"gradients are not finite for {count} of {len(x)} points: a NaN counts as 0 and leaves its pixel alone"
    return None


def randomised(
    model: Model, x: Tensor, y: Tensor, verdict_passes: int = 1, passes: int = 5, tolerance: float = 1e-4
) -> str | None:
    """Whether repeated passes over x [N, …] disagree, and what then to use besides ``verdict_passes``."""
    with torch.no_grad():
        outputs = [model(x).float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for _ in range(passes)]
    labels = [output.argmax(1) == y for output in outputs]
    scaled = [output / (output.norm(dim=1, keepdim=True) + 1e-10) for output in outputs]
    difference = max(float((one - scaled[0]).norm(dim=1).max()) for one in scaled)
    if difference > tolerance or any(int(one.sum()) != int(labels[0].sum()) for one in labels):
        doubt = 'the model seems to be randomised: its outputs differ from pass to pass; use version="rand"'
        if verdict_passes > 1:
            return f"{doubt}, which averages its gradients"
        return f"{doubt}, and verdict_passes (such as 20), or a lucky pass counts as a success"
    return None


def probabilities(logits: Tensor, tolerance: float = 1e-5) -> str | None:
    """Whether the outputs [N, L] are probabilities instead of logits."""
    logits = logits[logits.isfinite().all(1)]
    if len(logits) == 0:
        return None
    low, high = float(logits.min()), float(logits.max())
    sums = float((logits.sum(1) - 1).abs().max())
    if low > -tolerance and high < 1 + tolerance and sums < tolerance:
        return "the model seems to return probabilities: attacks need logits, without the softmax"
    return None


def zero_gradients(classifier: Classifier, x: Tensor, y: Tensor) -> str | None:
    """Whether gradients vanish at points of x [N, …] that are classified correctly.

    At others they may: the DLR loss is 1 wherever y has the third largest logit.
    """
    shares = []
    for name, loss in (("cross-entropy", cross_entropy), ("DLR", dlr_loss)):
        logits, _, gradient = classifier.gradient(x, loss, y)
        correct = logits.argmax(1) == y
        zeros = int((gradient.flatten(1).abs().amax(1)[correct] == 0).sum())
        if zeros:
            shares.append(f"{name}: {zeros} of {int(correct.sum())}")
    if shares:
        return f"points with zero gradient ({', '.join(shares)}): attacks by gradients may fail for that reason alone"
    return None


def dynamic(model: Model, x: Tensor) -> str | None:
    """Whether the model computes gradients while it predicts."""
    calls: list[Any] = []

    @torch.no_grad()
    def predict() -> None:
        model(x)

    watch((torch.autograd.grad, torch.autograd.backward), calls.append, predict)
    if calls:
        return "the model takes gradients while it predicts (a dynamic defence): AutoAttack may be insufficient"
    return None


def few_classes(classes: int, names: Sequence[str], targets: int) -> str | None:
    """What the attacks do when there are fewer classes than they are made for."""
    parts = []
    if classes < 3 and {"apgd-dlr", "apgd-t"} & set(names):
        parts.append("with 2 classes DLR is undefined, the difference of logits takes its place")
    elif classes < 4 and "apgd-t" in names:
        parts.append("with 3 classes targeted DLR is undefined, its denominator becomes z(1) - z(3)")
    if targets > classes - 1 and {"apgd-t", "fab-t"} & set(names):
        parts.append(f"targeted attacks try {classes - 1} classes instead of {targets}")
    return "; ".join(parts) or None


def masking(before: float, after: float, tolerance: float = 0.002) -> str | None:
    """Whether Square lowered the robust accuracy (shares) where gradients should have."""
    if before - after > tolerance:
        return (
            f"Square lowered the robust accuracy by {100 * (before - after):.2f} points: gradients may be masked; "
            "use more queries and restarts, or an adaptive attack"
        )
    return None
