"""Small models, mixtures and plain formulas that the tests share, and a CUDA graph that runs on the CPU."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scorematch import ThreatModel, graphs
from scorematch.posteriors import GaussianMixture

UNBOUNDED = {"lower": -math.inf, "upper": math.inf}


def small_cnn(*, batch_norm: bool = False, classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    norm: list[nn.Module] = [nn.BatchNorm2d(8)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, classes))


def smooth_mlp(features: int, classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def mixture(classes: int = 3, components: int = 2, features: int = 5, seed: int = 0) -> GaussianMixture:
    """A float64 mixture with full covariances and unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, components, features, dtype=torch.float64, generator=generator)
    factor = torch.randn(classes, components, features, features, dtype=torch.float64, generator=generator)
    covariances = 0.3 * factor @ factor.mT + 0.5 * torch.eye(features, dtype=torch.float64)
    weights = 0.2 + torch.rand(classes, components, dtype=torch.float64, generator=generator)
    return GaussianMixture(means, covariances, weights)


def log_posterior(mixture: GaussianMixture, x: Tensor) -> Tensor:
    """log p(y|x) of a mixture by torch.distributions, for automatic differentiation: independent of its own code."""
    normal = torch.distributions.MultivariateNormal(mixture.means, mixture.covariances)
    log_components = normal.log_prob(x.flatten(1)[:, None, None, :]) + mixture.log_weights
    return log_components.logsumexp(-1).log_softmax(-1)


def plain_divergence(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """D(P ‖ Q) of rows, written for automatic differentiation through both."""
    m = 0.5 * (p + q)
    js = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)
    return {
        "kl": (p * (p / q).log()).sum(1),
        "se": (p - q).square().sum(1),
        "l2": (p - q).norm(dim=1),
        "l1": (p - q).abs().sum(1),
        "linf": (p - q).abs().amax(1),
        "js": js,
        "js_distance": js.sqrt(),
        "l1_squared": (p - q).abs().sum(1).square(),
    }[kind]


def climbed(
    value: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, threat_model: ThreatModel, steps: int
) -> Tensor:
    """Where plain gradient ascent on ``value`` [N, D] → [N] arrives in the ball around x, without a box."""
    eps, length, x_adv = threat_model.eps, threat_model.step_size, start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x_adv).sum(), x_adv)
        x_adv = x_adv.detach()
        if threat_model.norm == "linf":
            x_adv = (x_adv + length * gradient.sign()).clamp(x - eps, x + eps)
        else:
            x_adv = x_adv + length * gradient / gradient.norm(dim=1, keepdim=True)
            x_adv = x + (x_adv - x) * (eps / (x_adv - x).norm(dim=1, keepdim=True)).clamp(max=1.0)
    return x_adv


class Replayed:
    """What a recording of :mod:`scorematch.graphs` promises: the first call once more, on memory of its own."""

    made = 0

    def __init__(self, attack: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor, ...]) -> None:
        Replayed.made += 1
        self.attack, self.inputs = attack, [value.clone() for value in inputs]

    def replay(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        return self.attack(*self.inputs)


def replays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks on the CPU may be recorded; ``Replayed.made`` counts how many were."""
    monkeypatch.setattr(graphs, "_Recording", Replayed)
    monkeypatch.setattr(Replayed, "made", 0)
    monkeypatch.setattr(graphs.AttackGraphs, "_check", staticmethod(lambda inputs: None))
