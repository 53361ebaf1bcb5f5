"""Randomized smoothing against linear classifiers, whose smoothed class and radius are known in closed form."""

import math
from functools import partial

import pytest
import torch
from library_models import small_cnn, smooth_mlp
from scipy.special import ndtr
from scipy.stats import beta, binomtest
from torch import nn

from scorematch import smoothing
from scorematch.intervals import wilson
from scorematch.smoothing import (
    ABSTAIN,
    Certificates,
    SmoothedClassifier,
    certified_accuracy,
    least_votes,
    lower_bound,
    noise_seeds,
)

FEATURES, SIGMA = 5, 0.5
NORMAL = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=torch.float64)
NORMAL = NORMAL / NORMAL.norm()


def linear(x: torch.Tensor) -> torch.Tensor:
    """Class 1 where the signed distance to a hyperplane is positive."""
    distance = x @ NORMAL - 0.2
    return torch.stack([-distance, distance], 1)


def at(distances: list[float] | torch.Tensor) -> torch.Tensor:
    """Points at these signed distances from the hyperplane, elsewhere random."""
    distances = torch.as_tensor(distances, dtype=torch.float64)
    x = torch.randn(len(distances), FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x + (distances + 0.2 - x @ NORMAL)[:, None] * NORMAL


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


SMOOTHED = SmoothedClassifier(linear, num_classes=2, sigma=SIGMA)


def test_radius_of_a_linear_classifier() -> None:
    """P(f = c) = Φ(|distance| / σ), so the true radius is the distance: reached for many votes, and never passed."""
    distances = torch.tensor([0.1, -0.3, 0.5, -0.7, 0.9], dtype=torch.float64)
    gaps = []
    for n in (2000, 50_000):
        found = SMOOTHED.certify(at(distances), n0=100, n=n, alpha=1e-4, generator=seeded(1))
        assert found.classes.tolist() == [1, 0, 1, 0, 1]
        assert found.radius.dtype == torch.float64
        assert (found.radius < distances.abs()).all()
        assert (found.p_lower < torch.from_numpy(ndtr(distances.abs().numpy() / SIGMA))).all()
        torch.testing.assert_close(found.radius, SMOOTHED.radius(found.p_lower))
        gaps.append(distances.abs() - found.radius)
    assert (gaps[1] < 0.02).all()
    assert (gaps[1] < gaps[0]).all()


def test_it_abstains_at_the_boundary() -> None:
    x = at([0.0] * 40)
    found = SMOOTHED.certify(x, n0=20, n=200, alpha=1e-3, generator=seeded(0))
    assert found.classes.tolist() == [ABSTAIN] * 40 == [-1] * 40
    assert (found.radius == 0.0).all()
    assert (found.p_lower <= 0.5).all()
    assert (SMOOTHED.predict(x, n=200, alpha=1e-3, generator=seeded(0)) == ABSTAIN).all()
    assert SMOOTHED.predict(at([0.6, -0.6]), n=100, alpha=1e-3, generator=seeded(0)).tolist() == [1, 0]


@pytest.mark.parametrize(("alpha", "least"), [(0.001, 10), (0.25, 3), (0.5, 2), (0.6, 1), (2**-20, 21)])
def test_so_few_votes_that_nothing_can_be_certified_are_refused(alpha: float, least: int) -> None:
    assert least_votes(alpha) == least
    x = at([50.0])
    assert float(SMOOTHED.certify(x, n0=1, n=least, alpha=alpha).radius) > 0.0
    assert least == 1 or alpha ** (1 / (least - 1)) <= 0.5
    if least > 1:
        with pytest.raises(ValueError, match=f"n must be at least {least} for alpha .*, got {least - 1}, which"):
            SMOOTHED.certify(x, n0=1, n=least - 1, alpha=alpha)


def test_certificates_hold_as_often_as_they_say() -> None:
    """4,000 repetitions, α = 5 %: the radius passes the true one, or the class is wrong, at most so often."""
    count, alpha = 4000, 0.05
    for distance in (0.02, 0.3):
        found = SMOOTHED.certify(at([distance] * count), n0=10, n=100, alpha=alpha, generator=seeded(2))
        wrong = (found.radius > distance) | (found.classes == 0)
        assert float(wrong.double().mean()) < alpha + 4 * (alpha * (1 - alpha) / count) ** 0.5
        assert wrong.any()  # α is used, not left over
        said = SMOOTHED.predict(at([distance] * count), n=100, alpha=alpha, generator=seeded(3))
        assert float((said == 0).double().mean()) < alpha
        assert (said == 1).any()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_coverage_of_the_bound_exactly(share: float) -> None:
    """The probability that the bound is above the share, summed over all counts, is at most α, and close to it."""
    count, alpha = 200, 0.05
    hits = torch.arange(count + 1, dtype=torch.float64)
    bound = lower_bound(hits, count, alpha)
    log_mass = (
        math.lgamma(count + 1) - torch.lgamma(hits + 1.0) - torch.lgamma(count - hits + 1.0)
        + hits * math.log(share) + (count - hits) * math.log1p(-share)
    )  # fmt: skip
    missed = float(log_mass.exp()[bound > share].sum())
    assert 0.25 * alpha < missed <= alpha * 1.0001


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_bound_is_that_of_clopper_and_pearson(alpha: float) -> None:
    hits = torch.tensor([[0, 1, 17], [60, 99, 100]])
    found = lower_bound(hits, 100, alpha)
    assert found.shape == hits.shape
    for k, value in zip(hits.flatten().tolist(), found.flatten().tolist(), strict=True):
        exact = binomtest(k, 100, alternative="greater").proportion_ci(1 - alpha, "exact").low
        assert value == pytest.approx(exact, rel=1e-9)
        assert k == 0 or value == pytest.approx(beta.ppf(alpha, k, 101 - k), rel=1e-9)
    assert float(found[1, 2]) == pytest.approx(alpha ** (1 / 100))


class Counted(nn.Module):
    """The class says how many of the first votes of a sample, whose number is its value, go to class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = torch.arange(self.seen, self.seen + len(x))
        self.seen += len(x)
        first = order < x[:, 0].round()
        return torch.stack([first.double(), (~first).double()], 1)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_prediction_is_the_binomial_test(alpha: float) -> None:
    for votes in (0, 25, 40, 50, 60, 66, 67, 68, 99, 100):
        smoothed = SmoothedClassifier(Counted(), num_classes=2, sigma=1e-6)
        said = int(smoothed.predict(torch.full((1, 1), float(votes), dtype=torch.float64), n=100, alpha=alpha))
        sure = binomtest(max(votes, 100 - votes), 100, 0.5).pvalue <= alpha
        assert said == ((0 if votes > 50 else 1) if sure else ABSTAIN)


def test_the_class_is_chosen_by_other_noise_than_bounds_it() -> None:
    """n0 votes for class 0, then n for class 1: what was chosen gets no vote, and nothing is certified."""
    smoothed = SmoothedClassifier(Counted(), num_classes=2, sigma=1e-6)
    found = smoothed.certify(torch.full((1, 1), 30.0, dtype=torch.float64), n0=30, n=100)
    assert found.classes.tolist() == [ABSTAIN]
    assert found.p_lower.tolist() == [0.0]


METHODS = {
    "predict": lambda smoothed, x, **given: [smoothed.predict(x, n=130, **given)],
    "certify": lambda smoothed, x, **given: list(smoothed.certify(x, n0=30, n=130, **given)),
    "probabilities": lambda smoothed, x, **given: [smoothed.probabilities(x, n=130, **given)],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_does_not_matter(method: str) -> None:
    """Nor do the other samples: alone, in parts with one generator, and in another order each gets the same."""
    model, call = smooth_mlp(FEATURES, 4), METHODS[method]
    x = 2 * torch.randn(13, FEATURES, dtype=torch.float64, generator=seeded(1))
    smoothed = SmoothedClassifier(model, num_classes=4, sigma=0.5)
    expected = call(smoothed, x, generator=seeded(5))

    def agree(*parts: list[torch.Tensor]) -> None:
        for want, found in zip(expected, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(found), want, rtol=1e-12, atol=1e-12)

    for batch in (1, 7, 50, 120, 10_000):
        agree(call(SmoothedClassifier(model, num_classes=4, sigma=0.5, batch=batch), x, generator=seeded(5)))
    one = seeded(5)
    agree(call(smoothed, x[:4], generator=one), call(smoothed, x[4:], generator=one))
    seeds = noise_seeds(13, seeded(5))
    agree(*[call(smoothed, x[[i]], seeds=seeds[[i]]) for i in range(13)])
    order = torch.randperm(13, generator=seeded(0))
    agree([part[order.argsort()] for part in call(smoothed, x[order], seeds=seeds[order])])
    other = call(smoothed, x, generator=seeded(6))
    assert not torch.equal(other[-1], expected[-1]) or method == "predict"


def test_probabilities_are_eq_38() -> None:
    """E σ(2 (d + σ ω)) of the linear classifier, by quadrature; and their class is that of the votes here."""
    x, n = at([-0.5, 0.0, 0.2, 1.0]), 20_000
    found = SMOOTHED.probabilities(x, n=n, generator=seeded(4))
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * nodes.square()) / math.sqrt(2 * math.pi)
    distance = (x @ NORMAL - 0.2)[:, None] + SIGMA * nodes
    expected = torch.trapezoid(density * torch.sigmoid(2 * distance), nodes)
    assert float((found[:, 1] - expected).abs().max()) < 4 * 0.5 / n**0.5
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))


def test_soft_and_hard_votes_may_differ() -> None:
    """A class that is rare but certain wins Eq. (38), and loses the votes that the radius is about."""

    def model(x: torch.Tensor) -> torch.Tensor:
        rare = x[:, 0] > 0.5  # 31 % of the noise
        return torch.stack([torch.full_like(x[:, 0], 0.1), torch.where(rare, 30.0, 0.0)], 1)

    smoothed = SmoothedClassifier(model, num_classes=2, sigma=1.0)
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert smoothed.predict(x, n=1000, generator=seeded(0)).tolist() == [0]
    assert float(smoothed.probabilities(x, n=1000, generator=seeded(0))[0, 1]) > 0.6


def test_a_module_is_given_back_as_it_was() -> None:
    model = small_cnn(batch_norm=True).train()
    x = torch.rand(3, 1, 8, 8)
    smoothed = SmoothedClassifier(model, num_classes=10, sigma=0.25)
    done: list[int] = []
    found = smoothed.certify(x, n0=10, n=60, generator=seeded(0), progress=done.append)
    assert sum(done) == 3
    assert model.training
    assert model[1].training
    assert int(model[1].num_batches_tracked) == 0
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(found.radius, smoothed.certify(x, n0=10, n=60, generator=seeded(0)).radius)
    steps: list[int] = []
    small = SmoothedClassifier(model, num_classes=10, sigma=0.25, batch=20)
    small.predict(x, n=10, progress=steps.append)
    small.probabilities(x, n=10, progress=steps.append)
    assert steps == [1] * 6


def test_no_samples() -> None:
    x = torch.zeros(0, FEATURES)
    assert SMOOTHED.predict(x).shape == (0,)
    assert [value.shape for value in SMOOTHED.certify(x)] == [(0,)] * 3
    assert SMOOTHED.probabilities(x).shape == (0, 2)


def test_the_largest_radius() -> None:
    """All n votes: σ Φ⁻¹(α^(1/n))."""
    found = SMOOTHED.certify(at([50.0]), n0=10, n=100, alpha=0.001)
    assert float(ndtr(float(found.radius) / SIGMA)) == pytest.approx(0.001 ** (1 / 100))


def test_the_radius_of_certainty_and_of_chance() -> None:
    found = SMOOTHED.radius(torch.tensor([0.0, 0.3, 0.5, float(ndtr(2.0)), 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.0, 2 * SIGMA, math.inf])


@pytest.mark.parametrize("n", [1, 100, 130])
def test_the_model_is_asked_as_often_as_said(n: int) -> None:
    asked: list[int] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return linear(x)

    smoothed = SmoothedClassifier(watched, num_classes=2, sigma=SIGMA)
    smoothed.predict(X, n=n)
    assert sum(asked) == 3 * n
    smoothed.probabilities(X, n=n)
    assert sum(asked) == 3 * (2 * n)
    smoothed.certify(X, n0=n, n=2 * n, alpha=0.5 if n > 1 else 0.6)
    assert sum(asked) == 3 * (5 * n)


def test_seeds_fill_their_range() -> None:
    seeds = noise_seeds(2000, seeded(0))
    assert seeds.dtype == torch.int64
    assert float(seeds.double().mean() / 2**62) == pytest.approx(0.5, abs=0.03)
    assert 0 <= int(seeds.min()) < int(seeds.max()) < 2**62


def test_the_curve_and_its_intervals() -> None:
    found = Certificates(
        torch.tensor([0, 1, ABSTAIN, 1, 2]), torch.tensor([0.5, 0.2, 0.0, 0.9, 0.3]).double(), torch.zeros(5).double()
    )
    y = torch.tensor([0, 1, 0, 0, 2])
    curve = certified_accuracy(found, y, [0.0, 0.25, 0.5, 0.6])
    assert [point.radius for point in curve] == [0.0, 0.25, 0.5, 0.6]
    assert [point.accuracy for point in curve] == [0.6, 0.4, 0.2, 0.0]
    assert [(point.low, point.high) for point in curve] == [wilson(hits, 5) for hits in (3, 2, 1, 0)]


def test_an_abstention_is_no_correct_class() -> None:
    found = Certificates(torch.tensor([ABSTAIN]), torch.zeros(1).double(), torch.zeros(1).double())
    assert certified_accuracy(found, torch.tensor([0]), [0.0])[0].accuracy == 0.0


X = torch.zeros(3, FEATURES, dtype=torch.float64)
BAD_LOGITS = partial(SmoothedClassifier, num_classes=3, sigma=1.0)
NOTHING = Certificates(torch.zeros(2).long(), torch.zeros(2).double(), torch.zeros(2).double())


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: SmoothedClassifier(linear, num_classes=1, sigma=1.0), ValueError, "num_classes must be at least 2"),
        (lambda: SmoothedClassifier(linear, num_classes=2, sigma=0.0), ValueError, "sigma must be finite and positive"),
        (lambda: SmoothedClassifier(linear, num_classes=2, sigma=math.nan), ValueError, "sigma must .* got nan"),
        (lambda: SmoothedClassifier(linear, num_classes=2, sigma=1.0, batch=0), ValueError, "batch must be at least 1"),
        (lambda: SMOOTHED.predict(X.long()), TypeError, "x must be floating point, got torch.int64"),
        (lambda: SMOOTHED.certify(X.numpy()), TypeError, "x must be a tensor, got ndarray"),
        (lambda: SMOOTHED.predict(X[:, 0]), ValueError, r"x must be \[N, …\], got \[3\]"),
        (lambda: SMOOTHED.predict(X, n=0), ValueError, "n must be at least 1, got 0"),
        (lambda: SMOOTHED.certify(X, n=1.5), TypeError, "n must be a whole number, got 1.5"),
        (lambda: SMOOTHED.certify(X, n0=0), ValueError, "n0 must be at least 1, got 0"),
        (lambda: SMOOTHED.certify(X, alpha=0.0), ValueError, r"alpha must lie in \(0, 1\), got 0.0"),
        (lambda: SMOOTHED.predict(X, alpha=1.0), ValueError, r"alpha must lie in \(0, 1\), got 1.0"),
        (lambda: SMOOTHED.predict(X, seeds=torch.zeros(2).long()), ValueError, r"seeds must be int64 \[3\], .* \[2\]"),
        (lambda: SMOOTHED.predict(X, seeds=[1, 2, 3]), ValueError, "seeds must be .* got list"),
        (
            lambda: SMOOTHED.predict(X, seeds=noise_seeds(3), generator=seeded(0)),
            ValueError,
            "generator must be left out where seeds are given",
        ),
        (lambda: BAD_LOGITS(linear).predict(X), ValueError, r"model must return logits \[150, 3\], got \[150, 2\]"),
        (lambda: BAD_LOGITS(lambda x: (x, x)).certify(X), ValueError, "model must return logits .* got tuple"),
        (lambda: BAD_LOGITS(lambda x: x[:, :3] / 0).probabilities(X), ValueError, "model must return finite logits"),
        (lambda: SMOOTHED.radius(torch.tensor([1.2])), ValueError, r"p_lower must lie in \[0, 1\]"),
        (lambda: SMOOTHED.radius(torch.tensor([-0.5])), ValueError, r"p_lower must .* got values in \[-0.5, -0.5\]"),
        (lambda: noise_seeds(-1), ValueError, "count must be at least 0, got -1"),
        (lambda: lower_bound(torch.tensor([1]), 0, 0.1), ValueError, "count must be at least 1, got 0"),
        (lambda: lower_bound(torch.tensor([1]), 2, 0.0), ValueError, r"alpha must lie in \(0, 1\), got 0.0"),
        (lambda: lower_bound(torch.tensor([3]), 2, 0.1), ValueError, r"hits must lie in \[0, 2\], got .* \[3, 3\]"),
        (lambda: certified_accuracy(NOTHING, torch.zeros(2), [0.0]), TypeError, "y must be int64 labels, got torch.fl"),
        (lambda: certified_accuracy(NOTHING, torch.zeros(3).long(), [0.0]), ValueError, r"got y \[3\] and certif"),
        (lambda: certified_accuracy(NOTHING, torch.zeros(2).long(), []), ValueError, "radii must be one or more"),
        (
            lambda: certified_accuracy(NOTHING, torch.zeros(2).long(), [-1.0]),
            ValueError,
            "each of radii must be finite and not",
        ),
    ],
)
def test_bad_input(call: object, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        call()  # type: ignore[operator]


def test_it_is_part_of_the_package() -> None:
    import scorematch

    assert scorematch.smoothing is smoothing
