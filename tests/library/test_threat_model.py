"""The ball and the box."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorematch import ThreatModel, l1_ball
from scorematch.threat_model import NORMS, ORDERS


def inside(threat_model: ThreatModel, x: torch.Tensor, x0: torch.Tensor) -> bool:
    difference = (x - x0).flatten(1)
    distance = difference.norm(dim=1, p=ORDERS[threat_model.norm])
    in_box = bool((x >= threat_model.lower).all() and (x <= threat_model.upper).all())
    return in_box and bool((distance <= threat_model.eps * (1 + 1e-5) + 1e-6).all())


@settings(max_examples=40)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(1e-3, 10.0),
    step=st.floats(1e-3, 10.0),
    seed=st.integers(0, 10_000),
)
def test_every_move_stays_in_the_ball_and_the_box(norm: str, eps: float, step: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    longest = 1.0 if norm == "linf" else 10.0
    threat_model = ThreatModel(norm, min(eps, longest), min(step, longest))
    x0 = torch.rand(4, 2, 3, 3, generator=generator)
    x = threat_model.random_start(x0, generator)
    assert inside(threat_model, x, x0)
    for _ in range(3):
        x = threat_model.step(x, torch.randn(x.shape, generator=generator), x0)
        assert inside(threat_model, x, x0)
    far = x0 + 20 * torch.randn(x0.shape, generator=generator)
    assert inside(threat_model, threat_model.project(far, x0), x0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_from_far_away_is_projected_into_the_ball(norm: str) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.rand(4, 2, 3, 3, generator=generator)
        far = x0 + 100 * torch.randn(x0.shape, generator=generator)
        threat_model = ThreatModel(norm, 1e-3)
        near = threat_model.project(far, x0)
        assert inside(threat_model, near, x0)
        torch.testing.assert_close(threat_model.project(near, x0), near, rtol=0, atol=1e-7)


def test_random_starts_are_uniform_in_the_ball() -> None:
    x = torch.zeros(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    linf = ThreatModel("linf", 2.0, lower=-math.inf, upper=math.inf).random_start(x, generator)
    assert linf.mean().abs() < 0.02
    assert float(linf.var()) == pytest.approx(4 / 3, rel=0.02)
    l2 = ThreatModel("l2", 2.0, lower=-math.inf, upper=math.inf).random_start(x, generator)
    # Uniform in the ball: (‖δ‖/eps)^D is uniform in [0, 1].
    quantile = (l2.norm(dim=1) / 2.0) ** 3
    assert float(quantile.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(quantile.var()) == pytest.approx(1 / 12, rel=0.03)
    l1 = ThreatModel("l1", 2.0, lower=-math.inf, upper=math.inf).random_start(x, generator)
    quantile = (l1.abs().sum(1) / 2.0) ** 3
    assert float(quantile.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(quantile.var()) == pytest.approx(1 / 12, rel=0.03)
    assert l1.mean(0).abs().max() < 0.02
    assert l1.abs().mean(0).std() < 0.01, "no feature is special"


def test_random_start_repeats_with_its_generator() -> None:
    x = torch.rand(5, 1, 4, 4)
    for norm in NORMS:
        threat_model = ThreatModel(norm, 0.3)
        first = threat_model.random_start(x, torch.Generator().manual_seed(3))
        assert torch.equal(first, threat_model.random_start(x, torch.Generator().manual_seed(3)))


def test_empty_batch() -> None:
    for norm in NORMS:
        threat_model = ThreatModel(norm, 0.3)
        x = torch.empty(0, 3, 8, 8)
        assert threat_model.step(threat_model.random_start(x), x, x).shape == x.shape


def test_step_length_defaults_to_a_quarter_of_eps() -> None:
    assert ThreatModel("linf", 0.4).step_length == pytest.approx(0.1)
    assert ThreatModel("linf", 0.4).replace(eps=0.8).step_length == pytest.approx(0.2)
    assert ThreatModel("linf", 0.4, 0.05).replace(eps=0.8).step_length == 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l3", "eps": 0.1}, "norm must be one of linf, l2, l1, got 'l3'"),
        ({"norm": "l1", "eps": 0.1, "share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"norm": "l1", "eps": 0.1, "share": 1.5}, r"share must lie in \(0, 1\], got 1.5"),
        ({"norm": "linf", "eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"norm": "linf", "eps": -1.0}, "eps must be positive"),
        ({"norm": "linf", "eps": math.nan}, "eps must be positive"),
        ({"norm": "linf", "eps": math.inf}, "eps must be positive"),
        ({"norm": "linf", "eps": 0.1, "step_size": 0.0}, "step_size must be positive"),
        (
            {"norm": "linf", "eps": 8 / 255, "step_size": 2},
            "step_size must not be larger than the box is wide, got 2; for 8-bit pixels write 2/255",
        ),
        ({"norm": "linf", "eps": 0.1, "step_size": 3, "upper": 2.0}, "the box is wide, got 3$"),
        ({"norm": "linf", "eps": 0.1, "lower": 1.0, "upper": 1.0}, "the box is empty"),
        ({"norm": "linf", "eps": 0.1, "lower": math.nan}, "the box is empty"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(**arguments)


@pytest.mark.parametrize(
    ("norm", "what"),
    [("l2", "the diagonal of the box, 13.86 for 192"), ("l1", "the L1 width of the box, 192 for 192")],
)
def test_a_step_across_the_box_is_refused(norm: str, what: str) -> None:
    threat_model = ThreatModel(norm, 0.5, step_size=256.0)
    with pytest.raises(ValueError, match=f"step_size must not be larger than {what} features, got 256; for 8-bit"):
        threat_model.check_radius(192)
    threat_model.replace(step_size=13.8).check_radius(192)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_may_be_as_long_as_the_ball_is_wide(norm: str) -> None:
    ThreatModel(norm, 0.8, step_size=1.6).check_radius(1)
    ThreatModel(norm, 0.8, step_size=9.0, upper=math.inf).check_radius(1)


@pytest.mark.parametrize(("name", "value"), [("eps", torch.tensor(0.1)), ("step_size", "0.1"), ("upper", None)])
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(value).__name__}"):
        ThreatModel(**{"norm": "linf", "eps": 0.1, name: value})


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_do_not_depend_on_the_memory_format(norm: str) -> None:
    x = torch.rand(4, 3, 5, 6)
    threat_model = ThreatModel(norm, 0.1)
    plain, arranged = (
        threat_model.random_start(x.contiguous(memory_format=format), torch.Generator().manual_seed(1))
        for format in (torch.contiguous_format, torch.channels_last)
    )
    torch.testing.assert_close(arranged, plain, rtol=0, atol=1e-7)
    assert arranged.is_contiguous(memory_format=torch.channels_last)


def test_a_radius_in_pixel_values_is_refused() -> None:
    """The classic mistake: 8 for 8/255, of which an attack would make a model that is never right."""
    with pytest.raises(ValueError, match=r"larger than the box \[0, 1\] is wide, got 8; for 8-bit pixels write 8/255"):
        ThreatModel("linf", 8)
    ThreatModel("linf", 8, upper=255.0)
    ThreatModel("linf", 1.0)  # all of the box, to see that an attack without limits succeeds
    ball = ThreatModel("l2", 128)
    with pytest.raises(
        ValueError, match=r"diagonal of the box, 55\.43 for 3072 features, got 128; for 8-bit pixels write"
    ):
        ball.check_radius(3072)
    ball.replace(eps=0.5).check_radius(3072)
    ball.replace(eps=math.sqrt(3072)).check_radius(3072)
    with pytest.raises(ValueError, match="eps must not be larger than the diagonal of the box"):
        ball.replace(eps=1.01 * math.sqrt(3072)).check_radius(3072)
    ThreatModel("l2", 128, lower=-math.inf, upper=math.inf).check_radius(3072)
    sums = ThreatModel("l1", 3060)
    sums.check_radius(3072)
    with pytest.raises(
        ValueError, match=r"L1 width of the box, 784 for 784 features, got 3060; for 8-bit pixels write"
    ):
        sums.check_radius(784)


def test_a_step_in_l1_moves_the_largest_gradients_that_the_box_lets_move() -> None:
    x = torch.tensor([[0.5, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    grad = torch.tensor([[0.1, 9.0, -9.0, -3.0, 0.2, math.nan, 0.0, 2.0, 0.3, 0.1]])
    one = ThreatModel("l1", 1.0, step_size=0.2, share=0.1)
    two = one.replace(share=0.2)
    move = torch.zeros(1, 10)
    move[0, 3] = -0.2
    torch.testing.assert_close(one.step(x, grad, x) - x, move)
    move[0, 3], move[0, 7] = -0.1, 0.1
    torch.testing.assert_close(two.step(x, grad, x) - x, move)
    assert torch.equal(two.step(x, torch.zeros_like(x), x), x)
    far = two.replace(step_size=9.0).step(x, grad, x)
    assert far[0, 3] == 0.0, "to the box"
    assert far[0, 7] == 1.0


def test_the_box_of_moves_in_l1_is_that_of_images() -> None:
    x = torch.tensor([[0.1, 0.9]]).repeat(200, 1)
    moved = l1_ball.random_start(x, torch.Generator().manual_seed(0), eps=2.0)
    assert [float(moved[:, 0].min()), float(moved[:, 1].max())] == [0.0, 1.0]
    for sign, end in ((-1.0, [0.0, 0.4]), (1.0, [0.6, 1.0])):
        found = l1_ball.sparse_step(x, sign * torch.ones_like(x), x, step_size=1.0, share=1.0, eps=2.0)
        torch.testing.assert_close(found, torch.tensor([end]).expand_as(x))


def test_projecting_in_l1_minds_the_box() -> None:
    """To the ball first and to the box then is another point, and not the nearest."""
    x0 = torch.tensor([[0.9, 0.5]])
    x = torch.tensor([[1.9, 1.0]])
    torch.testing.assert_close(ThreatModel("l1", 0.5).project(x, x0), torch.tensor([[1.0, 0.9]]))
