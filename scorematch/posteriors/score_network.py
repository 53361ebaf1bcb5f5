"""The posterior of a score network: its class scores integrated along the path of the attack."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import (
    check_classes,
    check_count,
    check_instance,
    check_length,
    check_like,
    check_real,
    check_share,
    check_strided,
    readable,
)
from ..networks.denoiser import Denoiser, EmbeddedDenoiser
from ..ops.score_line_integral import score_line_integral
from ..ops.score_step import score_step
from .base import PointwisePosterior, Posterior, Trace, centred, check_pull, check_sums

CENTERINGS = ("posterior", "network")


class ScoreNetwork(Posterior):
    """log p_σ(y|x') = log softmax_y [log p(y|x) + ∫ s_y · dx], from class scores s_y of a denoiser.

    A score network has no values, only gradients. The line integral from the clean point x to x' supplies the values,
    and normalisation removes the unconditional score (Eq. 34). The integral is a trapezoid rule along the iterates of
    the attack, the random start included.

    Args:
        denoiser: class-conditional denoiser, trained by denoising score matching
            (:func:`scorematch.matching.fit_denoiser`); fixed from now on: in eval mode, and its parameters require no
            gradients. To train it further, pass a copy.
        sigma: the noise level at which the scores are read, a standard deviation in input units; > 0.
        anchor: gives log p(y|x) at the clean point. None takes the given labels, smoothed by ``smoothing``. A pointwise
            posterior, which should belong to the same σ, takes the place of the labels.
        smoothing: probability in (0, 1) that a label anchor spreads over the other classes: a one-hot anchor has
            log p = −∞ elsewhere and no path could leave it.
        centering: how the unconditional score is removed from the gradient. ``"posterior"``: ∇ log p(y|x) =
            s_y − Σ_k p_k s_k, by the estimator's own posterior. ``"network"``: s_y − s_∅ with the denoiser's
            unconditional head, the paper's literal Eq. (34), kept for comparison.
        nodes: segments of the trapezoid rule in each move, at least 1.
        linear: read the scores at the clean point alone: log p(y|x') = log softmax_y [log p(y|x) + s_y(x) · (x' − x)].
            A whole attack then needs one evaluation of the network. Asks for ``nodes`` = 1.
        top_k: evaluate the scores of the k classes that are most probable at the clean point, 1 ≤ k ≤ L, and take the
            unconditional score for the others; None evaluates all. Only for a
            :class:`~scorematch.networks.EmbeddedDenoiser`, which is evaluated once for each class. Labels do not say
            which of the other classes is probable: without an ``anchor`` k is 1 or L.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        sigma: float,
        anchor: PointwisePosterior | None = None,
        smoothing: float = 0.1,
        centering: str = "posterior",
        nodes: int = 1,
        linear: bool = False,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        check_instance("denoiser", denoiser, Denoiser)
        if anchor is not None:
            check_instance("anchor", anchor, PointwisePosterior)
        check_length("sigma", sigma)
        check_share("smoothing", smoothing, zero=False)
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(CENTERINGS)}, got {centering!r}")
        check_count("nodes", nodes)
        if linear and nodes > 1:
            raise ValueError(f"nodes must be 1 where linear reads the scores at the clean point alone, got {nodes}")
        if top_k is not None:
            if not isinstance(denoiser, EmbeddedDenoiser):
                given = type(denoiser).__name__
                raise ValueError(f"top_k needs an EmbeddedDenoiser, got {given}, which gives all classes at once")
            check_count("top_k", top_k)
            if top_k > denoiser.num_classes:
                raise ValueError(f"top_k must lie between 1 and {denoiser.num_classes} classes, got {top_k}")
            if centering == "network":
                raise ValueError(f"top_k needs centering='posterior', got {centering!r}")
            if anchor is None and 1 < top_k < denoiser.num_classes:
                raise ValueError(
                    f"top_k must be 1 or {denoiser.num_classes} without an anchor, as labels do not say which other "
                    f"classes are probable, got {top_k}"
                )
        if anchor is not None and anchor.num_classes != denoiser.num_classes:
            raise ValueError(f"anchor has {anchor.num_classes} classes, the denoiser {denoiser.num_classes}")
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.anchor = anchor
        self.num_classes = denoiser.num_classes
        self.sigma = sigma
        self.smoothing = smoothing
        self.centering = centering
        self.nodes = nodes
        self.linear = linear
        self.top_k = top_k

    def train(self, mode: bool = True) -> ScoreNetwork:
        """A posterior is fixed: its networks stay in eval mode."""
        del mode
        return super().train(False)

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        check_real(x)
        kind = _LinearTrace if self.linear else _PathTrace
        return kind(self, x.detach(), self.clean_log_prob(x, y))

    def scores(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Class scores at x [N, …]: [N, L, …]; with ``centering="network"`` [N, L + 1, …], the unconditional last.

        ``classes`` int64 [N, K]: those to evaluate, for ``top_k``.
        """
        with torch.no_grad():
            if self.centering == "network":
                return self.denoiser.all_scores(x, self.sigma)
            if classes is not None:
                assert isinstance(self.denoiser, EmbeddedDenoiser)
                return self.denoiser.class_scores(x, self.sigma, classes)
            return self.denoiser.class_scores(x, self.sigma)

    def clean_log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y|x) [N, L] of the anchor at clean inputs; the score network is not evaluated.

        Raises:
            TypeError, ValueError: without an anchor, y is neither labels [N] nor probabilities [N, L] that sum to 1,
                whose values are read on the CPU alone; or x is no batch.
        """
        check_real(x)
        with torch.no_grad():
            if self.anchor is not None:
                return self.anchor.log_prob(x)
            if not isinstance(y, Tensor) or y.dim() != 2:
                check_classes(y, x, self.num_classes, values=readable(x))
                y = torch.nn.functional.one_hot(y, self.num_classes)
            check_strided(y, "y")
            if y.is_complex():
                raise TypeError(f"y must be int64 labels [N] or probabilities [N, L], got {y.dtype} {list(y.shape)}")
            y = y.to(x.dtype)
            check_like("y", y, x, [len(x), self.num_classes])
            others = (1.0 - y) / (self.num_classes - 1)
            smoothed = (1.0 - self.smoothing) * y + self.smoothing * others
            if readable(y):
                if not bool(((smoothed > 0.0) & (smoothed < 1.001)).all()):
                    given = torch.stack(y.aminmax()).tolist()
                    raise ValueError(f"y must be probabilities [N, L], got values in {given}")
                check_sums(y, "y")
            return smoothed.log()


class _PathTrace(Trace):
    def __init__(self, posterior: ScoreNetwork, x: Tensor, log_p: Tensor) -> None:
        self.posterior = posterior
        self.x = x
        self.log_p = log_p
        self.classes = None if posterior.top_k is None else log_p.topk(posterior.top_k, 1).indices
        self.scores = posterior.scores(x, self.classes)  # [N, L, …], or [N, L + 1, …]

    def move(self, x: Tensor) -> None:
        check_like("x", x, self.x, other="the points before")
        with torch.no_grad():
            start, move = self.x, (x.detach() - self.x) / self.posterior.nodes
            for node in range(1, self.posterior.nodes + 1):
                last = node == self.posterior.nodes
                self.x = x.detach() if last else start + node * move
                before, self.scores = self.scores, self.posterior.scores(self.x, self.classes)
                classes = self.posterior.num_classes
                self.log_p = score_line_integral(self.log_p, before[:, :classes], self.scores[:, :classes], move)

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        check_pull(weights, grad, self)
        if self.posterior.centering == "posterior":
            return score_step(centred(weights, self.log_p), self.scores, grad)
        unconditional = -weights.sum(1, keepdim=True)
        return score_step(torch.cat([weights, unconditional], 1), self.scores, grad)


class _LinearTrace(_PathTrace):
    def __init__(self, posterior: ScoreNetwork, x: Tensor, log_p: Tensor) -> None:
        super().__init__(posterior, x, log_p)
        self.clean, self.clean_log_p = x, log_p

    def move(self, x: Tensor) -> None:
        check_like("x", x, self.x, other="the points before")
        self.x = x.detach()
        scores = self.scores[:, : self.posterior.num_classes]
        self.log_p = score_line_integral(self.clean_log_p, scores, scores, self.x - self.clean)
