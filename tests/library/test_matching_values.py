"""Score matching, value by value: each loss against its formula, written out with automatic differentiation."""

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scorematch import matching
from scorematch.matching import (
    Batch,
    BestWeights,
    ClassificationLoss,
    DistillationLoss,
    Fit,
    Fitting,
    HeldOut,
    JointEnergy,
    fit_temperature,
    losses_by_level,
)
from scorematch.matching.losses import check_logits
from scorematch.networks import Denoiser, MLPBackbone

CLASSES, FEATURES, COUNT = 3, 2, 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, OMEGA = draw(COUNT, FEATURES, seed=0), draw(COUNT, FEATURES, seed=1)
Y = torch.tensor([0, 1, 2, 1, 0])
SIGMA = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.2], dtype=torch.float64)
NOISY = X + SIGMA[:, None] * OMEGA
BATCH = Batch(X, Y, SIGMA, OMEGA, None)


class Classifier(nn.Module):
    """Logits that depend on the noise level, too."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__()
        self.inner, self.outer = (
            nn.Parameter(draw(*shape, seed=seed + i)) for i, shape in enumerate([(3, 4), (4, CLASSES)])
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (torch.cat([x, sigma[:, None]], 1) @ self.inner).tanh() @ self.outer


def denoiser(seed: int = 0, sigma_data: float = 0.7) -> Denoiser:
    torch.manual_seed(seed)
    network = Denoiser(
        MLPBackbone((FEATURES,), (CLASSES + 1) * FEATURES, width=8, depth=1), num_classes=CLASSES, sigma_data=sigma_data
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network.double().eval()


def log_likelihood_gradient(classifier: Classifier, noisy: Tensor) -> Tensor:
    x = noisy.clone().requires_grad_()
    chosen = classifier(x, SIGMA).log_softmax(1).gather(1, Y[:, None]).sum()
    return torch.autograd.grad(chosen, x)[0]


def test_denoising() -> None:
    network = denoiser()
    every = network.denoise_all(NOISY, SIGMA)  # [N, L + 1, D], the last of them unconditional
    labelled, unconditional = every[torch.arange(COUNT), Y], every[:, -1]
    weight = (SIGMA**2 + 0.49) / (SIGMA * 0.7) ** 2
    errors = [(value - X).square().mean(1) for value in (labelled, unconditional)]
    expected = weight * (errors[0] + errors[1]) / 2
    torch.testing.assert_close(matching.denoising(network, X, Y, SIGMA, OMEGA), expected)


def test_a_network_is_told_how_samples_were_augmented() -> None:
    torch.manual_seed(0)
    backbone = MLPBackbone((FEATURES,), (CLASSES + 1) * FEATURES, width=8, depth=1, conditions=2)
    told = Denoiser(backbone, num_classes=CLASSES, sigma_data=0.7).double()
    for parameter in told.parameters():
        nn.init.normal_(parameter, std=0.5)
    how = draw(COUNT, 2, seed=5)
    found = matching.denoising(told, X, Y, SIGMA, OMEGA, how)
    for i in range(COUNT):
        one = matching.denoising(told, *(tensor[[i]] for tensor in (X, Y, SIGMA, OMEGA, how)))
        torch.testing.assert_close(found[[i]], one)
    assert (found != matching.denoising(told, X, Y, SIGMA, OMEGA, 0.0 * how)).all()
    for wrong in (how[:, 0], how[:4], how[:, :, None]):
        with pytest.raises(ValueError, match="conditions must be"):
            matching.denoising(told, X, Y, SIGMA, OMEGA, wrong)
    batch = Batch(X, Y, SIGMA, OMEGA, how).part(slice(1, 3))
    for part, whole in zip(batch, (X, Y, SIGMA, OMEGA, how), strict=True):
        assert torch.equal(part, whole[1:3])
    assert BATCH.part(slice(1, 3)).conditions is None


def test_distillation() -> None:
    student, teacher = denoiser(0), denoiser(1)
    difference = student.denoise_all(NOISY, SIGMA) - teacher.denoise_all(NOISY, SIGMA)
    weight = (SIGMA**2 + 0.49) / (SIGMA * 0.7) ** 2
    expected = weight * difference.flatten(1).square().mean(1)
    torch.testing.assert_close(matching.distillation(student, teacher, X, SIGMA, OMEGA), expected)


def test_denoising_likelihood() -> None:
    classifier, score = Classifier(), draw(COUNT, FEATURES, seed=9)
    gradient = log_likelihood_gradient(classifier, NOISY)
    residual = SIGMA[:, None] * (gradient + score) + OMEGA
    found, logits = matching.denoising_likelihood(classifier, score, NOISY, Y, SIGMA, OMEGA)
    torch.testing.assert_close(found, 0.5 * residual.square().mean(1))
    torch.testing.assert_close(logits, classifier(NOISY, SIGMA))


MIDDLES = {"number": 0.4, "each feature": torch.tensor([0.4, -0.2]).double(), "all": torch.tensor([[0.4]]).double()}


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_joint_energy(middle: Any) -> None:
    classifier = Classifier()
    x = NOISY.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(x, SIGMA).gather(1, Y[:, None]).sum(), x)
    level = SIGMA[:, None]
    residual = level * (gradient - (NOISY - middle) / (level**2 + 0.81)) + OMEGA
    found, _ = matching.joint_energy(classifier, NOISY, Y, SIGMA, OMEGA, center=middle, sigma_data=0.9)
    torch.testing.assert_close(found, 0.5 * residual.square().mean(1))


def test_losses_of_a_classifier_put_their_parts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, network = Classifier(), denoiser()
    plain = cross_entropy(classifier(NOISY, SIGMA), Y, reduction="none")
    torch.testing.assert_close(ClassificationLoss(classifier).loss(BATCH), plain)
    # A denoiser without a weight is not asked, and one with a weight is.
    with monkeypatch.context() as patched:
        patched.setattr(network, "score", None)
        torch.testing.assert_close(ClassificationLoss(classifier, 0.0, network).loss(BATCH), plain)
    score = network.score(NOISY, SIGMA).detach()
    likelihood, _ = matching.denoising_likelihood(classifier, score, NOISY, Y, SIGMA, OMEGA)
    for weight in (0.3, 1.0):
        found = ClassificationLoss(classifier, weight, network).loss(BATCH)
        torch.testing.assert_close(found, plain + weight * likelihood)
    energy, _ = matching.joint_energy(classifier, NOISY, Y, SIGMA, OMEGA, center=0.1, sigma_data=0.9)
    found = ClassificationLoss(classifier, energy=JointEnergy(2.0, 0.1, 0.9)).loss(BATCH)
    torch.testing.assert_close(found, plain + 2.0 * energy)


class Told(Classifier):
    """Logits that depend on what was done to the sample, too."""

    def forward(self, x: Tensor, sigma: Tensor, conditions: Tensor | None = None) -> Tensor:
        return super().forward(x if conditions is None else x * (1.0 + conditions), sigma)


@pytest.mark.parametrize("kind", ["plain", "energy", "likelihood"])
def test_a_classifier_is_told_how_samples_were_augmented(kind: str) -> None:
    torch.manual_seed(0)
    backbone = MLPBackbone((FEATURES,), (CLASSES + 1) * FEATURES, width=8, depth=1, conditions=FEATURES)
    settings: dict[str, Any] = {}
    if kind == "energy":
        settings = {"energy": JointEnergy(2.0, 0.1, 0.9)}
    elif kind == "likelihood":
        settings = {"weight": 0.5, "denoiser": Denoiser(backbone, num_classes=CLASSES, sigma_data=0.7).double()}
    how = draw(COUNT, FEATURES, seed=6)
    loss = ClassificationLoss(Told(), **settings)
    told, nothing_done = loss(BATCH._replace(conditions=how)), loss(BATCH._replace(conditions=0.0 * how))
    assert (told != nothing_done).all()
    torch.testing.assert_close(nothing_done, loss(BATCH))
    message = r"network must take \(x, sigma, conditions\), got Classifier, which takes \(x, sigma\)"
    with pytest.raises(TypeError, match=message):
        ClassificationLoss(Classifier(), **settings)(BATCH._replace(conditions=how))
    if kind == "likelihood":
        with pytest.raises(ValueError, match="conditions must be"):
            ClassificationLoss(Told(), 0.5, denoiser())(BATCH._replace(conditions=how))


def test_a_fit_tells_the_classifier_what_the_augmentation_did() -> None:
    seen = []

    class Listening(Told):
        def forward(self, x: Tensor, sigma: Tensor, conditions: Tensor | None = None) -> Tensor:
            seen.append(conditions)
            return super().forward(x, sigma, conditions)

    def augment(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return 2.0 * x, torch.ones_like(x)

    matching.fit_classifier(Listening(), X, Y, Fit(2, 4), generator=torch.Generator(), augment=augment)
    assert [None if told is None else list(told.shape) for told in seen] == [[8, FEATURES]] * 2


def test_every_sample_is_used_with_both_signs_of_its_noise() -> None:
    loss = ClassificationLoss(Classifier())
    torch.testing.assert_close(loss(BATCH), torch.cat([loss.loss(BATCH), loss.loss(BATCH._replace(noise=-OMEGA))]))


def test_a_teacher_is_left_alone() -> None:
    student, teacher = denoiser(0), denoiser(1).train().requires_grad_()
    loss = DistillationLoss(student, teacher)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == {"denoiser"}


def test_losses_by_level_are_at_x_plus_noise() -> None:
    """The noise is that of the seed, the same at each level; the mean is over points and noise vectors."""
    classifier, network = Classifier().train(), denoiser()
    found = losses_by_level(classifier, X, Y, (0.2, 0.7), seed=4, repeats=3, chunk=2)
    matched = losses_by_level(network, X, Y, (0.2,), seed=4, repeats=3, chunk=2)
    assert classifier.training
    generator = torch.Generator().manual_seed(4)
    noise = [torch.empty_like(X).normal_(generator=generator) for _ in range(3)]
    for sigma, loss in found.items():
        level = torch.full((COUNT,), sigma, dtype=torch.float64)
        expected = [cross_entropy(classifier(X + sigma * omega, level), Y) for omega in noise]
        assert loss == pytest.approx(float(sum(expected).detach()) / 3)
    level = torch.full((COUNT,), 0.2, dtype=torch.float64)
    expected = [matching.denoising(network, X, Y, level, omega).mean() for omega in noise]
    assert matched[0.2] == pytest.approx(float(sum(expected).detach()) / 3)
    assert losses_by_level(network, X, Y, (0.2,)) == losses_by_level(network, X, Y, (0.2,), seed=0, repeats=1)
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"each of sigmas must be finite and positive, got {wrong}"):
            losses_by_level(network, X, Y, (0.2, wrong))


def test_a_temperature_is_fitted_at_x_plus_noise() -> None:
    """Where the noise decides the logits alone, and its sign would turn them round."""

    def logits(x: Tensor) -> Tensor:
        return torch.stack([4 * x[:, 0], torch.zeros_like(x[:, 0])], 1)

    generator = torch.Generator().manual_seed(7)
    omega = torch.cat([torch.empty(40, 1, dtype=torch.float64).normal_(generator=generator) for _ in range(2)])
    x, y = torch.zeros(40, 1, dtype=torch.float64), (omega[:40, 0] < 0).long()
    found = fit_temperature(logits, x, y, noise=0.5, repeats=2, seed=7)
    values, labels = logits(0.5 * omega), y.repeat(2)

    def loss(temperature: float) -> float:
        return float(cross_entropy(values / temperature, labels))

    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01))
    assert loss(1.2 * found) > loss(found) < loss(found / 1.2)


def test_a_temperature_lies_between_a_twentieth_and_twenty() -> None:
    def right(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], -x[:, 0]], 1)

    x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    assert fit_temperature(right, x, y) == pytest.approx(0.05)
    assert fit_temperature(right, x, 1 - y) == pytest.approx(20.0)


def test_a_temperature_does_not_depend_on_modes() -> None:
    torch.manual_seed(0)
    classifier, x = torch.nn.Linear(FEATURES, CLASSES), X.float()
    found = fit_temperature(classifier, x, Y, noise=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert fit_temperature(classifier, x, Y, noise=0.5) == found
    with torch.inference_mode():
        assert fit_temperature(classifier, x.clone(), Y, noise=0.5) == found


def test_of_equal_losses_the_first_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best, classifier = BestWeights(HeldOut(X, Y, sigma=0.5)), Classifier()
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0)):
        monkeypatch.setattr(HeldOut, "loss", lambda self, network, loss=loss: loss)
        best.look(classifier, step)
    assert (best.step, best.loss, best.history) == (2, 1.0, [(1, 2.0), (2, 1.0), (3, 1.0)])


@pytest.mark.parametrize(
    ("count", "options", "error", "told"),
    [
        (0, {}, ValueError, r"x must be \[M, …\] with at least one sample, got \[0, 2\]"),
        (1, {"augment": 3}, TypeError, "augment must be a function, got int"),
        (1, {"progress": 3}, TypeError, "progress must be a function, got int"),
        (1, {}, None, None),
    ],
)
def test_a_training_checks_what_it_is_given(
    count: int, options: dict[str, Any], error: type[Exception] | None, told: str
) -> None:
    allowed = contextlib.nullcontext() if error is None else pytest.raises(error, match=told)
    with allowed:
        matching.fit_classifier(
            Classifier(), X[:count], Y[:count], Fit(1, 4), generator=torch.Generator().manual_seed(0), **options
        )


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (X, Y[:4], "at least one, got 5 and 4"),
        (X[:0], Y[:0], "at least one, got 0 and 0"),
        (X[:0], Y, "got 0 and 5"),
        (X[:, 0], Y, r"x must be \[N, …\] and y \[N\], got x \[5\] and y \[5\]"),
    ],
)
def test_held_out_data_must_fit(x: Tensor, y: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        HeldOut(x, y, sigma=0.5)


@pytest.mark.parametrize(
    ("steps", "interval", "looks"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (5, None, [1, 2, 3, 4, 5]), (101, None, [*range(2, 101, 2), 101])],
)
def test_held_out_data_are_looked_at(
    steps: int, interval: int | None, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ``interval`` steps, by default fifty times, and at the end."""
    seen = []
    monkeypatch.setattr(BestWeights, "look", lambda self, network, step: seen.append(step))
    monkeypatch.setattr(BestWeights, "restore", lambda self, network: None)
    held_out, generator = HeldOut(X, Y, sigma=0.5, interval=interval), torch.Generator().manual_seed(0)
    matching.fit_classifier(Classifier(), X, Y, Fit(steps, 4), generator=generator, held_out=held_out)
    assert seen == looks


def test_a_training_at_a_single_noise_level() -> None:
    fit, generator = Fit(sigma_min=0.2, sigma_max=0.2, steps=1), torch.Generator().manual_seed(0)
    batch = Fitting(Classifier(), ClassificationLoss(Classifier()), fit).draw(X, Y, generator, None)
    torch.testing.assert_close(batch.sigma, torch.full_like(batch.sigma, 0.2))


@pytest.mark.parametrize("logits", [torch.zeros(COUNT, CLASSES, 1), torch.zeros(COUNT + 1, CLASSES)])
def test_logits_must_be_those_of_the_samples(logits: Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N, L\] for x \[5, 2\], got"):
        check_logits(logits, Y, X)


def test_one_look_at_a_time_is_allowed() -> None:
    data = HeldOut(X, Y, sigma=0.5, interval=1, patience=1, repeats=1)
    assert (data.interval, data.patience, data.repeats) == (1, 1, 1)
    assert (HeldOut(X, Y, sigma=0.5).repeats, HeldOut(X, Y, sigma=0.5).seed) == (4, 0)
    assert BestWeights(data).step == 0


def test_default_settings_are_those_of_the_docstring() -> None:
    fit = Fit()
    assert (fit.steps, fit.batch_size, fit.lr, fit.warm_up) == (3000, 128, 1e-3, 0.05)
    assert (fit.sigma_min, fit.sigma_max, fit.averaging) == (0.05, 1.0, 0.998)
    assert (fit.noise_mean, fit.noise_deviation) == (pytest.approx(-1.2 - math.log(2)), 1.2)
    assert (fit.half_life, fit.weight_decay, fit.likelihood_weight) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["warm_up", "averaging"])
@pytest.mark.parametrize("value", [-0.5, 1.0, math.nan])
def test_shares_lie_between_0_and_1(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\), got {value}"):
        Fit(**{name: value})


def test_the_average_begins_after_a_quarter_and_is_what_remains() -> None:
    torch.manual_seed(0)
    network = Classifier()
    fitting = Fitting(network, ClassificationLoss(network), Fit(steps=8, batch_size=4, averaging=0.5, lr=0.1))
    seen = []
    for _ in range(8):
        fitting.step(BATCH)
        seen.append(network.outer.detach().clone())
        assert (fitting.averaged() is network) == (fitting.steps < 2)
    average = seen[1]
    for value in seen[2:]:
        average = 0.5 * average + 0.5 * value
    torch.testing.assert_close(fitting.averaged().outer, average)
    assert not torch.allclose(average, seen[-1])
    fitting.finish()
    torch.testing.assert_close(network.outer, average)
    assert not network.training


def test_a_half_life_averages_from_the_first_step_on() -> None:
    network = Classifier()
    for averaging in (0.998, 0.0):  # whose place it takes
        fit = Fit(steps=100, batch_size=4, half_life=40.0, averaging=averaging)
        fitting = Fitting(network, ClassificationLoss(network), fit)
        fitting.step(BATCH)
        assert fitting.averaged() is not network


def test_without_an_average_the_network_keeps_its_weights() -> None:
    network = Classifier()
    fitting = Fitting(network, ClassificationLoss(network), Fit(steps=2, batch_size=4, averaging=0.0))
    fitting.step(BATCH)
    weights = copy.deepcopy(network.state_dict())
    fitting.finish()
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_the_fused_optimiser_is_used_if_asked_for() -> None:
    network = Classifier()
    fitted = [Fitting(network, ClassificationLoss(network), Fit(), fused=fused) for fused in (True, False)]
    assert [bool(one.optimizer.defaults["fused"]) for one in fitted] == [True, False]
    assert not Fitting(network, ClassificationLoss(network), Fit()).optimizer.defaults["fused"]
