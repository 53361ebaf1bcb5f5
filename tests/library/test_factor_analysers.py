"""Mixtures of factor analysers against Gaussian mixtures with full covariances, and their fitting."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from scorematch.posteriors import FactorAnalysers, GaussianMixture
from scorematch.posteriors.factor_analysers import _iteration, _k_means

F64 = {"rtol": 1e-9, "atol": 1e-9}
NOISES = ("isotropic", "diagonal")


def analysers(
    noise: str, *, classes: int = 3, features: int = 6, rank: int = 2, spread: float = 1.0
) -> FactorAnalysers:
    """A float64 mixture of two components a class with unequal weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    variances = 0.3 + draw(classes, 2, features).square()
    return FactorAnalysers(
        spread * draw(classes, 2, features),
        draw(classes, 2, features, rank),
        variances[..., 0] if noise == "isotropic" else variances,
        0.2 + draw(classes, 2).abs(),
    )


def as_gaussians(p: FactorAnalysers) -> GaussianMixture:
    noise = p.noise[..., None].expand_as(p.means) if p.noise.dim() == 2 else p.noise
    return GaussianMixture(p.means, p.factors @ p.factors.mT + torch.diag_embed(noise), p.log_weights.exp())


def inputs(count: int = 7, features: int = 6) -> Tensor:
    return 2 * torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("noise", NOISES)
def test_equals_a_gaussian_mixture_with_full_covariances(noise: str) -> None:
    p, x = analysers(noise), inputs()
    expected = as_gaussians(p)
    torch.testing.assert_close(p.log_joint_components(x), expected.log_joint_components(x), **F64)
    torch.testing.assert_close(p.log_joint(x), expected.log_joint(x), **F64)
    torch.testing.assert_close(p(x), expected(x), **F64)
    torch.testing.assert_close(p.log_prob_and_scores(x), expected.log_prob_and_scores(x), **F64)


@pytest.mark.parametrize("noise", NOISES)
def test_scores_are_gradients_of_the_log_density(noise: str) -> None:
    p, x = analysers(noise), inputs().reshape(7, 1, 2, 3).requires_grad_()
    joint = p.log_joint(x)
    gradients = torch.stack([torch.autograd.grad(joint[:, y].sum(), x, retain_graph=True)[0] for y in range(3)], 1)
    scores = p.log_prob_and_scores(x)[1]
    assert scores.shape == (7, 3, 1, 2, 3)
    assert scores.is_contiguous()
    torch.testing.assert_close(scores, gradients, **F64)
    assert torch.autograd.gradcheck(p, (x,))


@pytest.mark.parametrize("noise", NOISES)
def test_samples_follow_it(noise: str) -> None:
    p, gaussians = analysers(noise), as_gaussians(analysers(noise))
    x, y = p.sample(200_000, torch.Generator().manual_seed(0), (2, 3))
    assert x.shape == (200_000, 2, 3)
    weights = p.log_weights.exp()
    torch.testing.assert_close(torch.bincount(y).double() / len(y), weights.sum(1), rtol=0.02, atol=0)
    for label in range(3):
        points, share = x[y == label].flatten(1), weights[label] / weights[label].sum()
        mean = share @ p.means[label]
        between = (share[:, None] * (p.means[label] - mean)).mT @ (p.means[label] - mean)
        covariance = between + (share[:, None, None] * gaussians.covariances[label]).sum(0)
        torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=0.04)
        torch.testing.assert_close(points.T.cov(), covariance, rtol=0, atol=0.03 * float(covariance.max()))


def test_samples_are_those_of_the_generator() -> None:
    p = analysers("isotropic")
    draws = [p.sample(50, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize("noise", NOISES)
def test_smoothed_is_convolved_with_noise(noise: str) -> None:
    p, x = analysers(noise), inputs()
    torch.testing.assert_close(p.smoothed(0.7).log_joint(x), as_gaussians(p).smoothed(0.7).log_joint(x), **F64)


def test_state_is_saved_and_converted() -> None:
    p, other, x = analysers("diagonal"), analysers("diagonal", spread=2.0), inputs()
    other.load_state_dict(p.state_dict())
    torch.testing.assert_close(other.log_prob_and_scores(x), p.log_prob_and_scores(x), rtol=0, atol=0)
    torch.testing.assert_close(other.smoothed(0.5).log_joint(x), p.smoothed(0.5).log_joint(x), rtol=0, atol=0)
    expected = p.log_prob_and_scores(x)
    log_p, scores = p.float().log_prob_and_scores(x.float())
    assert log_p.dtype == scores.dtype == torch.float32
    torch.testing.assert_close((log_p.double(), scores.double()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", NOISES)
def test_float32_is_accurate_at_the_dimension_of_images(noise: str) -> None:
    """log p(y|x) to 2e-3 nats where log p(x, y) is in the thousands, noise of .02 to .25."""
    generator = torch.Generator().manual_seed(0)
    means = 0.5 + 0.2 * torch.randn(4, 2, 3072, generator=generator)
    factors = 0.1 * torch.randn(4, 2, 3072, 8, generator=generator)
    variances = 0.02 + 0.23 * torch.rand(4, 2, 3072, generator=generator)
    p = FactorAnalysers(means, factors, variances.mean(2) if noise == "isotropic" else variances)
    exact = FactorAnalysers(p.means.double(), p.factors.double(), p.noise.double())
    x, _ = p.sample(32, generator, (3, 32, 32))
    log_p, scores = p.log_prob_and_scores(x)
    expected, gradients = exact.log_prob_and_scores(x.double())
    assert float(expected.abs().max()) > 1000
    torch.testing.assert_close(log_p.double(), expected, rtol=2e-6, atol=2e-3)
    torch.testing.assert_close(scores.double(), gradients, rtol=1e-4, atol=2e-5 * float(gradients.abs().max()))


def log_likelihood(p: FactorAnalysers, x: Tensor, y: Tensor) -> float:
    """Mean log p(x, y)."""
    return float(p.log_joint(x).gather(1, y[:, None]).mean())


@pytest.mark.parametrize("noise", NOISES)
def test_float32_tells_classes_apart_that_are_near_each_other(noise: str) -> None:
    """Both are far from the centre of all: log p is the difference of numbers near a million."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(10, 1, 3072, generator=generator)
    means[1] = means[0] + 2e-4 * torch.randn(1, 3072, generator=generator)
    factors = (0.02 * torch.randn(1, 1, 3072, 4, generator=generator)).repeat(10, 1, 1, 1)
    variances = torch.full((10, 1) if noise == "isotropic" else (10, 1, 3072), 1e-4)
    x = means[0] + 0.01 * torch.randn(64, 3072, generator=generator)
    x += torch.randn(64, 4, generator=generator) @ factors[0, 0].T
    narrow = FactorAnalysers(means, factors, variances)
    wide = FactorAnalysers(*(value.double() for value in (means, factors, variances)))
    (log_p, scores), (expected, expected_scores) = narrow.log_prob_and_scores(x), wide.log_prob_and_scores(x.double())
    assert log_p.dtype == scores.dtype == torch.float32
    assert (expected[:, :2] > -20).all(), "both classes are probable"
    torch.testing.assert_close(log_p[:, :2].double(), expected[:, :2], rtol=1e-6, atol=1e-6)
    error = (scores.double() - expected_scores).abs().max() / expected_scores.abs().max()
    assert error < 1e-6
    assert narrow.log_joint(x).dtype == torch.float64
    torch.testing.assert_close(narrow.log_joint(x), wide.log_joint(x.double()), rtol=1e-9, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_no_iteration_lowers_the_likelihood(noise: str) -> None:
    x, y = analysers(noise, spread=2.0).sample(900, torch.Generator().manual_seed(1))
    values = [
        log_likelihood(
            FactorAnalysers.fit(
                x,
                y,
                num_classes=3,
                components=2,
                rank=2,
                iterations=iterations,
                noise=noise,
                generator=torch.Generator().manual_seed(0),
            ),
            x,
            y,
        )
        for iterations in range(12)
    ]
    assert all(after >= before - 1e-9 for before, after in pairwise(values))
    assert values[-1] - values[0] > 0.1


@pytest.mark.parametrize("noise", NOISES)
def test_fit_finds_a_known_mixture(noise: str) -> None:
    """As probable on held-out points as the mixture that they come from, and with its posterior."""
    p = analysers(noise, features=8, spread=3.0)
    x, y = p.sample(30_000, torch.Generator().manual_seed(1))
    fitted = FactorAnalysers.fit(
        x.reshape(-1, 2, 4),
        y,
        num_classes=3,
        components=2,
        rank=2,
        iterations=60,
        noise=noise,
        generator=torch.Generator().manual_seed(0),
    )
    assert fitted.noise.shape == p.noise.shape
    held_out, labels = p.sample(20_000, torch.Generator().manual_seed(2))
    assert log_likelihood(p, held_out, labels) - log_likelihood(fitted, held_out, labels) == pytest.approx(0, abs=0.01)
    difference = (p(held_out).exp() - fitted(held_out).exp()).abs().sum(1).mean() / 2
    assert float(difference) < 0.01
    torch.testing.assert_close(
        fitted.log_weights.exp().sort(1).values, p.log_weights.exp().sort(1).values, rtol=0, atol=0.01
    )


def test_fit_of_one_component_is_probabilistic_pca() -> None:
    """Against the closed form of Tipping and Bishop (1999), Eq. 7 and 8."""
    x, y = analysers("isotropic", classes=1, features=5).sample(2000, torch.Generator().manual_seed(1))
    fitted = FactorAnalysers.fit(
        x,
        y,
        num_classes=1,
        components=1,
        rank=2,
        iterations=300,
        generator=torch.Generator().manual_seed(0),
    )
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    noise = values[:3].mean()
    top = vectors[:, 3:]
    torch.testing.assert_close(fitted.means[0, 0], x.mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(fitted.noise[0, 0], noise, rtol=1e-6, atol=0)
    factors = fitted.factors[0, 0]
    torch.testing.assert_close(factors @ factors.mT, (top * (values[3:] - noise)) @ top.mT, rtol=0, atol=1e-5)


def test_one_iteration_equals_its_definition() -> None:
    """From a mean that is off, with full covariances: hidden factors z of posterior N(m, V), x regressed on them."""
    p = analysers("diagonal", classes=1)
    one = FactorAnalysers(p.means[:, :1], p.factors[:, :1], p.noise[:, :1])
    x = inputs(50) + 1.0
    factors, noise = one.factors[0, 0], one.noise[0, 0]
    gain = factors.T @ torch.linalg.inv(factors @ factors.T + noise.diag())
    hidden = (x - one.means[0, 0]) @ gain.T
    both = torch.cat([x, hidden], 1).T.cov(correction=0)
    both[6:, 6:] += torch.eye(2, dtype=x.dtype) - gain @ factors
    explained = both[:6, 6:] @ torch.linalg.inv(both[6:, 6:]) @ both[6:, :6]
    result = _iteration(one, x, floor=1e-6)
    torch.testing.assert_close(result.means[0, 0], x.mean(0), **F64)
    torch.testing.assert_close((result.factors @ result.factors.mT)[0, 0], explained, **F64)
    torch.testing.assert_close(result.noise[0, 0], (both[:6, :6] - explained).diagonal(), **F64)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_k_means_starts_in_every_cluster(scale: float) -> None:
    """A point that coincides with a centre is never drawn as the next one, so each cluster has its centre."""
    places = scale * torch.tensor([[0.0, 0.0], [3.0, 1.0], [100.0, 0.0], [0.0, 40.0]], dtype=torch.float64)
    points = places.repeat_interleave(10, 0)
    for seed in range(10):
        centres = _k_means(points, 4, torch.Generator().manual_seed(seed), iterations=0)
        assert {tuple(row) for row in centres.tolist()} == {tuple(row) for row in places.tolist()}


@pytest.mark.parametrize("noise", NOISES)
def test_the_start_of_a_fit_is_that_of_its_clusters(noise: str) -> None:
    generator = torch.Generator().manual_seed(5)
    spread = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
    near = 2 + spread * torch.randn(30, 3, dtype=torch.float64, generator=generator)
    far = 50 + spread * torch.randn(10, 3, dtype=torch.float64, generator=generator)
    x = torch.cat([near, far])
    found = FactorAnalysers.fit(
        x, torch.zeros(40, dtype=torch.int64), num_classes=1, components=2, rank=1, iterations=0, noise=noise
    )
    order = found.means[0, :, 0].argsort()
    torch.testing.assert_close(found.means[0, order], torch.stack([near.mean(0), far.mean(0)]))
    torch.testing.assert_close(found.log_weights[0, order].exp(), torch.tensor([0.75, 0.25], dtype=torch.float64))
    deviations = torch.cat([near - near.mean(0), far - far.mean(0)]).square().mean(0)
    variance = deviations if noise == "diagonal" else deviations.mean()
    torch.testing.assert_close(found.noise[0], variance.expand(found.noise[0].shape))


def test_fit_survives_samples_that_coincide() -> None:
    x, y = torch.ones(20, 4), torch.arange(20) % 2
    fitted = FactorAnalysers.fit(x, y, num_classes=2, components=2, rank=2, floor=0.01)
    torch.testing.assert_close(fitted.noise, torch.full((2, 2), 0.01))
    torch.testing.assert_close(fitted(x).exp(), torch.full((20, 2), 0.5))


MEANS, FACTORS = torch.zeros(2, 1, 3), torch.ones(2, 1, 3, 1)
X, Y = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])


def fit(x: Tensor = X, y: Tensor = Y, **settings) -> FactorAnalysers:  # type: ignore[no-untyped-def]
    return FactorAnalysers.fit(x, y, **({"num_classes": 2, "components": 1, "rank": 1} | settings))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FactorAnalysers(MEANS[0], FACTORS, torch.ones(2, 1)), r"means must be \[L, K, D\], got \[1, 3\]"),
        (lambda: FactorAnalysers(MEANS, FACTORS[:, :, :2], torch.ones(2, 1)), r"factors must be \[L, K, D, R\]"),
        (lambda: FactorAnalysers(MEANS, FACTORS, torch.ones(2)), r"noise must be \[L, K\] or \[L, K, D\]"),
        (lambda: FactorAnalysers(MEANS, FACTORS, torch.zeros(2, 1)), "noise must be positive variances, got 0"),
        (lambda: FactorAnalysers(MEANS, FACTORS, torch.ones(2, 1), torch.ones(2)), r"weights must be \[L, K\]"),
        (lambda: FactorAnalysers(MEANS, FACTORS, torch.ones(2, 1), torch.zeros(2, 1)), "weights must be non-negative"),
        (
            lambda: analysers("diagonal")(torch.zeros(2, 5, dtype=torch.float64)),
            "x has 5 features a sample, the mixture 6",
        ),
        (lambda: analysers("diagonal").sample(2, shape=(2, 2)), r"shape \[2, 2\] has 4 features, the mixture 6"),
        (lambda: fit(y=Y[:3]), "x has 4 samples but y has 3"),
        (lambda: fit(components=0), "components must be at least 1, got 0"),
        (lambda: fit(rank=3), "rank must lie between 1 and D - 1 = 2, got 3"),
        (lambda: fit(iterations=-1), "iterations must be at least 0, got -1"),
        (lambda: fit(noise="full"), "noise must be one of isotropic, diagonal, got 'full'"),
        (lambda: fit(floor=0.0), "floor must be finite and positive, got 0.0"),
        (lambda: fit(num_classes=1), r"labels must lie in \[0, 1\), got 1"),
        (lambda: fit(X[:0], Y[:0]), "x has no samples"),
        (lambda: fit(components=2), "class 0 has 2 samples, too few for 2 components"),
        (lambda: fit(num_classes=3), "class 2 has 0 samples, too few for 1 components"),
    ],
)
def test_bad_input(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_fit_does_not_depend_on_autocast() -> None:
    x, y = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2

    def fitted() -> FactorAnalysers:
        generator = torch.Generator().manual_seed(1)
        return FactorAnalysers.fit(x, y, num_classes=2, components=2, rank=2, iterations=5, generator=generator)

    expected = fitted()
    with torch.autocast("cpu", torch.bfloat16):
        found = fitted()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
