"""What AutoAttack and PGD are given: pixels just outside the box, shapes of labels, settings assigned by name."""

import math
from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, EPS, alone, attack, data
from torch import Tensor

from scorematch import PGD, AutoAttack, ThreatModel
from scorematch.attacks import APGD, FAB, Square


def runs(model, y: Tensor):
    """AutoAttack, PGD and an attack by itself, from x to points."""
    threat_model = ThreatModel("linf", EPS["Linf"])
    yield "x_orig", lambda x, y=y: alone(model, "apgd-ce").run_standard_evaluation(x, y)
    yield "x", lambda x, y=y: PGD(threat_model, steps=3)(model, x, y, torch.Generator().manual_seed(0))
    yield "x", lambda x, y=y: APGD(threat_model, n_iter=3)(model, x, y)


def test_pixels_that_rounding_put_outside_the_box_are_clamped() -> None:
    model, x, _ = data()
    x[:, 0, 0, :4], x[:, 0, 1, :4] = 1.0, 0.0
    beyond = x * 1.0000002 - 1e-7
    assert beyond.max() > 1
    assert beyond.min() < 0
    given, y = beyond.clone(), model(beyond.clamp(0, 1)).argmax(1)
    for _, run in runs(model, y):
        assert torch.equal(run(beyond), run(beyond.clamp(0, 1)))
        assert torch.equal(beyond, given), "the caller's tensor stays as it is"
    adversary = alone(model, "apgd-ce")
    assert adversary.clean_accuracy(beyond, y) == adversary.clean_accuracy(beyond.clamp(0, 1), y)


def test_pixels_further_outside_are_refused_with_their_digits() -> None:
    model, x, y = data()
    for _, run in runs(model, y):
        with pytest.raises(ValueError, match=r"got values in \[0\.0, 1\.0001\d*\]"):
            run(x.clamp(max=0.9).index_fill(0, torch.tensor([3]), 0.0).index_fill(0, torch.tensor([4]), 1.0001))
    adversary = alone(model, "apgd-ce")
    with pytest.raises(ValueError, match="x_orig must lie in the box"):
        adversary.clean_accuracy(2 * x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 1)])
def test_labels_of_any_integer_type_in_one_column(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model, x, y = data()
    given = y.view(shape).to(dtype)
    for _, run in runs(model, y):
        assert torch.equal(run(x, given), run(x, y))
    adversary = alone(model, "apgd-ce")
    _, labels = adversary.run_standard_evaluation(x, given, return_labels=True)
    assert labels.shape == (COUNT,)
    assert labels.dtype == torch.int64
    assert adversary.clean_accuracy(x, given) == adversary.report["clean_accuracy"]


def test_labels_of_other_kinds_are_refused() -> None:
    model, x, y = data()
    one_hot = torch.nn.functional.one_hot(y, 10)
    cases = [
        (one_hot, r"labels \[40, 10\].*one-hot.*argmax\(1\)"),
        (one_hot.double(), r"labels \[40, 10\].*one-hot.*argmax\(1\)"),
        (y.double(), "must be class indices of an integer dtype, got torch.float64"),
        (y > 4, "must be class indices of an integer dtype, got torch.bool"),
        (y[:, None, None], r"y(_orig)? \[N\], got x(_orig)? \[40, 1, 8, 8\] and y(_orig)? \[40, 1, 1\]"),
    ]
    for labels, message in cases:
        for _, run in runs(model, y):
            with pytest.raises(ValueError, match=message):
                run(x, labels)
        with pytest.raises(ValueError, match=message):
            alone(model, "apgd-ce").clean_accuracy(x, labels)


ATTACKS = {"apgd": APGD, "apgd_targeted": APGD, "fab": FAB, "square": Square}


@pytest.mark.parametrize("attribute", ATTACKS)
@pytest.mark.parametrize("name", ["n_iters", "use_rs", "resc_schedule", "thr_decr", "verbose", "norm", "seed"])
def test_settings_that_an_attack_has_not_are_refused(attribute: str, name: str) -> None:
    model, _, _ = data()
    target = getattr(attack(model), attribute)
    with pytest.raises(
        AttributeError, match=rf"{ATTACKS[attribute].__name__} has no setting '{name}'.*n_restarts.*eps"
    ):
        setattr(target, name, 1)
    assert not hasattr(target, name)


def test_settings_that_autoattack_has_not_are_refused() -> None:
    model, _, _ = data()
    adversary = attack(model)
    with pytest.raises(AttributeError, match=r"AutoAttack has no setting 'atacks_to_run'.*seed.*attacks_to_run.*fab"):
        adversary.atacks_to_run = ["square"]
    for name, value in {"norm": "L2", "eps": 0.1, "version": "plus", "threat_model": ThreatModel("l2", 1)}.items():
        with pytest.raises(AttributeError, match=f"{name} is fixed when an AutoAttack is made; make another one"):
            setattr(adversary, name, value)
    assert (adversary.norm, adversary.eps, adversary.version) == ("Linf", EPS["Linf"], "standard")


def test_a_single_name_is_no_list_of_attacks() -> None:
    model, x, y = data()
    message = "attacks_to_run must be a list of attacks, got 'apgd-ce'"
    with pytest.raises(TypeError, match=message):
        AutoAttack(model, version="custom", attacks_to_run="apgd-ce")
    adversary = attack(model)
    adversary.attacks_to_run = "apgd-ce"
    with pytest.raises(TypeError, match=message):
        adversary.run_standard_evaluation(x, y)


@pytest.mark.parametrize(("name", "value"), [("alpha_max", 0.0), ("eta", 1.3), ("beta", 0.5)])
@pytest.mark.parametrize("run", ["fab", "fab-t"])
def test_settings_of_fab_are_honoured(run: str, name: str, value: float) -> None:
    model, x, y = data()
    default, other = alone(model, run), alone(model, run)
    setattr(other.fab, name, value)
    assert not torch.equal(default.run_standard_evaluation(x, y), other.run_standard_evaluation(x, y))


@pytest.mark.parametrize("run", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_an_attack_may_have_a_smaller_radius(run: str) -> None:
    model, x, y = data()
    attribute = {"apgd-ce": "apgd", "apgd-t": "apgd_targeted", "fab-t": "fab", "square": "square"}[run]
    adversary = alone(model, run)
    getattr(adversary, attribute).eps = 0.01
    x_adv = adversary.run_standard_evaluation(x, y)
    assert torch.equal(x_adv, alone(model, run, eps=0.01).run_standard_evaluation(x, y))
    assert 0 < (x_adv - x).abs().max() <= 0.01 + 1e-9
    assert getattr(adversary, attribute).eps == 0.01
    getattr(adversary, attribute).eps = 0.05
    with pytest.raises(
        ValueError, match=f"{attribute}.eps is 0.05, but the evaluation is of eps 0.03: make an AutoAttack"
    ):
        adversary.run_standard_evaluation(x, y)


def test_attacks_of_another_threat_model_are_refused() -> None:
    model, x, y = data()
    adversary = attack(model)
    adversary.square = Square(ThreatModel("l2", 0.01), n_queries=10)
    with pytest.raises(ValueError, match=r"square must have norm .* and box .* as the evaluation, got "):
        adversary.run_standard_evaluation(x, y)
    for wrong in (APGD(adversary.threat_model), 300):
        adversary.square = wrong
        with pytest.raises(TypeError, match=f"square must be a Square, got {type(wrong).__name__}"):
            adversary.run_standard_evaluation(x, y)


@pytest.mark.parametrize(
    ("attribute", "name", "value", "message"),
    [
        ("apgd", "n_iter", 2.5, "n_iter must be a whole number, got 2.5"),
        ("fab", "n_restarts", "3", "n_restarts must be a whole number, got '3'"),
        ("square", "n_queries", True, "n_queries must be a whole number, got True"),
        ("fab", "alpha_max", 1.5, r"alpha_max must lie in \[0, 1\], got 1.5"),
        ("fab", "eta", -1.0, "eta must be finite and at least 0, got -1.0"),
        ("fab", "eta", math.nan, "eta must be finite and at least 0, got nan"),
        ("fab", "beta", 2, r"beta must lie in \[0, 1\], got 2"),
    ],
)
def test_values_of_settings_are_checked_before_work(
    attribute: str, name: str, value: object, message: str, tmp_path: Path
) -> None:
    model, x, y = data()
    adversary = attack(model)
    setattr(getattr(adversary, attribute), name, value)
    with pytest.raises(ValueError, match=message):
        adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", math.nan, "seed must be a number from 0"),
        ("rng", "official", "rng must be one of keyed, reference"),
        ("search_dtype", torch.float64, "search_dtype must be None"),
        ("save_every", -1, "save_every must be a number of seconds, at least 0, got -1"),
    ],
)
def test_options_that_are_assigned_are_checked_like_those_given(name: str, value: object, message: str) -> None:
    model, x, y = data()
    with pytest.raises(ValueError, match=message):
        attack(model, **{name: value})
    adversary = attack(model)
    setattr(adversary, name, value)
    with pytest.raises(ValueError, match=message):
        adversary.run_standard_evaluation(x, y)


def test_a_state_knows_the_settings_of_its_attacks(tmp_path: Path) -> None:
    model, x, y = data()
    for attribute, name, value in (("apgd", "eps", 0.02), ("fab", "beta", 0.8)):
        path = tmp_path / f"{name}.pt"
        run = {"apgd": "apgd-ce", "fab": "fab-t"}[attribute]
        alone(model, run).run_standard_evaluation(x, y, state_path=path)
        adversary: AutoAttack = alone(model, run)
        setattr(getattr(adversary, attribute), name, value)
        with pytest.raises(ValueError, match="is of another list of attacks"):
            adversary.run_standard_evaluation(x, y, state_path=path)
