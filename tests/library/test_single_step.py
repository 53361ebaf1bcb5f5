"""FGSM-RS and N-FGSM against their definitions, alone and inside the objectives."""

import math

import pytest
import torch
from library_models import mixture, small_cnn, smooth_mlp
from torch import Tensor

from scorematch import ThreatModel, objectives
from scorematch.attacks import single_step
from scorematch.attacks.pgd import input_gradient
from scorematch.posteriors import KernelDensity

EPS = 0.1


def rows(norm: Tensor, like: Tensor) -> Tensor:
    return norm.view(-1, *[1] * (like.dim() - 1))


def in_ball(delta: Tensor, norm: str, radius: float) -> Tensor:
    if norm == "linf":
        return delta.clamp(-radius, radius)
    return delta * rows((radius / delta.flatten(1).norm(dim=1)).clamp(max=1.0), delta)


def random_offset(x: Tensor, norm: str, radius: float, seed: int) -> Tensor:
    """Uniform in the ball, from the same numbers as the library draws."""
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        return radius * torch.empty_like(x).uniform_(-1, 1, generator=generator)
    direction = torch.empty_like(x).normal_(generator=generator)
    length = torch.rand(len(x), dtype=x.dtype, generator=generator) ** (1 / x[0].numel())
    return radius * direction * rows(length / direction.flatten(1).norm(dim=1), x)


def plain_single_step(
    x: Tensor, y: Tensor, model: torch.nn.Module, attack: str, norm: str, seed: int, eps: float = EPS
) -> Tensor:
    radius, length = {"fgsm_rs": (eps, 1.25 * eps), "n_fgsm": (2 * eps, eps)}[attack]
    point = (x + random_offset(x, norm, radius, seed)).clamp(0, 1).requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(point), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, point)
    step = gradient.sign() if norm == "linf" else gradient / rows(gradient.flatten(1).norm(dim=1), x)
    delta = point.detach() + length * step - x
    return (x + (in_ball(delta, norm, eps) if attack == "fgsm_rs" else delta)).clamp(0, 1)


@pytest.mark.parametrize("eps", [EPS, 0.6])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["fgsm_rs", "n_fgsm"])
def test_against_its_definition(attack: str, norm: str, eps: float) -> None:
    """With eps = 0.6 in [0, 1] the ball from which N-FGSM draws is larger than the box."""
    model = smooth_mlp(12, 4)
    x = torch.rand(32, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 4
    gradient = input_gradient(lambda p: torch.nn.functional.cross_entropy(model(p), y, reduction="none"))
    found = single_step(x, gradient, ThreatModel(norm, eps), attack=attack, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, plain_single_step(x, y, model, attack, norm, 7, eps), rtol=1e-10, atol=1e-12)
    outcome = objectives.pgd_at(
        model, x, y, threat_model=ThreatModel(norm, eps), attack=attack, generator=torch.Generator().manual_seed(7)
    )
    torch.testing.assert_close(outcome.x_adv, found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "score_direct"])
def test_ball_of_each_attack(name: str) -> None:
    """FGSM-RS stays within eps; N-FGSM goes beyond it, up to 3 eps, and never leaves the box."""
    model = small_cnn()
    x, y = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    extra = {"posterior": KernelDensity(x, y, num_classes=10, sigma=1.0)} if name == "score_direct" else {}
    reach = {}
    for attack in ("fgsm_rs", "n_fgsm"):
        outcome = objectives.OBJECTIVES[name](
            model, x, y, threat_model=ThreatModel("linf", EPS), attack=attack, **extra
        )
        assert 0 <= float(outcome.x_adv.min()) <= float(outcome.x_adv.max()) <= 1
        reach[attack] = float((outcome.x_adv - x).abs().max())
        outcome.loss.mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert reach["fgsm_rs"] == pytest.approx(EPS, abs=1e-6)
    assert 2.9 * EPS < reach["n_fgsm"] <= 3 * EPS + 1e-6


def test_one_forward_pass_for_the_attack_and_a_given_start() -> None:
    model = small_cnn(batch_norm=True).train()
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    threat_model = ThreatModel("linf", EPS)
    start = objectives.first_iterate(x, threat_model, "uniform", torch.Generator().manual_seed(3), "n_fgsm")
    assert float((start - x).abs().max()) > EPS
    drawn = objectives.pgd_at(
        model, x, y, threat_model=threat_model, attack="n_fgsm", generator=torch.Generator().manual_seed(3)
    )
    assert int(model[1].num_batches_tracked) == 2
    given = objectives.pgd_at(model, x, y, threat_model=threat_model, attack="n_fgsm", start=start)
    assert torch.equal(drawn.x_adv, given.x_adv)


def test_direct_score_follows_its_own_gradient() -> None:
    """In an unbounded box, with linf, N-FGSM moves by eps along the sign of Eq. (33)."""
    oracle, model = mixture(4, 2, 6), smooth_mlp(6, 4)
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threat_model = ThreatModel("linf", 0.5, lower=-math.inf, upper=math.inf)
    y = torch.zeros(16, dtype=torch.int64)
    start = objectives.first_iterate(x, threat_model, "uniform", torch.Generator().manual_seed(1), "n_fgsm")
    outcome = objectives.score_direct(
        model, x, y, threat_model=threat_model, posterior=oracle, attack="n_fgsm", start=start
    )
    point = start.clone().requires_grad_()
    p, q = oracle(point).exp(), model(point).softmax(1)
    (gradient,) = torch.autograd.grad((p * (p / q).log()).sum(), point)
    torch.testing.assert_close(outcome.x_adv, start + 0.5 * gradient.sign())


def test_unknown_attack_is_named() -> None:
    model, x, y = small_cnn(), torch.rand(4, 1, 8, 8), torch.arange(4)
    for start in ("uniform", x):
        with pytest.raises(ValueError, match=r"attack must be one of .*fgsm_rs, n_fgsm, got 'fgsm'"):
            objectives.pgd_at(model, x, y, threat_model=ThreatModel("linf", EPS), attack="fgsm", start=start)
