"""Square Attack (Andriushchenko et al., ECCV 2020): random search without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..inputs import check_instance
from ..ops.square import square_l2, square_linf
from ..threat_model import ThreatModel
from . import repeats
from .classifier import Classifier
from .losses import margin_loss
from .parts import Batch, Search, run_alone
from .randomness import Noise
from .settings import AttackSettings

SETTLE_EVERY = 8  # queries after which misclassified samples leave the batch; on CUDA this waits for the device
WITHIN = 1 - 1e-6  # of eps in l1: a little room, so that rounding stays inside the ball
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries (of 10,000) after which the window's area halves


@dataclass
class Square(AttackSettings):
    """Square Attack on the margin, for images [N, C, H, W].

    A sample leaves the batch soon after it is misclassified, unless a verdict takes several passes of a randomised
    model.

    Args:
        threat_model: norm, radius and box; its step size is not used.
        n_queries: proposals of one run, at least 1.
        n_restarts: runs, at least 1.
        p_init: share of the image that the first windows cover, in (0, 1].
        rescale_schedule: stretch the schedule of window sizes, made for 10,000 queries, to ``n_queries``.

    Raises:
        TypeError: threat_model is none.
        ValueError: an argument is outside its range.
    """

    threat_model: ThreatModel
    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8
    rescale_schedule: bool = False

    name = "square"
    images_only = True

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for settings outside their range, TypeError for a threat model that is none."""
        check_instance("threat_model", self.threat_model, ThreatModel)
        self.check_counts("n_queries", "n_restarts")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init must lie in (0, 1], got {self.p_init}")

    def parts(self, num_classes: int) -> int:
        """How many runs of :meth:`run_part` the attack consists of."""
        return self.n_restarts

    def cost(self) -> tuple[int, int]:
        """Forward and backward passes of one part on a sample that it does not fool."""
        return self.n_queries + 1, 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
        """Adversarial points for a batch, x itself where none was found.

        Args:
            model: maps [N, C, H, W] to logits [N, L]; used in eval mode and left as found.
            x: [N, C, H, W] inside the box.
            y: int64 [N].
            seed: of the proposals; sample n sees the same ones in any batch that has it at place n.

        Returns:
            [N, C, H, W] inside B(x).

        Raises:
            ValueError: x is not a batch of images.
        """
        return run_alone(self, model, x, y, seed)

    def window_side(self, query: int, height: int, width: int) -> int:
        """Side of the window of a query: its area is p H W, where p halves as the search goes on."""
        if self.rescale_schedule:
            query = int(query / self.n_queries * 10_000)
        p = self.p_init / 2 ** sum(query > after for after in HALVINGS)
        side = round(math.sqrt(p * height * width))
        if self.threat_model.norm != "linf":
            side = max(side, 3)
            side += side % 2 == 0
        return min(max(side, 1), height, width)

    def run_part(self, classifier: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """One run, which can pause and go on.

        Returns:
            Points [N, C, H, W], and bool [N], whether the point is misclassified.
        """
        x, y, samples, noise, search = batch.x, batch.y, batch.samples, batch.noise, batch.search
        if x.dim() != 4:
            raise ValueError(f"Square Attack takes images [N, C, H, W], got x of shape {list(x.shape)}")
        if search is None:
            first = self._first(x, samples, noise)
            nothing = repeats.nothing_asked(len(x), x.device)
            search = Search(0, first, _margin_of_truth(classifier.logits(first), y), nothing)
        on_cpu = x.device.type == "cpu"
        best, margin = search.best.clone(), search.margin.clone()
        asked = search.asked.clone() if on_cpu else torch.zeros_like(search.asked)  # elsewhere nothing is remembered
        rows = (margin > (0 if classifier.is_sure else -torch.inf)).nonzero().squeeze(1)
        still = _Standing(rows, x[rows], y[rows], samples[rows], best[rows], margin[rows], asked[rows])
        channels, height, width = x.shape[1:]
        for query in range(search.queries, self.n_queries):
            if len(still.rows) == 0:
                break
            side = self.window_side(query, height, width)
            if side != self.window_side(max(query - 1, 0), height, width):
                still.asked = torch.zeros_like(still.asked)
            window = self._window(noise, still.samples, (channels, height, width), side, query)
            if on_cpu:
                self._ask_what_is_new(classifier, still, window, side)
            else:
                self._ask(classifier, still, window, side)
            if classifier.is_sure and (noise.depends_on_batch or query % SETTLE_EVERY == SETTLE_EVERY - 1):
                alive = still.margin > 0
                if not bool(alive.all()):
                    still.write_to(best, margin, asked)
                    still.keep(alive.nonzero().squeeze(1))
            if batch.pause is not None and query % 64 == 63:
                still.write_to(best, margin, asked)
                batch.pause(Search(query + 1, best, margin, asked))
        still.write_to(best, margin, asked)
        return best, margin <= 0

    def _ask(self, classifier: Classifier, still: _Standing, window: tuple[Tensor, ...], side: int) -> None:
        """Ask the model about a proposal for each sample, and take what is better."""
        proposal = self._propose(still.best, still.x, window, side)
        margin = _margin_of_truth(classifier.logits(proposal), still.y)
        accept = _is_better(margin, still.margin, classifier)
        still.best = torch.where(accept.view(-1, 1, 1, 1), proposal, still.best)
        still.margin = torch.where(accept, margin, still.margin)

    def _ask_what_is_new(self, classifier: Classifier, still: _Standing, window: tuple[Tensor, ...], side: int) -> None:
        """The same without queries whose answer is known. On CUDA, to find them would mean to wait for the device.

        In linf many proposals change nothing: with small windows and grey images, about half of them. And what was
        refused since the point last moved would be refused again, unless a verdict takes several passes.
        """
        new = torch.arange(len(still.rows), device="cpu")
        number = None
        if self.threat_model.norm == "linf" and classifier.is_sure:
            corner, sign = window
            height, width = still.x.shape[2:]
            number = repeats.numbers(corner, sign, (height - side, width - side))
        if number is not None:
            new = new[~repeats.is_asked(still.asked, number)]
            still.asked[new] = repeats.now_asked(still.asked[new], number[new])
            window = tuple(part[new] for part in window)
        everything = len(new) == len(still.rows)
        best, centre = (still.best, still.x) if everything else (still.best[new], still.x[new])
        proposal = self._propose(best, centre, window, side) if len(new) else best
        changes = (proposal != best).flatten(1).any(1)
        if not bool(changes.all()):
            new, proposal = new[changes], proposal[changes]
        if len(new) == 0:
            return
        margin = _margin_of_truth(classifier.logits(proposal), still.y[new])
        accept = _is_better(margin, still.margin[new], classifier)
        taken = new[accept]
        still.best[taken], still.margin[taken] = proposal[accept], margin[accept]
        still.asked[taken] = 0

    def _first(self, x: Tensor, samples: Tensor, noise: Noise) -> Tensor:
        """Vertical stripes of ±eps (linf), or tiles of a pattern, scaled to length eps; clipped to the box.

        In l1 the tiles, each as long as the box is wide, are projected to the ball and the box instead.
        """
        model = self.threat_model
        channels, height, width = x.shape[1:]
        if model.norm == "linf":
            stripes = noise.stripes(samples, channels, width).to(x)
            return (x + model.eps * stripes).clamp(model.lower, model.upper)
        side = max(height // 5, 1)
        margin = (height - side * 5) // 2
        pattern = pattern_on(model.norm, side, x.dtype, x.device)
        delta = torch.zeros_like(x)
        tile = 0
        for i in range(height // side):
            for j in range(width // side):
                transpose, signs = noise.tile(samples, channels, tile)
                turned = torch.where(transpose.view(-1, 1, 1, 1), pattern.T, pattern)
                top, left = max(margin, 0) + i * side, max(margin, 0) + j * side
                rows, columns = slice(top, min(top + side, height)), slice(left, min(left + side, width))
                piece = turned * signs.to(x).view(-1, channels, 1, 1)
                delta[:, :, rows, columns] += piece[..., : max(rows.stop - top, 0), : max(columns.stop - left, 0)]
                tile += 1
        if model.norm == "l1":
            return model.replace(eps=model.eps * WITHIN).project(x + model.unit * delta, x)
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return (x + delta / (length + 1e-12) * model.eps).clamp(model.lower, model.upper)

    def _window(
        self, noise: Noise, samples: Tensor, shape: tuple[int, int, int], side: int, query: int
    ) -> tuple[Tensor, ...]:
        """What a query draws for each sample: in linf a corner and signs; else two corners, whether to turn, signs."""
        channels, height, width = shape
        room = (height - side, width - side)
        if self.threat_model.norm == "linf":
            return noise.window(samples, channels, room, query)
        return noise.windows(samples, channels, room, query)

    def _propose(self, best: Tensor, x: Tensor, window: tuple[Tensor, ...], side: int) -> Tensor:
        model = self.threat_model
        box = {"eps": model.eps, "lower": model.lower, "upper": model.upper}
        if model.norm == "linf":
            corner, sign = window
            return square_linf(best, x, corner, sign.to(x), side=side, **box)
        corners, transpose, sign = window
        pattern = pattern_on(model.norm, side, x.dtype, x.device)
        if model.norm == "l1":
            return square_l1(best, x, corners, sign.to(x), pattern, transpose, model)
        return square_l2(best, x, corners, sign.to(x), pattern, transpose, **box)


@dataclass
class _Standing:
    """The samples that are still attacked.

    Attributes:
        rows: int64 [N], their places in the batch.
        x, y, samples: theirs in the batch.
        best, margin, asked: theirs in the :class:`Search`.
    """

    rows: Tensor
    x: Tensor
    y: Tensor
    samples: Tensor
    best: Tensor
    margin: Tensor
    asked: Tensor

    def keep(self, places: Tensor) -> None:
        """Go on with some of them, int64 [K]."""
        for name, values in vars(self).items():
            setattr(self, name, values[places])

    def write_to(self, best: Tensor, margin: Tensor, asked: Tensor) -> None:
        """Write how far they have come to the tensors of the batch."""
        best[self.rows], margin[self.rows], asked[self.rows] = self.best, self.margin, self.asked


def _is_better(proposed: Tensor, margin: Tensor, classifier: Classifier) -> Tensor:
    """Whether a proposal is taken, bool [N]; one that fools a model that is sure ends the search."""
    better = proposed < margin
    return better | (proposed <= 0) if classifier.is_sure else better


def _margin_of_truth(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − max of the others, [N]: −∞, as of a point that fools the model, where a logit is NaN."""
    return -margin_loss(logits, labels).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def square_l1(
    best: Tensor, x0: Tensor, corners: Tensor, sign: Tensor, pattern: Tensor, transpose: Tensor, model: ThreatModel
) -> Tensor:
    """The proposal of Square in l1: as in l2 (:func:`scorematch.ops.square_l2`), with lengths in l1.

    One window of the perturbation is set to 0. In another, each channel is set to the sum of its old direction and of
    the pattern, scaled to the length C · both + spare. Here both is the length that the channel had in the two windows,
    and spare is eps minus the length of the whole perturbation. A point that is then outside is projected to the ball
    and the box.

    Args:
        best, x0: [N, C, H, W].
        corners: int64 [N, 4], first row and column of the window that gains, then of the one that loses.
        sign: [N, C], 1 or −1.
        pattern: [side, side], of length 1.
        transpose: bool [N].
        model: an l1 ball and its box.

    Returns:
        [N, C, H, W].
    """
    count, channels, height, width = best.shape
    side = torch.arange(len(pattern), device=best.device)
    delta = (best - x0).flatten(2)  # [N, C, H W]
    gains, loses = (
        ((corner[:, 0, None] + side)[:, :, None] * width + (corner[:, 1, None] + side)[:, None]).flatten(1)
        for corner in corners.split(2, 1)
    )  # [N, side²], places in an image
    either = torch.zeros(count, height * width, dtype=torch.bool, device=best.device)
    either = either.scatter(1, gains, True).scatter(1, loses, True)
    both = (delta.abs() * either[:, None]).sum(2, keepdim=True)
    spare = (model.eps - delta.abs().sum((1, 2)).view(-1, 1, 1)).clamp_min(0)
    gains, loses = (t[:, None].expand(-1, channels, -1) for t in (gains, loses))
    old = delta.gather(2, gains)
    bump = torch.where(transpose.view(-1, 1, 1), pattern.T, pattern).flatten(1)
    new = bump[:, None] * sign[:, :, None] + old / (1e-12 + old.abs().sum(2, keepdim=True))
    new = new / (1e-12 + new.abs().sum(2, keepdim=True)) * (spare / channels + both) * channels
    delta = delta.scatter(2, loses, 0.0).scatter(2, gains, new)
    return model.replace(eps=model.eps * WITHIN).project(x0 + delta.view(best.shape), x0)


@cache
def l2_pattern(side: int) -> Tensor:
    """The l2 move of the paper (section 4.2): a peak above a trough, [side, side], of length 1."""
    return _pattern(side, p=2, falloff=2)


@cache
def l1_pattern(side: int) -> Tensor:
    """The same for l1, with steeper peaks and of l1 length 1 (Croce & Hein, Mind the box, ICML 2021)."""
    return _pattern(side, p=1, falloff=4)


PATTERNS = {"l2": l2_pattern, "l1": l1_pattern}


@cache
def pattern_on(norm: str, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The pattern of a norm on a device, kept there: a GPU that is sent numbers is waited for."""
    return PATTERNS[norm](side).to(device, dtype)


def _pattern(side: int, p: int, falloff: int) -> Tensor:
    pattern = torch.zeros(side, side, device="cpu")
    half = side // 2
    pattern[:half] = _peak(half, side, p, falloff)
    pattern[half:] = -_peak(side - half, side, p, falloff)
    return pattern / pattern.norm(p=p)


def _peak(height: int, width: int, p: int, falloff: int) -> Tensor:
    """Nested rectangles of weight k^−falloff, centred, [height, width], of length 1 in the p-norm."""
    peak = torch.zeros(height, width, device="cpu")
    middle = (height // 2, width // 2)
    for k in range(max(height, width) // 2 + 1):
        top, left = middle[0] - k, middle[1] - k
        peak[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1.0 / (k + 1) ** falloff
    return peak / peak.norm(p=p).clamp_min(1e-12)
