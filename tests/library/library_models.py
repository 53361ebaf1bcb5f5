"""Small models and mixtures that the tests share, and a CUDA graph that runs on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scorematch import graphs
from scorematch.posteriors import GaussianMixture


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


def log_posterior(mixture: GaussianMixture, x: torch.Tensor) -> torch.Tensor:
    """log p(y|x) of a mixture by torch.distributions, for automatic differentiation: independent of its own code."""
    normal = torch.distributions.MultivariateNormal(mixture.means, mixture.covariances)
    log_components = normal.log_prob(x.flatten(1)[:, None, None, :]) + mixture.log_weights
    return log_components.logsumexp(-1).log_softmax(-1)


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
