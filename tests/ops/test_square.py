"""square_linf and square_l2 against scorematch.reference."""

# ruff: noqa: E501 (tables of messages)

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import square_l2, square_linf

from .conftest import assert_close

SHAPES = [(6, 3, 8, 8), (5, 1, 6, 9), (7, 3, 9, 5), (3, 3, 32, 32), (2, 40, 7, 4), (0, 3, 4, 4), (3, 0, 4, 4)]
SIDES = {"largest": min, "one": lambda h, w: 1, "three": lambda h, w: 3}
Move = Callable[..., Tensor]


def inputs(shape: tuple[int, ...], side: int, corners: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    samples, channels, height, width = shape
    x0 = torch.rand(shape, dtype=torch.float64)
    best = (x0 + 0.1 * (2 * torch.rand_like(x0) - 1)).clamp(0, 1)
    places = (
        torch.rand(samples, corners) * torch.tensor([height - side + 1, width - side + 1] * (corners // 2))
    ).long()
    sign = torch.randn(samples, channels).sign()
    moved = {"best": best, "x0": x0, "sign": sign}
    return {**{name: t.to(device, dtype) for name, t in moved.items()}, "corner": places.to(device)}


def linf_case(shape: tuple[int, ...], side: int, device: str, dtype: torch.dtype) -> dict:
    return {**inputs(shape, side, 2, device, dtype), "side": side, "eps": 0.1}


def l2_case(shape: tuple[int, ...], side: int, device: str, dtype: torch.dtype) -> dict:
    pattern = torch.rand(side, side, dtype=torch.float64)  # of length .7: length 1 may cancel a 1×1 window to rounding
    transpose = (torch.arange(shape[0]) % 2 == 1).to(device)
    return {
        **inputs(shape, side, 4, device, dtype),
        "pattern": (0.7 * pattern / pattern.norm()).to(device, dtype),
        "transpose": transpose,
        "eps": 0.06 * math.sqrt(max(1, math.prod(shape[1:]))),
    }


CASES = [(square_linf, reference.square_linf, linf_case), (square_l2, reference.square_l2, l2_case)]
by_norm = pytest.mark.parametrize(("move", "plain", "case"), CASES, ids=["linf", "l2"])


def exact(arguments: dict) -> dict:
    return {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}


@by_norm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-math.inf, math.inf), (0.25, math.inf)], ids=str)
def test_move_is_the_reference(move, plain, case, shape, side, box, device_dtype):
    arguments = case(shape, SIDES[side](*shape[2:]), *device_dtype)
    limits = {"lower": box[0], "upper": box[1]}
    actual = move(**arguments, **limits)
    assert actual.dtype == arguments["best"].dtype
    assert actual.shape == shape
    assert_close(actual, plain(**exact(arguments), **limits))


@by_norm
def test_move_is_inside_when_the_last_is_outside_the_ball_by_far(move, plain, case, device):
    """‖delta‖ > eps: nothing to spare, and the whole is brought back."""
    arguments = case((6, 3, 8, 8), 3, device, torch.float32)
    arguments["best"] = arguments["x0"] + torch.randn_like(arguments["x0"])
    assert_close(move(**arguments), plain(**exact(arguments)))


def test_linf_move_is_the_reference_bit_for_bit(device):
    arguments = linf_case((5, 3, 32, 32), 11, device, torch.float32)
    assert torch.equal(square_linf(**arguments), reference.square_linf(**arguments))


def test_linf_changes_nothing_outside_the_window(device):
    arguments = linf_case((4, 3, 16, 16), 5, device, torch.float32)
    arguments["best"] = reference.square_linf(**arguments)  # inside ball and box
    arguments["corner"] = (arguments["corner"] + 4).clamp(max=11)
    changed = square_linf(**arguments) != arguments["best"]
    for n, (row, column) in enumerate(arguments["corner"].tolist()):
        assert changed[n, :, row : row + 5, column : column + 5].any()
        changed[n, :, row : row + 5, column : column + 5] = False
    assert not changed.any()


@by_norm
@pytest.mark.parametrize("corner", [-1, -(2**62), 7, 2**62])
def test_a_corner_outside_the_image_is_clamped(move, plain, case, corner, device):
    arguments = case((3, 3, 8, 6), 3, device, torch.float32)
    arguments["corner"][1] = corner
    actual = move(**arguments)
    height, width = 5, 3
    arguments["corner"][:, ::2].clamp_(0, height)
    arguments["corner"][:, 1::2].clamp_(0, width)
    assert_close(actual, plain(**exact(arguments)))


@by_norm
@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
    ],
    ids=["channels_last", "transposed", "strided"],
)
@pytest.mark.parametrize("arranged", [("best", "x0"), ("best",), ("x0",)], ids=str)
def test_memory_formats(move, plain, case, arrange, arranged, device):
    arguments = case((4, 3, 9, 7), 4, device, torch.float32)
    expected = plain(**exact(arguments))
    for name in arranged:
        arguments[name] = arrange(arguments[name])
    arguments["sign"] = arguments["sign"].t().contiguous().t()
    arguments["corner"] = arguments["corner"].t().contiguous().t()
    if "pattern" in arguments:
        arguments["pattern"] = arguments["pattern"].t().contiguous().t()
    keeps = arguments["best"].is_contiguous(memory_format=torch.channels_last)
    actual = move(**arguments)
    assert_close(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last if keeps else torch.contiguous_format)


@by_norm
@pytest.mark.parametrize("where", ["best", "x0"])
def test_nan_stays_nan(move, plain, case, where, device):
    arguments = case((4, 3, 8, 8), 3, device, torch.float32)
    arguments[where][2, 1, 4, 7] = math.nan
    result = move(**arguments)
    assert result.isnan().flatten(1).any(1).tolist() == [False, False, True, False]
    assert result[2, 1, 4, 7].isnan()
    assert result[2].isnan().all() == (move is square_l2)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(range(2)), st.integers(1, 7), st.floats(1e-3, 5))
def test_candidate_is_in_ball_and_box(seed, number, side, eps):
    move, _, case = CASES[number]
    torch.manual_seed(seed)
    arguments = {**case((3, 3, 9, 7), side, "cpu", torch.float32), "eps": eps}
    candidate = move(**arguments)
    offset = (candidate - arguments["x0"]).abs().flatten(1)
    distance = offset.amax(1) if move is square_linf else offset.norm(dim=1)
    assert (distance <= eps * (1 + 1e-5) + 1e-6).all()
    assert candidate.min() >= 0
    assert candidate.max() <= 1


def test_l2_move_is_on_the_sphere_and_empties_the_second_window(device):
    arguments = {**l2_case((4, 3, 12, 12), 3, device, torch.float64), "lower": -math.inf, "upper": math.inf}
    arguments["corner"] = torch.tensor([[0, 0, 5, 5]] * 4, device=device)
    moved = square_l2(**arguments) - arguments["x0"]
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full_like(moved[:, 0, 0, 0], arguments["eps"]))
    assert (moved[:, :, 5:8, 5:8] == 0).all()
    assert (moved[:, :, :3, :3] != 0).all()


def test_l2_move_of_nothing_is_nothing(device):
    """The second window holds the whole perturbation; what rounding leaves outside of it may be below 0."""
    arguments = l2_case((64, 3, 8, 8), 4, device, torch.float32)
    delta = torch.zeros_like(arguments["x0"])
    delta[:, :, :4, :4] = 0.05 * torch.randn(64, 3, 4, 4, device=device)
    arguments |= {"best": arguments["x0"] + delta, "corner": torch.tensor([[4, 4, 0, 0]] * 64, device=device)}
    arguments["pattern"] = torch.zeros_like(arguments["pattern"])
    assert torch.equal(square_l2(**arguments), arguments["x0"])


@by_norm
def test_opcheck(move, plain, case, device):
    arguments = case((4, 3, 8, 6), 3, device, torch.float32)
    order = ["best", "x0", "corner", "sign", "side", "pattern", "transpose", "eps"]
    operator = getattr(torch.ops.scorematch, move.__name__).default
    opcheck(operator, (*(arguments[name] for name in order if name in arguments), 0.0, 1.0))
    arguments["best"] = arguments["best"].to(memory_format=torch.channels_last)
    opcheck(operator, (*(arguments[name] for name in order if name in arguments), 0.0, 1.0))


@by_norm
def test_no_gradient_passes_through(move, plain, case, device):
    arguments = case((2, 3, 8, 8), 3, device, torch.float32)
    arguments["best"].requires_grad_()
    assert not move(**arguments).requires_grad


@by_norm
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"best": torch.rand(2, 3, 8)}, ValueError, r"best has shape \[2, 3, 8\], expected \[N, C, H, W\]"),
        ({"x0": torch.rand(2, 3, 8, 7)}, ValueError, r"x0 has shape \[2, 3, 8, 7\] but best has shape \[2, 3, 8, 8\]"),
        ({"corner": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"corner has shape \[2, 3\] but best has shape .*: expected \[2, [24]\]"),
        ({"corner": torch.zeros(2, 2)}, TypeError, r"corner is torch.float32, expected torch.int64"),
        ({"corner": [0, 0]}, TypeError, r"corner must be a torch.Tensor, got list"),
        ({"sign": torch.ones(2, 4)}, ValueError, r"sign has shape \[2, 4\] but best has shape \[2, 3, 8, 8\]: expected \[2, 3\]"),
        ({"sign": torch.ones(2, 3).long()}, TypeError, r"sign is torch.int64 but best is torch.float32"),
        ({"eps": -1.0}, ValueError, r"eps must be greater than 0, got -1.0"),
        ({"lower": 2.0}, ValueError, r"the box is empty"),
    ],
)  # fmt: skip
def test_bad_input(move, plain, case, change, error, message):
    with pytest.raises(error, match=message):
        move(**{**case((2, 3, 8, 8), 3, "cpu", torch.float32), **change})


@pytest.mark.parametrize(("move", "case"), [(square_linf, linf_case), (square_l2, l2_case)])
def test_a_ball_without_an_end_is_refused(move, case):
    with pytest.raises(ValueError, match=r"eps must be finite, got inf"):
        move(**{**case((2, 3, 8, 8), 3, "cpu", torch.float32), "eps": math.inf})


@pytest.mark.parametrize("side", [0, 9, -1])
def test_bad_side(side):
    with pytest.raises(ValueError, match=rf"side must be between 1 and the image's 8, got {side}"):
        square_linf(**{**linf_case((2, 3, 8, 10), 3, "cpu", torch.float32), "side": side})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": torch.ones(2, 3)}, ValueError, r"pattern has shape \[2, 3\], expected \[side, side\]"),
        ({"pattern": torch.ones(9, 9)}, ValueError, r"side must be between 1 and the image's 8, got 9"),
        ({"pattern": torch.ones(3, 3).double()}, TypeError, r"pattern is torch.float64 but best is torch.float32"),
        ({"transpose": torch.ones(2)}, TypeError, r"transpose is torch.float32, expected torch.bool"),
        ({"transpose": torch.ones(3).bool()}, ValueError, r"transpose has shape \[3\] but best has shape .*: expected \[2\]"),
    ],
)  # fmt: skip
def test_bad_l2_input(change, error, message):
    with pytest.raises(error, match=message):
        square_l2(**{**l2_case((2, 3, 8, 8), 3, "cpu", torch.float32), **change})
