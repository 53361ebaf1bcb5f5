"""Gaussian augmentation and its γ: Eqs. (35) to (37) in float64, their signs, and what has no lower bound."""

import math

import numpy as np
import pytest
import torch
from library_models import mixture, plain_divergence, small_cnn, smooth_mlp
from torch import nn
from torch.nn.functional import one_hot

from scorematch import objectives
from scorematch.bounds import theorem_5
from scorematch.divergences import KINDS

FEATURES, CLASSES, COUNT = 6, 4, 12


def batch(count: int = COUNT, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, omega = torch.randn(2, count, FEATURES, dtype=torch.float64, generator=generator)
    return x, torch.arange(count) % CLASSES, omega


def cross_entropy(weights: list[list[list[float]]], x: list[float], label: int) -> float:
    """−log p_θ(label|x) of the network of ``smooth_mlp``, number by number."""
    (inner, inner_bias), (outer, outer_bias) = weights
    hidden = [
        math.tanh(b + sum(w * v for w, v in zip(row, x, strict=True))) for row, b in zip(inner, inner_bias, strict=True)
    ]
    logits = [
        b + sum(w * v for w, v in zip(row, hidden, strict=True)) for row, b in zip(outer, outer_bias, strict=True)
    ]
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("gamma", [-3.0, 0.0, 0.5, 0.99, 2.0])
def test_the_paper_s_formulas_number_by_number(gamma: float, antithetic: bool) -> None:
    """The left sides of Eqs. (36) and (37) with fixed noise √v ω, v the paper's σ."""
    model, (x, y, omega) = smooth_mlp(FEATURES, CLASSES), batch()
    variance = 0.09
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights = [[layer.weight.tolist(), layer.bias.tolist()] for layer in layers]
    expected = []
    for point, noise, label in zip(x.tolist(), omega.tolist(), y.tolist(), strict=True):
        signs = (1, -1) if antithetic else (1,)
        moved = [[a + s * math.sqrt(variance) * b for a, b in zip(point, noise, strict=True)] for s in signs]
        smoothed = sum(cross_entropy(weights, m, label) for m in moved) / len(moved)
        clean = cross_entropy(weights, point, label)
        eq_36 = (smoothed - gamma * clean) / (1 - gamma)
        eq_37 = (gamma * clean - smoothed) / (gamma - 1)
        assert eq_36 == pytest.approx(eq_37, rel=1e-12)  # one function of γ
        expected.append(eq_36)
    outcome = objectives.gaussian(model, x, y, sigma=0.3, gamma=gamma, antithetic=antithetic, noise=omega)
    torch.testing.assert_close(outcome.loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(outcome.x_adv, x + 0.3 * omega, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_and_soft_targets(kind: str) -> None:
    model, (x, _, omega) = smooth_mlp(FEATURES, CLASSES), batch()
    y = torch.rand(COUNT, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    y = y / y.sum(1, keepdim=True)
    noisy, clean = (plain_divergence(y, model(point).softmax(1), kind) for point in (x + 0.2 * omega, x))
    outcome = objectives.gaussian(model, x, y, sigma=0.2, gamma=0.6, noise=omega, divergence=kind)
    torch.testing.assert_close(outcome.loss, (noisy - 0.6 * clean) / 0.4)
    torch.testing.assert_close(outcome.metrics["natural"], clean.mean().detach())
    torch.testing.assert_close(outcome.metrics["noisy"], noisy.mean().detach())


def test_the_neutral_gamma_is_plain_augmentation_exactly() -> None:
    """Loss and gradient to the bit, and one pass: the network sees noisy inputs alone."""
    model = small_cnn(batch_norm=True)
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    outcome = objectives.gaussian(model, x, y, sigma=0.25, generator=torch.Generator().manual_seed(3))
    assert int(model[1].num_batches_tracked) == 1
    noisy = x + 0.25 * torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(3))
    plain = objectives.standard(model, noisy, y)
    assert torch.equal(outcome.loss, plain.loss)
    parameters = list(model.parameters())
    found = torch.autograd.grad(outcome.loss.mean(), parameters)
    for a, b in zip(found, torch.autograd.grad(plain.loss.mean(), parameters), strict=True):
        assert torch.equal(a, b)
    assert float(noisy.min()) < 0.0  # nothing is clipped to the box


def test_no_noise_is_standard_training() -> None:
    model, (x, y, _) = smooth_mlp(FEATURES, CLASSES), batch()
    expected = objectives.standard(model, x, y).loss
    for gamma in (0.0, 0.7, 3.0):
        torch.testing.assert_close(objectives.gaussian(model, x, y, sigma=0.0, gamma=gamma).loss, expected)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.7}, {"gamma": 2.5}, {"alignment": -0.2, "antithetic": True}])
def test_gradient_by_finite_differences(options: dict) -> None:
    model, (x, y, omega) = smooth_mlp(FEATURES, CLASSES), batch()
    sigma = 0.1 + 0.05 * torch.arange(COUNT, dtype=torch.float64)
    parameters = list(model.parameters())

    def value() -> torch.Tensor:
        return objectives.gaussian(model, x, y, sigma=sigma, noise=omega, **options).loss.sum()

    step = 1e-5
    for parameter, gradient in zip(parameters, torch.autograd.grad(value(), parameters), strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            parameter += step * direction
            above = value()
            parameter -= 2 * step * direction
            below = value()
            parameter += step * direction
        expected = float(above - below) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.5])
def test_the_alignment_term_and_its_sign(gamma: float) -> None:
    """(objective − R(0)) / (σ² / (2 (1 − γ))) is the alignment of Theorem 5, and γ > 1 turns the sign of the term."""
    density, model, sigma = mixture(CLASSES, 2, FEATURES), smooth_mlp(FEATURES, CLASSES), 0.05
    with torch.no_grad():
        model[-1].weight *= 6.0  # the term is large enough to be seen
    x, y = density.sample(20_000, torch.Generator().manual_seed(0))
    outcome = objectives.gaussian(
        model, x, y, sigma=sigma, gamma=gamma, antithetic=True, generator=torch.Generator().manual_seed(1)
    )
    term = outcome.loss.detach() - objectives.standard(model, x, y).loss.detach()
    coefficient = objectives.alignment_of(sigma, gamma)
    assert (coefficient > 0) == (gamma < 1)
    found = term / coefficient
    right = theorem_5(model, density, x, y, sigma=sigma, generator=torch.Generator().manual_seed(2)).right
    right = 2 * right  # the ½ of the theorem is in the coefficient
    error = (found.var() / len(x) + right.var() / len(x)).sqrt()
    assert float((found.mean() - right.mean()).abs()) < 4 * float(error)
    assert float(right.mean().abs()) > 8 * float(error)  # it is not 0 = 0


def test_pairs_of_noise_keep_the_loss_quiet_near_gamma_one() -> None:
    model, (x, y, _) = smooth_mlp(FEATURES, CLASSES), batch(4000)
    spread = {}
    for sigma in (0.1, 0.01):
        for antithetic in (False, True):
            generator = torch.Generator().manual_seed(0)
            options = {"alignment": 0.05, "antithetic": antithetic, "generator": generator}
            loss = objectives.gaussian(model, x, y, sigma=sigma, **options).loss.detach()
            spread[sigma, antithetic] = float((loss - objectives.standard(model, x, y).loss.detach()).std())
    assert spread[0.01, False] == pytest.approx(10 * spread[0.1, False], rel=0.1)  # grows like 1 / σ
    assert spread[0.01, True] == pytest.approx(spread[0.1, True], rel=0.1)  # does not grow


class Spiked(nn.Module):
    """Class 1 close to 0 and class 0 everywhere else, with logits that differ by ``height``."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.height = height

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spike = torch.exp(-0.5 * (x / 1e-3).square())
        return torch.cat([torch.zeros_like(x), self.height * (2 * spike - 1)], 1)


@pytest.mark.parametrize(
    ("gamma", "label", "bounded"), [(-1.0, 0, True), (-1.0, 1, True), (0.0, 0, True), (0.5, 0, False), (2.0, 1, False)]
)
def test_what_has_no_lower_bound(gamma: float, label: int, bounded: bool) -> None:
    """A network that is wrong at x alone (0 < γ < 1), or right at x alone (γ > 1), goes below any bound."""
    x, y = torch.zeros(200, 1, dtype=torch.float64), torch.full((200,), label)
    for height in (10.0, 1000.0):
        generator = torch.Generator().manual_seed(0)
        loss = objectives.gaussian(Spiked(height), x, y, sigma=1.0, gamma=gamma, generator=generator).loss.mean()
        assert float(loss) >= 0.0 if bounded else float(loss) < -0.9 * height


def test_a_range_draws_the_variance_uniformly() -> None:
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    levels = objectives.noise_levels(x, (0.1, 0.5), torch.Generator().manual_seed(0))
    assert levels.shape == (20_000,)
    assert 0.1 <= float(levels.min()) < 0.11
    assert 0.499 < float(levels.max()) <= 0.5
    share = (levels.square() - 0.01) / 0.24  # uniform in [0, 1]
    assert float(share.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 20_000) ** 0.5)
    assert float((share < 0.25).double().mean()) == pytest.approx(0.25, abs=4 * (0.1875 / 20_000) ** 0.5)


def test_sigma_of_each_sample() -> None:
    """A range is its levels, then the noise; with ``alignment`` each sample has the γ of its σ."""
    model, (x, y, omega) = smooth_mlp(FEATURES, CLASSES), batch()
    generator = torch.Generator().manual_seed(5)
    drawn = objectives.gaussian(model, x, y, sigma=(0.1, 0.5), gamma=0.5, generator=generator)
    generator = torch.Generator().manual_seed(5)
    levels = objectives.noise_levels(x, (0.1, 0.5), generator)
    noise = torch.empty_like(x).normal_(generator=generator)
    assert torch.equal(drawn.loss, objectives.gaussian(model, x, y, sigma=levels, gamma=0.5, noise=noise).loss)

    for alignment in (0.3, -0.3):
        held = objectives.gaussian(model, x, y, sigma=levels, alignment=alignment, noise=omega).loss
        for i, sigma in enumerate(levels.tolist()):
            gamma = 1 - sigma**2 / (2 * alignment)
            assert (gamma > 1) == (alignment < 0)
            assert objectives.alignment_of(sigma, gamma) == pytest.approx(alignment)
            one = objectives.gaussian(model, x[[i]], y[[i]], sigma=sigma, gamma=gamma, noise=omega[[i]]).loss
            torch.testing.assert_close(held[[i]], one)
    plain = objectives.gaussian(model, x, y, sigma=0.4, alignment=0.08, noise=omega).loss  # σ² / 2: γ = 0
    torch.testing.assert_close(plain, objectives.gaussian(model, x, y, sigma=0.4, noise=omega).loss)


@pytest.mark.parametrize("gamma", [0.0, 0.6, -2.0, 3.0])
@pytest.mark.parametrize("final_sigma", [0.05, 0.5, 1.5])
def test_annealing_keeps_the_coefficient(gamma: float, final_sigma: float) -> None:
    start = objectives.annealed(0.0, sigma=0.5, final_sigma=final_sigma, gamma=gamma)
    assert start == pytest.approx((0.5, gamma), abs=1e-15)
    assert objectives.annealed(1.0, sigma=0.5, final_sigma=final_sigma, gamma=gamma).sigma == pytest.approx(final_sigma)
    variances = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        now = objectives.annealed(progress, sigma=0.5, final_sigma=final_sigma, gamma=gamma)
        assert objectives.alignment_of(now.sigma, now.gamma) == pytest.approx(0.125 / (1 - gamma), rel=1e-12)
        assert (now.gamma > 1) == (gamma > 1)
        variances.append(now.sigma**2)
    steps = torch.tensor(variances, dtype=torch.float64).diff()
    torch.testing.assert_close(steps, steps[:1].expand(4), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"sigma": -0.1}, ValueError, "sigma must be finite and at least 0, got -0.1"),
        ({"sigma": math.nan}, ValueError, "sigma must be finite and at least 0, got nan"),
        ({"sigma": math.inf}, ValueError, "got inf"),
        ({"sigma": "0.5"}, TypeError, r"sigma must be a number, a range \(low, high\) or a tensor \[N\], got str"),
        ({"sigma": True}, TypeError, "got bool"),
        ({"sigma": (0.5, 0.1)}, ValueError, r"\(low, high\), both finite and at least 0, got \(0.5, 0.1\)"),
        ({"sigma": (0.1, 0.2, 0.3)}, ValueError, r"got \(0.1, 0.2, 0.3\)"),
        ({"sigma": (0.1, math.inf)}, ValueError, "got .0.1, inf"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma must be \[4\] on cpu for x \[4, 1, 8, 8\], got \[3\] on cpu"),
        ({"sigma": torch.ones(4).double()}, TypeError, "sigma must be torch.float32 as x, got torch.float64"),
        ({"sigma": -torch.ones(4)}, ValueError, r"at least 0, got values in \[-1, -1\]"),
        ({"sigma": torch.tensor([-1.0, 0.0, 1.0, 2.0])}, ValueError, r"got values in \[-1, 2\]"),
        ({"sigma": 0.0, "alignment": 1.0}, ValueError, "sigma must be finite and above 0, got 0.0"),
        ({"sigma": (0.0, 1.0), "alignment": 1.0}, ValueError, "both finite and above 0"),
        ({"sigma": torch.zeros(4), "alignment": 1.0}, ValueError, "above 0, got values"),
        ({"sigma": 1.0, "gamma": 1.0}, ValueError, "gamma must be finite and not 1, got 1.0"),
        ({"sigma": 1.0, "gamma": -math.inf}, ValueError, "gamma must be finite and not 1, got -inf"),
        ({"sigma": 1.0, "alignment": 0.0}, ValueError, "alignment must be finite and not 0, got 0.0"),
        ({"sigma": 1.0, "alignment": math.nan}, ValueError, "alignment must be finite and not 0, got nan"),
        (
            {"sigma": 1.0, "alignment": 1.0, "gamma": 0.5},
            ValueError,
            "gamma must be left out .* got gamma 0.5 beside 1",
        ),
        ({"sigma": 1.0, "noise": torch.ones(4, 64)}, ValueError, r"noise must be \[4, 1, 8, 8\] on cpu for x"),
        ({"sigma": 1.0, "noise": torch.ones(4, 1, 8, 8).double()}, TypeError, "noise must be torch.float32 as x"),
        ({"sigma": 1.0, "divergence": "hellinger"}, ValueError, "divergence must be one of kl"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], told: str) -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    with pytest.raises(error, match=told):
        objectives.gaussian(small_cnn(), x, y, **options)


@pytest.mark.parametrize(
    ("progress", "options", "told"),
    [
        (-0.5, {}, r"progress must lie in \[0, 1\], got -0.5"),
        (1.5, {}, r"progress must lie in \[0, 1\], got 1.5"),
        (math.nan, {}, "progress must lie"),
        (0.5, {"sigma": 0.0}, "sigma must be finite and positive, got 0.0"),
        (0.5, {"sigma": math.inf}, "sigma must be finite and positive, got inf"),
        (0.5, {"final_sigma": 0.0}, "final_sigma must be finite and positive, got 0.0"),
        (0.5, {"gamma": 1.0}, "gamma must be finite and not 1, got 1.0"),
    ],
)
def test_bad_schedules(progress: float, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        objectives.annealed(progress, **{"sigma": 0.5, "final_sigma": 0.1, **options})


def test_annealing_starts_without_gamma_where_none_is_given() -> None:
    assert objectives.annealed(0.0, sigma=0.5, final_sigma=0.1).gamma == 0.0


def test_a_range_of_one_value_is_that_value() -> None:
    x, y, omega = batch()
    common = {"noise": omega, "generator": torch.Generator().manual_seed(0)}
    ranged = objectives.gaussian(smooth_mlp(FEATURES, CLASSES), x, y, sigma=(0.3, 0.3), **common)
    torch.testing.assert_close(ranged.x_adv, x + 0.3 * omega)


def test_no_noise_is_a_level_of_noise_unless_refused() -> None:
    x = torch.zeros(3, 2)
    assert objectives.noise_levels(x, 0.0).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match=r"sigma must be finite and above 0, got 0\.0"):
        objectives.noise_levels(x, 0.0, positive=True)


def test_no_noise_has_no_alignment() -> None:
    assert objectives.alignment_of(0.0, 0.5) == 0.0


def test_bad_coefficients() -> None:
    with pytest.raises(ValueError, match="sigma must be finite and not negative, got -1"):
        objectives.alignment_of(-1.0, 0.0)
    with pytest.raises(ValueError, match="gamma must be finite and not 1, got 1"):
        objectives.alignment_of(1.0, 1.0)


def test_what_an_outcome_holds() -> None:
    x, y = torch.rand(6, 1, 8, 8), one_hot(torch.arange(6), 10).float()
    outcome = objectives.gaussian(small_cnn(), x, y, sigma=0.1, gamma=0.5)
    assert outcome.loss.shape == (6,)
    assert outcome.loss.requires_grad
    assert not outcome.x_adv.requires_grad
    assert outcome.metrics.keys() == {"accuracy", "natural", "noisy"}
    assert not any(metric.requires_grad or metric.dim() for metric in outcome.metrics.values())
    assert len(objectives.gaussian(small_cnn(), x[:0], y[:0], sigma=(0.1, 0.2), alignment=0.1).loss) == 0


def test_levels_are_of_the_dtype_of_x() -> None:
    x = torch.zeros(3, 2)
    assert torch.equal(objectives.noise_levels(x, np.float32(0.5)), torch.full((3,), 0.5))
    with pytest.raises(TypeError, match="x must be floating point"):  # 0.1 would be 0
        objectives.noise_levels(x.long(), 0.1)
