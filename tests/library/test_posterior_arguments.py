"""What posteriors refuse, argument by argument, and what they take as it is."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scorematch as sm
from scorematch.networks import EmbeddedDenoiser, MLPBackbone
from scorematch.posteriors import (
    ClassScorePosterior,
    Ensemble,
    FactorAnalysers,
    GaussianMixture,
    KernelDensity,
    Posterior,
    ScoreNetwork,
)
from scorematch.posteriors.base import check_deviation
from scorematch.posteriors.factor_analysers import _k_means

MEANS, ONES = torch.zeros(2, 1, 3), torch.ones(2, 1)
X, Y = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])


def score_network(**options: Any) -> ScoreNetwork:
    backbone = MLPBackbone((3,), 3, width=4, depth=1, conditions=4)
    return ScoreNetwork(EmbeddedDenoiser(backbone, num_classes=4, sigma_data=1.0), sigma=0.3, **options)


@pytest.mark.parametrize(
    ("means", "covariances", "weights", "error", "told"),
    [
        ([[[0.0]]], ONES, None, TypeError, "means must be a tensor, got list"),
        (MEANS.long(), ONES, None, TypeError, "means must be floating point, got torch.int64"),
        (MEANS.half(), ONES.half(), None, TypeError, "means must be torch.float32 or torch.float64, got torch.float16"),
        (MEANS * math.nan, ONES, None, ValueError, "means must be finite, got 6 values that are NaN or infinite"),
        (MEANS, ONES * math.inf, None, ValueError, "covariances must be finite, got 2 values"),
        (MEANS, ONES.double(), None, TypeError, "covariances must be torch.float32 as means, got torch.float64"),
        (
            MEANS,
            torch.tensor([[1.0], [-1.0]]),
            None,
            ValueError,
            "covariances must be positive definite, component 0 of class 1 is not",
        ),
        (MEANS, ONES, ONES.to(torch.complex64), TypeError, "weights must be real numbers on cpu, got torch.complex64"),
        (MEANS, ONES, ONES.double(), TypeError, "weights must be torch.float32 as means, got torch.float64"),
        (MEANS, ONES, ONES.to("meta"), TypeError, "weights must be real numbers on cpu, got torch.float32 on meta"),
        (
            MEANS.expand(2, 2, 3),
            ONES.expand(2, 2),
            torch.tensor([[3.0, 1.0], [2.0, -4.0]]),
            ValueError,
            r"positive sum for each class, got 1 negative values and the sums \[4.0, -2.0\]",
        ),
    ],
)
def test_parameters_of_a_mixture(
    means: Any, covariances: Tensor, weights: Tensor | None, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        GaussianMixture(means, covariances, weights)


def test_weights_may_be_counts() -> None:
    counts = torch.tensor([[1], [3]])
    found, expected = (GaussianMixture(MEANS, ONES, weights) for weights in (counts, counts.float()))
    assert torch.equal(found.log_weights, expected.log_weights)
    torch.testing.assert_close(found.log_weights.exp(), torch.tensor([[0.25], [0.75]]), check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_of_a_deviation_is_a_number(dtype: torch.dtype) -> None:
    like, kind = torch.zeros(1, dtype=dtype), torch.finfo(dtype)
    for sigma in (kind.tiny**0.5, kind.max**0.5):
        check_deviation(sigma, like)
    for sigma in (0.9 * kind.tiny**0.5, 1.1 * kind.max**0.5):
        with pytest.raises(ValueError, match=f"sigma must have a square that {dtype} holds, got"):
            check_deviation(sigma, like)
    check_deviation(0.0, like, zero=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.complex64])
def test_labels_are_whole_numbers(kind: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"y must be int64 labels \[M\], got {kind} \[4\]"):
        KernelDensity(X, Y.to(kind), num_classes=2, sigma=1.0)
    KernelDensity(X, Y.int(), num_classes=2, sigma=1.0)


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (X[:, 0], Y, r"got x \[4\] on cpu and y \[4\] on cpu"),
        (X, Y[:, None], r"got x \[4, 3\] on cpu and y \[4, 1\] on cpu"),
        (X, Y.to("meta"), "got x .* on cpu and y .* on meta"),
    ],
)
def test_there_is_a_label_for_each_sample(x: Tensor, y: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=rf"x must be \[M, …\] and y \[M\] on one device, {told}"):
        KernelDensity(x, y, num_classes=2, sigma=1.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(4, 2), r"got torch.float32 \[4, 2\]"),
        (torch.zeros(4, 3, device="meta"), r"got torch.float32 \[4, 3\] on meta"),
    ],
)
def test_a_gradient_to_add_to_is_like_x(given: Tensor, told: str) -> None:
    posteriors: list[Posterior] = [GaussianMixture(MEANS + torch.tensor([[[0.0]], [[1.0]]]), ONES), score_network()]
    for posterior in posteriors:
        trace = posterior.trace(X, Y)
        with pytest.raises(ValueError, match=rf"grad must be like x, \[4, 3\] on cpu, {told}"):
            trace.pull_back(torch.zeros(trace.log_p.shape), given)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_number_of_classes_whose_scores_are_read(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k must"):
        score_network(top_k=top_k)
    assert [score_network(top_k=k).top_k for k in (1, 4)] == [1, 4]


@pytest.mark.parametrize(
    "build",
    [
        GaussianMixture,
        lambda means, noise: GaussianMixture(means, noise[..., None, None] * torch.eye(3)),
        lambda means, noise: FactorAnalysers(means, torch.ones(2, 1, 3, 1), noise),
    ],
)
def test_a_mixture_owns_its_parameters(build: Any) -> None:
    means, noise = torch.rand(2, 1, 3, requires_grad=True), torch.ones(2, 1)
    mixture, other = build(means, noise), build(torch.rand(2, 1, 3), noise)
    smoothed, before = mixture.smoothed(0.5), {name: value.clone() for name, value in mixture.state_dict().items()}
    smoothed.load_state_dict(other.state_dict())
    with torch.no_grad():
        means.mul_(0.0)
        noise.mul_(2.0)
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())
    assert not any(value.requires_grad for value in mixture.state_dict().values())


def test_a_kernel_density_takes_no_graph_with_it() -> None:
    assert not KernelDensity(X.clone().requires_grad_() * 1.0, Y, num_classes=2, sigma=1.0).points.requires_grad
    fitted = FactorAnalysers.fit(
        torch.rand(20, 3, requires_grad=True), Y.repeat(5), num_classes=2, components=1, rank=1
    )
    assert not fitted.means.requires_grad


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_the_dtype_of_x_is_that_of_a_mixture(own: torch.dtype) -> None:
    given = torch.float64 if own == torch.float32 else torch.float32
    means, ones = MEANS.to(own), ONES.to(own)
    for mixture in (GaussianMixture(means, ones), FactorAnalysers(means, torch.ones(2, 1, 3, 1, dtype=own), ones)):
        for ask in (mixture.log_joint, mixture, lambda x, mixture=mixture: mixture.trace(x, Y)):
            with pytest.raises(TypeError, match=f"x is {given} but the posterior is {own}"):
                ask(X.to(given))
            ask(X.to(own))


def test_labels_of_an_anchor_are_probabilities() -> None:
    network, low = score_network(), torch.tensor([[-0.2, 0.4, 0.4, 0.4]]).expand(4, 4)
    with pytest.raises(ValueError, match=r"y must be probabilities \[N, L\], got values in \[-0.2.*, 0.4.*\]"):
        network.clean_log_prob(X, low)
    for row, total in (([0.1, 0.2, 0.3, 0.2], "0.8"), ([0.5, 0.5, 0.5, 0.5], "2"), ([0.0] * 4, "0")):
        with pytest.raises(ValueError, match=f"^y must be probabilities that sum to 1 .*, got a sum of {total}$"):
            network.clean_log_prob(X, torch.tensor([[0.25] * 4] * 3 + [row]))
    rounded = torch.tensor([0.1, 0.2, 0.3, 0.4]).bfloat16().expand(4, 4)
    assert network.clean_log_prob(X, rounded).isfinite().all()


def test_an_empty_cluster_keeps_its_centre() -> None:
    points = torch.full((6, 2), 5.0)
    centres = _k_means(points, 3, torch.Generator().manual_seed(0))  # all points are nearest to the first of them
    assert torch.equal(centres, torch.full((3, 2), 5.0))


def test_an_empty_cluster_may_fill_again() -> None:
    x, y = torch.ones(20, 4), torch.arange(20) % 2
    fitted = FactorAnalysers.fit(x, y, num_classes=2, components=3, rank=1, iterations=0)
    assert fitted.log_weights.isfinite().all()


def test_a_fit_has_twenty_iterations() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def factors(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        many = {"num_classes": 2, "components": 2, "rank": 1, "generator": generator, **options}
        return FactorAnalysers.fit(x, Y.repeat(10), **many).factors

    assert torch.equal(factors(), factors(iterations=20))
    assert not torch.equal(factors(), factors(iterations=21))


def test_the_factors_of_a_start_have_the_variance_of_the_data() -> None:
    """R directions to samples, each divided by √R."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, dtype=torch.float64, generator=generator)
    y = torch.zeros(30, dtype=torch.int64)
    for rank in (1, 3):
        fitted = FactorAnalysers.fit(x, y, num_classes=1, components=1, rank=rank, iterations=0, generator=generator)
        directions = fitted.factors[0, 0].mT * rank**0.5  # [R, D]
        samples = x - x.mean(0)
        torch.testing.assert_close(directions, samples[torch.cdist(directions, samples).argmin(1)])


def test_images_have_the_shape_of_the_data() -> None:
    images = torch.rand(4, 2, 3, 3)
    posterior = KernelDensity(images, Y, num_classes=2, sigma=1.0)
    with pytest.raises(ValueError, match=r"x has samples of shape \[3, 3, 2\], the posterior's data of \[2, 3, 3\]"):
        posterior(images.permute(0, 2, 3, 1))
    flat = KernelDensity(images.flatten(1), Y, num_classes=2, sigma=1.0)
    assert torch.equal(flat(images), posterior(images.flatten(1)))


class Returning(ClassScorePosterior):
    """Of two classes, with something else than the values and the scores of these."""

    num_classes = 2

    def __init__(self, altered: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.altered = altered

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.stack([x, -x], 1)
        return self.altered(scores.flatten(2).sum(2).log_softmax(1), scores)


@pytest.mark.parametrize(
    ("altered", "error", "told"),
    [
        (lambda log_p, scores: log_p, TypeError, r"got torch.float32 \[6, 2\] on cpu$"),
        (lambda log_p, scores: None, TypeError, "got NoneType$"),
        (lambda log_p, scores: (), TypeError, "got nothing$"),
        (lambda log_p, scores: (log_p, None), TypeError, r"got torch.float32 \[6, 2\] on cpu and NoneType$"),
        (lambda log_p, scores: (log_p, scores.double()), TypeError, "and torch.float64 .6, 2, 3, 4, 4. on cpu$"),
        (lambda log_p, scores: (log_p.double(), scores), TypeError, "got torch.float64 .6, 2. on cpu and"),
        (lambda log_p, scores: (log_p, scores.flatten(2)), ValueError, r"and torch.float32 \[6, 2, 48\] on cpu$"),
        (lambda log_p, scores: (log_p[:, :1], scores), ValueError, r"got torch.float32 \[6, 1\] on cpu and"),
        (lambda log_p, scores: (log_p, scores[:, :1]), ValueError, r"and torch.float32 \[6, 1, 3, 4, 4\] on cpu$"),
        (lambda log_p, scores: (log_p, scores.to("meta")), ValueError, r"\[6, 2, 3, 4, 4\] on meta$"),
    ],
    ids=["values", "none", "empty", "half", "wide", "wide values", "flat", "classes", "scores of classes", "device"],
)
def test_values_and_scores_of_ones_own_are_looked_at(
    altered: Callable[[Tensor, Tensor], Any], error: type[Exception], told: str
) -> None:
    x, y, ball = torch.rand(6, 3, 4, 4), torch.zeros(6, dtype=torch.int64), sm.ThreatModel("linf", 0.1)
    model, posterior = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), Returning(altered)
    expected = r"must return log p .* = \[6, 2\] and scores .* = \[6, 2, 3, 4, 4\] like x, torch.float32"
    uses: list[Callable[[], object]] = [
        lambda: posterior.log_prob(x),
        lambda: sm.objectives.score_direct(model, x, y, threat_model=ball, posterior=posterior),
        lambda: sm.audit.robust_accuracy(posterior, x, y, ball),
        lambda: sm.consistency(model, posterior, x, y, ball),
    ]
    for use in uses:
        with pytest.raises(error, match=expected + ".*" + told):
            use()


def test_members_of_an_ensemble_are_told_apart() -> None:
    member = Returning(lambda *both: both)
    nameless = KernelDensity(X, Y, num_classes=2, sigma=0.3)
    del nameless.num_classes
    for odd, given in ((nn.Linear(3, 2), "Linear"), (KernelDensity, "ABCMeta"), (nameless, "KernelDensity")):
        with pytest.raises(TypeError, match=rf"members\[1\] must be a posterior, with num_classes .*, got {given}$"):
            Ensemble([member, odd])  # type: ignore[list-item]
