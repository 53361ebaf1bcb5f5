"""What the tests of AutoAttack attack: a small network, its data, the standard version with fewer steps."""

import torch
from library_models import small_cnn
from torch import Tensor, nn

from scorematch import AutoAttack

EPS = {"Linf": 0.03, "L2": 0.2, "L1": 1.0}
COUNT = 40


def data(classes: int = 10, count: int = COUNT, **options) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 (so that rounding in other batch shapes does not matter), with two labels wrong."""
    model = small_cnn(classes=classes, **options).double().eval()
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % classes
    return model, x, y


def attack(model, norm: str = "Linf", **options) -> AutoAttack:
    """The standard version with fewer steps."""
    options = {"eps": EPS[norm], "seed": 0, "verbose": False, **options}
    adversary = AutoAttack(model, norm, **options)
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = 20
    adversary.fab.n_iter = 10
    adversary.square.n_queries = 150
    return adversary


def alone(model, name: str, norm: str = "Linf", **options) -> AutoAttack:
    """One attack of it."""
    return attack(model, norm, version="custom", attacks_to_run=[name], **options)


def verdict(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x_adv).argmax(1) == y
