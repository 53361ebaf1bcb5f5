"""l1_step against scorematch.reference, and against solvers that share nothing with either."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import l1_project, l1_step

from .conftest import assert_close, runs_cuda_code

SHAPES = [(7,), (5, 1), (3, 16), (5, 3, 5, 7), (4, 3, 4, 5, 6), (6, 3, 33, 31), (0, 3, 4, 4), (3, 0)]
OPTIONS = [{"eps": 2.0}, {"eps": 0.3, "lower": -0.5, "upper": 2.0}, {"eps": 5.0, "lower": -math.inf, "upper": math.inf}]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype, reach: float = 0.3) -> tuple[Tensor, ...]:
    """x0 (some elements at the box), x near it, grad (some zeros), step sizes, and how many elements move."""
    x0 = (torch.rand(shape, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    x = x0 + reach * torch.randn_like(x0)
    grad = torch.randn_like(x0) * (torch.rand_like(x0) > 0.2)
    features = math.prod(shape[1:])
    step_size = torch.tensor([0.0, 0.5, 3.0, 0.1])[torch.arange(shape[0]) % 4]
    moving = torch.tensor([1, features // 5 + 1, features, 0, 2 * features + 1])[torch.arange(shape[0]) % 5]
    tensors = [t.to(device, dtype) for t in (x, grad, x0)]
    step_size = step_size.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return *tensors, step_size, moving.to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_is_the_reference(shape, options, device_dtype):
    x, grad, x0, step_size, moving = inputs(shape, *device_dtype)
    actual = l1_step(x, grad, x0, step_size, moving, **options)
    assert actual.dtype == x.dtype
    assert actual.shape == x.shape
    expected = reference.l1_step(*(t.double() for t in (x, grad, x0)), step_size.double(), moving, **options)
    assert_close(actual, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_projection_is_the_reference(options, device_dtype):
    """Where nothing moves, whatever the step size and the gradient are."""
    x, grad, x0, step_size, moving = inputs((6, 3, 33, 31), *device_dtype)
    actual = l1_project(x, x0, **options)
    assert torch.equal(actual, l1_step(x, grad, x0, step_size + 1, 0 * moving, **options))
    zeros = torch.zeros_like(step_size).double()
    assert_close(actual, reference.l1_step(x.double(), x.double(), x0.double(), zeros, 0 * moving, **options))


def by_bisection(x: Tensor, x0: Tensor, eps: float, lower: float, upper: float) -> Tensor:
    """The projection of [N, D]: the multiplier of the ball by bisection, the box by clipping."""
    change = x - x0

    def shortened(multiplier: Tensor) -> Tensor:
        return (x0 + change.sign() * (change.abs() - multiplier).clamp_min(0)).clamp(lower, upper)

    low, high = torch.zeros(len(x), 1, dtype=x.dtype), change.abs().amax(1, keepdim=True)
    fits = (shortened(low) - x0).abs().sum(1, keepdim=True) <= eps
    for _ in range(200):
        middle = (low + high) / 2
        outside = (shortened(middle) - x0).abs().sum(1, keepdim=True) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return shortened(torch.where(fits, 0.0, high))


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 60),
    eps=st.sampled_from([1e-6, 0.1, 1.0, 4.0, 1e3]),
    reach=st.sampled_from([1e-8, 0.05, 1.0, 1e4]),
    box=st.sampled_from([(0.0, 1.0), (-2.0, 0.5), (0.3, 0.4)]),
    corners=st.booleans(),
    ties=st.booleans(),
)
def test_projection_is_the_nearest_point(seed, count, eps, reach, box, corners, ties):
    """Against bisection, with x0 at corners of the box, ties, and balls larger than the box."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(4, count, generator=generator, dtype=torch.float64)
    change = reach * torch.randn(4, count, generator=generator, dtype=torch.float64)
    if ties:
        change = change.sign() * reach
    x0 = (unit.round() if corners else unit) * (box[1] - box[0]) + box[0]
    x0 = x0.clamp(*box)
    x = x0 + change
    found = l1_project(x, x0, eps=eps, lower=box[0], upper=box[1])
    torch.testing.assert_close(found, by_bisection(x, x0, eps, *box), rtol=1e-9, atol=1e-12 * (1 + reach))
    assert ((found - x0).abs().sum(1) <= eps * (1 + 1e-12) + 1e-15 * count * (1 + reach)).all()
    assert (found >= box[0]).all()
    assert (found <= box[1]).all()
    again = l1_project(found, x0, eps=eps, lower=box[0], upper=box[1])
    torch.testing.assert_close(again, found, rtol=0, atol=1e-14 * (1 + reach))


def test_rounding_far_from_x0_does_not_leave_the_box(device):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(200, 15, generator=generator, dtype=torch.float64).round() * 0.1 + 0.3
    x0 = x0.clamp(0.3, 0.4).to(device)
    x = x0 + 1e4 * torch.randn(200, 15, generator=generator, dtype=torch.float64).to(device)
    found = l1_project(x, x0, eps=1.0, lower=0.3, upper=0.4)
    assert ((found >= 0.3) & (found <= 0.4)).all()


def test_no_point_of_the_set_is_nearer(device):
    """⟨x − u, v − u⟩ ≤ 0 for all v of a convex set says that u is the projection of x onto it."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(50, 6, generator=generator, dtype=torch.float64)
    x = x0 + torch.randn(50, 6, generator=generator, dtype=torch.float64)
    u = l1_project(x.to(device), x0.to(device), eps=0.7).cpu()
    for _ in range(300):
        v = (x0 + 0.5 * torch.randn(50, 6, generator=generator, dtype=torch.float64)).clamp(0, 1)
        length = (v - x0).abs().sum(1, keepdim=True)
        v = x0 + (v - x0) * (0.7 / length).clamp_max(1)
        assert (((x - u) * (v - u)).sum(1) <= 1e-12).all()


def test_what_does_not_change_keeps_its_very_value(device):
    x0 = torch.rand(20, 100, device=device)
    x = x0 + 0.1 * torch.randn_like(x0)
    found = l1_project(x, x0, eps=0.5)
    kept = (found == x0).sum(1)
    assert (kept > 50).all()
    inside = x0 + 1e-4 * (torch.rand_like(x0) - 0.5)
    inside = inside.clamp(0, 1)
    assert torch.equal(l1_project(inside, x0, eps=0.5), inside)


@pytest.mark.parametrize("count", [1, 5, 30, 64])
def test_the_largest_gradients_move(count, device):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(10, 64, generator=generator).to(device)
    x = torch.full_like(grad, 0.5)
    moving = torch.full((10,), count, device=device)
    moved = l1_step(x, grad, x, torch.full((10,), 0.4, device=device), moving, eps=math.inf) - x
    largest = torch.zeros_like(grad).scatter(1, grad.abs().topk(count, dim=1).indices, 1.0)
    torch.testing.assert_close(moved, grad.sign() * largest * 0.4 / count, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 3.0, -3.0, 1.0],
        [1e-38, 1e-30, 2.0, -3.0],
        [2.0**-149, 0.0, 2.0, -3.0],  # the smallest number of float32
        [math.inf, -math.inf, 5.0, 0.0],
        [math.inf, 5.0, -4.0, 3.0],
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_ties_and_extreme_gradients(values, count, device):
    """All elements of the same gradient move together; 0 never moves."""
    grad = torch.tensor([values], device=device)
    x = torch.full_like(grad, 0.5)
    sizes = sorted((abs(v) for v in values), reverse=True)
    expected = [math.copysign(1.0, v) if abs(v) >= sizes[count - 1] and v else 0.0 for v in values]
    moved = l1_step(x, grad, x, torch.tensor([0.3], device=device), torch.tensor([count], device=device), eps=math.inf)
    number = sum(map(abs, expected))
    torch.testing.assert_close(moved - x, torch.tensor([expected], device=device) * 0.3 / number, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-1, -10, -20, -35])
def test_the_largest_of_gradients_that_are_far_smaller_than_one_of_them(power, dtype, device):
    """A search among values would need a step for each power of two between them."""
    generator = torch.Generator().manual_seed(1)
    grad = (torch.randn(4, 64, generator=generator, dtype=torch.float64) * 10.0**power).to(device, dtype)
    grad[:, 5] = 1.0
    x = torch.full_like(grad, 0.5)
    moving = torch.full((4,), 7, device=device)
    moved = l1_step(x, grad, x, torch.full_like(x[:, 0], 0.4), moving, eps=math.inf) - x
    largest = torch.zeros_like(grad).scatter(1, grad.abs().topk(7, dim=1).indices, 1.0)
    torch.testing.assert_close(moved, grad.sign() * largest * 0.4 / 7, rtol=0, atol=1e-6)


def test_zero_and_nan_gradients_stay(device):
    x0 = torch.rand(3, 40, device=device)
    x = x0.clone()
    grad = torch.randn(3, 40, device=device)
    grad[0] = 0.0
    grad[1] = math.nan
    grad[2, :5] = math.nan
    moved = l1_step(x, grad, x0, torch.ones(3, device=device), torch.full((3,), 35, device=device), eps=1.0)
    assert torch.equal(moved[:2], x[:2])
    assert torch.equal(moved[2, :5], x[2, :5])
    assert (moved[2, 5:] != x[2, 5:]).sum() > 20


def test_an_element_of_x0_outside_of_the_box_leaves_the_ball_to_the_others(device):
    """It has no room, rather than less than none."""
    x0, x = torch.tensor([[[1.5, 0.5, 0.5]], [[1.8, 0.9, 0.1]]], device=device, dtype=torch.float64).unbind()
    found = l1_project(x, x0, eps=0.4)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.7, 0.3]], device=device, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_nan_and_infinity_make_the_sample_nan(where, value, device):
    arguments = list(inputs((6, 40), device, torch.float32))
    arguments[where][4, 17] = value
    result = l1_step(*arguments, eps=2.0)
    assert result.isnan().all(1).tolist() == [False, False, False, False, True, False]
    assert result.isnan().any(1).tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
    ],
    ids=["channels_last", "transposed", "strided"],
)
@pytest.mark.parametrize("arranged", [(0, 1, 2), (0,), (1, 2)], ids=str)
def test_memory_formats(arrange, arranged, device):
    plain = inputs((4, 3, 6, 5), device, torch.float32)
    mixed = [arrange(t) if i in arranged else t for i, t in enumerate(plain)]
    actual = l1_step(*mixed, eps=2.0)
    torch.testing.assert_close(actual, l1_step(*plain, eps=2.0), rtol=1e-5, atol=1e-6)
    keeps = 0 in arranged and mixed[0].is_contiguous(memory_format=torch.channels_last)
    assert actual.is_contiguous(memory_format=torch.channels_last if keeps else torch.contiguous_format)


def test_opcheck(device):
    arguments = inputs((4, 3, 6, 5), device, torch.float32)
    step = torch.ops.scorematch.l1_step.default
    opcheck(step, (*arguments, 2.0, 0.0, 1.0))
    opcheck(step, (arguments[0].to(memory_format=torch.channels_last), *arguments[1:], 2.0, 0.0, 1.0))


def test_no_gradient_passes_through(device):
    x, *others = inputs((2, 3), device, torch.float32)
    assert not l1_step(x.requires_grad_(), *others, eps=1.0).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": torch.rand(2, 4)}, ValueError, r"x0 has shape \[2, 4\] but x has shape \[2, 3\]"),
        ({"grad": torch.rand(2, 3).double()}, TypeError, r"grad is torch.float64 but x is torch.float32"),
        ({"step_size": torch.rand(3)}, ValueError, r"step_size has shape \[3\] but x has shape \[2, 3\]"),
        ({"step_size": 0.1}, TypeError, r"step_size must be a torch.Tensor, got float"),
        ({"moving": 3}, TypeError, r"moving must be a torch.Tensor, got int"),
        ({"moving": torch.ones(2)}, TypeError, r"moving is torch.float32, expected torch.int64"),
        ({"moving": torch.ones(3).long()}, ValueError, r"moving has shape \[3\] but x has shape \[2, 3\]"),
        ({"eps": 0.0}, ValueError, r"eps must be greater than 0, got 0.0"),
        ({"lower": 2.0}, ValueError, r"the box is empty: lower must be less than upper"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    tensors = {name: torch.rand(2, 3) for name in ("x", "grad", "x0")}
    other = {"step_size": torch.rand(2), "moving": torch.ones(2, dtype=torch.int64), "eps": 1.0}
    with pytest.raises(error, match=message):
        l1_step(**{**tensors, **other, **change})


def test_zeros_do_not_move_where_denormal_numbers_count_as_zero() -> None:
    if runs_cuda_code("cpu") or not torch.set_flush_denormal(True):
        pytest.skip("the processor has no such mode, or it is not the one that computes")
    try:
        x, grad = torch.full((1, 100), 0.5), torch.zeros(1, 100)
        grad[0, :2] = 1.0
        moved = l1_step(x, grad, x, torch.tensor([0.4]), torch.tensor([20]), eps=1.0)
    finally:
        torch.set_flush_denormal(False)
    assert (moved - x).flatten().tolist() == pytest.approx([0.2, 0.2, *[0.0] * 98], abs=1e-6)
