"""pgd_step, project and random_start against scorematch.reference."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import pgd_step, project, random_start

from .conftest import assert_close, runs_cuda_code

NORMS = ["linf", "l2"]
EPS = {"linf": 0.1, "l2": 0.7}
SHAPES = [(7,), (5, 1), (3, 16), (4, 3, 5, 7), (2, 3, 4, 5, 6), (2, 3, 33, 31), (0, 3, 4, 4), (3, 0)]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, grad, x0 with zero gradient elements and, if there are several samples, a sample of zero gradient."""
    x0 = torch.rand(shape, device=device, dtype=torch.float64)
    x = x0 + 0.2 * torch.randn_like(x0)
    grad = torch.randn_like(x0) * (torch.rand_like(x0) > 0.2)
    grad[1:2] = 0
    return tuple(t.to(dtype) for t in (x, grad, x0))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-math.inf, math.inf), (0.25, math.inf), (-math.inf, 0.5)], ids=str)
def test_step_is_the_reference(shape, norm, box, device_dtype):
    x, grad, x0 = inputs(shape, *device_dtype)
    options = {"norm": norm, "step_size": 0.07, "eps": EPS[norm], "lower": box[0], "upper": box[1]}
    expected = reference.pgd_step(x.double(), grad.double(), x0.double(), **options)
    actual = pgd_step(x, grad, x0, **options)
    assert actual.dtype == x.dtype
    assert actual.shape == x.shape
    assert_close(actual, expected)
    projected = project(x, x0, norm=norm, eps=EPS[norm], lower=box[0], upper=box[1])
    still = {**options, "step_size": 0.0}
    assert_close(projected, reference.pgd_step(x.double(), 0 * grad.double(), x0.double(), **still))


def test_linf_step_is_the_reference_bit_for_bit(device):
    x, grad, x0 = inputs((4, 3, 32, 32), device, torch.float32)
    options = {"norm": "linf", "step_size": 2 / 255, "eps": 8 / 255}
    assert torch.equal(pgd_step(x, grad, x0, **options), reference.pgd_step(x, grad, x0, **options))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [True, False])
def test_random_start_is_the_reference(norm, radius, device_dtype):
    x, noise, _ = inputs((9, 3, 5, 7), *device_dtype)
    noise = noise.clamp(-1, 1) if norm == "linf" else noise
    distance = torch.rand(9).to(noise) if radius and norm == "l2" else None
    options = {"norm": norm, "eps": EPS[norm], "lower": 0.1, "upper": 0.9}
    expected = reference.random_start(
        x.double(), noise.double(), radius=None if distance is None else distance.double(), **options
    )
    assert_close(random_start(x, noise, radius=distance, **options), expected)


def test_linf_random_start_clips_noise_beyond_its_range(device):
    x = torch.full((2, 8), 0.5, device=device)
    start = random_start(x, 5 * torch.randn_like(x), norm="linf", eps=0.1)
    assert (start - x).abs().max() <= 0.1 + 1e-6


def test_linf_random_start_is_the_reference_bit_for_bit(device):
    x, noise = torch.rand(4, 3, 31, 33, device=device), 2 * torch.rand(4, 3, 31, 33, device=device) - 1
    assert torch.equal(
        random_start(x, noise, norm="linf", eps=8 / 255), reference.random_start(x, noise, norm="linf", eps=8 / 255)
    )


@pytest.mark.parametrize("features", [2, 7, 201])
def test_a_linf_random_start_does_not_depend_on_the_batch(features, device):
    """Nor on the threads that share it: whatever a row is computed with, it gets the same bits."""
    x, noise = torch.rand(301, features, device=device), 2 * torch.rand(301, features, device=device) - 1
    together = random_start(x, noise, norm="linf", eps=8 / 255)
    for i in range(301):
        assert torch.equal(random_start(x[i : i + 1], noise[i : i + 1], norm="linf", eps=8 / 255), together[i : i + 1])


def test_an_l2_random_start_stays_in_the_ball_whatever_the_radius(device):
    x, noise = torch.full((3, 5), 0.5, device=device), torch.randn(3, 5, device=device)
    radius = torch.tensor([3.0, -1.0, 0.5], device=device)
    start = random_start(x, noise, norm="l2", eps=0.1, radius=radius)
    torch.testing.assert_close((start - x).norm(dim=1).cpu(), torch.tensor([0.1, 0.0, 0.05]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-6, 1.0, 1e6])
def test_points_that_are_very_far_away_are_projected_to_the_sphere(eps, dtype, device):
    """Their squares overflow long before they do."""
    direction = torch.randn(50, dtype=torch.float64)
    direction /= direction.norm()
    x0 = torch.zeros(1, 50, device=device, dtype=dtype)
    for power in range(7, 38 if dtype == torch.float32 else 300, 5):
        x = (direction * 10.0**power).to(device, dtype)[None]
        box = {"lower": -math.inf, "upper": math.inf}
        for moved in (
            project(x, x0, norm="l2", eps=eps, **box),
            pgd_step(x0, x, x0, norm="l2", step_size=min(10.0**power, 1e38), eps=eps, **box),
        ):
            torch.testing.assert_close(moved[0].cpu().double() / eps, direction, rtol=0, atol=1e-6)
        inside = project(x, x0, norm="l2", eps=eps, lower=-0.1 * eps, upper=0.1 * eps)
        torch.testing.assert_close(inside[0].cpu().double() / eps, direction.clamp(-0.1, 0.1), rtol=0, atol=1e-6)


def layouts() -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    return [
        ("channels_last", lambda t: t.to(memory_format=torch.channels_last)),
        ("transposed", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        ("strided", lambda t: torch.stack([t, t], dim=-1)[..., 0]),
        ("expanded", lambda t: t[:1].expand(t.shape)),
    ]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "arrange"), layouts(), ids=[name for name, _ in layouts()])
@pytest.mark.parametrize("arranged", [(0, 1, 2), (0,), (1, 2)], ids=str)
def test_memory_formats(norm, name, arrange, arranged, device):
    plain = inputs((4, 3, 6, 5), device, torch.float32)
    mixed = [arrange(t) if i in arranged else t for i, t in enumerate(plain)]
    options = {"norm": norm, "step_size": 0.07, "eps": EPS[norm]}
    actual = pgd_step(*mixed, **options)
    assert_close(actual, reference.pgd_step(*[t.double() for t in mixed], **options))
    keeps = name == "channels_last" and 0 in arranged
    assert actual.is_contiguous(memory_format=torch.channels_last if keeps else torch.contiguous_format)
    start = random_start(mixed[0], mixed[1].clamp(-1, 1), norm=norm, eps=0.3)
    assert_close(start, reference.random_start(mixed[0].double(), mixed[1].clamp(-1, 1).double(), norm=norm, eps=0.3))
    assert start.stride() == actual.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-44, -30, -25, -12, 0, 12, 25, 30, 38])
def test_l2_step_is_full_however_large_the_gradient(power, dtype, device):
    x = torch.full((3, 50), 0.5, device=device, dtype=dtype)
    grad = (torch.randn(3, 50, device=device, dtype=torch.float64) * 10.0**power).clamp(-3e38, 3e38).to(dtype)
    assert (grad != 0).any(1).all()
    moved = pgd_step(x, grad, x, norm="l2", step_size=0.1, eps=1.0)
    torch.testing.assert_close(
        (moved - x).norm(dim=1), torch.full((3,), 0.1, device=device, dtype=dtype), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        (moved - x).double(), 0.1 * grad.double() / grad.double().norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-6
    )


@pytest.mark.skipif(runs_cuda_code("cpu"), reason="about threads of the CPU")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_that_is_worth_several_threads(norm, threads):
    x, grad, x0 = inputs((70, 3, 33, 31), "cpu", torch.float32)
    options = {"norm": norm, "eps": EPS[norm]}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        moved = pgd_step(x, grad, x0, step_size=0.07, **options)
        start = random_start(x, grad.clamp(-1, 1), **options)
    finally:
        torch.set_num_threads(before)
    assert_close(moved, reference.pgd_step(x.double(), grad.double(), x0.double(), step_size=0.07, **options))
    assert_close(start, reference.random_start(x.double(), grad.clamp(-1, 1).double(), **options))


@pytest.mark.parametrize("power", [-310, -200, -160, 160, 200, 300])
def test_l2_step_is_full_up_to_the_ends_of_float64(power, device):
    direction = torch.randn(3, 50, dtype=torch.float64)
    x = torch.full((3, 50), 0.5, device=device, dtype=torch.float64)
    moved = pgd_step(x, (direction * 10.0**power).to(device), x, norm="l2", step_size=0.1, eps=1.0)
    expected = 0.1 * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close((moved - x).cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [48, -48, 480, -480])
def test_l2_step_where_elements_of_a_row_are_on_both_sides_of_a_bound(bound, dtype, device):
    """Rows are scaled where their largest element is beyond 2^±48 (float32) or 2^±480 (float64)."""
    if dtype == torch.float32 and abs(bound) > 48:
        pytest.skip("no number of float32")
    direction = 0.3 * torch.randn(3, 50, dtype=torch.float64).sign()
    direction[:, 0] = 5.0
    x = torch.full((3, 50), 0.5, device=device, dtype=dtype)
    moved = pgd_step(x, (direction * 2.0**bound).to(device, dtype), x, norm="l2", step_size=0.1, eps=1.0)
    assert_close(moved, 0.5 + 0.1 * direction / direction.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("where", ["x", "grad", "x0"])
def test_nan_stays_nan(norm, where, device):
    arguments = dict(zip(("x", "grad", "x0"), inputs((3, 40), device, torch.float32), strict=True))
    arguments[where][2, 17] = math.nan
    result = pgd_step(**arguments, norm=norm, step_size=0.1, eps=0.2)
    assert not result[:2].isnan().any()
    assert result[2, 17].isnan()
    assert result[2].isnan().all() == (norm == "l2")


def test_zero_sign_and_infinite_radius(device):
    x = torch.tensor([[0.5, 0.5, 0.5]], device=device)
    grad = torch.tensor([[0.0, -0.0, 1e-40]], device=device)
    moved = pgd_step(x, grad, x, norm="linf", step_size=0.25, eps=math.inf)
    assert moved.tolist() == [[0.5, 0.5, 0.75]]
    assert pgd_step(x, torch.zeros_like(x), x, norm="l2", step_size=0.25, eps=math.inf).tolist() == x.tolist()


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from(NORMS),
    st.floats(1e-4, 10),
    st.floats(0, 10),
    st.floats(-2, 0.4),
    st.floats(0.6, 3),
)
def test_step_stays_in_ball_and_box(seed, norm, eps, step_size, lower, upper):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(3, 29, generator=generator).clamp(lower, upper)
    x = x0 + torch.randn(3, 29, generator=generator)
    grad = torch.randn(3, 29, generator=generator)
    noise = torch.randn(3, 29, generator=generator)
    options = {"norm": norm, "eps": eps, "lower": lower, "upper": upper}
    for result in (pgd_step(x, grad, x0, step_size=step_size, **options), random_start(x0, noise, **options)):
        offset = (result - x0).abs()
        distance = offset.amax(1) if norm == "linf" else offset.norm(dim=1)
        assert (distance <= eps * (1 + 1e-5) + 1e-6).all()
        assert (result >= torch.tensor(lower)).all()
        assert (result <= torch.tensor(upper)).all()


@pytest.mark.parametrize("number", [0, 1])
def test_opcheck(number, device):
    x, grad, x0 = inputs((4, 3, 6, 5), device, torch.float32)
    radius = torch.rand(4, device=device)
    step, start = torch.ops.scorematch.pgd_step.default, torch.ops.scorematch.random_start.default
    opcheck(step, (x, grad, x0, number, 0.1, 0.3, 0.0, 1.0))
    channels_last = x.to(memory_format=torch.channels_last)
    opcheck(step, (channels_last, grad, x0.transpose(2, 3).contiguous().transpose(2, 3), number, 0.1, 0.3, 0.0, 1.0))
    opcheck(step, (x.transpose(2, 3), x.transpose(2, 3), x.transpose(2, 3), number, 0.1, 0.3, 0.0, 1.0))
    opcheck(start, (x, grad, radius if number else None, number, 0.3, 0.0, 1.0))
    opcheck(start, (channels_last, grad, None, number, 0.3, 0.0, 1.0))


def test_no_gradient_passes_through(device):
    x, grad, x0 = inputs((2, 3), device, torch.float32)
    assert not pgd_step(x.requires_grad_(), grad, x0, norm="l2", step_size=0.1, eps=0.3).requires_grad
    assert not random_start(x, grad, norm="l2", eps=0.3).requires_grad


STEP = {"norm": "linf", "step_size": 0.1, "eps": 0.1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.rand(2, 4)}, ValueError, r"grad has shape \[2, 4\] but x has shape \[2, 3\]"),
        ({"x0": torch.rand(3)}, ValueError, r"x0 has shape \[3\] but x has shape \[2, 3\]"),
        ({"grad": torch.rand(2, 3).double()}, TypeError, r"grad is torch.float64 but x is torch.float32"),
        (
            {"x": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            r"x is torch.int64; on the CPU it must be torch.float32",
        ),
        ({"x": torch.rand(2, 3).half()}, TypeError, r"x is torch.float16; on the CPU"),
        ({"x": [[1.0]]}, TypeError, r"x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\], but must be a batch"),
        ({"grad": torch.rand(2, 3, device="meta")}, ValueError, r"grad is on meta but x is on cpu"),
        ({"eps": 0.0}, ValueError, r"eps must be greater than 0, got 0.0"),
        ({"eps": math.nan}, ValueError, r"eps must be greater than 0, got nan"),
        ({"eps": 1e-40}, ValueError, r"eps must be greater than 0, and at least 1.18e-38, got 1e-40"),
        ({"eps": "8/255"}, TypeError, r"eps must be a number, got str"),
        ({"eps": torch.tensor(0.1)}, TypeError, r"eps must be a number, got Tensor"),
        ({"step_size": -0.1}, ValueError, r"step_size must be at least 0, got -0.1"),
        ({"step_size": math.inf}, ValueError, r"step_size must be at least 0 and finite, got inf"),
        ({"step_size": 1e39}, ValueError, r"step_size must be at least 0 and finite, got 1e\+39"),
        ({"lower": 1.0}, ValueError, r"the box is empty: lower must be less than upper, got lower=1.0 and upper=1.0"),
        ({"upper": math.nan}, ValueError, r"the box is empty"),
        ({"norm": "Linf"}, ValueError, r"norm must be one of \{linf, l2\}, got 'Linf'"),
        ({"norm": None}, ValueError, r"norm must be one of \{linf, l2\}, got None"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.rand(2, 3), "grad": torch.rand(2, 3), "x0": torch.rand(2, 3), **STEP}
    with pytest.raises(error, match=message):
        pgd_step(**{**arguments, **change})


def test_bad_radius():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"radius is for norm='l2', got norm='linf'"):
        random_start(x, x, norm="linf", eps=0.1, radius=torch.rand(2))
    with pytest.raises(ValueError, match=r"radius has shape \[3\] but x has shape \[2, 3\]: expected \[2\]"):
        random_start(x, x, norm="l2", eps=0.1, radius=torch.rand(3))


@pytest.mark.parametrize("eps", [math.inf, 1e39])
def test_a_random_start_is_in_a_finite_ball(eps):
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match="eps must be finite, got"):
        random_start(x, x, norm="linf", eps=eps)


def test_direct_calls_are_checked_too():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 3\] but grad has shape \[2, 4\]$"):
        torch.ops.scorematch.pgd_step.default(x, torch.rand(2, 4), x, 0, 0.1, 0.1, 0.0, 1.0)
