"""AutoAttack on a box other than [0, 1]: the same attacks in other units."""

from functools import cache
from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, EPS, attack, data, verdict
from torch import Tensor, nn

from scorematch import AutoAttack, ThreatModel
from scorematch.attacks import Square
from scorematch.attacks.randomness import KeyedNoise
from scorematch.threat_model import ORDERS

BOXES = [(-1.0, 1.0), (0.0, 255.0), (-3.0, -1.0)]
FACTOR = {"Linf": 1, "L2": 2, "L1": 1.5}  # of eps, so that the box binds


class InUnits(nn.Module):
    """A model of [0, 1] for values in [lower, upper]."""

    def __init__(self, model: nn.Module, lower: float, upper: float) -> None:
        super().__init__()
        self.model, self.lower, self.width = model, lower, upper - lower

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.lower) / self.width)


def evaluated(model: nn.Module, x: Tensor, y: Tensor, norm: str, version: str, lower: float, upper: float):
    """Points and report with eps in units of the box."""
    eps = FACTOR[norm] * EPS[norm] * (upper - lower)
    adversary = attack(InUnits(model, lower, upper), norm, version=version, eps=eps, lower=lower, upper=upper)
    x_adv = adversary.run_standard_evaluation(lower + (upper - lower) * x, y)
    return x_adv, adversary.report


@cache
def of_the_unit_box(norm: str, version: str):
    return evaluated(*data(), norm, version, 0.0, 1.0)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_verdicts_do_not_depend_on_the_units(norm: str, version: str, box: tuple[float, float]) -> None:
    model, x, y = data()
    lower, width = box[0], box[1] - box[0]
    expected, of_unit = of_the_unit_box(norm, version)
    x_adv, report = evaluated(model, x, y, norm, version, *box)
    assert report["fallen_by"] == of_unit["fallen_by"]
    if norm != "L1":  # in L1 rounding decides how many features a step moves
        torch.testing.assert_close((x_adv - lower) / width, expected, rtol=0, atol=1e-6)
    assert report["box"] == list(box)
    assert 0 < report["robust_accuracy"] < report["clean_accuracy"]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("norm", list(EPS))
def test_the_first_proposals_of_square_do_not_depend_on_the_units(norm: str, box: tuple[float, float]) -> None:
    x = torch.full((COUNT, 1, 8, 8), 0.5, dtype=torch.float64)
    lower, width = box[0], box[1] - box[0]
    firsts = []
    for start, unit in ((0.0, 1.0), (lower, width)):
        ball = ThreatModel(norm.lower(), EPS[norm] * unit, lower=start, upper=start + unit)
        first = Square(ball)._first(start + unit * x, torch.arange(COUNT), KeyedNoise(0, "square", 0))
        firsts.append((first - start) / unit)
    torch.testing.assert_close(*firsts, rtol=0, atol=1e-9)
    assert not torch.equal(firsts[0], x)


def in_single_precision() -> tuple[nn.Module, Tensor, Tensor]:
    """Points of which every other row of pixels is at the box."""
    model, x, _ = data()
    model, x = model.float(), x.float()
    x[:, 0, ::2] = x[:, 0, ::2].round()
    return model, x, model(x).argmax(1)


@cache
def fallen_on_the_unit_box(norm: str, name: str) -> float:
    """To this attack alone, in single precision."""
    model, x, y = in_single_precision()
    adversary = attack(model, norm, eps=FACTOR[norm] * EPS[norm], version="custom", attacks_to_run=[name])
    adversary.run_standard_evaluation(x, y)
    return 1 - adversary.report["robust_accuracy"]


@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("box", BOXES)
def test_points_in_single_precision_keep_to_ball_and_box(norm: str, box: tuple[float, float]) -> None:
    """Each attack by itself; and as many fall as on [0, 1] but for rounding."""
    model, x, y = in_single_precision()
    lower, upper = box
    width = upper - lower
    eps = FACTOR[norm] * EPS[norm]
    moved = lower + width * x
    for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"):
        custom = {"version": "custom", "attacks_to_run": [name]}
        adversary = attack(InUnits(model, *box), norm, eps=eps * width, lower=lower, upper=upper, **custom)
        x_adv = adversary.run_standard_evaluation(moved.clamp(lower, upper), y)
        assert lower <= x_adv.min(), name
        assert x_adv.max() <= upper, name
        length = (x_adv.double() - moved.double()).flatten(1).norm(dim=1, p=ORDERS[norm.lower()])
        assert length.max() <= eps * width * (1 + 1e-5), name
        fallen = 1 - adversary.report["robust_accuracy"]
        assert fallen > 0, name
        assert abs(fallen - fallen_on_the_unit_box(norm, name)) <= 2 / COUNT, name
        assert adversary.report["robust_accuracy"] == verdict(InUnits(model, *box), x_adv, y).double().mean().item()


def test_the_box_is_checked_and_fixed(tmp_path: Path) -> None:
    model, x, y = data()
    adversary = attack(InUnits(model, -1.0, 1.0), lower=-1.0, upper=1.0, version="fast")
    assert (adversary.lower, adversary.upper) == (-1.0, 1.0)
    with pytest.raises(ValueError, match=r"x_orig must lie in the box \[-1.0, 1.0\] of the threat model"):
        adversary.run_standard_evaluation(x * 3, y)
    with pytest.raises(ValueError, match=r"x_orig must be float32 or float64 in \[-1, 1\], got torch.float16"):
        adversary.run_standard_evaluation(x.half(), y)
    for name in ("lower", "upper"):
        with pytest.raises(AttributeError, match=f"{name} is fixed when an AutoAttack is made"):
            setattr(adversary, name, 0.5)
    path = tmp_path / "state.pt"
    adversary.run_standard_evaluation(x, y, state_path=path)
    other = attack(InUnits(model, -1.0, 1.0), lower=-1.0, upper=2.0, version="fast")
    with pytest.raises(ValueError, match=r"is of another box: \[-1.0, 1.0\], now \[-1.0, 2.0\]"):
        other.run_standard_evaluation(x, y, state_path=path)
    cases = [
        ({"lower": 1.0}, "box is empty"),
        ({"eps": 3.0, "lower": -1.0}, r"eps must not be larger than the box \[-1, 1\] is wide, got 3"),
        ({"lower": float("-inf"), "version": "fast"}, "lower and upper must be finite, got -inf and 1.0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            AutoAttack(model, **options)


def test_a_curve_keeps_the_box() -> None:
    model, x, y = data()
    adversary = attack(InUnits(model, -1.0, 1.0), lower=-1.0, upper=1.0)
    curve = adversary.accuracy_curve(2 * x - 1, y, radii=[0.02, 0.06])
    unit = attack(model).accuracy_curve(x, y, radii=[0.01, 0.03])
    torch.testing.assert_close(curve.nearest, 2 * unit.nearest, rtol=0, atol=1e-6)
    assert curve.adversarial.min() >= -1
