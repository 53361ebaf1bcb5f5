"""Targets of one's own for the targeted attacks, by the sample."""

from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, EPS, alone, attack, data
from torch import Tensor

from scorematch import ThreatModel
from scorematch.attacks import APGD, FAB

ATTRIBUTES = {"apgd-t": "apgd_targeted", "fab-t": "fab"}


def likeliest(model, x: Tensor, y: Tensor, count: int) -> Tensor:
    """The classes that the attacks choose themselves, for samples that are classified correctly."""
    with torch.no_grad():
        logits = model(x).scatter(1, y[:, None], -torch.inf)
    return logits.argsort(1, descending=True)[:, :count].contiguous()


def with_targets(model, name: str, targets: Tensor | None, norm: str = "Linf", **options):
    adversary = alone(model, name, norm, **options)
    getattr(adversary, ATTRIBUTES[name]).target_classes = targets
    return adversary


@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_likeliest_classes_by_hand_are_those_of_the_attack(name: str, norm: str) -> None:
    model, x, y = data()
    usual = alone(model, name, norm)
    getattr(usual, ATTRIBUTES[name]).n_target_classes = 4
    chosen = with_targets(model, name, likeliest(model, x, y, 4), norm)
    expected = usual.run_standard_evaluation(x, y)
    for options in ({}, {"bs": 7}):
        actual = chosen.run_standard_evaluation(x, y, **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert 0 < usual.report["robust_accuracy"] < usual.report["clean_accuracy"]


EPS_OF_PATH = 0.1


def one_way(x: Tensor) -> Tensor:
    """Class 0 in the middle; class 1 is near, but in no random direction; nothing leads to classes 2 and 3."""
    near = x.flatten(1).mean(1) - 0.5 - 0.9 * EPS_OF_PATH
    return torch.stack([0 * near, near, 0 * near - 1, 0 * near - 2], 1)


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("options", [(250, "keyed"), (5, "keyed"), (5, "reference")])
def test_each_sample_has_its_own_targets(name: str, options: tuple[int, str]) -> None:
    x, y = torch.full((COUNT, 1, 4, 4), 0.5), torch.zeros(COUNT, dtype=torch.int64)
    reachable = torch.arange(COUNT) % 3 == 0
    targets = torch.tensor([[2, 3], [3, 1]])[reachable.long()]
    bs, rng = options
    adversary = with_targets(one_way, name, targets, eps=EPS_OF_PATH, rng=rng)
    adversary.run_standard_evaluation(x, y, bs=bs)
    assert torch.equal(torch.tensor(adversary.report["robust"]), ~reachable)
    ball = ThreatModel("linf", EPS_OF_PATH)
    by_itself = {
        "apgd-t": APGD(ball, loss="dlr-targeted", n_iter=20, target_classes=targets),
        "fab-t": FAB(ball, n_iter=10, target_classes=targets),
    }
    moved = by_itself[name](one_way, x, y) != x
    assert torch.equal(moved.flatten(1).any(1), reachable)


class Killed(BaseException):
    pass


def test_an_interrupted_attack_goes_on_with_its_targets(tmp_path: Path) -> None:
    model, x, y = data()
    targets, path = likeliest(model, x, y, 4).flip(1), tmp_path / "state.pt"
    adversary = with_targets(model, "apgd-t", targets)
    expected = adversary.run_standard_evaluation(x, y)
    calls = 0

    def killer(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 60 == 0:
            raise Killed
        return model(images)

    kills = 0
    while True:
        try:
            adversary = with_targets(killer, "apgd-t", targets, save_every=0)
            actual = adversary.run_standard_evaluation(x, y, bs=10, state_path=path)
            break
        except Killed:
            kills += 1
            assert kills < 30
    assert kills > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="is of another list of attacks"):
        with_targets(killer, "apgd-t", targets.flip(1)).run_standard_evaluation(x, y, state_path=path)


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, y: t.int(),
            r"target_classes must be an int64 tensor \[N, T\] with T >= 1, got torch.int32 \[40, 3\]",
        ),
        (lambda t, y: t[:, 0], r"target_classes must be .* got torch.int64 \[40\]"),
        (lambda t, y: t[:, :0], r"target_classes must be .* got torch.int64 \[40, 0\]"),
        (lambda t, y: t[:9], r"target_classes must have a row for each of the 40 samples, got \[9, 3\]"),
        (lambda t, y: t[:, [0, 1, 0]], "target_classes: row 0 has a class twice"),
        (lambda t, y: t - 10, "target_classes: row 0 has a negative class"),
        (lambda t, y: t + 10, "target_classes: row 0 goes beyond the 10 classes of the model"),
        (lambda t, y: torch.cat([t[:, :2], y[:, None]], 1), "target_classes: row 0 has the label of its sample"),
    ],
)
def test_targets_that_cannot_be_are_refused(name: str, change, message: str, tmp_path: Path) -> None:
    model, x, y = data()
    targets = change(likeliest(model, x, y, 3), y)
    adversary = with_targets(model, name, targets)
    with pytest.raises(ValueError, match=message):
        adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())
    ball = ThreatModel("linf", 0.03)
    kinds = {"apgd-t": lambda: APGD(ball, loss="dlr-targeted", target_classes=targets)}
    kinds["fab-t"] = lambda: FAB(ball, target_classes=targets)
    with pytest.raises(ValueError, match=message):
        kinds[name]()(model, x, y)


def test_targets_are_for_targeted_attacks() -> None:
    model, x, y = data()
    targets = likeliest(model, x, y, 2)
    ball = ThreatModel("linf", 0.03)
    with pytest.raises(ValueError, match="target_classes is for loss dlr-targeted, got loss 'ce'"):
        APGD(ball, target_classes=targets)
    with pytest.raises(ValueError, match="target_classes is for targeted=True"):
        FAB(ball, targeted=False, target_classes=targets)
    with pytest.raises(TypeError, match=r"target_classes must be an int64 tensor \[N, T\] or None, got list"):
        FAB(ball, target_classes=[[1]])
    adversary = attack(model, version="custom", attacks_to_run=["fab", "fab-t"])
    adversary.fab.target_classes = targets
    adversary.run_standard_evaluation(x, y)
    adversary = attack(model)
    adversary.apgd.target_classes = targets
    with pytest.raises(ValueError, match="target_classes is for loss dlr-targeted"):
        adversary.run_standard_evaluation(x, y)
