"""fab_step against scorematch.reference, and against general solvers."""

# ruff: noqa: E501 (tables of messages)

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import fab_step

from .conftest import assert_close

NORMS = ["linf", "l2", "l1"]
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
SHAPES = [(7,), (5, 1), (3, 16), (5, 3, 5, 7), (4, 3, 4, 5, 6), (6, 3, 33, 31), (0, 3, 4, 4), (3, 0)]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """x, x0 (some elements at the box), normal (some zeros), difference: near, far, 0 and out of reach."""
    x0 = (torch.rand(shape, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    x = (x0 + 0.05 * torch.randn_like(x0)).clamp(0, 1)
    normal = torch.randn_like(x0) * (torch.rand_like(x0) > 0.2)
    reach = normal.abs().flatten(1).sum(1) if len(shape) > 1 else normal.abs()
    difference = torch.randn(shape[0], dtype=torch.float64).sign() * reach
    difference *= torch.tensor([0.02, 0.2, 0.0, 1e-4, 3.0, 0.3])[torch.arange(shape[0]) % 6]
    tensors = [t.to(device, dtype) for t in (x, x0, normal * scale)]
    return *tensors, (difference * scale).to(device, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"alpha_max": 1.0, "overshoot": 1.0}, {"lower": -0.5, "upper": 2.0}], ids=str)
def test_step_is_the_reference(shape, norm, options, device_dtype):
    arguments = inputs(shape, *device_dtype)
    actual = fab_step(*arguments, norm=norm, **options)
    assert actual.dtype == arguments[0].dtype
    assert actual.shape == arguments[0].shape
    expected = reference.fab_step(*(t.double() for t in arguments), norm=norm, **options)
    if norm == "l1" and arguments[0].dtype == torch.float32:
        # One element takes up what sums over the row are rounded by, which narrow vectors do more often.
        torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=1e-7 * max(20, arguments[0][:1].numel()))
    else:
        assert_close(actual, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e-3, 1e20, 1e30])
def test_scale_of_the_gradient_does_not_matter(norm, scale, device):
    expected = fab_step(*inputs((12, 3, 8, 8), device, torch.float64), norm=norm)
    torch.manual_seed(0)
    actual = fab_step(*inputs((12, 3, 8, 8), device, torch.float32, scale), norm=norm)
    assert_close(actual, expected)


def move_to_hyperplane(p: Tensor, w: Tensor, c: Tensor, norm: str, lower: float = 0.0, upper: float = 1.0) -> Tensor:
    """The projection alone: no overshoot, no part of the move from x0."""
    return fab_step(p, p, w, c, norm=norm, alpha_max=0.0, overshoot=1.0, lower=lower, upper=upper) - p


def reachable(p: Tensor, w: Tensor, c: Tensor, lower: float, upper: float) -> Tensor:
    towards = -c.sign().unsqueeze(1) * w
    room = torch.where(towards > 0, upper - p, p - lower)
    return (w.abs() * room).sum(1)


random_problem = st.tuples(
    st.integers(0, 2**31),
    st.sampled_from(NORMS),
    st.integers(1, 40),
    st.floats(0, 0.99),
    st.sampled_from([(0.0, 1.0), (-2.0, 0.5), (0.3, 0.4)]),
)


def problem(seed: int, count: int, share: float, box: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """p in the box, w, and c that uses a share of what the box leaves."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(3, count, generator=generator, dtype=torch.float64) * (box[1] - box[0]) + box[0]
    w = torch.randn(3, count, generator=generator, dtype=torch.float64) ** 3
    w *= torch.rand(3, count, generator=generator) > 0.2
    sign = torch.randn(3, generator=generator, dtype=torch.float64).sign()
    return p, w, sign * share * reachable(p, w, sign, *box)


@settings(max_examples=100)
@given(random_problem)
def test_move_meets_the_hyperplane_inside_the_box(drawn):
    seed, norm, count, share, box = drawn
    p, w, c = problem(seed, count, share, box)
    move = move_to_hyperplane(p, w, c, norm, *box)
    size = w.abs().sum(1) * (box[1] - box[0])
    assert ((c + (w * move).sum(1)).abs() <= 1e-12 * size).all()
    assert (p + move >= box[0] - 1e-12).all()
    assert (p + move <= box[1] + 1e-12).all()
    assert (move[w == 0] == 0).all()


@settings(max_examples=40)
@given(random_problem)
def test_move_is_the_shortest(drawn):
    """linf: a linear program in (delta, t); l1: one in what goes up and what goes down. l2: the dual by bisection, delta = clip(p - nu w) - p."""
    seed, norm, count, share, box = drawn
    p, w, c = problem(seed, count, share, box)
    lengths = move_to_hyperplane(p, w, c, norm, *box).norm(dim=1, p=ORDERS[norm])
    for length, p_n, w_n, c_n in zip(lengths.tolist(), p.numpy(), w.numpy(), c.tolist(), strict=True):
        if norm == "linf":
            identity, ones = np.eye(count), np.ones((count, 1))
            size = np.abs(w_n).sum() or 1.0  # the solver meets a constraint to 1e-7, whatever its scale
            solved = linprog(
                np.r_[np.zeros(count), 1.0],
                A_ub=np.block([[identity, -ones], [-identity, -ones]]),
                b_ub=np.zeros(2 * count),
                A_eq=np.r_[w_n / size, 0.0][None],
                b_eq=[-c_n / size],
                bounds=[*zip(box[0] - p_n, box[1] - p_n, strict=True), (0, None)],
            )
            assert solved.status == 0
            assert length == pytest.approx(solved.fun, rel=1e-6, abs=3e-7)
        elif norm == "l1":
            size = np.abs(w_n).max() or 1.0
            solved = linprog(
                np.ones(2 * count),
                A_eq=np.r_[w_n, -w_n][None] / size,
                b_eq=[-c_n / size],
                bounds=[*((0, room) for room in np.r_[box[1] - p_n, p_n - box[0]])],
            )
            assert solved.status == 0
            assert length == pytest.approx(solved.fun, rel=1e-6, abs=1e-6)
        elif c_n != 0:

            def residual(nu: float, p_n: np.ndarray = p_n, w_n: np.ndarray = w_n, c_n: float = c_n) -> float:
                return c_n + w_n @ (np.clip(p_n - nu * w_n, *box) - p_n)

            limit = np.sign(c_n)
            while residual(limit) * c_n > 0:
                limit *= 2
            nu = brentq(residual, 0, limit, xtol=1e-16 * abs(limit), maxiter=1000)
            nearest = np.linalg.norm(np.clip(p_n - nu * w_n, *box) - p_n)
            assert length == pytest.approx(nearest, rel=1e-6, abs=1e-8)
        else:
            assert length == 0


@pytest.mark.parametrize("norm", NORMS)
def test_unreachable_hyperplane_leads_to_the_corner(norm, device_dtype):
    device, dtype = device_dtype
    p = torch.rand(2, 50, device=device, dtype=torch.float64).to(dtype)
    w = torch.randn(2, 50, device=device).to(dtype)
    w[:, ::7] = 0
    c = torch.tensor([1e3, -1e3], device=device, dtype=w.dtype)
    corner = torch.where(-c.sign().unsqueeze(1) * w > 0, torch.ones_like(p), torch.zeros_like(p))
    moved = fab_step(p, p, w, c, norm=norm, overshoot=1.0)
    assert_close(moved, torch.where(w == 0, p, corner))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("c", [1e8, 1e9, 1e38])
def test_a_difference_that_is_huge_for_its_gradient(norm, c, device):
    p = torch.tensor([[0.3, 0.6, 0.8]], device=device)
    w = 1e-20 * torch.tensor([[1.0, -2.0, 3.0]], device=device)
    moved = fab_step(p, p, w, torch.tensor([c], device=device), norm=norm, overshoot=1.0)
    assert moved.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("norm", NORMS)
def test_an_unreachable_hyperplane_moves_what_its_sum_does_not_feel(norm, device):
    """1e-11 · room is lost in a sum of 1e7, and still belongs to the corner."""
    p = torch.tensor([[0.3, 0.6, 0.8]], device=device, dtype=torch.float64)
    w = torch.tensor([[2e7, -1e-11, 3e3]], device=device, dtype=torch.float64)
    c = torch.tensor([1e8], device=device, dtype=torch.float64)
    for step in (fab_step, reference.fab_step):
        assert step(p, p, w, c, norm=norm, overshoot=1.0).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("norm", NORMS)
def test_zero_normal(norm, device):
    x, x0 = torch.rand(2, 3, 20, device=device).unbind()
    moved = fab_step(
        x, x0, torch.zeros_like(x), torch.tensor([0.0, 1.0, -1.0], device=device), norm=norm, alpha_max=0.25
    )
    torch.testing.assert_close(moved, 0.75 * x + 0.25 * x0)


def test_moves_of_no_length_weigh_the_same(device):
    """alpha = 1e-8 / (1e-8 + 1e-8), where both points are on the hyperplane or the normal is 0."""
    x, x0 = torch.rand(2, 3, 20, device=device).unbind()
    for norm in NORMS:
        moved = fab_step(x, x0, torch.zeros_like(x), torch.zeros(3, device=device), norm=norm, alpha_max=1.0)
        torch.testing.assert_close(moved, 0.5 * x + 0.5 * x0)


@pytest.mark.parametrize("norm", NORMS)
def test_an_element_outside_of_the_box_leaves_the_way_to_the_others(norm, device):
    """It has no room, rather than less than none."""
    p = torch.tensor([[1.2, 0.5]], device=device, dtype=torch.float64)
    c = torch.tensor([-0.3], device=device, dtype=torch.float64)
    moved = fab_step(p, p, torch.ones_like(p), c, norm=norm, alpha_max=0.0, overshoot=1.0)
    torch.testing.assert_close(moved, torch.tensor([[1.0, 0.8]], device=device, dtype=torch.float64))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("c", "move"), [(0.8, [0.4, 0.0]), (1.0, [0.5, 0.0]), (1.2, [0.5, 0.2])])
def test_l1_move_where_the_search_meets_a_weight(sign, c, move, device):
    """Its bounds are halves of 4: one of them is the weight 2 itself."""
    p = torch.full((1, 2), 0.5, device=device, dtype=torch.float64)
    w = torch.tensor([[2.0, 1.0]], device=device, dtype=torch.float64)
    found = move_to_hyperplane(p, w, torch.tensor([sign * c], device=device, dtype=torch.float64), "l1")
    torch.testing.assert_close(found, -sign * torch.tensor([move], device=device, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_l1_move_where_weights_are_the_same(share, device):
    """The elements of the largest weight go first, all by the same share of their room."""
    w = torch.tensor([[3.0, -3.0, 3.0, -1.0, 1.0, 1.0]], device=device, dtype=torch.float64)
    p = torch.tensor([[0.2, 0.9, 0.5, 0.4, 0.6, 0.7]], device=device, dtype=torch.float64)
    c = -share * (w.abs() * torch.where(w > 0, 1 - p, p)).sum(1)
    moved = fab_step(p, p, w, c, norm="l1", alpha_max=0.0, overshoot=1.0)
    assert_close(moved, reference.fab_step(p, p, w, c, norm="l1", alpha_max=0.0, overshoot=1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_many_pieces(norm, device):
    """Newton's method meets as many pieces as the weights' scales spread over."""
    w = torch.logspace(-6, 3, 4096, device=device, dtype=torch.float64).unsqueeze(0)
    room = torch.logspace(0, -8, 4096, device=device, dtype=torch.float64).unsqueeze(0)
    x = 1 - 0.5 * room  # towards the upper end there is little room for the large weights
    for share in (1e-6, 0.1, 0.5, 0.999999):
        c = -share * (w * (1 - x)).sum(1)
        moved = fab_step(x, x, w, c, norm=norm, overshoot=1.0)
        assert (moved - x).abs().max() > 0
        torch.testing.assert_close(c + (w * (moved - x)).sum(1), torch.zeros_like(c), rtol=0, atol=1e-9)
        torch.testing.assert_close(moved, reference.fab_step(x, x, w, c, norm=norm, overshoot=1.0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_nan_and_infinity_make_the_sample_nan(norm, where, value, device):
    arguments = list(inputs((6, 40), device, torch.float32))
    arguments[where][(4, 17)[: arguments[where].dim()]] = value
    result = fab_step(*arguments, norm=norm)
    assert result.isnan().all(1).tolist() == [False, False, False, False, True, False]
    assert result.isnan().any(1).tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("norm", NORMS)
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
def test_memory_formats(norm, arrange, arranged, device):
    plain = inputs((4, 3, 6, 5), device, torch.float32)
    mixed = [arrange(t) if i in arranged else t for i, t in enumerate(plain)]
    actual = fab_step(*mixed, norm=norm)
    torch.testing.assert_close(actual, fab_step(*plain, norm=norm), rtol=1e-5, atol=1e-6)
    keeps = 0 in arranged and mixed[0].is_contiguous(memory_format=torch.channels_last)
    assert actual.is_contiguous(memory_format=torch.channels_last if keeps else torch.contiguous_format)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_opcheck(number, device):
    x, x0, normal, difference = inputs((4, 3, 6, 5), device, torch.float32)
    step = torch.ops.scorematch.fab_step.default
    opcheck(step, (x, x0, normal, difference, number, 0.1, 1.05, 0.0, 1.0))
    opcheck(step, (x.to(memory_format=torch.channels_last), x0, normal, difference, number, 0.1, 1.05, 0.0, 1.0))


def test_no_gradient_passes_through(device):
    x, *others = inputs((2, 3), device, torch.float32)
    assert not fab_step(x.requires_grad_(), *others, norm="l2").requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": torch.rand(2, 4)}, ValueError, r"x0 has shape \[2, 4\] but x has shape \[2, 3\]"),
        ({"normal": torch.rand(2, 3).double()}, TypeError, r"normal is torch.float64 but x is torch.float32"),
        ({"difference": torch.rand(3)}, ValueError, r"difference has shape \[3\] but x has shape \[2, 3\]: expected \[2\]"),
        ({"difference": torch.rand(2).double()}, TypeError, r"difference is torch.float64 but x is torch.float32"),
        ({"difference": 0.1}, TypeError, r"difference must be a torch.Tensor, got float"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\], but must be a batch"),
        ({"norm": "l3"}, ValueError, r"norm must be one of \{linf, l2, l1\}, got 'l3'"),
        ({"alpha_max": -0.1}, ValueError, r"alpha_max must be in \[0, 1\], got -0.1"),
        ({"overshoot": math.inf}, ValueError, r"overshoot must be finite and at least 0, got inf"),
        ({"upper": math.inf}, ValueError, r"the box must be finite with lower less than upper, got lower=0.0 and upper=inf"),
        ({"lower": 2.0}, ValueError, r"the box must be finite with lower less than upper, got lower=2.0 and upper=1.0"),
        ({"lower": "0"}, TypeError, r"lower must be a number, got str"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    tensors = {name: torch.rand(2, 3) for name in ("x", "x0", "normal")}
    with pytest.raises(error, match=message):
        fab_step(**{**tensors, "difference": torch.rand(2), "norm": "linf", **change})
