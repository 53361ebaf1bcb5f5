"""R_SCORE and R_Madry on the grid against brute force."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from scorematch import ThreatModel, consistency
from training import measures, models
from training.data import toy


class Oracle(nn.Module):
    """p_d(y|x) as a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return toy.log_joint(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = models.build("toy_mlp", (1,), 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0)  # a curve with several turns
    return network.double()


def brute_force(model: nn.Module) -> dict[str, float]:
    """The definitions, point by point, on grids of their own: 801 points x with 201 points x' around each."""
    x = torch.linspace(-13.0, 13.0, 801, dtype=torch.float64)
    offsets = torch.linspace(-toy.EPS, toy.EPS, 201, dtype=torch.float64)
    neighbours = x[:, None] + offsets
    with torch.no_grad():
        log_q = model(neighbours.reshape(-1, 1)).log_softmax(1).reshape(*neighbours.shape, 2)
    log_p_there = toy.log_joint(neighbours.reshape(-1)).log_softmax(1).reshape(*neighbours.shape, 2)
    log_p_here = toy.log_joint(x).log_softmax(1)[:, None, :].expand_as(log_q)
    density = toy.log_joint(x).exp().sum(1)

    def expected_maximum(log_p: Tensor) -> float:
        worst = (log_p.exp() * (log_p - log_q)).sum(2).amax(1)
        return (torch.trapezoid(density * worst, x) / torch.trapezoid(density, x)).item()

    here = (log_p_here.exp() * (log_p_here - log_q)).sum(2)[:, len(offsets) // 2]
    return {
        "r_standard": (torch.trapezoid(density * here, x) / torch.trapezoid(density, x)).item(),
        "r_score": expected_maximum(log_p_there),
        "r_madry": expected_maximum(log_p_here),
    }


def test_robust_errors_agree_with_brute_force(model: nn.Module) -> None:
    assert toy.robust_errors(model) == pytest.approx(brute_force(model), rel=1e-3)


def test_refining_the_grid_changes_little(model: nn.Module) -> None:
    coarse, fine = (toy.robust_errors(model, toy.Grid(points_per_eps=points)) for points in (500, 2000))
    assert coarse == pytest.approx(fine, rel=1e-4)


def test_the_oracle_has_no_self_consistent_error_but_a_robust_error() -> None:
    errors = toy.robust_errors(Oracle())
    assert errors["r_standard"] == pytest.approx(0.0, abs=1e-12)
    assert errors["r_score"] == pytest.approx(0.0, abs=1e-12)
    assert errors["r_madry"] > 0.01


def test_the_grid_holds_all_of_the_data() -> None:
    grid = toy.Grid()
    inside = grid.x.abs() <= grid.reach
    density = toy.log_joint(grid.x).exp().sum(1)
    assert torch.trapezoid(density[inside], grid.x[inside]).item() == pytest.approx(1.0, abs=1e-8)


def test_the_library_oracle_is_the_same_distribution() -> None:
    x = torch.linspace(-5, 5, 11)[:, None]
    assert torch.allclose(toy.oracle()(x).exp(), toy.posterior(x), atol=1e-6)


def test_measuring_leaves_the_mode_of_the_model(model: nn.Module) -> None:
    model.train()
    toy.robust_errors(model)
    assert model.training


def test_the_search_finds_what_the_grid_finds(model: nn.Module) -> None:
    """The judge of any known p_d, on points of the toy, against the exact maximum over a grid."""
    x, y = toy.sample(4000, seed=5)
    x = x.double()
    threat_model = ThreatModel("linf", toy.EPS, lower=-math.inf, upper=math.inf)
    found = measures.self_consistency(model, toy.oracle().double(), x, y, threat_model, steps=20, seed=0)
    low, high = found["r_score_interval"]
    wide = 2 * (high - low)  # twice the 95 % interval
    assert low - wide < toy.robust_errors(model)["r_score"] < high + wide
    assert found["kl"] < found["r_score"]


def test_intervals_of_the_judge_are_at_95_per_cent(model: nn.Module) -> None:
    """Of the mean over the samples of one search."""
    x, y = toy.sample(50, seed=5)
    x, oracle = x.double(), toy.oracle().double()
    threat_model = ThreatModel("linf", toy.EPS, lower=-math.inf, upper=math.inf)
    found = measures.self_consistency(model, oracle, x, y, threat_model, steps=2, seed=7)
    one = consistency(model, oracle, x, y, threat_model, steps=2, generator=torch.Generator().manual_seed(7))
    for name, values in (("kl", one.divergence), ("r_score", one.r_score)):
        mean, half = float(values.mean()), norm.ppf(0.975) * float(values.std()) / math.sqrt(50)
        assert found[name] == pytest.approx(mean)
        assert found[f"{name}_interval"] == pytest.approx([mean - half, mean + half], rel=1e-4)
    assert found["disagrees_interval"] == pytest.approx(measures.wilson(int(one.disagrees.sum()), 50))
