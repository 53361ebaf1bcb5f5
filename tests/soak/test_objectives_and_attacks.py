"""Every objective and attack on random networks, data and settings: inside B(x), finite, and left as it was found."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import scorematch as sm
from scorematch.attacks import APGD, FAB, Square

from .drawing import examples, misfits

pytestmark = pytest.mark.soak

CLASSES = 3
Arguments = dict[str, Any]


@st.composite
def networks(draw: Any, shape: tuple[int, ...]) -> nn.Module:
    """A small classifier; its logits are of any size."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    width = math.prod(shape)
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.SiLU]))
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(width, 8)]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm1d(8))
    network = nn.Sequential(*layers, activation(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        network[-1].weight *= 10.0 ** draw(st.integers(-3, 3))  # type: ignore[operator]
    return network


@st.composite
def problems(draw: Any, images: bool = False) -> Arguments:
    """A network, points of the box with labels, and a ball."""
    shape = draw(st.sampled_from([(1, 4, 4), (3, 5, 3)] if images else [(5,), (1, 4, 4)]))
    count = draw(st.integers(2, 5))
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10_000))))
    x = x.round() if draw(st.booleans()) else x  # corners of the box
    eps = draw(st.sampled_from([1e-6, 0.01, 0.3, 0.99]))
    return {
        "model": draw(networks(shape)),
        "x": x,
        "y": torch.arange(count) % CLASSES,
        "threat_model": sm.ThreatModel(draw(st.sampled_from(["linf", "l2", "l1"])), eps, step_size=eps / 3),
    }


@st.composite
def objectives(draw: Any, name: str) -> Arguments:
    drawn = draw(problems())
    x = drawn["x"]
    drawn["divergence"] = draw(st.sampled_from(list(sm.ops.DIVERGENCES)))
    if draw(st.booleans()) and name != "score_direct":
        drawn["y"] = torch.nn.functional.one_hot(drawn["y"], CLASSES) * 0.7 + 0.1
    if name in ("standard", "gaussian"):
        del drawn["threat_model"]
    if name == "gaussian":
        return {**drawn, "sigma": draw(st.sampled_from([0.1, (0.0, 0.5)])), "gamma": draw(st.sampled_from([0, 0.5]))}
    if name == "standard":
        return drawn
    drawn["steps"] = draw(st.integers(0, 3))
    drawn["clip"] = draw(st.sampled_from([0.0, 0.05]))
    if name == "trades":
        drawn["beta"] = draw(st.sampled_from([0.0, 1.0, 6.0]))
    if name == "score_direct":
        points = torch.rand(12, *x.shape[1:], generator=torch.Generator().manual_seed(1))
        drawn["posterior"] = sm.posteriors.KernelDensity(
            points, torch.arange(12) % CLASSES, num_classes=CLASSES, sigma=draw(st.sampled_from([0.1, 0.5, 5.0]))
        )
        drawn["target_mix"] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return drawn


def inside(threat_model: sm.ThreatModel, x_adv: Tensor, x: Tensor) -> bool:
    far = (x_adv - x).flatten(1).norm(dim=1, p={"linf": math.inf, "l2": 2, "l1": 1}[threat_model.norm])
    return bool((far <= threat_model.eps * (1 + 1e-5) + 1e-6).all() and (x_adv >= 0).all() and (x_adv <= 1).all())


def state_of(model: nn.Module) -> tuple[bool, list[Tensor]]:
    return model.training, [parameter.detach().clone() for parameter in model.parameters()]


OBJECTIVES = ("standard", "gaussian", "pgd_at", "trades", "score_direct")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_stay_inside_and_finite(name: str) -> None:
    objective = getattr(sm.objectives, name)

    @examples(quick=8, soak=200)
    @given(objectives(name))
    def check(arguments: Arguments) -> None:
        model, x = arguments["model"].train(), arguments["x"]
        twin = copy.deepcopy(model)
        random = {} if name == "standard" else {"generator": torch.Generator().manual_seed(0)}
        training, weights = state_of(model)
        outcome = objective(**arguments, **random)
        assert outcome.loss.shape == (len(x),)
        assert bool(outcome.loss.isfinite().all())
        if name != "gaussian":  # whose γ subtracts
            assert bool((outcome.loss >= -1e-5).all())
        if "threat_model" in arguments:
            assert inside(arguments["threat_model"], outcome.x_adv, x)
        outcome.loss.mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        assert model.training == training
        assert all(torch.equal(a, b) for a, b in zip(weights, state_of(model)[1], strict=True))
        random = {} if name == "standard" else {"generator": torch.Generator().manual_seed(0)}
        again = objective(**{**arguments, "model": twin}, **random)
        assert torch.equal(again.loss, outcome.loss)

    check()


ATTACKS = {
    "pgd": lambda ball: sm.PGD(ball, steps=3, restarts=2, losses=("ce", "margin")),
    "apgd-ce": lambda ball: APGD(ball, n_iter=4, n_restarts=2),
    "apgd-dlr": lambda ball: APGD(ball, loss="dlr-targeted", n_iter=4, n_target_classes=2),
    "fab": lambda ball: FAB(ball, n_iter=4),
    "fab-t": lambda ball: FAB(ball, n_iter=4, targeted=True, n_target_classes=2),
    "square": lambda ball: Square(ball, n_queries=8),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_stay_inside_and_change_only_what_they_fool(name: str) -> None:
    @examples(quick=8, soak=200)
    @given(problems(images=name == "square"))
    def check(arguments: Arguments) -> None:
        model, x, y = arguments["model"].eval(), arguments["x"], arguments["y"]
        before = state_of(model)
        attack = ATTACKS[name](arguments["threat_model"])
        options = {"generator": torch.Generator().manual_seed(0)} if name == "pgd" else {"seed": 0}
        found = attack(model, x, y, **options)
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert inside(arguments["threat_model"], found, x)
        if name != "pgd":  # which returns the worst point, fooled or not
            with torch.no_grad():
                moved = (found != x).flatten(1).any(1)
                assert bool((model(found)[moved].argmax(1) != y[moved]).all())
        after = state_of(model)
        assert after[0] == before[0]
        assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))

    check()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_refuse_by_name(name: str) -> None:
    objective = getattr(sm.objectives, name)

    @examples(quick=15, soak=1000)
    @given(objectives(name), st.data())
    def check(arguments: Arguments, data: st.DataObject) -> None:
        changed = data.draw(st.sampled_from(sorted(set(arguments) - {"model", "posterior"})))
        arguments = {**arguments, changed: data.draw(misfits(arguments[changed]))}
        try:
            objective(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            names = {"x": ("x ", "mat1"), "y": ("y ", "target")}.get(changed, (changed,))  # mat1: of torch.nn.Linear
            assert any(word in str(error) for word in names), f"{name}, {changed}: {error}"  # noqa: PT017

    check()


@pytest.mark.parametrize("changed", ["x_orig", "y_orig", "bs"])
def test_autoattack_refuses_by_name(changed: str) -> None:
    @examples(quick=15, soak=1000)
    @given(problems(images=True), st.data())
    def check(arguments: Arguments, data: st.DataObject) -> None:
        attack = sm.AutoAttack(
            arguments["model"].eval(), eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False
        )
        attack.apgd.n_iter = 2
        given_to = {"x_orig": arguments["x"], "y_orig": arguments["y"], "bs": 2}
        given_to[changed] = data.draw(misfits(given_to[changed]))
        try:
            attack.run_standard_evaluation(**given_to)
        except (ValueError, TypeError, RuntimeError) as error:
            names = {"x_orig": ("x_orig", "x "), "y_orig": ("y_orig", "y ", "labels"), "bs": ("bs",)}[changed]
            assert any(word in str(error) for word in names), f"{changed}: {error}"  # noqa: PT017

    check()
