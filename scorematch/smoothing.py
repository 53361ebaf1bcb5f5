"""Randomized smoothing: the class that a classifier gives most often under Gaussian noise, with a certified L2 radius.

The base classifier f maps x to the class of its largest logit. Cohen, Rosenfeld and Kolter, *Certified Adversarial
Robustness via Randomized Smoothing* (ICML 2019), smooth it to

    g(x) = arg max_c P(f(x + σω) = c),  ω ~ N(0, I).

If class c has a probability of at least p > 1/2 at x, then g(x + δ) = c for all δ with ‖δ‖₂ < σ Φ⁻¹(p) (their Theorem
1). Both g and p are estimated by sampling, so what is said holds with confidence 1 − α for each sample.

Eq. (38) of Pang et al. (ICML 2022) smooths the probabilities, E[p_θ(y|x + σω)], in the place of the votes:
:meth:`SmoothedClassifier.probabilities`. The two may differ in their class, and the radius is about the votes. The
paper's σ is the variance of the noise; ours is a standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betainc, betaincinv, ndtri
from torch import Tensor, nn

from .attacks.classifier import output_of
from .inputs import check_callable, check_count, check_finite, check_length, check_share, check_tensor
from .intervals import wilson
from .model_state import borrowed

ABSTAIN = -1
BLOCK = 50  # noise vectors that a sample draws at once: part of what a seed means, whatever the batch


class Certificates(NamedTuple):
    """What :meth:`SmoothedClassifier.certify` returns, one value a sample.

    Attributes:
        classes: int64 [N] in [0, L), or −1 (:data:`ABSTAIN`) where nothing is certified.
        radius: float64 [N], in input units: no δ with ‖δ‖₂ below it changes the class of the smoothed classifier. 0
            where it abstains.
        p_lower: float64 [N], lower confidence bound of the probability of the class that won among the first ``n0``
            noise vectors.
    """

    classes: Tensor
    radius: Tensor
    p_lower: Tensor


class CertifiedAccuracy(NamedTuple):
    """Certified accuracy at one radius; shares in [0, 1].

    Attributes:
        radius: in input units.
        accuracy: the share of samples whose certified class is their label, with a certified radius of at least this.
        low: lower end of the interval of that share over samples.
        high: its upper end.
    """

    radius: float
    accuracy: float
    low: float
    high: float


class SmoothedClassifier:
    """A classifier under Gaussian noise (Cohen et al., ICML 2019; Eq. 38).

    Each sample has a seed of its own, and its noise is drawn with that seed on the device of x. Apart from rounding in
    the model, the result of a sample therefore does not depend on the rest of the batch, and a sample may be certified
    alone. Calls on the parts of a data set with one generator give what one call on all of it gives. Of a seed the CPU
    counts the lowest 32 bits, so seeds of your own should differ in these.

    Args:
        model: the base classifier, maps [N, …] to logits [N, L]. A module is put into eval mode meanwhile; another
            function must be deterministic, and treat each row by itself.
        num_classes: L, at least 2.
        sigma: standard deviation of the noise in input units, finite and > 0. Noisy points are not clipped to any box.
        batch: noisy points in one pass of the model, at least 1; it decides how much memory is used.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], *, num_classes: int, sigma: float, batch: int = 1000) -> None:
        check_callable("model", model)
        check_count("num_classes", num_classes, least=2)
        check_length("sigma", sigma)
        check_count("batch", batch)
        self.model, self.num_classes, self.sigma, self.batch = model, num_classes, sigma, int(batch)

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        *,
        n: int = 100,
        alpha: float = 0.001,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """The class of the smoothed classifier: PREDICT of Cohen et al.

        It abstains unless a two-sided binomial test at level α tells the counts of the two most frequent classes
        apart. With probability at least 1 − α it either abstains or returns g(x) (their Proposition 1).

        Args:
            x: [N, …] inputs, floating point.
            n: noise vectors for each sample, at least 1.
            alpha: probability of a wrong class, in (0, 1).
            generator: what the seeds of the samples are drawn from, see :func:`noise_seeds`.
            seeds: int64 [N], the seeds themselves, in place of ``generator``.
            progress: called after each part of the samples with the number of samples in that part.

        Returns:
            int64 [N] in [0, L), or −1 (:data:`ABSTAIN`), on the device of x.

        Raises:
            TypeError, ValueError: an argument is not what it must be, or the model returns other than finite logits
                [N, L].
        """
        _check(x, alpha, n=n)
        classes = []
        with self._borrowed():
            for part, streams in self._parts(x, generator, seeds):
                top, first = self._votes(part, streams, n).topk(2, dim=1)
                most, both = (value.cpu().numpy().astype(np.float64) for value in (top[:, 0], top.sum(1)))
                # P(B ≥ most) for B ~ Bin(both, 1/2), twice: the two-sided p-value, since that law is symmetric.
                p_value = np.minimum(2 * betainc(most, both - most + 1, 0.5), 1.0)
                sure = torch.from_numpy(p_value <= alpha).to(x.device)
                classes.append(torch.where(sure, first[:, 0], ABSTAIN))
                if progress is not None:
                    progress(len(part))
        return torch.cat(classes) if classes else torch.zeros(0, dtype=torch.int64, device=x.device)

    @torch.no_grad()
    def certify(
        self,
        x: Tensor,
        *,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Certificates:
        """The class and a radius within which it stays: CERTIFY of Cohen et al.

        ``n0`` noise vectors choose the class, ``n`` fresh ones bound its probability from below (Clopper and Pearson,
        one-sided). Where that bound is above 1/2 the radius is σ Φ⁻¹(bound). For each sample the probability that it is
        given a class and a radius that do not hold is at most α (their Proposition 2). No radius is larger than
        σ Φ⁻¹(α^(1/n)), which all n votes for one class give.

        Args:
            x: [N, …] inputs, floating point.
            n0: noise vectors that choose the class, at least 1.
            n: further noise vectors that bound its probability, at least :func:`least_votes` of alpha.
            alpha: probability of a wrong certificate, in (0, 1).
            generator: what the seeds of the samples are drawn from, see :func:`noise_seeds`.
            seeds: int64 [N], the seeds themselves, in place of ``generator``.
            progress: called after each part of the samples with the number of samples in that part.

        Returns:
            Classes, radii and bounds, on the device of x.

        Raises:
            TypeError, ValueError: an argument is not what it must be, or the model returns other than finite logits
                [N, L].
        """
        _check(x, alpha, n0=n0, n=n)
        if n < (least := least_votes(alpha)):
            raise ValueError(f"n must be at least {least} for alpha {alpha:g}, got {n}, which certify nothing")
        chosen, hits = [], []
        with self._borrowed():
            for part, streams in self._parts(x, generator, seeds):
                guess = self._votes(part, streams, n0).argmax(1)
                chosen.append(guess)
                hits.append(self._votes(part, streams, n).gather(1, guess[:, None])[:, 0])
                if progress is not None:
                    progress(len(part))
        if not chosen:
            nothing = torch.zeros(0, dtype=torch.float64, device=x.device)
            return Certificates(nothing.long(), nothing, nothing)
        p_lower = lower_bound(torch.cat(hits), n, alpha)
        radius = self.radius(p_lower)
        return Certificates(torch.where(radius > 0.0, torch.cat(chosen), ABSTAIN), radius, p_lower)

    def radius(self, p_lower: Tensor) -> Tensor:
        """σ Φ⁻¹(p), the L2 radius of Cohen et al. (Theorem 1 with p_B = 1 − p); 0 where p ≤ 1/2.

        Args:
            p_lower: floating point, in [0, 1]: lower bounds of the probability of a class.

        Returns:
            float64 of its shape, in input units.

        Raises:
            ValueError: a value is outside [0, 1].
        """
        values = p_lower.detach().cpu().double().numpy()
        if not ((values >= 0.0) & (values <= 1.0)).all():
            raise ValueError(f"p_lower must lie in [0, 1], got values in [{values.min()}, {values.max()}]")
        return torch.from_numpy(self.sigma * ndtri(np.maximum(values, 0.5))).to(p_lower.device)

    @torch.no_grad()
    def probabilities(
        self,
        x: Tensor,
        *,
        n: int = 100,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """E[p_θ(y|x + σω)], Eq. (38), as the mean over ``n`` noise vectors.

        Args:
            x: [N, …] inputs, floating point.
            n: noise vectors for each sample, at least 1.
            generator: what the seeds of the samples are drawn from, see :func:`noise_seeds`.
            seeds: int64 [N], the seeds themselves, in place of ``generator``.
            progress: called after each part of the samples with the number of samples in that part.

        Returns:
            float64 [N, L], rows that sum to 1, on the device of x.

        Raises:
            TypeError, ValueError: an argument is not what it must be, or the model returns other than finite logits
                [N, L].
        """
        _check(x, n=n)
        rows = [torch.zeros(0, self.num_classes, dtype=torch.float64, device=x.device)]
        with self._borrowed():
            for part, streams in self._parts(x, generator, seeds):
                sums = [logits.double().softmax(2).sum(1) for logits in self._logits(part, streams, n)]
                rows.append(torch.stack(sums).sum(0) / n)
                if progress is not None:
                    progress(len(part))
        return torch.cat(rows)

    def _borrowed(self) -> AbstractContextManager[None]:
        return borrowed(self.model, "eval") if isinstance(self.model, nn.Module) else nullcontext()

    def _parts(
        self, x: Tensor, generator: torch.Generator | None, seeds: Tensor | None
    ) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
        """Samples whose blocks of noise fill a batch, with the noise of each."""
        if seeds is None:
            seeds = noise_seeds(len(x), generator)
        elif not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != x.shape[:1]:
            given = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
            raise ValueError(f"seeds must be int64 [{len(x)}], one for each sample of x, got {given}")
        elif generator is not None:
            raise ValueError("generator must be left out where seeds are given")
        numbers = seeds.tolist()
        size = max(1, self.batch // BLOCK)
        for start in range(0, len(x), size):
            own = [torch.Generator(x.device).manual_seed(number) for number in numbers[start : start + size]]
            yield x[start : start + size], own

    def _logits(self, x: Tensor, streams: Sequence[torch.Generator], draws: int) -> Iterator[Tensor]:
        """Logits [N, B, L] at ``draws`` noisy points of each sample, block by block."""
        for start in range(0, draws, BLOCK):
            shape = (min(BLOCK, draws - start), *x.shape[1:])
            noise = [torch.empty(shape, dtype=x.dtype, device=x.device).normal_(generator=own) for own in streams]
            points = (x[:, None] + self.sigma * torch.stack(noise)).flatten(0, 1)
            logits = torch.cat(
                [self._checked(output_of(self.model, part), len(part)) for part in points.split(self.batch)]
            )
            yield logits.view(len(x), shape[0], self.num_classes)

    def _checked(self, logits: Tensor, count: int) -> Tensor:
        if not isinstance(logits, Tensor) or logits.shape != (count, self.num_classes):
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits [{count}, {self.num_classes}], got {given}")
        if not bool(logits.isfinite().all()):
            bad = int((~logits.isfinite()).sum())
            raise ValueError(f"model must return finite logits, got {bad} of {logits.numel()} that are not")
        return logits

    def _votes(self, x: Tensor, streams: Sequence[torch.Generator], draws: int) -> Tensor:
        """How often each class comes first at ``draws`` noisy points, int64 [N, L]."""
        votes = torch.zeros(len(x), self.num_classes, dtype=torch.int64, device=x.device)
        for logits in self._logits(x, streams, draws):
            votes += nn.functional.one_hot(logits.argmax(2), self.num_classes).sum(1)
        return votes


def noise_seeds(count: int, generator: torch.Generator | None = None) -> Tensor:
    """One seed for each sample of a data set: ``seeds`` of :class:`SmoothedClassifier`.

    Two calls for a and b seeds give what one call for a + b gives.

    Args:
        count: N, at least 0.
        generator: randomness, on any device; None is torch's own of the CPU.

    Returns:
        int64 [N] in [0, 2⁶²), on the CPU.

    Raises:
        TypeError, ValueError: ``count`` is not what is said above.
    """
    check_count("count", count, least=0)
    device = "cpu" if generator is None else generator.device
    one_by_one = [torch.randint(2**62, (1,), generator=generator, device=device) for _ in range(count)]
    return torch.cat(one_by_one).cpu() if one_by_one else torch.zeros(0, dtype=torch.int64, device="cpu")


def least_votes(alpha: float) -> int:
    """The smallest n with which :meth:`SmoothedClassifier.certify` can certify anything: α^(1/n) is above 1/2.

    Args:
        alpha: in (0, 1).

    Raises:
        TypeError, ValueError: ``alpha`` is not what is said above.
    """
    check_share("alpha", alpha, zero=False)
    return math.floor(-math.log2(alpha)) + 1


def lower_bound(hits: Tensor, count: int, alpha: float) -> Tensor:
    """The one-sided lower confidence bound of a share (Clopper and Pearson, Biometrika 1934), at level 1 − α.

    It is the α quantile of Beta(hits, count − hits + 1), and 0 without hits. Over draws of ``hits`` it is above the
    true share with probability at most α.

    Args:
        hits: integers of any shape in [0, count].
        count: trials, at least 1.
        alpha: in (0, 1).

    Returns:
        float64 in [0, 1), of the shape of hits.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_tensor("hits", hits)
    check_count("count", count)
    check_share("alpha", alpha, zero=False)
    if hits.is_complex() or (hits.is_floating_point() and not bool((hits == hits.floor()).all())):
        raise TypeError(f"hits must be whole numbers, got {hits.dtype}")
    values = hits.cpu().numpy().astype(np.float64)
    if values.size and not (values.min() >= 0 and values.max() <= count):
        raise ValueError(f"hits must lie in [0, {count}], got values in [{values.min():g}, {values.max():g}]")
    bound = np.where(values > 0, betaincinv(np.maximum(values, 1), count - np.maximum(values, 1) + 1, alpha), 0.0)
    return torch.from_numpy(bound).to(hits.device)


def certified_accuracy(certificates: Certificates, y: Tensor, radii: Sequence[float]) -> list[CertifiedAccuracy]:
    """The curve of Cohen et al.: the share of samples that are certified as their label at each radius.

    The intervals are Wilson's, at 95 %. They are about the choice of the samples, as if another test set were drawn.
    That a certificate holds only with confidence 1 − α is not part of them: in expectation, at most a share α of the
    samples has a certificate that does not hold.

    Args:
        certificates: of N ≥ 1 samples.
        y: int64 [N] labels.
        radii: at least one, in input units, finite and ≥ 0.

    Returns:
        One point for each radius, in their order.

    Raises:
        TypeError: y is not int64.
        ValueError: an argument does not fit.
    """
    check_tensor("y", y)
    if y.dtype != torch.int64:
        raise TypeError(f"y must be int64 labels, got {y.dtype}")
    if y.shape != certificates.classes.shape or len(y) < 1:
        given = f"{list(y.shape)} and certificates {list(certificates.classes.shape)}"
        raise ValueError(f"y must be [N], one for each certificate, N at least 1, got y {given}")
    if not isinstance(radii, Sequence) or isinstance(radii, str) or not radii:
        raise ValueError(f"radii must be one or more numbers, got {radii!r}")
    for radius in radii:
        check_length("each of radii", radius, zero=True)
    right = certificates.classes == y
    hits = [int((right & (certificates.radius >= radius)).sum()) for radius in radii]
    return [
        CertifiedAccuracy(float(radius), count / len(y), *wilson(count, len(y)))
        for radius, count in zip(radii, hits, strict=True)
    ]


def _check(x: Tensor, alpha: float = 0.5, **counts: int) -> None:
    check_finite(x, "x", batch=True)
    for name, value in counts.items():
        check_count(name, value)
    check_share("alpha", alpha, zero=False)
