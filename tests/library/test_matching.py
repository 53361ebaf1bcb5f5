"""Score matching: each loss is least at the true score, and training finds it."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from library_models import mixture
from torch import nn

from scorematch import matching
from scorematch.matching import DenoisingLoss, Fit, Fitting, fit_classifier, fit_denoiser
from scorematch.networks import Denoiser, EmbeddedDenoiser, MLPBackbone
from scorematch.posteriors import NoiseConditionalClassifier, ScoreNetwork


def gaussian(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of N(0, C) in R³ and C, whose score is −C⁻¹ x."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.2, 0.0], [-0.3, 0.4, 0.8]], dtype=torch.float64)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator) @ factor.T, factor @ factor.T


@pytest.mark.parametrize("method", ["sliced", "finite_difference"])
def test_minimum_is_the_score_of_the_data(method: str) -> None:
    """A linear score s = −A x is least at A = C⁻¹ (of the sample): the gradient vanishes there, and only there."""
    x, _ = gaussian(4000)
    precision = torch.linalg.inv(x.T @ x / len(x))
    # All Rademacher directions, so that E[v vᵀ] = I exactly.
    directions = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)

    def loss(a: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for v in directions:
            projection = v.expand(len(x), 3)
            if method == "sliced":
                total = total + matching.sliced(lambda z: -z @ a, x, projection).mean()
            else:
                total = total + matching.finite_difference(lambda z: -z @ a, x, projection, step=1e-3).mean()
        return total / len(directions)

    a = precision.clone().requires_grad_()
    (at_minimum,) = torch.autograd.grad(loss(a), a)
    a = (1.1 * precision).requires_grad_()
    (elsewhere,) = torch.autograd.grad(loss(a), a)
    assert elsewhere.abs().max() > 0.05
    assert at_minimum.abs().max() < 1e-4 * elsewhere.abs().max()
    # The value is ½ E‖s‖² + E tr ∇s = −½ tr C⁻¹ there.
    assert float(loss(precision).detach()) == pytest.approx(-0.5 * float(precision.trace()), rel=1e-5)


def test_finite_difference_approaches_sliced() -> None:
    x, _ = gaussian(64)
    projection = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def score(z: torch.Tensor) -> torch.Tensor:
        return -(z**3) - z.sin()

    exact = matching.sliced(score, x, projection)
    errors = [
        float((matching.finite_difference(score, x, projection, step=h) - exact).detach().abs().max())
        for h in (0.1, 0.05)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


class LinearDenoiser(Denoiser):
    """D = (1 − σ² a) x for every class: its score is −a x."""

    def __init__(self, a: float) -> None:
        super().__init__(nn.Identity(), num_classes=2, sigma_data=1.0)
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def denoise_all(
        self, x: torch.Tensor, sigma: torch.Tensor | float, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        del conditions
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return ((1 - s.square() * self.a) * x)[:, None].expand(-1, 3, *x.shape[1:])


def test_denoising_finds_the_score_of_the_smoothed_data() -> None:
    """x ~ N(0, 1): the score of p_σ is −x / (1 + σ²)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 1, dtype=torch.float64, generator=generator)
    noise = torch.randn(200_000, 1, dtype=torch.float64, generator=generator)
    x, noise = torch.cat([x, x]), torch.cat([noise, -noise])
    y = torch.zeros(len(x), dtype=torch.int64)
    sigma = torch.full((len(x),), 0.7, dtype=torch.float64)
    gradients = {}
    for factor in (1.0, 1.1):
        denoiser = LinearDenoiser(factor / 1.49)
        (gradients[factor],) = torch.autograd.grad(matching.denoising(denoiser, x, y, sigma, noise).mean(), denoiser.a)
    assert gradients[1.1].abs() > 0.05
    assert gradients[1.0].abs() < 0.1 * gradients[1.1].abs()


def test_denoising_trains_the_labelled_and_the_unconditional_head() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(MLPBackbone((2,), 8, width=8, depth=1), num_classes=3, sigma_data=1.0)
    x, noise = torch.randn(2, 4, 2)
    y = torch.tensor([0, 0, 2, 2])
    matching.denoising(denoiser, x, y, torch.full((4,), 0.5), noise).mean().backward()
    used = denoiser.backbone.outlet[-1].bias.grad.reshape(4, 2).abs().sum(1) > 0
    assert used.tolist() == [True, False, True, True]


def test_denoising_likelihood_is_least_at_the_true_posterior() -> None:
    """A classifier with the logits of the truth, scaled by a: the expected loss is least at a = 1."""
    oracle = mixture(2, 1, 2)
    sigma = 0.5
    smoothed = oracle.smoothed(sigma)

    class Scaled(nn.Module):
        def __init__(self, a: float) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            del sigma
            return self.a * smoothed.log_joint(x)

    generator = torch.Generator().manual_seed(0)
    x, y = oracle.sample(100_000, generator)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    x, y, noise = torch.cat([x, x]), torch.cat([y, y]), torch.cat([noise, -noise])
    noisy = x + sigma * noise
    log_p, scores = smoothed.log_prob_and_scores(noisy)
    unconditional = (log_p.exp()[..., None] * scores).sum(1)
    gradients = {}
    for a in (1.0, 1.2):
        model = Scaled(a)
        loss, logits = matching.denoising_likelihood(
            model, unconditional, noisy, y, torch.full((len(x),), sigma, dtype=torch.float64), noise
        )
        assert logits.shape == (len(x), 2)
        (gradients[a],) = torch.autograd.grad(loss.mean(), model.a)
    assert gradients[1.2] > 0
    assert gradients[1.0].abs() < 0.1 * gradients[1.2]


def test_joint_energy_is_least_at_the_true_joint_density() -> None:
    """Logits that are the log joint density, less that of the Gaussian that is added again, scaled by a."""
    oracle = mixture(2, 1, 2)
    sigma, sigma_data, center = 0.5, 1.5, torch.tensor([0.3, -0.2], dtype=torch.float64)
    smoothed = oracle.smoothed(sigma)

    class Scaled(nn.Module):
        def __init__(self, a: float) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            base = 0.5 * (x - center).square().sum(1, keepdim=True) / (sigma[:, None].square() + sigma_data**2)
            return self.a * smoothed.log_joint(x) + base

    generator = torch.Generator().manual_seed(0)
    x, y = oracle.sample(100_000, generator)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    x, y, noise = torch.cat([x, x]), torch.cat([y, y]), torch.cat([noise, -noise])
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    gradients = {}
    for a in (1.0, 1.2):
        model = Scaled(a)
        loss, logits = matching.joint_energy(
            model, x + sigma * noise, y, level, noise, center=center, sigma_data=sigma_data
        )
        assert loss.shape == (len(x),)
        assert logits.shape == (len(x), 2)
        (gradients[a],) = torch.autograd.grad(loss.mean(), model.a)
    assert gradients[1.2] > 0
    assert gradients[1.0].abs() < 0.1 * gradients[1.2]


def test_a_joint_energy_learns_posterior_and_class_scores() -> None:
    oracle = mixture(2, 1, 1)
    x, y = toy()
    torch.manual_seed(0)
    network = MLPBackbone((1,), 2, width=32, depth=1)
    fit = Fit(steps=600, batch_size=256, lr=1e-2, sigma_min=0.5, sigma_max=1.0)
    energy = matching.JointEnergy(1.0, 0.0, 1.8)
    fit_classifier(network, x, y, fit, generator=torch.Generator().manual_seed(0), energy=energy)
    points = torch.linspace(-2, 2, 41)[:, None].requires_grad_()
    logits = network(points, torch.full((41,), 0.7))
    truth = oracle.smoothed(0.7)
    expected, scores = truth.log_prob_and_scores(points.detach().double())
    assert (logits.softmax(1) - expected.exp()).abs().max() < 0.1
    for label in range(2):
        (slope,) = torch.autograd.grad(logits[:, label].sum(), points, retain_graph=True)
        error = slope - points / (0.7**2 + 1.8**2) - scores[:, label]
        assert error.detach().square().mean() < 0.05 * scores.square().mean()


def noisy_labels(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points whose labels mean nothing: all that can be learned of them is to be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(2, (count,), generator=generator)


def test_held_out_data_pick_the_weights() -> None:
    """Where there is nothing to learn the first look is the best, and the training stops once it has looked in vain."""
    x, y = noisy_labels(40, 0)
    held_out = matching.HeldOut(*noisy_labels(200, 1), sigma=0.1, interval=20, patience=3)
    fit = Fit(steps=1000, batch_size=40, lr=1e-2, half_life=100, sigma_min=0.05, sigma_max=0.2)
    steps = []
    torch.manual_seed(0)
    network = MLPBackbone((4,), 2, width=64, depth=1)
    fit_classifier(
        network,
        x,
        y,
        fit,
        generator=torch.Generator().manual_seed(0),
        held_out=held_out,
        progress=lambda step, loss: steps.append(step),
    )
    chosen = held_out.loss(network)
    assert len(steps) < 500
    assert not network.training
    torch.manual_seed(0)
    to_the_end = MLPBackbone((4,), 2, width=64, depth=1)
    fit_classifier(to_the_end, x, y, fit, generator=torch.Generator().manual_seed(0))
    assert chosen < 1.0
    assert held_out.loss(to_the_end) > 2 * chosen


def test_best_weights_are_those_of_the_lowest_loss() -> None:
    network = nn.Linear(1, 1)
    losses = iter([3.0, 1.0, 2.0, float("nan")])

    class Listed(matching.HeldOut):
        def loss(self, network: nn.Module) -> float:
            return next(losses)

    best = matching.BestWeights(Listed(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1.0, patience=2))
    stopped = []
    for step in (1, 2, 3, 4):
        nn.init.constant_(network.weight, step)
        best.look(network, step)
        stopped.append(best.in_vain)
    assert stopped == [False, False, False, True]
    best.restore(network)
    assert (best.step, best.loss, network.weight.item()) == (2, 1.0, 2.0)


def test_no_finite_loss_is_an_error() -> None:
    held_out = matching.HeldOut(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), sigma=1.0)
    with pytest.raises(ValueError, match="no look at held-out data gave a finite loss"):
        matching.BestWeights(held_out).restore(nn.Linear(1, 1))


def test_losses_by_level_are_the_losses_and_repeat() -> None:
    denoiser = small_denoiser()
    x, y = toy(300)
    first = matching.losses_by_level(denoiser, x, y, (0.2, 0.9), repeats=2)
    assert first == matching.losses_by_level(denoiser, x, y, (0.2, 0.9), repeats=2)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for _ in range(2)]
    level = torch.full((300,), 0.2)
    expected = torch.cat([matching.denoising(denoiser, x, y, level, n).detach() for n in noise]).mean()
    assert first[0.2] == pytest.approx(float(expected), rel=1e-5)


class Halting(nn.Module):
    """A classifier of noisy inputs with a batch norm, which stops at more than ``limit`` samples."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.norm, self.head = limit, nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if len(x) > self.limit:
            raise RuntimeError("too many samples")
        return self.head(self.norm(x))


@pytest.mark.parametrize("limit", [10, 3])
def test_losses_by_level_leave_the_network_as_found(limit: int) -> None:
    """Each module in its own mode, also after a failure."""
    network = Halting(limit)
    network.norm.eval()
    network.head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="too many samples") if limit < 10 else nullcontext():
        matching.losses_by_level(network, torch.rand(10, 2), torch.arange(10) % 3, (0.1,))
    assert (network.training, network.norm.training, network.head.training) == (True, False, True)
    assert [parameter.requires_grad for parameter in network.parameters()] == [True, True, False, True]


def test_temperature_of_a_tempered_posterior() -> None:
    oracle = mixture()
    x, y = oracle.sample(20_000, torch.Generator().manual_seed(0))
    for factor in (0.5, 3.0):
        found = matching.fit_temperature(lambda points, factor=factor: factor * oracle.log_joint(points), x, y)
        assert found == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be finite and positive"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"x": torch.zeros(0, 2)}, "as many samples, at least one, got 0 and 3"),
    ],
)
def test_bad_held_out_data(options: dict, message: str) -> None:
    given = {"x": torch.zeros(3, 2), "y": torch.zeros(3, dtype=torch.int64), "sigma": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        matching.HeldOut(**given)


def test_one_loss_of_gradients_at_a_time() -> None:
    with pytest.raises(ValueError, match="allowed: one of them"):
        matching.ClassificationLoss(nn.Identity(), 1.0, small_denoiser(), matching.JointEnergy(1.0, 0.0, 1.0))
    for weight in (-1.0, 0.0, math.inf):
        with pytest.raises(ValueError, match=rf"energy.weight must be finite and positive, got {weight}"):
            matching.ClassificationLoss(nn.Identity(), energy=matching.JointEnergy(weight, 0.0, 1.0))


def small_denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(MLPBackbone((1,), 3, width=32, depth=1), num_classes=2, sigma_data=1.8)


def toy(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = mixture(2, 1, 1).sample(count, torch.Generator().manual_seed(0))
    return x.float(), y


def test_fit_denoiser_learns_the_class_scores() -> None:
    oracle, (x, y) = mixture(2, 1, 1), toy(20_000)
    denoiser = small_denoiser()
    seen: list[int] = []
    fit_denoiser(
        denoiser,
        x,
        y,
        Fit(steps=800, batch_size=256, lr=1e-2, sigma_min=0.2, sigma_max=1.0),
        generator=torch.Generator().manual_seed(0),
        progress=lambda step, loss: seen.append(step),
    )
    assert seen == list(range(1, 801))
    assert not denoiser.training
    points = x[:2000]
    _, truth = oracle.smoothed(0.5).log_prob_and_scores(points.double())
    error = (denoiser.class_scores(points, 0.5).double() - truth).square().mean() / truth.square().mean()
    assert error < 0.05


def test_fit_classifier_learns_the_smoothed_posterior() -> None:
    oracle, (x, y) = mixture(2, 1, 1), toy(20_000)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MLPBackbone((1,), 2, width=32, depth=1)

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.backbone(x, sigma.log() / 4)

    torch.manual_seed(0)
    network = Classifier()
    fit = Fit(steps=400, batch_size=256, lr=1e-2, sigma_min=0.2, sigma_max=1.0)
    fit_classifier(network, x, y, fit, generator=torch.Generator().manual_seed(0))
    truth = oracle.smoothed(0.5).log_prob(x[:2000].double())
    found = network(x[:2000], torch.full((2000,), 0.5)).double().log_softmax(1)
    assert (truth.exp() * (truth - found)).sum(1).mean() < 0.01


def test_training_repeats_exactly() -> None:
    x, y = toy(200)
    fit = Fit(steps=20, batch_size=16)
    first, second = (
        fit_denoiser(small_denoiser(), x, y, fit, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def embedded(num_classes: int = 2, features: int = 1) -> EmbeddedDenoiser:
    torch.manual_seed(0)
    backbone = MLPBackbone((features,), features, width=32, depth=1, conditions=num_classes)
    return EmbeddedDenoiser(backbone, num_classes=num_classes, sigma_data=1.8)


def test_an_embedded_denoiser_learns_the_class_scores_and_a_student_those() -> None:
    oracle, (x, y) = mixture(2, 1, 1), toy(20_000)
    points = x[:2000]
    _, truth = oracle.smoothed(0.5).log_prob_and_scores(points.double())
    fit = Fit(steps=800, batch_size=256, lr=1e-2, sigma_min=0.2, sigma_max=1.0)
    teacher = embedded()
    fit_denoiser(teacher, x, y, fit, generator=torch.Generator().manual_seed(0))
    student = fit_denoiser(
        small_denoiser(), x, torch.zeros_like(y), fit, generator=torch.Generator().manual_seed(1), teacher=teacher
    )
    for denoiser in (teacher, student):  # the student has seen no label
        error = (denoiser.class_scores(points, 0.5).double() - truth).square().mean() / truth.square().mean()
        assert error < 0.1


def test_distillation_is_zero_for_the_teacher_itself() -> None:
    x, noise = torch.randn(2, 6, 2)
    sigma = torch.linspace(0.1, 1, 6)
    teacher, student = embedded(3, 2), Denoiser(MLPBackbone((2,), 8, width=8, depth=1), num_classes=3, sigma_data=1.8)
    assert not matching.distillation(teacher, teacher, x, sigma, noise).any()
    losses = matching.distillation(student, teacher, x, sigma, noise)
    scale = (sigma**2 + 1.8**2) / (sigma * 1.8) ** 2
    noisy = x + sigma[:, None] * noise
    error = student.denoise_all(noisy, sigma) - teacher.denoise_all(noisy, sigma)
    torch.testing.assert_close(losses, scale * error.square().mean((1, 2)))
    with pytest.raises(ValueError, match="the student has 2 classes, the teacher 3"):
        matching.distillation(small_denoiser(), teacher, x, sigma, noise)


def test_noise_levels() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    uniform = Fit(sigma_min=0.1, sigma_max=10.0).noise_levels(20_000, generator, like).log()
    assert math.log(0.1) <= uniform.min() < uniform.max() <= math.log(10)
    assert float(uniform.mean()) == pytest.approx(0, abs=0.03)
    normal = Fit(noise="log_normal").noise_levels(20_000, generator, like).log()
    # P_mean and P_std of Karras et al. (2022) for images in [−1, 1], of which ours are half as wide
    assert float((2 * normal.exp()).log().mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(normal.std()) == pytest.approx(1.2, abs=0.03)


def test_learning_rate_and_average() -> None:
    cosine, constant = Fit(steps=1000), Fit(steps=1000, schedule="constant", warm_up=0.2)
    assert [cosine.lr_factor(step) for step in (0, 24)] == pytest.approx([1 / 50, 1 / 2])
    assert cosine.lr_factor(500) == pytest.approx(0.5)
    assert cosine.lr_factor(999) < 1e-5
    assert [constant.lr_factor(step) for step in (99, 199, 999)] == [0.5, 1, 1]
    assert Fit(warm_up=0.0, schedule="constant").lr_factor(0) == 1
    assert Fit(averaging=0.9).decay(7) == 0.9
    halving = Fit(batch_size=100, half_life=1000.0)
    assert halving.decay(10_000) ** 10 == pytest.approx(0.5)
    assert halving.decay(100) ** 5 == pytest.approx(0.5), "5 % of the 10,000 samples seen"


def test_an_interrupted_fitting_goes_on_exactly() -> None:
    x, y = toy(200)
    for fit in (
        Fit(steps=12, batch_size=16),
        Fit(steps=12, half_life=100.0),
        Fit(steps=12, averaging=0),
    ):
        results = []
        for breaks in (0, 5):
            generator, denoiser = torch.Generator().manual_seed(0), small_denoiser()
            fitting = Fitting(denoiser, DenoisingLoss(denoiser), fit)
            for step in range(fit.steps):
                if breaks and step == breaks:
                    state, drawn = copy.deepcopy(fitting.state_dict()), generator.get_state()
                    generator, denoiser = torch.Generator(), small_denoiser()
                    fitting = Fitting(denoiser, DenoisingLoss(denoiser), fit)
                    fitting.load_state_dict(state)
                    generator.set_state(drawn)
                fitting.step(fitting.draw(x, y, generator))
            fitting.finish()
            results.append(denoiser)
        assert all(torch.equal(a, b) for a, b in zip(*(r.parameters() for r in results), strict=True))


def test_likelihood_weight_needs_a_denoiser() -> None:
    x, y = toy(10)
    with pytest.raises(ValueError, match="denoiser must be given"):
        fit_classifier(nn.Identity(), x, y, Fit(likelihood_weight=1.0), generator=torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be finite and positive, got 0.0"),
        ({"sigma_min": 0.0}, "sigma_min must be finite and positive, got 0.0"),
        ({"sigma_max": math.inf}, "sigma_max must be finite and positive, got inf"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "0 < sigma_min ≤ sigma_max is needed"),
        ({"averaging": 1.0}, r"averaging must lie in \[0, 1\)"),
        ({"warm_up": 1.0}, r"warm_up must lie in \[0, 1\)"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant, got 'step'"),
        ({"noise": "uniform"}, "noise must be one of log_uniform, log_normal, got 'uniform'"),
        ({"noise_deviation": 0.0}, "noise_deviation must be finite and positive"),
        ({"noise_mean": math.nan}, "noise_mean must be finite"),
        ({"half_life": -1.0}, "half_life must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"likelihood_weight": math.nan}, "likelihood_weight must be finite and not negative"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fit(**settings)


def test_finite_difference_needs_a_step() -> None:
    with pytest.raises(ValueError, match=r"step must be finite and positive, got 0\.0"):
        matching.finite_difference(lambda z: z, torch.zeros(1, 2), torch.ones(1, 2), step=0.0)


@pytest.mark.parametrize("label", [-100, -1, 2])
@pytest.mark.parametrize("name", ["denoiser", "embedded", "classifier", "joint_energy"])
def test_labels_that_are_no_classes(name: str, label: int) -> None:
    """The last head is the unconditional one, which −1 asked for; cross-entropy counts −100 as nothing."""
    x, y = toy(4)
    batch = matching.Batch(x, torch.full_like(y, label), torch.ones(4), torch.zeros_like(x), None)
    network = MLPBackbone((1,), 2, width=8, depth=1)
    losses = {
        "denoiser": lambda: DenoisingLoss(small_denoiser()),
        "embedded": lambda: DenoisingLoss(embedded()),
        "classifier": lambda: matching.ClassificationLoss(network),
        "joint_energy": lambda: matching.ClassificationLoss(network, energy=matching.JointEnergy(1.0, 0.0, 1.0)),
    }
    with pytest.raises(ValueError, match=rf"y must lie in \[0, 2\), got values in \[{label}, {label}\]"):
        losses[name]()(batch)


def test_a_temperature_needs_finite_logits() -> None:
    x, y = toy(4)
    with pytest.raises(ValueError, match="logits must be finite, got 16 values that are NaN or infinite"):
        matching.fit_temperature(lambda z: torch.tensor([0.0, -math.inf]).expand(len(z), 2), x, y)
    with pytest.raises(TypeError, match="what logits returns must be a tensor, got tuple"):
        matching.fit_temperature(lambda z: (z, z), x, y)


def test_autocast_around_a_training_sees_its_steps() -> None:
    """Its cache would give each step the weights that the first one began with."""
    x, y = torch.rand(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3

    def fitted(cached: bool) -> dict[float, float]:
        torch.manual_seed(0)
        network = MLPBackbone((6,), 3, width=16, depth=1)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            fit = Fit(steps=30, batch_size=32, lr=1e-2, averaging=0.0)
            fit_classifier(network, x, y, fit, generator=torch.Generator().manual_seed(1))
        return matching.losses_by_level(network, x, y, (0.1,))

    assert fitted(True)[0.1] == pytest.approx(fitted(False)[0.1], rel=1e-3)


def test_the_fixed_denoiser_of_a_classifier_drops_nothing() -> None:
    denoiser = Denoiser(MLPBackbone((6,), 24, width=16, depth=1, dropout=0.5), num_classes=3, sigma_data=1.0)
    loss = matching.ClassificationLoss(MLPBackbone((6,), 3, width=16, depth=1), 1.0, denoiser.train())
    assert not any(module.training for module in denoiser.modules())
    assert loss.training


def test_numbers_of_numpy_are_numbers() -> None:
    x, y, network = torch.rand(8, 6), torch.arange(8) % 3, MLPBackbone((6,), 3, width=8, depth=1)
    found, expected = (matching.losses_by_level(network, x, y, (0.1,), seed=seed) for seed in (np.int64(3), 3))
    assert found == expected
    backbone = MLPBackbone((6,), 6, width=8, depth=1, conditions=3)
    denoiser = EmbeddedDenoiser(backbone, num_classes=3, sigma_data=1.0, chunk=np.int64(2))
    assert denoiser.class_scores(x, 0.3).shape == (8, 3, 6)


def test_a_network_that_a_posterior_keeps_fixed_is_not_trained() -> None:
    x, y = toy(16)
    denoiser, classifier = small_denoiser(), MLPBackbone((1,), 2, width=8, depth=1)
    ScoreNetwork(denoiser, sigma=0.5)
    NoiseConditionalClassifier(classifier, num_classes=2, sigma=0.5)
    fit, generator = Fit(steps=2, batch_size=4), torch.Generator()
    told = r"network has no parameter that requires a gradient \(a posterior keeps its network fixed; pass a copy"
    with pytest.raises(ValueError, match=told):
        fit_denoiser(denoiser, x, y, fit, generator=generator)
    with pytest.raises(ValueError, match=told):
        fit_classifier(classifier, x, y, fit, generator=generator)
    fit_classifier(copy.deepcopy(classifier).requires_grad_(), x, y, fit, generator=generator)


@pytest.mark.parametrize("name", ["denoiser", "classifier", "likelihood", "joint_energy"])
def test_all_labels_are_looked_at_before_the_first_step(name: str) -> None:
    """Batches of 2 of 4000 samples do not draw the last one."""
    x, y = toy()
    y[-1] = 2
    generator = torch.Generator().manual_seed(0)
    network = small_denoiser() if name == "denoiser" else MLPBackbone((1,), 2, width=8, depth=1)
    before = copy.deepcopy(network.state_dict())
    fit = Fit(steps=2, batch_size=2, likelihood_weight=float(name == "likelihood"))
    energy = matching.JointEnergy(1.0, 0.0, 1.0) if name == "joint_energy" else None
    train = fit_denoiser if name == "denoiser" else partial(fit_classifier, denoiser=small_denoiser(), energy=energy)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 2\), got values in \[0, 2\]"):
        train(network, x, y, fit, generator=generator)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Raising(nn.Module):
    """Takes what it must, and fails within."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        raise TypeError("of its own")


@pytest.mark.parametrize("settings", [{}, {"likelihood_weight": 1.0}], ids=["plain", "likelihood"])
def test_a_network_that_is_not_told_the_noise_level(settings: dict) -> None:
    x, y = toy(16)
    plain, fit = nn.Sequential(nn.Linear(1, 2)), Fit(steps=1, batch_size=4, **settings)
    told = r"network must take \(x, sigma\), got Sequential, which takes \(input\)"
    with pytest.raises(TypeError, match=told):
        fit_classifier(plain, x, y, fit, generator=torch.Generator(), denoiser=small_denoiser())
    with pytest.raises(TypeError, match=told):
        matching.losses_by_level(plain, x, y, (0.1,))
    with pytest.raises(TypeError, match=told):
        NoiseConditionalClassifier(plain, num_classes=2, sigma=0.5)(x)
    with pytest.raises(TypeError, match=r"^of its own$"):
        NoiseConditionalClassifier(Raising(), num_classes=2, sigma=0.5)(x)
