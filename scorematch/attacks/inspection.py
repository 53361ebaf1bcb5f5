"""What about a model makes a robustness evaluation doubtful, found out before and after attacking it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .classifier import Classifier
from .losses import cross_entropy, dlr_loss


class AutoAttackWarning(UserWarning):
    """The evaluation may be unreliable."""


Model = Callable[[Tensor], Tensor]


def check_logits(logits: Tensor, x: Tensor) -> None:
    """Refuse what no classifier returns.

    Raises:
        ValueError: logits are not [N, L] with L ≥ 2 for x [N, …], or hold a NaN.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return a tensor of logits [N, L], got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(
            f"the model must return logits [N, L] with L >= 2, got {list(logits.shape)} for x of shape {list(x.shape)}"
        )
    if bool(logits.isnan().any()):
        raise ValueError(f"the model returned NaN for {int(logits.isnan().any(1).sum())} of {len(x)} points")


def randomised(model: Model, x: Tensor, y: Tensor, passes: int = 5, tolerance: float = 1e-4) -> str | None:
    """Whether repeated passes over x [N, …] disagree."""
    with torch.no_grad():
        outputs = [model(x).float() for _ in range(passes)]
    labels = [output.argmax(1) == y for output in outputs]
    scaled = [output / (output.norm(dim=1, keepdim=True) + 1e-10) for output in outputs]
    difference = max(float((one - scaled[0]).norm(dim=1).max()) for one in scaled)
    if difference > tolerance or any(int(one.sum()) != int(labels[0].sum()) for one in labels):
        return 'the model seems to be randomised: its outputs differ from pass to pass; use version="rand"'
    return None


def probabilities(logits: Tensor, tolerance: float = 1e-5) -> str | None:
    """Whether the outputs [N, L] are probabilities instead of logits."""
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
    watched = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}
    calls = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code in watched

    previous = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            model(x)
    finally:
        sys.setprofile(previous)
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


@contextmanager
def unchanged_buffers(model: Any, warn: Callable[[str], None]) -> Iterator[None]:
    """Give the buffers of a module back as they were, with a warning if inference changed them."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        changed = [n for n, b in model.named_buffers() if n in saved and not torch.equal(b, saved[n])]
        for name, buffer in model.named_buffers():
            if name in changed:
                buffer.copy_(saved[name])
    if changed:
        warn(f"the model changes its buffers while it predicts ({', '.join(changed[:3])}); they were restored")
