"""Theorems 1 to 3 and Corollary 1 on random models, posteriors and finite sets of points in B(x)."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from scorematch import ThreatModel, bounds
from scorematch.bounds import Inequality, RobustErrors
from scorematch.divergences import DIVERGENCES
from scorematch.posteriors import GaussianMixture

METRICS = ("l1", "l2", "linf", "js_distance")
SQUARES = {"se": "l2", "l1_squared": "l1", "js": "js_distance"}
CASES = 1000  # models × posteriors × threat models, each with all divergences
SAMPLES, POINTS = 6, 8
ROUNDING = 1e-7  # of the JS distance near 0, in float64


class Case(NamedTuple):
    """A model, p_d, samples, a ball, and the points of the ball over which maxima are taken."""

    model: nn.Module
    posterior: GaussianMixture
    x: Tensor
    threat_model: ThreatModel
    candidates: Tensor
    beta: float

    def errors(self, *kinds: str) -> dict[str, RobustErrors]:
        y = torch.zeros(len(self.x), dtype=torch.int64)
        return bounds.robust_errors(
            self.model, self.posterior, self.x, y, self.threat_model, divergences=kinds, candidates=self.candidates
        )


def case(seed: int) -> Case:
    """Two to five classes, one to four features, narrow and wide mixtures, flat and steep models, three norms."""
    torch.manual_seed(seed)
    classes, features = 2 + seed % 4, 1 + seed // 4 % 4
    norm = ("linf", "l2", "l1")[seed // 16 % 3]

    def scale(low: float, high: float) -> float:
        """Between 10^low and 10^high."""
        return 10 ** float(torch.empty(()).uniform_(low, high))

    variances = scale(-1, 0.5) * torch.eye(features, dtype=torch.float64).expand(classes, 1, features, features)
    posterior = GaussianMixture(
        torch.randn(classes, 1, features, dtype=torch.float64) * scale(-1, 1),
        variances,
        0.05 + torch.rand(classes, 1, dtype=torch.float64),
    )
    model = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale(-0.5, 1))
    threat_model = ThreatModel(norm, scale(-1, 0.5), lower=-math.inf, upper=math.inf)
    x = 2 * torch.randn(SAMPLES, features, dtype=torch.float64)
    candidates = torch.stack([threat_model.random_start(x) for _ in range(POINTS)], 1)
    return Case(model.eval(), posterior, x, threat_model, candidates, 1.0 + scale(-2, 1))


@pytest.fixture(scope="module")
def cases() -> list[tuple[Case, dict[str, RobustErrors]]]:
    made = [case(seed) for seed in range(CASES)]
    return [(one, one.errors(*DIVERGENCES)) for one in made]


def holds(inequality: Inequality) -> bool:
    """At each sample, and between the means."""
    at_each = bool((inequality.left <= inequality.right + ROUNDING).all())
    return at_each and inequality.slack.mean >= -ROUNDING


Cases = list[tuple[Case, dict[str, RobustErrors]]]


def test_theorem_1(cases: Cases) -> None:
    checked = [bounds.theorem_1(errors[kind]) for _, errors in cases for kind in METRICS]
    assert len(checked) == 4 * CASES
    assert all(holds(found.lower) and holds(found.upper) for found in checked)


def test_theorem_2(cases: Cases) -> None:
    """φ = t², whose φ∘D is evaluated by itself: both ways must say the same."""
    for _, errors in cases:
        for square, metric in SQUARES.items():
            found = bounds.theorem_2(errors[metric])
            assert holds(found)
            # The right side is φ⁻¹ of R_Madry with φ∘D.
            of_square = math.sqrt(float(errors[square].madry.mean()))
            assert found.right_mean.mean == pytest.approx(of_square, rel=1e-6, abs=ROUNDING)


def test_theorem_3(cases: Cases) -> None:
    for one, errors in cases:
        for kind in METRICS:
            found = bounds.theorem_3(errors[kind], beta=one.beta)
            assert holds(found.lower)
            assert holds(found.upper)


def test_corollary_1(cases: Cases) -> None:
    assert all(holds(bounds.corollary_1(errors["l1"], errors["kl"])) for _, errors in cases)


def test_the_maxima_are_those_over_the_points(cases: Cases) -> None:
    """For l1, by the definitions of Eqs. (5) and (6) and of C^D, x among the points."""
    for one, errors in cases[::10]:
        points = torch.cat([one.x[:, None], one.candidates], 1)
        flat = points.reshape(-1, one.x.shape[1])
        with torch.no_grad():
            p, q = (
                values.reshape(SAMPLES, POINTS + 1, -1)
                for values in (one.posterior(flat).exp(), one.model(flat).softmax(1))
            )
        expected = {
            "madry": (p[:, :1] - q).abs().sum(2).amax(1),
            "score": (p - q).abs().sum(2).amax(1),
            "constant": (p[:, :1] - p).abs().sum(2).amax(1),
        }
        for name, values in expected.items():
            torch.testing.assert_close(getattr(errors["l1"], name), values, rtol=1e-7, atol=1e-7)


def test_the_cases_are_not_all_easy(cases: Cases) -> None:
    """Somewhere a bound is nearly attained, and somewhere errors, constants and slacks are large."""
    lowers = [bounds.theorem_1(errors["l1"]).lower for _, errors in cases]
    slack = torch.cat([lower.right - lower.left for lower in lowers])
    constants = torch.cat([errors["l1"].constant for _, errors in cases])
    scores = torch.cat([errors["l1"].score for _, errors in cases])
    assert float(slack.min()) < 0.01
    assert float(slack.max()) > 0.5
    assert float(constants.max()) > 1.5
    assert float(scores.max()) > 1.9
    assert float(scores.min()) < 0.1


def test_kl_violates_theorem_1(cases: Cases) -> None:
    """KL is not a metric, so the same check must fail for it; its errors are only called those of l1."""
    renamed = [errors["kl"]._replace(divergence="l1") for _, errors in cases]
    broken = [found for found in map(bounds.theorem_1, renamed) if not (holds(found.lower) and holds(found.upper))]
    assert len(broken) > 10
    assert min(found.upper.slack.mean for found in broken) < -0.01
