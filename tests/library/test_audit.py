"""Audits of a posterior, and the judge of self-consistency, against closed forms in float64."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from library_models import mixture, smooth_mlp
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scorematch import ThreatModel, audit, objectives
from scorematch.divergences import KINDS
from scorematch.matching import fit_temperature
from scorematch.networks import Denoiser, MLPBackbone
from scorematch.posteriors import (
    ClassScorePosterior,
    Ensemble,
    GaussianMixture,
    KernelDensity,
    NoiseConditionalClassifier,
    ScoreNetwork,
)
from scorematch.posteriors.base import PointwisePosterior, Trace
from scorematch.self_consistency import consistency

F64 = {"rtol": 1e-9, "atol": 1e-9}


class Altered(ClassScorePosterior):
    """A mixture whose log posterior is tempered and whose scores are scaled and turned."""

    def __init__(self, truth: GaussianMixture, scale: float = 1.0, temperature: float = 1.0, turn: float = 0.0) -> None:
        super().__init__()
        self.truth, self.scale, self.temperature, self.turn = truth, scale, temperature, turn
        self.num_classes = truth.num_classes

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, scores = self.truth.log_prob_and_scores(x)
        mean = (log_p.exp()[..., None] * scores).sum(1, keepdim=True)
        return (log_p / self.temperature).log_softmax(1), mean + self.scale * (scores - mean) + self.turn


def sample(truth: GaussianMixture, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return truth.sample(count, torch.Generator().manual_seed(seed))


def test_gradients_are_those_of_the_log_posterior() -> None:
    truth = mixture()
    x, y = sample(truth, 7)
    log_p, gradients = audit.posterior_gradients(truth, x, y)
    torch.testing.assert_close(log_p, truth(x), **F64)
    point = x.requires_grad_()
    for label in range(3):
        (expected,) = torch.autograd.grad(truth(point)[:, label].sum(), point)
        torch.testing.assert_close(gradients[:, label], expected, **F64)


def test_errors_of_scaled_gradients() -> None:
    """ĝ = a g has the relative error (a − 1)², the cosine 1 and wants the factor 1/a."""
    truth = mixture()
    x, y = sample(truth, 50)
    for scale in (0.5, 1.0, 3.0):
        error = audit.gradient_error(Altered(truth, scale, turn=2.0), truth, x, y)
        assert error.relative == pytest.approx((scale - 1) ** 2, abs=1e-9)
        assert error.cosine == pytest.approx(1.0)
        assert error.amplitude == pytest.approx(1 / scale)


def test_kl_error() -> None:
    truth = mixture()
    x, y = sample(truth, 50)
    moved = x + 0.3
    p, q = truth(moved).softmax(1), (truth(moved) / 2).softmax(1)
    expected = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(audit.kl_error(Altered(truth, temperature=2.0), truth, x, y, moved), expected, **F64)
    assert audit.kl_error(truth, truth, x, y).abs().max() < 1e-12


def test_kl_error_where_the_truth_rules_out_a_class() -> None:
    """0 log 0 is 0, whatever the estimate says of the class, and −∞ where the truth does not say so is infinite."""
    truth = mixture(2, 1, 5)

    class Without(Altered):
        def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
            log_p, scores = self.truth.log_prob_and_scores(x)
            return torch.tensor([0.0, -math.inf], dtype=x.dtype).expand_as(log_p), scores

    x, y = sample(truth, 5)
    sure = Without(truth)
    torch.testing.assert_close(audit.kl_error(truth, sure, x, y), -truth(x)[:, 0])
    assert audit.kl_error(sure, sure, x, y).tolist() == [0.0] * 5
    assert audit.kl_error(sure, truth, x, y).tolist() == [math.inf] * 5
    assert audit.kl_error(Broken(truth, -math.inf), sure, x, y).isnan().all()


class Still(Trace):
    def __init__(self, x: Tensor, log_p: Tensor) -> None:
        self.x, self.log_p = x, log_p

    def move(self, x: Tensor) -> None:
        self.x = x

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        raise NotImplementedError


class Lazy(Altered):
    """Keeps the value of the point where its path began."""

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        return Still(x, self.log_prob_and_scores(x)[0])


def test_the_truth_has_the_highest_held_out_likelihood() -> None:
    truth = mixture()
    x, y = sample(truth, 4000)
    noise = 0.4
    values = {
        t: float(audit.log_likelihood(Altered(truth.smoothed(noise), temperature=t), x, y, noise=noise).mean())
        for t in (0.7, 1.0, 1.5)
    }
    assert max(values, key=values.__getitem__) == 1.0

    # An estimate that stays where its path began is no better for it, though the label is that of another point.
    assert float(audit.log_likelihood(Lazy(truth.smoothed(noise)), x, y, noise=noise).mean()) < values[1.0] - 0.005
    # and at no noise it is the log-likelihood of the labels
    plain = audit.log_likelihood(truth, x, y, noise=0.0, repeats=1)
    torch.testing.assert_close(plain, truth(x).gather(1, y[:, None])[:, 0], **F64)


def test_the_likelihood_is_the_mean_over_the_noise() -> None:
    truth = mixture()
    x, y = sample(truth, 20)
    generator = torch.Generator().manual_seed(7)
    values = [truth(x + 0.4 * torch.empty_like(x).normal_(generator=generator)) for _ in range(3)]
    expected = torch.stack(values).mean(0).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(audit.log_likelihood(truth, x, y, noise=0.4, repeats=3, seed=7), expected, **F64)


def test_a_path_starts_where_nothing_more_is_known_of_clean_x() -> None:
    """As far from x' as x is, in a direction of its own: 2 x' − x, for one, would give x away."""
    truth = mixture()
    x, y = sample(truth, 2000)
    begun: list[Tensor] = []

    class Watched(Altered):
        def trace(self, x: Tensor, y: Tensor) -> Trace:
            begun.append(x)
            return super().trace(x, y)

        def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
            begun.append(x)
            return super().log_prob_and_scores(x)

    audit.log_likelihood(Watched(truth), x, y, noise=0.5, repeats=1)
    start, moved = begun[0], begun[-1]
    there, back = ((a - b).flatten() / 0.5 for a, b in ((moved, x), (start, moved)))
    assert float(back.square().mean()) == pytest.approx(1.0, abs=0.1)
    assert abs(float((there * back).mean())) < 0.05


def test_matching_error_is_its_definition() -> None:
    """The mean over both signs of two noise vectors, whatever the unconditional score is."""
    truth, sigma = mixture(), 0.5
    x, y = sample(truth, 12)
    generator = torch.Generator().manual_seed(7)
    squares = []
    for omega in [torch.empty_like(x).normal_(generator=generator) for _ in range(2)]:
        for noise in (omega, -omega):
            point = (x + sigma * noise).requires_grad_()
            (gradient,) = torch.autograd.grad(truth(point).gather(1, y[:, None]).sum(), point)
            squares.append((gradient + (3 * point.detach()).sin() + noise / sigma).square().mean(1))
    found = audit.matching_error(truth, lambda v: (3 * v).sin(), x, y, sigma=sigma, repeats=2, seed=7)
    torch.testing.assert_close(found, torch.stack(squares).mean(0), **F64)


def test_matching_error_ranks_as_the_truth_does() -> None:
    """Its differences are the differences of the errors of the gradients, which are known here."""
    truth, sigma = mixture(), 0.5
    smoothed = truth.smoothed(sigma)
    x, y = sample(truth, 20_000)

    def unconditional(points: Tensor) -> Tensor:
        log_p, scores = smoothed.log_prob_and_scores(points)
        return (log_p.exp()[..., None] * scores).sum(1)

    errors = {
        scale: audit.matching_error(Altered(smoothed, scale), unconditional, x, y, sigma=sigma).mean()
        for scale in (0.5, 1.0, 1.4)
    }
    noisy = x + sigma * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    log_p, g = audit.posterior_gradients(smoothed, noisy, y)
    energy = float((log_p.exp() * g.square().mean(2)).sum(1).mean())
    for scale in (0.5, 1.4):
        assert float(errors[scale] - errors[1.0]) == pytest.approx((scale - 1) ** 2 * energy, rel=0.1)


def test_calibration() -> None:
    truth = mixture()
    x, y = sample(truth, 20_000)
    good, sure = (audit.calibration(Altered(truth, temperature=t), x, y, noise=0.0) for t in (1.0, 0.3))
    assert good.error < 0.02
    assert good.accuracy == pytest.approx(float((truth(x).argmax(1) == y).double().mean()))
    assert sure.error > 4 * good.error
    assert sure.confidence > sure.accuracy
    assert good == pytest.approx(audit.reliability(truth(x), y))


def test_calibration_at_noise_does_not_start_where_more_is_known() -> None:
    """An estimate that keeps the value of its start would else be as accurate as at clean x."""
    truth = mixture()
    x, y = sample(truth, 20_000)
    clean, noisy = (audit.calibration(truth, x, y, noise=noise).accuracy for noise in (0.0, 2.0))
    lazy = audit.calibration(Lazy(truth), x, y, noise=2.0).accuracy
    assert lazy < noisy < clean - 0.02


def test_reliability_of_stated_probabilities() -> None:
    # Three of four at .55 are right, and one of two at .95: |.75 - .55| · 4/6 + |.5 - .95| · 2/6.
    p = torch.tensor([[0.55, 0.45]] * 4 + [[0.05, 0.95]] * 2, dtype=torch.float64)
    found = audit.reliability(p.log(), torch.tensor([0, 0, 1, 0, 1, 0]), bins=10)
    assert found[:3] == pytest.approx((0.2 * 4 / 6 + 0.45 * 2 / 6, (4 * 0.55 + 2 * 0.95) / 6, 4 / 6))
    one = audit.reliability(p.log(), torch.tensor([0, 0, 1, 0, 1, 0]), bins=1)
    assert one.error == pytest.approx(abs(4 / 6 - (4 * 0.55 + 2 * 0.95) / 6))
    certain = audit.reliability(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    assert certain == (0.0, 1.0, 1.0, 0.0, 0.0)


def test_the_error_of_calibrated_probabilities_is_not_above_chance() -> None:
    """Labels drawn from p itself: the error of 500 points is about 5 %, and 5 % of the seeds are above the quantile."""
    above, errors, expected = 0, [], []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        log_p = (1.5 * torch.randn(500, 10, generator=generator, dtype=torch.float64)).log_softmax(1)
        y = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
        found = audit.reliability(log_p, y, seed=seed)
        assert 0 < found.chance < found.chance_high < 0.1
        above += found.error > found.chance_high
        errors.append(found.error)
        expected.append(found.chance)
        sure = audit.reliability((3 * log_p).log_softmax(1), y, seed=seed)
        assert sure.error > 2 * sure.chance_high
    assert above <= 5
    assert sum(errors) / 50 == pytest.approx(sum(expected) / 50, rel=0.1)
    assert sum(errors) / 50 > 0.04, "a threshold of .05 alone would flag many"
    assert audit.reliability(log_p, y, seed=7) == audit.reliability(log_p, y, seed=7)


@pytest.mark.parametrize(
    ("log_p", "y", "bins", "message"),
    [
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 5, "log_p must be log probabilities, at most 0"),
        (torch.zeros(3), torch.tensor([0, 0, 0]), 5, r"log_p must be \[N, L\] and not empty, got \[3\]"),
        (torch.zeros(1, 2).long(), torch.tensor([0]), 5, "log_p must be floating point"),
        (torch.full((1, 3), -5.0), torch.tensor([0]), 5, "log_p must be normalised, .* got a sum of 0.02021"),
        (torch.tensor([[-math.inf, -math.inf]]), torch.tensor([0]), 5, "log_p must be normalised, .* got a sum of 0 "),
        (torch.zeros(2, 1), torch.tensor([0]), 5, r"and y \[N\]|y must be"),
        (torch.zeros(1, 1), torch.tensor([2]), 5, r"y must lie in \[0, 1\)"),
        (torch.zeros(1, 1), torch.tensor([0]), 0, "bins must be at least 1, got 0"),
    ],
)
def test_bad_input_of_the_reliability(log_p: Tensor, y: Tensor, bins: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        audit.reliability(log_p, y, bins=bins)


def test_spread_over_trainings() -> None:
    truth = mixture()
    x, y = sample(truth, 100)
    variance, kl = audit.spread([Altered(truth, s) for s in (0.5, 1.5)], x, y)
    assert variance == pytest.approx(0.5)  # unbiased variance of .5 and 1.5, relative to the square of their mean
    assert kl == pytest.approx(0.0, abs=1e-12)
    assert audit.spread([truth, truth], x, y)[0] == 0.0
    assert audit.spread([truth, Altered(truth, temperature=3.0)], x, y)[1] > 0.01
    with pytest.raises(ValueError, match="at least two, got 1"):
        audit.spread([truth], x, y)
    with pytest.raises(TypeError, match=r"each of posteriors must be a posterior, .* got Linear"):
        audit.spread([truth, nn.Linear(5, 3)], x, y)  # type: ignore[list-item]


def two_points(variance: float, shift: float = 0.0) -> GaussianMixture:
    means = torch.tensor([[[0.2, 0.2 + shift]], [[0.8, 0.8]]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((2, 1), variance, dtype=torch.float64))


def test_spread_of_posteriors_that_are_sure() -> None:
    """Where probabilities underflow, 0 log 0 is 0."""
    sure, shifted = two_points(1e-4), two_points(1e-4, 0.01)
    x, y = torch.tensor([[0.2, 0.2], [0.5, 0.5]], dtype=torch.float64), torch.tensor([0, 1])
    log_p = [posterior(x).tolist() for posterior in (sure, shifted)]
    assert math.exp(log_p[0][0][1]) == 0.0

    def kl(own: list[list[float]]) -> float:
        total = 0.0
        for point in range(2):
            for label in range(2):
                p = 0.5 * sum(math.exp(member[point][label]) for member in log_p)
                total += p * (math.log(p) - own[point][label]) if p else 0.0
        return total / 2

    variance, found = audit.spread([sure, shifted], x, y)
    assert found == pytest.approx(0.5 * (kl(log_p[0]) + kl(log_p[1])))
    assert 0.0 < variance < math.inf
    assert audit.spread([sure, shifted], x[:1], y[:1]) == (0.0, 0.0)
    assert audit.centre(sure, x[:1], y[:1]) == 0.0


def test_gradient_error_where_the_truth_is_sure() -> None:
    sure, x, y = two_points(1e-4), torch.tensor([[0.2, 0.2]], dtype=torch.float64), torch.tensor([0])
    assert audit.gradient_error(two_points(1.0), sure, x, y) == (math.inf, 0.0, 0.0)
    assert audit.gradient_error(sure, sure, x, y) == (0.0, 0.0, 0.0)


class Turning(ClassScorePosterior):
    """Not a posterior: the class scores of a field that turns, (−x₂, x₁) for class 0 and zero for class 1."""

    num_classes = 2

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        field = torch.stack([-x[:, 1], x[:, 0]], 1)
        return x.new_full((len(x), 2), -math.log(2.0)), torch.stack([field, torch.zeros_like(field)], 1)


def test_a_closed_loop_finds_a_field_that_is_no_gradient() -> None:
    """Around a square of side a the field (−x₂, x₁) gains 2 a² by Stokes, up to the sign of the turn."""

    class FieldDenoiser(Denoiser):
        def __init__(self) -> None:
            super().__init__(torch.nn.Identity(), num_classes=2, sigma_data=1.0)

        def class_scores(self, x: Tensor, sigma: Tensor | float) -> Tensor:
            return Turning().log_prob_and_scores(x)[1]

    x, y = torch.randn(5, 2, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    network = ScoreNetwork(FieldDenoiser(), sigma=1.0, smoothing=0.5)
    gained = audit.closed_loop(network, x, y, length=0.5)
    # log p starts at (ln ½, ln ½); the loop adds ±½ to the first logit
    expected = [abs(math.log(2 / (1 + math.exp(-g)))) for g in (0.5, -0.5)]
    for value in gained.tolist():
        assert min(abs(value - e) for e in expected) < 1e-9
    truth = mixture(features=2)
    assert audit.closed_loop(truth, x, y, length=0.5).max() < 1e-12


def test_martingale() -> None:
    truth = mixture()
    x, y = sample(truth, 20_000)
    sigmas = (0.3, 0.8)
    mean, error = audit.martingale(truth.smoothed(0.3), truth.smoothed(0.8), x, y, sigmas=sigmas)
    assert abs(mean) < 4 * error
    unsure, error = audit.martingale(
        truth.smoothed(0.3), Altered(truth.smoothed(0.8), temperature=2.0), x, y, sigmas=sigmas
    )
    assert unsure > 10 * error
    with pytest.raises(ValueError, match="sigmas must rise"):
        audit.martingale(truth, truth, x, y, sigmas=(0.8, 0.3))
    with pytest.raises(ValueError, match=r"sigmas must rise, got \(0.3, 0.3\)"):
        audit.martingale(truth, truth, x, y, sigmas=(0.3, 0.3))
    with pytest.raises(ValueError, match="sigmas must"):
        audit.martingale(truth, truth, x, y, sigmas=(0.8, math.inf))


def test_the_standard_error_of_the_martingale_is_how_far_its_mean_strays() -> None:
    truth = mixture()
    finer, coarser = truth.smoothed(0.3), truth.smoothed(0.8)
    found = [
        audit.martingale(finer, coarser, *sample(truth, 200, seed=seed), sigmas=(0.3, 0.8), seed=seed)
        for seed in range(200)
    ]
    means, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert float(means.std()) == pytest.approx(float(errors.mean()), rel=0.15)  # three standard errors of a spread


def test_gradients_of_a_posterior_have_no_mean() -> None:
    truth = mixture()
    x, y = sample(truth, 30)
    assert audit.centre(Altered(truth, turn=5.0), x, y) < 1e-20

    class Literal(Altered):
        """Gradients that are not centred, as those of the literal Eq. (34) with a wrong unconditional score."""

        def _trace_at(self, x: Tensor) -> Trace:
            return Uncentred(self, x)

    class Uncentred(Trace):
        def __init__(self, posterior: Altered, x: Tensor) -> None:
            self.posterior = posterior
            self.move(x)

        def move(self, x: Tensor) -> None:
            self.x = x
            self.log_p, self.scores = self.posterior.log_prob_and_scores(x)

        def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
            return grad + (weights[..., None] * self.scores).sum(1)

    log_p, scores = Altered(truth).log_prob_and_scores(x)
    p = log_p.exp()[..., None]
    expected = (p * scores).sum(1).square().sum() / (p * scores.square()).sum()
    assert audit.centre(Literal(truth), x, y) == pytest.approx(float(expected))


def test_energy_identity() -> None:
    truth = mixture()
    x, y = sample(truth, 40_000)
    energy, slope = audit.energy_identity(truth.smoothed, x, y, sigma=0.7, repeats=2)
    assert energy == pytest.approx(slope, rel=0.05)
    # gradients of the wrong size show on the left side alone
    double, same = audit.energy_identity(lambda s: Altered(truth.smoothed(s), 2.0), x, y, sigma=0.7, repeats=2)
    assert double == pytest.approx(4 * energy)
    assert same == pytest.approx(slope)


def test_both_sides_of_the_energy_identity_are_their_definitions() -> None:
    """Of one noise vector with both signs; the slope is a central difference."""
    truth, sigma, step = mixture(), 0.7, 0.4
    x, y = sample(truth, 30)
    omega = torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(3))

    def entropy(level: float) -> Tensor:
        noisy = torch.cat([x + level * omega, x - level * omega])
        return -truth.smoothed(level)(noisy).gather(1, torch.cat([y, y])[:, None]).mean()

    expected = (entropy(sigma * (1 + step)) - entropy(sigma * (1 - step))) / (2 * step * sigma) / sigma
    energy, slope = audit.energy_identity(truth.smoothed, x, y, sigma=sigma, step=step, repeats=1, seed=3)
    assert slope == pytest.approx(float(expected))
    point = torch.cat([x + sigma * omega, x - sigma * omega]).requires_grad_()
    log_p = truth.smoothed(sigma)(point)
    gradients = [torch.autograd.grad(log_p[:, c].sum(), point, retain_graph=True)[0] for c in range(3)]
    squares = torch.stack(gradients, 1).square().sum(2)
    assert energy == pytest.approx(float((log_p.exp() * squares).sum(1).mean().detach()))


def test_agreement_with_people() -> None:
    generator = torch.Generator().manual_seed(0)
    people = torch.rand(50, 4, generator=generator).pow(6).double()
    people[:10] = torch.eye(4, dtype=torch.float64)[0]
    people = people / people.sum(1, keepdim=True)
    log_p = (people + 0.1 * torch.rand(50, 4, generator=generator)).log().log_softmax(1)
    found = audit.agreement(log_p, people)
    target = torch.distributions.Categorical(probs=people)
    posterior = torch.distributions.Categorical(logits=log_p)
    assert found.kl == pytest.approx(float(torch.distributions.kl_divergence(target, posterior).mean()), rel=1e-5)
    rank = spearmanr(target.entropy().round(decimals=12), posterior.entropy().round(decimals=12)).statistic
    assert found.entropy_rank == pytest.approx(float(rank), abs=0.02)
    assert audit.agreement(people.clamp(min=1e-300).log(), people).kl == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"log_p and people must both be \[N, L\]"):
        audit.agreement(log_p[:3], people)


@pytest.mark.parametrize(
    ("log_p", "people", "message"),
    [
        (torch.full((4, 3), -5.0), torch.full((4, 3), 1 / 3), "log_p must be normalised, .* got a sum of 0.02021"),
        (torch.full((4, 2), 0.5).log(), torch.full((4, 2), 0.9), "people must be .* sum to 1 .* got a sum of 1.8"),
        (torch.full((4, 2), 0.5).log(), torch.full((4, 2), -0.5), r"people must be .* outside \[0, 1\]"),
    ],
)
def test_bad_input_of_the_agreement(log_p: Tensor, people: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit.agreement(log_p, people)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [4, 10, 100])
def test_an_entropy_that_is_constant_but_for_rounding_has_no_rank(classes: int, dtype: torch.dtype) -> None:
    """The same probabilities in another order, whose sums round otherwise."""
    generator = torch.Generator().manual_seed(classes)
    one = torch.rand(classes, dtype=dtype, generator=generator).softmax(0)
    constant = torch.stack([one[torch.randperm(classes, generator=generator)] for _ in range(200)])
    other = torch.randn(200, classes, dtype=dtype, generator=generator).log_softmax(1)
    assert torch.special.entr(constant).sum(1).unique().numel() > 1
    assert audit.agreement(other, constant).entropy_rank == 0.0
    assert audit.agreement(constant.log(), other.exp()).entropy_rank == 0.0
    assert audit.agreement(other, other.exp()).entropy_rank == pytest.approx(1.0)
    # Two values of the entropy in two halves: all ties are told.
    halves = torch.cat([constant[:100], torch.full((100, classes), 1 / classes, dtype=dtype)])
    rank = spearmanr([0] * 100 + [1] * 100, torch.special.entr(other.exp()).sum(1)).statistic
    assert audit.agreement(other, halves).entropy_rank == pytest.approx(float(rank), abs=1e-6)


def plain_gradient(members: list[PointwisePosterior], x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    point = x.detach().requires_grad_()
    log_p = torch.stack([member(point).exp() for member in members]).mean(0).log()
    return log_p.detach(), torch.autograd.grad((log_p * weights).sum(), point)[0]


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    members = [mixture(seed=seed) for seed in range(3)]
    x, y = sample(members[0], 6)
    moved = x + 0.2
    trace = Ensemble(members).trace(x, y)
    trace.move(moved)
    weights = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    log_p, gradient = plain_gradient(members, moved, weights)
    torch.testing.assert_close(trace.log_p, log_p, **F64)
    torch.testing.assert_close(trace.pull_back(weights, torch.ones_like(x)), gradient + 1, **F64)
    torch.testing.assert_close(Ensemble(members).log_prob(moved), log_p, **F64)
    torch.testing.assert_close(Ensemble(members)(moved), log_p, **F64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ensemble([]), "at least one posterior"),
        (lambda: Ensemble([mixture(2), mixture(3)]), r"equally many classes each, got \[2, 3\]"),
    ],
)
def test_members_must_fit(build: Callable[[], Ensemble], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def free(eps: float) -> ThreatModel:
    return ThreatModel("l2", eps, lower=-math.inf, upper=math.inf)


def test_the_judge_finds_the_largest_divergence() -> None:
    """In one dimension the ball can be searched point by point."""
    truth = mixture(2, 2, 1)
    model = smooth_mlp(1, 2)
    x, y = sample(truth, 200)
    threat_model = free(0.5).replace(step_size=0.02)
    found = consistency(
        model, truth, x, y, threat_model, steps=80, restarts=3, generator=torch.Generator().manual_seed(0)
    )
    grid = x + torch.linspace(-0.5, 0.5, 2001, dtype=x.dtype)
    points = grid.reshape(-1, 1)
    with torch.no_grad():
        log_q, log_p = model(points).log_softmax(1), truth(points)
    values = (log_p.exp() * (log_p - log_q)).sum(1).reshape(grid.shape)
    truly = values.amax(1)
    assert (found.r_score <= truly + 1e-5).all()
    close = found.r_score > 0.999 * truly - 1e-6
    assert float(close.double().mean()) > 0.97  # a few searches end at a local maximum
    other = (log_q.argmax(1) != log_p.argmax(1)).reshape(grid.shape).any(1)
    assert not (found.disagrees & ~other).any()
    assert float((found.disagrees == other).double().mean()) > 0.85  # it looks along the searches only
    at_found = (truth(found.x_score).exp() * (truth(found.x_score) - model(found.x_score).log_softmax(1))).sum(1)
    torch.testing.assert_close(at_found.detach(), found.r_score, **F64)
    assert (found.divergence <= found.r_score + 1e-12).all()


def test_the_judge_looks_at_every_point_of_every_search() -> None:
    """At clean x, then at the start and after each step of three searches, the last with small steps from the worst."""
    truth, model = mixture(), smooth_mlp(5, 3)
    x, y = sample(truth, 20)
    seen: list[Tensor] = []

    def watched(points: Tensor) -> Tensor:
        seen.append(points.detach().clone())
        return model(points)

    ball, generator = free(1.0).replace(step_size=0.2), torch.Generator().manual_seed(0)
    found = consistency(watched, truth, x, y, ball, steps=2, restarts=1, generator=generator)
    points = torch.stack(seen)
    assert len(points) == 1 + 3 * 3
    log_p, log_q = (f(points.flatten(0, 1)).log_softmax(1).detach().unflatten(0, (10, 20)) for f in (truth, model))
    values = (log_p.exp() * (log_p - log_q)).sum(2)
    torch.testing.assert_close(found.divergence, values[0], **F64)
    torch.testing.assert_close(found.r_score, values.amax(0), **F64)
    assert torch.equal(found.disagrees, (log_p.argmax(2) != log_q.argmax(2)).any(0))
    assert torch.equal(points[1], x)
    assert not torch.equal(points[4], x)
    assert torch.equal(points[7], points[values[:7].argmax(0), torch.arange(20)])
    assert float((points[8] - points[7]).norm(dim=1).max()) == pytest.approx(0.05)


def test_a_model_that_is_the_truth_is_self_consistent() -> None:
    truth = mixture()
    x, y = sample(truth, 50)
    found = consistency(truth.log_joint, truth, x, y, free(1.0), steps=5)
    assert found.r_score.max() < 1e-10
    assert not found.disagrees.any()
    # by the label it is not robust: p_d itself turns within the ball
    _, robust = audit.robust_accuracy(truth, x, y, free(1.0))
    assert robust < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_self_consistent(kind: str) -> None:
    """A model that returns NaN for one sample, and one that does so away from clean points alone."""
    truth = mixture(2, 1, 2)
    x, y = sample(truth, 6)

    def at_one(points: Tensor) -> Tensor:
        return truth.log_joint(points) * torch.ones(6, 1, dtype=x.dtype).index_fill(0, torch.tensor([2]), math.nan)

    found = consistency(at_one, truth, x, y, free(1.0), divergence=kind, steps=2)
    assert found.divergence.isnan().tolist() == found.r_score.isnan().tolist() == [i == 2 for i in range(6)]
    assert found.disagrees.tolist() == [i == 2 for i in range(6)]

    def away(points: Tensor) -> Tensor:
        return truth.log_joint(points).masked_fill((points != x).any(1, keepdim=True), math.nan)

    found = consistency(away, truth, x, y, free(1.0), divergence=kind, steps=2)
    assert found.divergence.isfinite().all()
    assert found.r_score.isnan().all()
    assert found.disagrees.all()
    distance = (found.x_score - x).norm(dim=1)
    assert ((distance > 0) & (distance <= 1.0 + 1e-9)).all()


@pytest.mark.parametrize(
    ("x", "threat_model", "message"),
    [
        (torch.full((3, 5), 5.0), ThreatModel("linf", 0.1), r"x must lie in the box \[0.0, 1.0\]"),
        (torch.full((3, 5), math.nan), free(1.0), "got values in \\[nan, nan"),
        (torch.full((3, 5), 0.5), ThreatModel("l2", 8.0), "eps must not be larger than the diagonal"),
        (torch.ones(3, 5, dtype=torch.int64), free(1.0), "x must be floating point"),
        (torch.full((4, 5), 0.5), free(1.0), r"got x \[4, 5\] and y \[3\]"),
        (torch.full((3,), 0.5), free(1.0), r"x must be \[N, …\] and y \[N\], got x \[3\] and y \[3\]"),
    ],
    ids=["outside", "nan", "radius", "integers", "short", "flat"],
)
def test_points_that_the_judge_refuses(x: Tensor, threat_model: ThreatModel, message: str) -> None:
    truth = mixture()
    with pytest.raises((TypeError, ValueError), match=message):
        consistency(truth.log_joint, truth, x, torch.arange(3), threat_model)


@pytest.mark.parametrize("restarts", [1, 3])
def test_every_point_of_an_attack_on_a_posterior_is_judged(restarts: int) -> None:
    """Without a step those are clean x and the random starts."""
    truth, ball = mixture(), free(1.0)
    x, y = sample(truth, 300)
    generator = torch.Generator().manual_seed(0)
    log_p = torch.stack([truth(x), *(truth(ball.random_start(x, generator)) for _ in range(restarts))])
    right = log_p.argmax(2) == y
    options = {"steps": 0, "restarts": restarts}
    found = audit.robust_accuracy(truth, x, y, ball, generator=torch.Generator().manual_seed(0), **options)
    assert found == (float(right[0].double().mean()), float(right.all(0).double().mean()))
    assert not torch.equal(right.all(0), right[1:].all(0)), "clean x must decide about some"
    lowest = audit.attacked_log_likelihood(truth, x, y, ball, generator=torch.Generator().manual_seed(0), **options)
    torch.testing.assert_close(lowest, log_p.gather(2, y[None, :, None].expand(len(log_p), -1, 1)).amin((0, 2)), **F64)


def unconditional(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


LIKELIHOOD = partial(audit.log_likelihood, noise=0.1)
MATCHING = partial(audit.matching_error, unconditional=unconditional, sigma=0.1)
CALIBRATION = partial(audit.calibration, noise=0.1)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (LIKELIHOOD, {"noise": -0.1}, "noise must be finite and not negative, got -0.1"),
        (LIKELIHOOD, {"noise": math.nan}, "noise must be finite and not negative, got nan"),
        (LIKELIHOOD, {"repeats": 0}, "repeats must be at least 1, got 0"),
        (LIKELIHOOD, {"repeats": 1.5}, "repeats must be a whole number, got 1.5"),
        (MATCHING, {"sigma": 0.0}, "sigma must be finite and positive, got 0.0"),
        (MATCHING, {"sigma": math.inf}, "sigma must be finite and positive, got inf"),
        (MATCHING, {"repeats": 0}, "repeats must be at least 1, got 0"),
        (CALIBRATION, {"noise": -1.0}, "noise must be finite and not negative, got -1.0"),
        (CALIBRATION, {"bins": 0}, "bins must be at least 1, got 0"),
        (audit.closed_loop, {"length": 0.0}, "length must be finite and positive, got 0.0"),
        (audit.robust_accuracy, {"threat_model": ThreatModel("l2", 0.5), "restarts": 0}, "restarts must be at least 1"),
        (audit.robust_accuracy, {"threat_model": ThreatModel("l2", 0.5), "steps": -1}, "steps must be at least 0"),
        (audit.robust_accuracy, {"threat_model": 0.5}, "threat_model must be a ThreatModel, .*got float, which lacks"),
    ],
)
def test_arguments_outside_their_range(function: Callable[..., object], options: dict, message: str) -> None:
    truth = mixture()
    x, y = sample(truth, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        function(truth, x=x, y=y, **options)


@pytest.mark.parametrize("function", [LIKELIHOOD, MATCHING, CALIBRATION])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.int(), r"y must be int64 labels \[N\], got torch.int32 \[5\]"),
        (lambda y: y[:4], r"x must be \[N, …\] and y \[N\], got x \[5, 5\] and y \[4\]"),
        (lambda y: y - y - 1, r"y must lie in \[0, 3\), got values in \[-1, -1\]"),
        (lambda y: y + 3, r"y must lie in \[0, 3\), got values in"),
    ],
    ids=["int32", "short", "negative", "large"],
)
def test_labels_that_are_not_classes(
    function: Callable[..., object], change: Callable[[Tensor], Tensor], message: str
) -> None:
    truth = mixture()
    x, y = sample(truth, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        function(truth, x=x, y=change(y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -0.7}, "sigma must be finite and positive, got -0.7"),
        ({"step": 1.0}, r"step must lie in \(0, 1\), got 1.0"),
        ({"step": 0.0}, r"step must lie in \(0, 1\), got 0.0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"y": torch.full((5,), 7)}, r"y must lie in \[0, 3\)"),
        ({"x": torch.zeros(0, 5).double(), "y": torch.zeros(0).long()}, "must hold at least 1 samples, got 0"),
    ],
)
def test_bad_input_of_the_energy_identity(options: dict, message: str) -> None:
    truth = mixture()
    x, y = sample(truth, 5)
    with pytest.raises(ValueError, match=message):
        audit.energy_identity(truth.smoothed, **{"x": x, "y": y, "sigma": 0.7, **options})


def test_the_memory_format_decides_no_noise() -> None:
    class NotAGradient(Denoiser):
        def class_scores(self, x: Tensor, sigma: Tensor | float) -> Tensor:
            return torch.stack([x.roll(1, -1), torch.zeros_like(x)], 1)

    network = ScoreNetwork(NotAGradient(torch.nn.Identity(), num_classes=2, sigma_data=1.0), sigma=1.0)
    truth = mixture(3, 1, 32)
    x, y = sample(truth, 6)
    images = x.reshape(6, 2, 4, 4)

    def found(x: Tensor) -> list[Tensor]:
        error = audit.matching_error(truth, torch.zeros_like, x, y, sigma=0.3)
        loop = audit.closed_loop(network, x, y % 2, length=0.5)
        numbers = (
            *audit.calibration(truth, x, y, noise=0.3),
            *audit.martingale(truth.smoothed(0.1), truth.smoothed(0.5), x, y, sigmas=(0.1, 0.5)),
            *audit.energy_identity(truth.smoothed, x, y, sigma=0.3),
            fit_temperature(truth.log_prob, x, y, noise=0.3),
        )
        likelihood = audit.log_likelihood(truth, x, y, noise=0.3)
        return [likelihood, error, loop, torch.tensor(numbers, dtype=torch.float64)]

    for values, others in zip(found(images), found(images.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(values, others, **F64)


def test_points_of_another_shape() -> None:
    truth = mixture()
    x, y = sample(truth, 5)
    with pytest.raises(ValueError, match=r"moved must be as x, torch.float64 \[5, 5\], got torch.float64 \[1, 5\]"):
        audit.kl_error(truth, truth, x, y, x[:1])


AUDITS: dict[str, Callable[..., object]] = {
    "log_likelihood": lambda posterior, x, y: audit.log_likelihood(posterior, x, y, noise=0.1),
    "matching_error": lambda posterior, x, y: audit.matching_error(posterior, torch.neg, x, y, sigma=0.3),
    "calibration": lambda posterior, x, y: audit.calibration(posterior, x, y, noise=0.1),
    "spread": lambda posterior, x, y: audit.spread([posterior, mixture(100, 1, 8).float()], x, y),
    "closed_loop": lambda posterior, x, y: audit.closed_loop(posterior, x, y, length=0.1),
    "martingale": lambda posterior, x, y: audit.martingale(posterior, posterior, x, y, sigmas=(0.1, 0.2)),
    "centre": audit.centre,
    "energy_identity": lambda posterior, x, y: audit.energy_identity(lambda sigma: posterior, x, y, sigma=0.3),
    "posterior_gradients": audit.posterior_gradients,
    "gradient_error": lambda posterior, x, y: audit.gradient_error(posterior, mixture(100, 1, 8).float(), x, y),
    "kl_error": lambda posterior, x, y: audit.kl_error(posterior, mixture(100, 1, 8).float(), x, y),
    "robust_accuracy": lambda posterior, x, y: audit.robust_accuracy(
        posterior, x, y, ThreatModel("l2", 0.3), steps=2, generator=torch.Generator().manual_seed(0)
    ),
    "attacked_log_likelihood": lambda posterior, x, y: audit.attacked_log_likelihood(
        posterior, x, y, ThreatModel("l2", 0.3), steps=2, generator=torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("name", AUDITS)
def test_the_modes_of_the_caller_change_no_audit(name: str) -> None:
    """In half precision the probabilities of 100 classes that are alike sum to 1.011."""
    torch.manual_seed(0)
    network = MLPBackbone((8,), 100, width=8, depth=1)
    posterior = NoiseConditionalClassifier(network, num_classes=100, sigma=0.3)
    x, y = torch.rand(5, 8), torch.arange(5)
    expected = AUDITS[name](posterior, x, y)
    with torch.inference_mode():
        torch.testing.assert_close(AUDITS[name](posterior, x, y), expected)
        made_within = x.clone(), y.clone()
    torch.testing.assert_close(AUDITS[name](posterior, *made_within), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(AUDITS[name](posterior, x, y), expected)


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps must"), ({"restarts": -1}, "restarts must")])
def test_bad_input_of_the_judge(options: dict, message: str) -> None:
    truth = mixture()
    x, y = sample(truth, 3)
    with pytest.raises(ValueError, match=message):
        consistency(truth.log_joint, truth, x, y, free(1.0), **options)


def test_an_attack_on_a_saturated_posterior_keeps_its_direction() -> None:
    """Where p(y|x) rounds to 1 in float32 the attack is as strong as in float64, up to the starts, which differ."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    centres = torch.randn(3, 20, generator=generator)
    x = (0.5 + 0.05 * centres[y] + 0.1 * torch.randn(300, 20, generator=generator)).clamp(0, 1)
    threat_model = ThreatModel("linf", 0.07)
    found = []
    for dtype in (torch.float32, torch.float64):
        density = KernelDensity(x.to(dtype), y, num_classes=3, sigma=0.02)
        assert float((density(x.to(dtype)).gather(1, y[:, None]) > -1e-12).double().mean()) > 0.9
        start = torch.Generator().manual_seed(1)
        found.append(audit.robust_accuracy(density, x.to(dtype), y, threat_model, steps=20, generator=start)[1])
    assert found[0] == pytest.approx(found[1], abs=0.03)
    assert 0.1 < found[1] < 0.9


class Broken(Altered):
    """Its values, or else the scores of these features, are NaN where the first feature is above ``threshold``."""

    def __init__(self, truth: GaussianMixture, threshold: float, *, values: bool = True, of: slice = slice(0)) -> None:
        super().__init__(truth)
        self.threshold, self.values, self.of = threshold, values, of

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, scores = self.truth.log_prob_and_scores(x)
        broken = x.flatten(1)[:, :1] > self.threshold
        if self.values:
            return log_p.masked_fill(broken, math.nan), scores
        scores[..., self.of] = scores[..., self.of].masked_fill(broken[..., None], math.nan)
        return log_p, scores


def test_a_nan_of_the_posterior_is_misclassified() -> None:
    """arg max of NaN is class 0, which is the label here."""
    truth = two_points(0.01)
    x, y = truth.means[0].expand(2, -1) + torch.tensor([[0.0], [0.02]], dtype=torch.float64), torch.zeros(2).long()
    ball = ThreatModel("linf", 0.01)
    assert audit.robust_accuracy(truth, x, y, ball, steps=10) == (1.0, 1.0)
    assert audit.robust_accuracy(Broken(truth, 0.215), x, y, ball, steps=10) == (0.5, 0.5)
    assert audit.robust_accuracy(Broken(truth, 0.205), x, y, ball, steps=10) == (0.5, 0.0)
    assert audit.attacked_log_likelihood(Broken(truth, 0.215), x, y, ball, steps=10).isnan().tolist() == [False, True]


def test_a_nan_of_the_gradient_leaves_a_feature_as_it_is() -> None:
    """What the other feature reaches by itself, from a start that is drawn for both."""
    truth = two_points(0.01)
    x, y = truth.means[1].expand(64, -1), torch.ones(64).long()
    free = ThreatModel("linf", 0.45)
    assert audit.robust_accuracy(truth, x, y, free, steps=10) == (1.0, 0.0)
    half = Broken(truth, -math.inf, values=False, of=slice(1, 2))
    clean, robust = audit.robust_accuracy(half, x, y, free, steps=10, generator=torch.Generator().manual_seed(0))
    assert clean == 1.0
    assert 0.1 < robust < 0.9


@pytest.mark.parametrize("wrong", [1, 5, 6])
@pytest.mark.parametrize("values", [True, False])
def test_a_posterior_of_nan_is_refused(values: bool, wrong: int) -> None:
    """Numbers would come of it, such as the robust accuracy of an attack that cannot move."""
    truth, ball = two_points(0.01), ThreatModel("linf", 0.01)
    x, y = truth.means[1].repeat(6, 1), torch.ones(6).long()
    x[wrong:, 0] -= 0.1
    broken = Broken(truth, 0.75, values=values, of=slice(None))
    model = nn.Linear(2, 2).double()
    told = rf"(log p\(y\|x\) at every point|scores that are numbers), got .*NaN at {wrong} of 6 points"
    uses: dict[str, Callable[[], object]] = {
        "objective": lambda: objectives.score_direct(model, x, y, threat_model=ball, posterior=broken, steps=3),
        "surrogate": lambda: objectives.trades(model, x, y, threat_model=ball, posterior=broken, steps=3),
        "consistency": lambda: consistency(model, broken, x, y, ball, steps=2),
        "likelihood": lambda: audit.log_likelihood(broken, x, y, noise=0.0),
        "accuracy": lambda: audit.robust_accuracy(broken, x, y, ball, steps=2),
        "lowest": lambda: audit.attacked_log_likelihood(broken, x, y, ball, steps=2),
    }
    if not values:
        assert torch.equal(uses.pop("likelihood")(), audit.log_likelihood(truth, x, y, noise=0.0))  # reads no scores
    elif wrong < 6:
        assert uses.pop("accuracy")()[0] == pytest.approx(1 - wrong / 6)  # NaN is misclassified
        assert int(uses.pop("lowest")().isnan().sum()) == wrong
    for use in uses.values():
        with pytest.raises(ValueError, match=told):
            use()


def test_the_spread_of_a_posterior_that_is_nan_is_none() -> None:
    truth = two_points(0.01)
    x, y = truth.means[:, 0], torch.arange(2)
    assert all(math.isnan(value) for value in audit.spread([truth, Broken(truth, 0.0)], x, y))


def test_kernel_density_is_right_about_itself() -> None:
    """Its own points, at no noise, have all of their mass in their class: evidence on them says nothing."""
    x, y = sample(mixture(), 40)
    density = KernelDensity(x, y, num_classes=3, sigma=0.05)
    assert float(audit.log_likelihood(density, x, y, noise=0.0).exp().mean()) > 0.99
    assert float(cross_entropy(density(x), y)) < 0.01


def test_consistency_borrows_the_model_as_attacks_do() -> None:
    """In eval mode, left as found, and within whatever gradient mode evaluation code is in."""
    truth = mixture(4, 1, 64).float()
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.LazyLinear(4))
    model(x)
    state = copy.deepcopy(model.state_dict())
    settings = {"threat_model": ThreatModel("linf", 0.1), "steps": 2, "restarts": 0}
    expected = consistency(copy.deepcopy(model).eval(), truth, x, y, **settings)
    with torch.inference_mode():
        found = consistency(model, truth, x.clone(), y, **settings)
    torch.testing.assert_close(found.r_score, expected.r_score)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(consistency(model, truth, x, y, **settings).r_score, found.r_score)
    with pytest.raises(ValueError, match=r"the model must return a tensor of logits \[N, L\], got tuple"):
        consistency(lambda x: (model(x), x), truth, x, y, **settings)
    with pytest.raises(ValueError, match=r"posterior must give log p .* \[16, 4\] for logits torch.float32 \[16, 3\]"):
        consistency(lambda x: model(x)[:, :3], truth, x, y, **settings)
