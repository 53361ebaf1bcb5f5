"""Posteriors against closed forms and automatic differentiation, in float64."""

import math

import pytest
import torch
from library_models import log_posterior, mixture

from scorematch import ThreatModel
from scorematch.audit import attacked_log_likelihood, robust_accuracy
from scorematch.networks import Denoiser, EmbeddedDenoiser, MLPBackbone
from scorematch.posteriors import (
    ClassScorePosterior,
    Ensemble,
    GaussianMixture,
    KernelDensity,
    NoiseConditionalClassifier,
    Posterior,
    ScoreNetwork,
    Trace,
)

F64 = {"rtol": 1e-10, "atol": 1e-10}


def inputs(count: int = 6, features: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def class_score_gradients(posterior: ClassScorePosterior, x: torch.Tensor) -> torch.Tensor:
    """∇ log p(y|x) for every class, [N, L, …], from the class scores."""
    log_p, scores = posterior.log_prob_and_scores(x)
    shape = (*log_p.shape, *[1] * (x.dim() - 1))
    return scores - (log_p.exp().reshape(shape) * scores).sum(1, keepdim=True)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("components", [1, 3])
def test_mixture_equals_torch_distributions(features: int, components: int) -> None:
    p, x = mixture(3, components, features), inputs(features=features).requires_grad_()
    expected = log_posterior(p, x)
    torch.testing.assert_close(p(x), expected, **F64)
    gradients = torch.stack(
        [torch.autograd.grad(expected[:, y].sum(), x, retain_graph=True)[0] for y in range(3)], dim=1
    )
    torch.testing.assert_close(class_score_gradients(p, x), gradients, **F64)


def test_mixture_gradient_passes_gradcheck() -> None:
    p = mixture()
    assert torch.autograd.gradcheck(p, (inputs().requires_grad_(),))


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
def test_forms_of_covariance_agree(form: str) -> None:
    means = inputs(6).reshape(3, 2, 5)
    variance = 0.5 + torch.rand(3, 2, dtype=torch.float64)
    covariances = {
        "isotropic": variance,
        "diagonal": variance[..., None].expand(3, 2, 5),
        "full": variance[..., None, None] * torch.eye(5, dtype=torch.float64),
    }[form]
    p, x = GaussianMixture(means, covariances), inputs(4)
    squared = (x[:, None, None] - means).square().sum(-1)
    expected = (-0.5 * squared / variance - 2.5 * (2 * math.pi * variance).log()).logsumexp(-1).log_softmax(-1)
    torch.testing.assert_close(p(x), expected, **F64)


def test_mixture_samples_follow_it() -> None:
    p = mixture(2, 2, 1)
    x, y = p.sample(100_000, torch.Generator().manual_seed(0))
    prior = p.log_weights.exp().sum(1)
    torch.testing.assert_close(torch.bincount(y).double() / len(y), prior, rtol=0.02, atol=0)
    # E over x of p(y|x) is the prior, and among points with p(1|x) near t a share t is of class 1.
    posterior = p(x).exp()[:, 1]
    for low in (0.2, 0.5, 0.8):
        chosen = (posterior > low) & (posterior < low + 0.1)
        assert float(y[chosen].double().mean()) == pytest.approx(float(posterior[chosen].mean()), abs=0.03)


def test_smoothed_mixture_adds_the_variance_of_the_noise() -> None:
    p = mixture()
    expected = p.covariances + 0.09 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(p.smoothed(0.3).covariances, expected)
    torch.testing.assert_close(p.smoothed(0.3).log_weights, p.log_weights)


def test_kernel_density_is_the_mixture_of_its_kernels() -> None:
    points, labels = inputs(12, seed=2), torch.arange(12) % 3
    density = KernelDensity(points, labels, num_classes=3, sigma=0.7)
    means = torch.stack([points[labels == y] for y in range(3)])
    equivalent = GaussianMixture(means, torch.full((3, 4), 0.49, dtype=torch.float64))
    x = inputs()
    torch.testing.assert_close(density(x), equivalent(x), **F64)
    torch.testing.assert_close(class_score_gradients(density, x), class_score_gradients(equivalent, x), **F64)


def test_kernel_density_of_unbalanced_classes_and_images() -> None:
    points, labels = inputs(9, 16, seed=2).reshape(9, 1, 4, 4), torch.tensor([2, 0, 0, 0, 0, 1, 2, 0, 0])
    density = KernelDensity(points, labels, num_classes=3, sigma=1.5)
    x = inputs(4, 16).reshape(4, 1, 4, 4)
    squared = (x[:, None] - points).square().flatten(2).sum(2) / (2 * 1.5**2)
    expected = torch.stack([(-squared[:, labels == y]).logsumexp(1) for y in range(3)], 1).log_softmax(1)
    torch.testing.assert_close(density(x), expected, **F64)
    assert torch.autograd.gradcheck(density, (x.requires_grad_(),))


@pytest.mark.parametrize("place", ["close", "between"])
@pytest.mark.parametrize("sigma", [0.4, 0.02])
@pytest.mark.parametrize("features", [64, 784, 3072])
def test_kernel_density_keeps_its_digits_in_float32(features: int, sigma: float, place: str) -> None:
    """At points of two classes that are close to each other, and halfway between points that are not."""
    generator = torch.Generator().manual_seed(0)
    if place == "close":
        base = torch.rand(features, generator=generator)
        points = base + 3 * sigma * torch.randn(8, features, generator=generator) / features**0.5
        x = base + sigma * torch.randn(5, features, generator=generator) / features**0.5
    else:
        points = torch.rand(8, features, generator=generator)
        across = points[4:] - points[:4]
        beyond_half = sigma**2 * torch.randn(4, 1, generator=generator) / across.square().sum(1, keepdim=True)
        x = points[:4] + (0.5 + beyond_half) * across
    density, exact = (
        KernelDensity(p, torch.arange(8) // 4, num_classes=2, sigma=sigma) for p in (points, points.double())
    )
    found, expected = density.log_prob_and_scores(x), exact.log_prob_and_scores(x.double())
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0].exp().double(), expected[0].exp(), rtol=0, atol=1e-6)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-6
    assert 0.02 < expected[0].exp().min() < expected[0].exp().max() < 0.98


def test_state_of_a_kernel_density_holds_its_labels() -> None:
    points, few, many = inputs(10), torch.arange(10) // 3 % 2, torch.arange(10) // 8
    density, other = (KernelDensity(points, y, num_classes=2, sigma=0.7) for y in (few, many))
    x = inputs(4, seed=3)
    assert not torch.equal(density(x), other(x))
    other.load_state_dict(density.state_dict())
    assert torch.equal(density(x), other(x))
    without = {name: value for name, value in density.state_dict().items() if name == "points"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"class_sizes\""):
        other.load_state_dict(without)


class OracleDenoiser(Denoiser):
    """The exact denoiser of a mixture at any σ: x + σ² ∇ log p_σ (Tweedie's formula)."""

    def __init__(self, oracle: GaussianMixture) -> None:
        super().__init__(torch.nn.Identity(), num_classes=oracle.num_classes, sigma_data=1.0)
        self.oracle = oracle

    def all_scores(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        log_p, scores = self.oracle.smoothed(float(sigma)).log_prob_and_scores(x)
        unconditional = (log_p.exp()[..., None] * scores).sum(1, keepdim=True)
        return torch.cat([scores, unconditional], 1)

    def class_scores(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.all_scores(x, sigma)[:, : self.num_classes]


def path(x: torch.Tensor, steps: int, seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = [x]
    for _ in range(steps):
        points.append(points[-1] + 0.4 * torch.randn(x.shape, dtype=x.dtype, generator=generator))
    return points


@pytest.mark.parametrize("centering", ["posterior", "network"])
def test_path_integral_of_exact_scores_reaches_the_posterior(centering: str) -> None:
    oracle, x = mixture(), inputs()
    smoothed = oracle.smoothed(0.3)
    posterior = ScoreNetwork(OracleDenoiser(oracle), sigma=0.3, anchor=smoothed, centering=centering, nodes=64)
    trace = posterior.trace(x, torch.zeros(len(x), dtype=torch.int64))
    for point in path(x, 3)[1:]:
        trace.move(point)
    torch.testing.assert_close(trace.log_p, smoothed(point), rtol=1e-3, atol=1e-3)
    weights = torch.randn(trace.log_p.shape, dtype=torch.float64)
    point.requires_grad_()
    (expected,) = torch.autograd.grad((smoothed(point) * weights).sum(), point)
    torch.testing.assert_close(trace.pull_back(weights, torch.zeros_like(x)), expected, rtol=1e-3, atol=1e-3)


def test_linear_posterior_is_first_order() -> None:
    """log softmax [log p(y|x) + s_y(x) · δ]: exact to first order in δ, one evaluation of the network."""
    oracle, x = mixture(), inputs()
    smoothed, y = oracle.smoothed(0.3), torch.zeros(len(inputs()), dtype=torch.int64)
    posterior = ScoreNetwork(OracleDenoiser(oracle), sigma=0.3, anchor=smoothed, linear=True)
    errors = []
    for scale in (1e-2, 5e-3):
        trace = posterior.trace(x, y)
        for point in (x + 0.1, x + scale * torch.ones_like(x)):  # only the last point counts
            trace.move(point)
        errors.append(float((trace.log_p - smoothed.log_prob(trace.x)).abs().max()))
        scores = posterior.scores(x)
        expected = (smoothed.log_prob(x) + (scores * (trace.x - x)[:, None]).flatten(2).sum(2)).log_softmax(1)
        torch.testing.assert_close(trace.log_p, expected, **F64)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    weights, grad = torch.randn(len(x), oracle.num_classes, dtype=x.dtype), torch.zeros_like(x)
    p = trace.log_p.exp()
    centred = weights - p * weights.sum(1, keepdim=True)
    torch.testing.assert_close(trace.pull_back(weights, grad), (centred[..., None] * scores).sum(1), **F64)


def test_top_k_of_all_classes_is_all_of_them() -> None:
    torch.manual_seed(0)
    backbone = MLPBackbone((6,), 6, width=16, depth=1, conditions=4)
    denoiser = EmbeddedDenoiser(backbone, num_classes=4, sigma_data=1.0)
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    anchor = KernelDensity(x, y, num_classes=4, sigma=1.0)
    traces = [ScoreNetwork(denoiser, sigma=0.5, anchor=anchor, top_k=k).trace(x, y) for k in (None, 4, 2)]
    for trace in traces:
        trace.move(x + 0.3)
    torch.testing.assert_close(traces[1].log_p, traces[0].log_p)
    assert not torch.allclose(traces[2].log_p, traces[0].log_p)
    for message, settings in {
        "top_k must lie between 1 and 4 classes, got 5": {"top_k": 5},
        "top_k needs centering='posterior'": {"top_k": 2, "centering": "network"},
        "nodes must be 1 where": {"linear": True, "nodes": 2},
        "top_k must be 1 or 4 without an anchor, .* got 2": {"top_k": 2},
    }.items():
        with pytest.raises(ValueError, match=message):
            ScoreNetwork(denoiser, sigma=0.5, **settings)
    with pytest.raises(ValueError, match="top_k needs an EmbeddedDenoiser, got Denoiser"):
        ScoreNetwork(Denoiser(backbone, num_classes=4, sigma_data=1.0), sigma=0.5, top_k=1)


def test_refining_the_path_integral_is_second_order() -> None:
    oracle, x = mixture(), inputs()
    smoothed, target = oracle.smoothed(0.3), path(x, 1)[1]
    errors = []
    for nodes in (4, 8, 16):
        posterior = ScoreNetwork(OracleDenoiser(oracle), sigma=0.3, anchor=smoothed, nodes=nodes)
        trace = posterior.trace(x, torch.zeros(len(x), dtype=torch.int64))
        trace.move(target)
        errors.append(float((trace.log_p - smoothed(target)).abs().max()))
    assert errors[0] > 1e-6
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_label_anchor() -> None:
    denoiser = OracleDenoiser(mixture())
    posterior = ScoreNetwork(denoiser, sigma=0.3, smoothing=0.2)
    x = inputs(3)
    hard = posterior.trace(x, torch.tensor([0, 1, 2])).log_p.exp()
    torch.testing.assert_close(hard, 0.1 + 0.7 * torch.eye(3, dtype=torch.float64))
    soft = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).expand(3, 3)
    expected = 0.8 * soft + 0.2 * (1 - soft) / 2
    torch.testing.assert_close(posterior.trace(x, soft).log_p.exp(), expected)


class ToyClassifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 3).double()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh() / sigma[:, None]


def test_classifier_pull_back_equals_automatic_differentiation() -> None:
    posterior = NoiseConditionalClassifier(ToyClassifier(), num_classes=3, sigma=0.5)
    x = inputs().requires_grad_()
    trace = posterior.trace(inputs(seed=9), torch.zeros(6, dtype=torch.int64))
    trace.move(x)
    weights, grad = torch.randn(6, 3, dtype=torch.float64), inputs(seed=4)
    (expected,) = torch.autograd.grad((posterior(x) * weights).sum(), x)
    torch.testing.assert_close(trace.pull_back(weights, grad), grad + expected, **F64)
    torch.testing.assert_close(trace.log_p.exp().sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_classifier_of_other_classes_is_refused(num_classes: int) -> None:
    posterior = NoiseConditionalClassifier(ToyClassifier(), num_classes=num_classes, sigma=0.5)
    told = rf"network must return logits \[6, {num_classes}\] for num_classes, got \[6, 3\]"
    with pytest.raises(ValueError, match=told):
        posterior.log_prob(inputs())
    with pytest.raises(ValueError, match=told):
        posterior.trace(inputs(), torch.zeros(6, dtype=torch.int64))


def all_posteriors() -> list[Posterior]:
    points, labels = inputs(12, seed=2), torch.arange(12) % 3
    torch.manual_seed(0)
    denoiser = Denoiser(MLPBackbone((5,), 20, width=8, depth=1), num_classes=3, sigma_data=1.0).double()
    return [
        mixture(),
        KernelDensity(points, labels, num_classes=3, sigma=0.7),
        NoiseConditionalClassifier(ToyClassifier(), num_classes=3, sigma=0.5),
        ScoreNetwork(denoiser, sigma=0.5),
    ]


@pytest.mark.parametrize("index", range(4))
def test_posteriors_are_fixed_and_can_be_saved(index: int) -> None:
    posterior, other = all_posteriors()[index], all_posteriors()[index]
    assert not any(p.requires_grad for p in posterior.parameters())
    posterior.train()
    assert not any(module.training for module in list(posterior.modules())[1:])
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(posterior.state_dict())
    x, y = inputs(), torch.arange(6) % 3
    for moved in (x, x + 0.1):
        a, b = posterior.trace(x, y), other.trace(x, y)
        a.move(moved)
        b.move(moved)
        assert torch.equal(a.log_p, b.log_p)
        assert not a.log_p.requires_grad


def test_audit_finds_the_robust_accuracy_of_a_linear_posterior() -> None:
    means = torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)
    oracle = GaussianMixture(means, torch.full((2, 1), 0.5, dtype=torch.float64))
    x, y = oracle.sample(2000, torch.Generator().manual_seed(0))
    threat_model = ThreatModel("linf", 0.3, lower=-math.inf, upper=math.inf)
    clean, robust = robust_accuracy(oracle, x, y, threat_model, steps=20)
    margin = torch.where(y == 1, x[:, 0], -x[:, 0])
    assert clean == pytest.approx(float((margin > 0).double().mean()))
    assert robust == pytest.approx(float((margin > 0.3).double().mean()))
    # Its log p(y|x) is −log(1 + exp(−4 m)) of the margin m, lowest where the attack has taken all of eps from m.
    lowest = attacked_log_likelihood(oracle, x, y, threat_model, steps=20)
    torch.testing.assert_close(lowest, torch.nn.functional.logsigmoid(4 * (margin - 0.3)))


class Listening(Posterior):
    """Another posterior; it remembers all values that it told."""

    def __init__(self, own: Posterior) -> None:
        super().__init__()
        self.own, self.num_classes = own, own.num_classes
        self.told: list[torch.Tensor] = []

    def trace(self, x: torch.Tensor, y: torch.Tensor) -> Trace:
        trace = self.own.trace(x, y)
        self.told.append(trace.log_p)
        move = trace.move

        def moved(x: torch.Tensor) -> None:
            move(x)
            self.told.append(trace.log_p)

        trace.move = moved  # type: ignore[method-assign]
        return trace


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_lowest_likelihood_is_that_of_all_iterates(steps: int) -> None:
    """A step that is too long overshoots the minimum; what was lowest counts, the last point and clean x included."""
    posterior, x = Listening(mixture()), inputs()
    y = torch.arange(len(x)) % posterior.num_classes
    threat_model = ThreatModel("l2", 2.0, lower=-math.inf, upper=math.inf, step_size=3.0)
    generator = torch.Generator().manual_seed(0)
    lowest = attacked_log_likelihood(posterior, x, y, threat_model, steps=steps, restarts=2, generator=generator)
    told = torch.stack(posterior.told)
    assert len(told) == 1 + 2 * (2 + steps)
    torch.testing.assert_close(lowest, told.gather(2, y[None, :, None].expand(len(told), -1, 1))[..., 0].amin(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(2, 3)), r"means must be \[L, K, D\], got \[2, 3\]"),
        (lambda: GaussianMixture(torch.zeros(2, 1, 3), torch.ones(3)), "covariances must be"),
        (lambda: GaussianMixture(torch.zeros(2, 1, 3), -torch.ones(2, 1)), "positive definite"),
        (lambda: GaussianMixture(torch.zeros(2, 1, 3), torch.ones(2, 1), torch.ones(3)), r"weights must be \[L, K\]"),
        (lambda: GaussianMixture(torch.zeros(2, 1, 3), torch.ones(2, 1), -torch.ones(2, 1)), "non-negative"),
        (
            lambda: GaussianMixture(torch.zeros(1, 2, 3), torch.ones(1, 2), torch.tensor([[-0.5, 2.0]])),
            "weights must be non-negative",
        ),
        (lambda: mixture()(torch.zeros(2, 4, dtype=torch.float64)), "x has 4 features a sample, the mixture 5"),
        (
            lambda: KernelDensity(torch.zeros(2, 3), torch.tensor([0, 1]), num_classes=2, sigma=0.0),
            "sigma must be finite and positive",
        ),
        (lambda: KernelDensity(torch.zeros(2, 3), torch.tensor([0]), num_classes=2, sigma=1.0), "x has 2 samples but"),
        (lambda: KernelDensity(torch.zeros(2, 3), torch.tensor([0, 0]), num_classes=2, sigma=1.0), "class 1 has no"),
        (lambda: KernelDensity(torch.zeros(2, 3), torch.tensor([0, 2]), num_classes=2, sigma=1.0), "labels must lie"),
        (
            lambda: NoiseConditionalClassifier(ToyClassifier(), num_classes=3, sigma=-1.0),
            "sigma must be finite and positive",
        ),
        (lambda: ScoreNetwork(OracleDenoiser(mixture()), sigma=0.0), "sigma must be finite and positive, got 0.0"),
        (lambda: ScoreNetwork(OracleDenoiser(mixture()), sigma=1.0, smoothing=0.0), "smoothing must lie in"),
        (lambda: ScoreNetwork(OracleDenoiser(mixture()), sigma=1.0, centering="mean"), "centering must be one of"),
        (lambda: ScoreNetwork(OracleDenoiser(mixture()), sigma=1.0, nodes=0), "nodes must be at least 1, got 0"),
        (lambda: ScoreNetwork(OracleDenoiser(mixture()), sigma=1.0, anchor=mixture(4)), "anchor has 4 classes"),
    ],
)
def test_bad_input(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


def test_an_ensemble_has_a_gradient_where_a_class_is_out_of_reach() -> None:
    """Its probability is below the range of float32 with each member."""
    points, labels = torch.tensor([[0.0], [1e3]]), torch.tensor([0, 1])
    members = [KernelDensity(points, labels, num_classes=2, sigma=sigma) for sigma in (1e-17, 2e-17)]
    trace = Ensemble(members).trace(torch.ones(1, 1), labels[:1])
    assert trace.log_p.tolist() == [[0.0, -math.inf]]
    assert trace.pull_back(torch.ones(1, 2), torch.zeros(1, 1)).isfinite().all()


class Masked(torch.nn.Module):
    """A class that is impossible everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.tensor([0.0, 0.0, -math.inf])


def test_an_ensemble_can_be_attacked_where_no_member_allows_a_class() -> None:
    torch.manual_seed(0)
    member = NoiseConditionalClassifier(Masked(), num_classes=3, sigma=0.3)
    x, found = torch.rand(5, 6), []
    for model in (member, Ensemble([member, member]), Ensemble([Ensemble([member]), member])):
        point = x.clone().requires_grad_()
        log_p = model(point)
        assert log_p[:, 2].tolist() == [-math.inf] * 5
        found.append((log_p.detach(), torch.autograd.grad(log_p[:, 0].sum(), point)[0]))
    assert found[0][1].abs().max() > 0
    for log_p, gradient in found[1:]:
        torch.testing.assert_close(log_p, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


def test_a_class_whose_weight_vanishes_is_refused() -> None:
    """Rounding makes its share of all weights 0; its log-probabilities were −∞ and its scores NaN."""
    weights = torch.tensor([[1e-30], [1e30]])
    with pytest.raises(ValueError, match="weights must be non-negative with a positive sum for each class"):
        GaussianMixture(torch.zeros(2, 1, 3), torch.ones(2, 1), weights)
