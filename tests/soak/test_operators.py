"""Every operator on random inputs: what the reference says in float64, and a clear error for what does not fit."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scorematch import ops, reference

from .drawing import DTYPES, IMAGES, SHAPES, SIZES, boxes, examples, misfits, tensors

pytestmark = pytest.mark.soak

NORMS = st.sampled_from(["linf", "l2"])
Arguments = dict[str, Any]
ROUNDING = {torch.float32: 3e-6, torch.float64: 1e-13}


@st.composite
def steps(draw: Any) -> Arguments:
    shape, dtype, box = draw(SHAPES), draw(DTYPES), draw(boxes())
    names = ("x", "grad", "x0")
    return {
        **{name: draw(tensors(shape, dtype)) for name in names},
        "norm": draw(NORMS),
        "step_size": draw(st.one_of(st.just(0.0), SIZES)),
        "eps": draw(st.one_of(SIZES, st.just(math.inf))),
        "lower": box[0],
        "upper": box[1],
    }


@st.composite
def projections(draw: Any) -> Arguments:
    drawn = draw(steps())
    return {name: value for name, value in drawn.items() if name not in ("grad", "step_size")}


@st.composite
def apgd_steps(draw: Any) -> Arguments:
    drawn = draw(steps())
    x, count = drawn["x"].contiguous(), len(drawn["x"])
    like = {name: draw(tensors(tuple(x.shape), x.dtype)).contiguous() for name in ("x_prev", "best_x", "best_grad")}
    flags = {
        name: torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
        for name in ("improved", "restart")
    }
    del drawn["step_size"]
    return {
        **drawn,
        "x": x,
        "eps": min(drawn["eps"], 1e12),
        **like,
        **flags,
        "step_size": draw(tensors((count,), x.dtype)).abs().contiguous(),
        "momentum": draw(st.sampled_from([0.0, 0.75, 1.0])),
    }


@st.composite
def l1_projections(draw: Any) -> Arguments:
    """x0 lies in the box."""
    drawn = draw(projections())
    del drawn["norm"]
    return {**drawn, "x0": drawn["x0"].clamp(drawn["lower"], drawn["upper"])}


@st.composite
def l1_steps(draw: Any) -> Arguments:
    drawn = draw(l1_projections())
    x = drawn["x"]
    features = max(math.prod(x.shape[1:]), 1)
    moving = draw(st.lists(st.integers(0, features), min_size=len(x), max_size=len(x)))
    return {
        **drawn,
        "grad": draw(tensors(tuple(x.shape), x.dtype)),
        "step_size": draw(tensors((len(x),), x.dtype)).abs().contiguous(),
        "moving": torch.tensor(moving, dtype=torch.int64),
    }


@st.composite
def starts(draw: Any) -> Arguments:
    drawn = draw(projections())
    x = drawn.pop("x0")
    radius = None
    if drawn["norm"] == "l2" and draw(st.booleans()):
        radius = torch.rand(len(x), dtype=x.dtype)
    return {
        **drawn,
        "x": x,
        "noise": draw(tensors(tuple(x.shape), x.dtype)),
        "radius": radius,
        "eps": min(drawn["eps"], 1e12),
    }


@st.composite
def divergences(draw: Any) -> Arguments:
    rows, classes, dtype = draw(st.integers(0, 4)), draw(st.integers(2, 40)), draw(DTYPES)
    logits = draw(tensors((rows, classes), dtype)).clamp(-1e4, 1e4)
    if draw(st.booleans()):
        target: Tensor = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows + classes))
    else:
        target = draw(tensors((rows, classes), dtype)).clamp(-50, 50).double().softmax(1).to(dtype)
    return {
        "logits": logits,
        "target": target,
        "kind": draw(st.sampled_from(list(ops.DIVERGENCES))),
        "clip": draw(st.sampled_from([0.0, 0.1])),
    }


@st.composite
def logit_divergences(draw: Any) -> Arguments:
    drawn = draw(divergences())
    target = draw(tensors(tuple(drawn["logits"].shape), drawn["logits"].dtype)).clamp(-1e4, 1e4)
    return {"logits": drawn["logits"], "target_logits": target, "kind": drawn["kind"], "clip": drawn["clip"]}


@st.composite
def score_steps(draw: Any) -> Arguments:
    shape, dtype, classes = draw(SHAPES), draw(DTYPES), draw(st.integers(2, 12))
    return {
        "weights": draw(tensors((shape[0], classes), dtype)),
        "scores": draw(tensors((shape[0], classes, *shape[1:]), dtype)),
        "grad": draw(tensors(shape, dtype)),
    }


@st.composite
def line_integrals(draw: Any) -> Arguments:
    drawn = draw(score_steps())
    scores = drawn["scores"]
    return {
        "log_p": drawn["weights"].clamp(-1e4, 1e4).log_softmax(1) if len(scores) else drawn["weights"],
        "scores0": scores,
        "scores1": draw(tensors(tuple(scores.shape), scores.dtype)),
        "move": drawn["grad"],
    }


@st.composite
def fab_steps(draw: Any) -> Arguments:
    shape, dtype, norm = draw(SHAPES), torch.float64, draw(st.sampled_from(["linf", "l2", "l1"]))
    inside = [
        torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) for _ in "ab"
    ]
    return {
        "x": inside[0],
        "x0": inside[1],
        "normal": draw(tensors(shape, dtype)),
        "difference": draw(tensors((shape[0],), dtype)).contiguous(),
        "norm": norm,
        "alpha_max": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "overshoot": draw(st.sampled_from([1.0, 1.05])),
    }


@st.composite
def squares(draw: Any) -> Arguments:
    shape, dtype, box = draw(IMAGES), draw(DTYPES), draw(boxes())
    side = draw(st.integers(1, min(shape[2:])))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    corner = torch.stack(
        [torch.randint(0, size - side + 1, (shape[0],), generator=random) for size in shape[2:]], dim=1
    )
    return {
        "best": draw(tensors(shape, dtype)),
        "x0": draw(tensors(shape, dtype)),
        "corner": corner,
        "sign": 1.0 - 2.0 * torch.randint(0, 2, shape[:2], generator=random).to(dtype),
        "side": side,
        "eps": draw(SIZES),
        "lower": box[0],
        "upper": box[1],
    }


@st.composite
def squares_l2(draw: Any) -> Arguments:
    drawn = draw(squares())
    side, count, random = drawn.pop("side"), len(drawn["best"]), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    best, x0 = (drawn[name].sign() * drawn[name].abs().clamp(1e-3, 1e3) for name in ("best", "x0"))
    return {
        **drawn,
        "best": best,
        "x0": x0,
        "eps": min(max(drawn["eps"], 1e-3), 1e3),
        "corner": torch.cat([drawn["corner"], drawn["corner"].flip(0)], dim=1),
        "pattern": torch.rand(side, side, generator=random, dtype=drawn["best"].dtype) + 0.1,
        "transpose": torch.randint(0, 2, (count,), generator=random).bool(),
    }


@st.composite
def keys(draw: Any) -> Arguments:
    samples = draw(st.lists(st.integers(0, 2**32 - 1), max_size=5))
    return {
        "samples": torch.tensor(samples, dtype=torch.int64),
        "count": draw(st.integers(0, 40)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "stream": draw(st.integers(0, 2**63 - 1)),
        "dtype": draw(DTYPES),
    }


OPERATORS: dict[str, st.SearchStrategy[Arguments]] = {
    "pgd_step": steps(),
    "project": projections(),
    "apgd_step": apgd_steps(),
    "l1_project": l1_projections(),
    "l1_step": l1_steps(),
    "random_start": starts(),
    "divergence": divergences(),
    "logit_divergence": logit_divergences(),
    "score_step": score_steps(),
    "score_line_integral": line_integrals(),
    "fab_step": fab_steps(),
    "square_linf": squares(),
    "square_l2": squares_l2(),
    "keyed_uniform": keys(),
}
# A projection is a step of length 0.
PROJECTIONS: dict[str, Callable[[Tensor], Arguments]] = {
    "project": lambda x: {"grad": torch.zeros_like(x), "step_size": 0.0},
    "l1_project": lambda x: {
        "grad": torch.zeros_like(x),
        "step_size": x.new_zeros(len(x)),
        "moving": torch.zeros(len(x), dtype=torch.int64),
    },
}
IN_PLACE = {"apgd_step": ("x", "x_prev", "best_x", "best_grad")}


def test_every_operator_is_here() -> None:
    assert set(OPERATORS) == {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}


def precise(arguments: Arguments) -> Arguments:
    """The same in float64, contiguous, and copied."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.double() if value.is_floating_point() else value).contiguous().clone()

    return {name: of(value) for name, value in arguments.items()}


def call(function: Callable, name: str, arguments: Arguments) -> list[Tensor]:
    """What the operator returns, or changes."""
    given = {key: value.clone() if key in IN_PLACE.get(name, ()) else value for key, value in arguments.items()}
    if name in PROJECTIONS and function is not getattr(ops, name):
        given |= PROJECTIONS[name](given["x"])
    result = function(**given)
    return [given[key] for key in IN_PLACE[name]] if name in IN_PLACE else [result]


def error_allowed(name: str, arguments: Arguments) -> float:
    """Rounding of the numbers that meet in the result: so much of the largest of them."""
    floats = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    rounding = ROUNDING[floats[0].dtype] if floats else 0.0
    if name in ("divergence", "logit_divergence"):
        scale = max([1.0, *(v.abs().max().item() for v in floats if v.numel())])
        allowed = 50 * rounding * scale
        return math.sqrt(allowed) if arguments["kind"] in ("js_distance", "l2") else allowed
    if name == "score_step":
        w, s, g = (arguments[key].double() for key in ("weights", "scores", "grad"))
        sums = reference.score_step(w.abs(), s.abs(), g.abs())
        return 30 * rounding * (sums.max().item() if sums.numel() else 0.0)
    if name == "score_line_integral":
        log_p, a, b, move = (arguments[key].double() for key in ("log_p", "scores0", "scores1", "move"))
        moved = reference.score_step(torch.ones_like(log_p), a.abs() + b.abs(), torch.zeros_like(move)) * move.abs()
        rest = log_p[log_p.isfinite()].abs()
        largest = moved.reshape(len(moved), -1).sum(1).max().item() if moved.numel() else 0.0
        return 50 * rounding * (largest + (rest.max().item() if rest.numel() else 0.0) + 1)
    numbers = [v for v in arguments.values() if isinstance(v, float) and math.isfinite(v)]
    sizes = [v.abs().max().item() for v in floats if v.numel()] + [abs(v) for v in numbers]
    if name in ("pgd_step", "apgd_step", "random_start", "project", "l1_step", "l1_project"):
        used = ["x", "x0", "x_prev", "best_x", "step_size"]
        sizes = [
            *(
                arguments[k].abs().max().item()
                for k in used
                if isinstance(arguments.get(k), Tensor) and arguments[k].numel()
            ),
            *numbers,
        ]
        if name == "random_start" and arguments["norm"] == "linf":
            sizes.append(1.0)
    if name == "apgd_step":
        sizes += (
            [arguments["grad"].abs().max().item(), arguments["best_grad"].abs().max().item()]
            if arguments["x"].numel()
            else []
        )
    return 30 * rounding * max([1e-30, *sizes])


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "fab_step"])
def test_operators_are_the_reference(name: str) -> None:
    @examples(quick=25, soak=10_000)
    @given(OPERATORS[name])
    def check(arguments: Arguments) -> None:
        found = call(getattr(ops, name), name, arguments)
        plain = getattr(reference, {"project": "pgd_step", "l1_project": "l1_step"}.get(name, name))
        expected = call(plain, name, precise(arguments))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            allowed = error_allowed(name, arguments)
            torch.testing.assert_close(
                ours.double(), theirs.double(), rtol=1e-4 if ours.dtype == torch.float32 else 1e-9, atol=allowed
            )

    check()


def test_fab_steps_are_the_reference() -> None:
    @examples(quick=25, soak=10_000)
    @given(OPERATORS["fab_step"])
    def check(arguments: Arguments) -> None:
        found, expected = (call(f, "fab_step", arguments)[0] for f in (ops.fab_step, reference.fab_step))
        assert bool(((found >= 0) & (found <= 1)).all())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    check()


@pytest.mark.parametrize("name", OPERATORS)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    """An error of Python that names the argument, or a result; never anything else."""
    operator = getattr(ops, name)

    @examples(quick=25, soak=3000)
    @given(OPERATORS[name], st.data())
    def check(arguments: Arguments, data: st.DataObject) -> None:
        changed = data.draw(st.sampled_from(sorted(arguments)))
        arguments = {**arguments, changed: data.draw(misfits(arguments[changed]))}
        try:
            operator(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            assert changed in str(error), f"{name}, {changed}: {error}"  # noqa: PT017

    check()
