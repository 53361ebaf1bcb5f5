"""0-1 errors against the label of p_d (section 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks.classifier import predicted
from ..attacks.losses import margin_loss
from ..modes import outside_modes
from ..ops.logit_divergence import logit_divergence
from ..posteriors.base import Posterior, check_known
from ..threat_model import ThreatModel
from .errors import RobustErrors
from .estimates import Estimate, estimate
from .inequalities import ZERO_ONE
from .search import Ascent, Problem, clean_values, explore


class ZeroOneErrors(NamedTuple):
    """Which samples have which error; bool [N] each, maxima over the same points of B(x).

    Y_d = arg max_y p_d(y|·) and Y_θ = arg max_y p_θ(y|·); in a tie, the first class. Where a logit of the model is
    NaN, Y_θ is no class: it differs from every Y_d, from every label and from every class that the model names
    elsewhere.

    Attributes:
        standard: Y_θ(x) ≠ Y_d(x), Eq. (11).
        madry: Y_θ(x') ≠ Y_d(x) at some x', Eq. (12).
        score: Y_θ(x') ≠ Y_d(x') at some x', Eq. (13), the self-consistent error.
        flips: Y_d(x') ≠ Y_d(x) at some x': where the paper's assumption, that perturbations keep the label, is false.
        preserving: Y_θ(x') ≠ Y_d(x') at some x' with Y_d(x') = Y_d(x): only perturbations that keep the label count. It
            is at most ``madry`` and at most ``score``.
        invariance: Y_θ(x') ≠ Y_θ(x) at some x'.
        label: Y_θ(x') ≠ y at some x', for the label y drawn at x: what benchmarks measure. It differs from ``madry``
            only where y ≠ Y_d(x).
    """

    standard: Tensor
    madry: Tensor
    score: Tensor
    flips: Tensor
    preserving: Tensor
    invariance: Tensor
    label: Tensor

    def rates(self, *, weights: Tensor | None = None) -> dict[str, Estimate]:
        """Each error as a share in [0, 1] of p_d(x), with its 95 % interval (Wilson's).

        Args:
            weights: [N] quadrature weights of p_d(x), see :func:`scorematch.bounds.estimate`; None: x are draws.
                Where x are nodes, labels are not drawn, and ``label`` means nothing.
        """
        return {name: estimate(values, weights) for name, values in self._asdict().items()}

    def errors(self) -> RobustErrors:
        """The same as errors of D(P ‖ Q) = 1(arg max P ≠ arg max Q), so that Theorem 1 and Theorem 3 take them.

        This D is symmetric and obeys the triangle inequality, which is all that the proofs use. C^D is the share of
        ``flips``, so Theorem 1 says how far the criteria of Eqs. (12) and (13) can be apart.
        """
        standard, madry, score, flips, invariance = (
            values.double() for values in (self.standard, self.madry, self.score, self.flips, self.invariance)
        )
        return RobustErrors(ZERO_ONE, standard, madry, score, flips, invariance)


@outside_modes
def zero_one_errors(
    model: Callable[[Tensor], Tensor],
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    candidates: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> ZeroOneErrors:
    """The 0-1 errors of Eqs. (11) to (13) and their alternatives, all at common points of B(x).

    The paper concludes that Eqs. (12) and (13) are equivalent, and that p_d is optimal for both, where Y_d is constant
    on each B(x). At a sample where it is, they agree. Elsewhere they need not: for p_θ = p_d Eq. (13) is 0 and
    Eq. (12) is the share of flips, and a model that is constant may have less.

    Without candidates, gradient ascents look for errors: of the margins of the model and of p_d, and of the KL
    divergence between them. Every point that any of them visits counts for all errors. The search may miss errors, so
    every share is a lower bound. With candidates the errors are those over the candidates and x, exactly.

    Args:
        y: int64 [N] labels in [0, L).

    The other arguments are those of :func:`scorematch.bounds.robust_errors`.

    Raises:
        ValueError, TypeError: an argument does not fit, or p_d gives a NaN; the message names it.
    """
    problem = Problem(model, posterior, x, y, threat_model)
    log_p, logits = clean_values(problem)
    if y.dtype != torch.int64 or y.dim() != 1:
        raise TypeError(f"y must be int64 [N], got {y.dtype} {list(y.shape)}")
    if not bool(((y >= 0) & (y < log_p.shape[1])).all()):
        raise ValueError(f"y must lie in [0, {log_p.shape[1]}), got values in [{int(y.min())}, {int(y.max())}]")
    likely, said = _most_likely(log_p), predicted(logits)
    wrong, none = said != likely, torch.zeros_like(likely, dtype=torch.bool)
    found = ZeroOneErrors(wrong, wrong, wrong, none, wrong, none, said != y)

    def look(there_p: Tensor, there_logits: Tensor) -> None:
        nonlocal found
        data, says = _most_likely(there_p), predicted(there_logits)
        kept = data == likely[:, None]
        found = found._replace(
            madry=found.madry | (says != likely[:, None]).any(1),
            score=found.score | (says != data).any(1),
            flips=found.flips | (~kept).any(1),
            preserving=found.preserving | (kept & (says != data)).any(1),
            invariance=found.invariance | (says != said[:, None]).any(1),
            label=found.label | (says != y[:, None]).any(1),
        )

    named = said.clamp(min=0)  # no class has no margin; class 0 stands for it
    ascents = [
        Ascent(lambda _, z: margin_loss(z, likely)),
        Ascent(lambda there, z: margin_loss(z, there.detach().argmax(1))),
        Ascent(lambda there, z: logit_divergence(z, there, kind="kl")),
        Ascent(lambda there, z: torch.minimum(margin_loss(z, likely), -margin_loss(there, likely))),
        Ascent(lambda there, _: margin_loss(there, likely)),
        Ascent(lambda _, z: margin_loss(z, named)),
        Ascent(lambda _, z: margin_loss(z, y)),
    ]
    explore(problem, ascents, look, candidates=candidates, steps=steps, restarts=restarts, generator=generator)
    return found


def _most_likely(log_p: Tensor) -> Tensor:
    """arg max over the classes, the last dimension, of the log p of p_d.

    Raises:
        ValueError: p_d has no most likely class, since it gives a NaN.
    """
    check_known(log_p)
    return log_p.argmax(-1)
