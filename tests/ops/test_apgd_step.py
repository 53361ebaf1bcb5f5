"""apgd_step against scorematch.reference."""

# ruff: noqa: E501 (tables of messages)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import apgd_step

from .conftest import assert_close

NORMS = ["linf", "l2"]
EPS = {"linf": 0.1, "l2": 0.7}
SHAPES = [(7,), (5, 1), (3, 16), (8, 3, 5, 7), (4, 3, 4, 5, 6), (6, 3, 33, 31), (0, 3, 4, 4), (3, 0)]
NAMES = ["x", "x_prev", "x0", "grad", "best_x", "best_grad", "step_size", "improved", "restart"]
WRITTEN = ["x", "x_prev", "best_x", "best_grad"]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Points in and around the ball, one zero gradient, every combination of the flags if there are enough samples."""
    x0 = torch.rand(shape, dtype=torch.float64)
    x, x_prev, best_x = (x0 + 0.15 * torch.randn_like(x0) for _ in range(3))
    grad, best_grad = (torch.randn_like(x0) * (torch.rand_like(x0) > 0.2) for _ in range(2))
    grad[2:3], best_grad[3:4] = 0, 0
    step_size = torch.rand(shape[0], dtype=torch.float64) * 0.3
    flags = torch.arange(shape[0])
    values = (x, x_prev, x0, grad, best_x, best_grad, step_size)
    tensors = {name: value.to(device, dtype) for name, value in zip(NAMES[:7], values, strict=True)}
    tensors["step_size"] = tensors["step_size"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return {**tensors, "improved": (flags % 2 == 1).to(device), "restart": (flags // 2 % 2 == 1).to(device)}


def stepped(arguments: dict[str, Tensor], function=apgd_step, double: bool = False, **options) -> dict[str, Tensor]:
    """The written tensors after a step on copies."""
    copies = {name: t.clone() for name, t in arguments.items()}
    if double:
        copies = {name: t.double() if t.is_floating_point() else t for name, t in copies.items()}
    assert function(**copies, **options) is None
    return {name: copies[name] for name in WRITTEN}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("momentum", [0.75, 1.0])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-math.inf, math.inf), (0.25, math.inf)], ids=str)
def test_step_is_the_reference(shape, norm, momentum, box, device_dtype):
    arguments = inputs(shape, *device_dtype)
    options = {"norm": norm, "eps": EPS[norm], "momentum": momentum, "lower": box[0], "upper": box[1]}
    actual = stepped(arguments, **options)
    expected = stepped(arguments, reference.apgd_step, double=True, **options)
    for name in WRITTEN:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize("shape", [(8, 3, 32, 32), (5, 13)], ids=str)
@pytest.mark.parametrize("momentum", [0.75, 1.0, 0.3])
def test_float32_is_the_reference_bit_for_bit(shape, momentum, device):
    arguments = inputs(shape, device, torch.float32)
    options = {"norm": "linf", "eps": 8 / 255, "momentum": momentum}
    actual, expected = stepped(arguments, **options), stepped(arguments, reference.apgd_step, **options)
    for name in WRITTEN:
        assert torch.equal(actual[name], expected[name])


def test_best_point_is_copied_bit_for_bit(device_dtype):
    for norm in NORMS:
        arguments = inputs((8, 3, 5, 7), *device_dtype)
        result = stepped(arguments, norm=norm, eps=0.3, momentum=0.75)
        improved = arguments["improved"]
        for best, now in (("best_x", "x"), ("best_grad", "grad")):
            assert torch.equal(result[best][improved], arguments[now][improved])
            assert torch.equal(result[best][~improved], arguments[best][~improved])
        start = torch.where(arguments["restart"].reshape(-1, 1, 1, 1), result["best_x"], arguments["x"])
        assert torch.equal(result["x_prev"], start)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(norm, memory_format, device):
    arguments = inputs((8, 3, 6, 5), device, torch.float32)
    options = {"norm": norm, "eps": EPS[norm], "momentum": 0.75}
    expected = stepped(arguments, **options)
    for name in WRITTEN:
        arguments[name] = arguments[name].to(memory_format=memory_format)
    arguments["x0"] = arguments["x0"].transpose(2, 3).contiguous().transpose(2, 3)
    arguments["grad"] = torch.stack([arguments["grad"]] * 2, dim=-1)[..., 0]
    arguments["step_size"] = torch.stack([arguments["step_size"]] * 2, dim=-1)[..., 0]
    before = {name: t.data_ptr() for name, t in arguments.items()}
    apgd_step(**arguments, **options)
    for name in WRITTEN:
        assert arguments[name].data_ptr() == before[name]
        torch.testing.assert_close(arguments[name], expected[name], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("where", ["x", "grad", "x0", "x_prev", "step_size"])
def test_nan_stays_nan(norm, where, device):
    arguments = inputs((8, 40), device, torch.float32)
    arguments["restart"][:] = False
    arguments[where][(5, 17)[: arguments[where].dim()]] = math.nan
    result = stepped(arguments, norm=norm, eps=0.2, momentum=0.75)["x"]
    assert not result[:5].isnan().any()
    assert not result[6:].isnan().any()
    assert result[5, 17].isnan()
    assert result[5].isnan().all() == (norm == "l2" or where == "step_size")


def test_nan_at_the_best_point_matters_only_to_a_restart(device):
    for norm in NORMS:
        arguments = inputs((8, 40), device, torch.float32)
        arguments["best_x"][:] = math.nan
        result = stepped(arguments, norm=norm, eps=0.2, momentum=0.75)["x"]
        expected = arguments["restart"] & ~arguments["improved"]
        assert result.isnan().any(1).tolist() == expected.tolist()


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from(NORMS),
    st.floats(1e-3, 2),
    st.floats(0, 1),
    st.floats(-2, 0.4),
    st.floats(0.6, 3),
)
def test_next_point_is_in_ball_and_box(seed, norm, eps, momentum, lower, upper):
    torch.manual_seed(seed)
    arguments = inputs((4, 29), "cpu", torch.float32)
    arguments["x0"].clamp_(lower, upper)
    result = stepped(arguments, norm=norm, eps=eps, momentum=momentum, lower=lower, upper=upper)["x"]
    offset = (result - arguments["x0"]).abs()
    distance = offset.amax(1) if norm == "linf" else offset.norm(dim=1)
    assert (distance <= eps * (1 + 1e-5) + 1e-6).all()
    assert (result >= torch.tensor(lower)).all()
    assert (result <= torch.tensor(upper)).all()


@pytest.mark.parametrize("number", [0, 1])
def test_opcheck(number, device):
    arguments = inputs((8, 3, 6, 5), device, torch.float32)
    step = torch.ops.scorematch.apgd_step.default
    opcheck(step, (*arguments.values(), number, 0.3, 0.75, 0.0, 1.0))
    channels_last = {n: t.to(memory_format=torch.channels_last) if n in WRITTEN else t for n, t in arguments.items()}
    opcheck(step, (*channels_last.values(), number, 0.3, 0.75, 0.0, 1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_under_compile(norm, device):
    torch._dynamo.reset()
    arguments = inputs((8, 3, 6, 5), device, torch.float32)

    def two_steps(**arguments: Tensor) -> None:
        apgd_step(**arguments, norm=norm, eps=0.3, momentum=1.0)
        arguments["grad"] = torch.cos(9 * arguments["x"])
        apgd_step(**arguments, norm=norm, eps=0.3, momentum=0.75)

    actual = stepped(arguments, torch.compile(two_steps, fullgraph=True, backend="aot_eager"))
    expected = stepped(arguments, two_steps)
    for name in WRITTEN:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_graph_that_saved_x_notices_the_step(device):
    """What autograd saved must not change under it in silence."""
    arguments = inputs((8, 5), device, torch.float32)
    weight = torch.ones(5, device=device, requires_grad=True)
    loss = (arguments["x"] * weight).sum()
    apgd_step(**arguments, norm="linf", eps=0.3, momentum=0.75)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode(device):
    with torch.inference_mode():
        arguments = inputs((8, 5), device, torch.float32)
        before = arguments["x"].clone()
        apgd_step(**arguments, norm="l2", eps=0.3, momentum=0.75)
        assert not torch.equal(before, arguments["x"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.rand(2, 4)}, ValueError, r"grad has shape \[2, 4\] but x has shape \[2, 3\]"),
        ({"x_prev": torch.rand(3, 2).t()}, ValueError, r"x_prev is written in place and must be in the memory format of x: x has strides \(3, 1\), x_prev \(1, 2\)"),
        ({"x": torch.rand(3, 2).t()}, ValueError, r"x is written in place and must be contiguous or channels_last, got strides \(1, 2\)"),
        ({"best_x": torch.rand(2, 3).double()}, TypeError, r"best_x is torch.float64 but x is torch.float32"),
        ({"x": torch.rand(2, 3).half()}, TypeError, r"x is torch.float16; on the CPU"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\], but must be a batch"),
        ({"step_size": 0.1}, TypeError, r"step_size must be a torch.Tensor, got float"),
        ({"step_size": torch.rand(3)}, ValueError, r"step_size has shape \[3\] but x has shape \[2, 3\]: expected \[2\]"),
        ({"step_size": torch.rand(2).half()}, TypeError, r"step_size is torch.float16 but x is torch.float32"),
        ({"improved": torch.ones(2)}, TypeError, r"improved is torch.float32, expected torch.bool"),
        ({"restart": torch.ones(3).bool()}, ValueError, r"restart has shape \[3\] but x has shape \[2, 3\]: expected \[2\]"),
        ({"restart": torch.ones(2, device="meta").bool()}, ValueError, r"restart is on meta but x is on cpu"),
        ({"norm": "l1"}, ValueError, r"norm must be one of \{linf, l2\}, got 'l1'"),
        ({"eps": 0}, ValueError, r"eps must be greater than 0, got 0"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ({"lower": 1.0}, ValueError, r"the box is empty"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    points = {name: torch.rand(2, 3) for name in NAMES[:6]}
    per_sample = {"step_size": torch.rand(2), "improved": torch.ones(2).bool(), "restart": torch.ones(2).bool()}
    with pytest.raises(error, match=message):
        apgd_step(**{**points, **per_sample, "norm": "linf", "eps": 0.1, "momentum": 0.75, **change})


@pytest.mark.parametrize(
    ("first", "second"), [("x", "x_prev"), ("x", "best_x"), ("x_prev", "x0"), ("best_grad", "grad")]
)
def test_shared_memory_is_refused(first, second):
    arguments = inputs((4, 3), "cpu", torch.float32)
    arguments[second] = arguments[first]
    with pytest.raises(ValueError, match=r"^\w+ is written in place and shares memory with \w+$"):
        apgd_step(**arguments, norm="linf", eps=0.1, momentum=0.75)
