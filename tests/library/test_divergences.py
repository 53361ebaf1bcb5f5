"""Names, definitions and clipping bounds of the divergences."""

import math

import pytest
import torch

import scorematch
from scorematch.divergences import DIVERGENCES, KINDS, clip_bound

PLAIN = {
    "kl": lambda p, q: (p * (p / q).log()).sum(),
    "se": lambda p, q: (p - q).square().sum(),
    "l2": lambda p, q: (p - q).norm(),
    "l1": lambda p, q: (p - q).abs().sum(),
    "linf": lambda p, q: (p - q).abs().max(),
    "js": lambda p, q: 0.5 * (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum(),
    "js_distance": lambda p, q: PLAIN["js"](p, q).sqrt(),
    "l1_squared": lambda p, q: (p - q).abs().sum().square(),
}


def value(kind: str, p: torch.Tensor, q: torch.Tensor) -> float:
    return float(scorematch.divergence(q.log()[None], p[None], kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_computes_the_definition(kind: str) -> None:
    p, q = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert value(kind, p, q) == pytest.approx(float(PLAIN[kind](p, q)), rel=1e-12)


@pytest.mark.parametrize("kind", [d.name for d in DIVERGENCES.values() if d.is_metric])
def test_metrics_are_symmetric_and_satisfy_the_triangle_inequality(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        p, q, r = (3 * torch.randn(3, 4, dtype=torch.float64, generator=generator)).softmax(1)
        assert value(kind, p, q) == pytest.approx(value(kind, q, p), rel=1e-9)
        assert value(kind, p, r) <= value(kind, p, q) + value(kind, q, r) + 1e-12


@pytest.mark.parametrize("kind", ["kl", "se", "js", "l1_squared"])
def test_the_others_violate_an_axiom(kind: str) -> None:
    p, q, r = torch.tensor([[0.99, 0.01], [0.5, 0.5], [0.01, 0.99]], dtype=torch.float64)
    asymmetric = abs(value(kind, p, q) - value(kind, q, p)) > 1e-6
    assert asymmetric or value(kind, p, r) > value(kind, p, q) + value(kind, q, r)


def test_clip_bounds_of_table_2() -> None:
    assert clip_bound("se", 0.4, 10) == pytest.approx(0.4**2 + 9 * (0.4 / 9) ** 2, abs=1e-12)
    assert round(clip_bound("se", 0.4, 10), 4) == 0.1778
    assert round(clip_bound("se", 0.3, 10), 4) == 0.1
    assert clip_bound("kl", 0.4, 10) == pytest.approx(-math.log(0.6))
    assert clip_bound("kl", 0.0, 10) == 0.0
    assert clip_bound("l1", 0.25, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 0.4, 10), "kind must be one of"),
        (("se", 1.0, 10), r"threshold must lie in \[0, 1\), got 1.0"),
        (("se", -0.1, 10), r"threshold must lie in"),
        (("se", math.nan, 10), r"threshold must lie in"),
        (("se", 0.4, 1), "num_classes must be at least 2, got 1"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_bound(*arguments)
