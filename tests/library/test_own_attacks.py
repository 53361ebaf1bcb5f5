"""Losses and attacks of one's own, in AutoAttack and alone."""

import contextlib
import copy
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import scorematch as sm
from scorematch.attacks import APGD, Attack, Batch, Classifier
from scorematch.attacks.randomness import ATTACK_KEYS, attack_key

BALL = sm.ThreatModel("linf", 0.1)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    x = torch.rand(60, 1, 4, 4)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


class Named:
    """Only its name counts for a state file, in any process."""


class NamedOtherwise:
    """As ``Named``."""


class RandomPoints:
    """Random points of the ball."""

    name, images_only = "random points", False

    def __init__(self, threat_model: sm.ThreatModel, n_restarts: int = 5, lies: bool = False) -> None:
        self.threat_model, self.n_restarts, self.lies = threat_model, n_restarts, lies

    def check(self) -> None:
        if self.n_restarts < 1:
            raise ValueError("n_restarts must be at least 1")

    def parts(self, num_classes: int) -> int:
        return self.n_restarts

    def cost(self) -> tuple[int, int]:
        return 1, 0

    def run_part(self, classifier: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        noise = batch.noise.start(batch.samples, batch.x, "linf")
        points = sm.random_start(batch.x, noise, norm="linf", eps=self.threat_model.eps)
        wrong = classifier.label(points) != batch.y
        return points, torch.ones_like(wrong) if self.lies else wrong


class Beyond(RandomPoints):
    """Changes what random points return."""

    name = "beyond"

    def __init__(self, kind: str) -> None:
        super().__init__(BALL)
        self.kind = kind

    def run_part(self, classifier: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        points, _ = super().run_part(classifier, batch)
        everything = torch.ones(len(points), dtype=torch.bool)
        if self.kind == "far":
            return batch.x + 0.11 * (0.5 - batch.x).sign(), everything
        if self.kind == "box":
            return batch.x - 0.05, everything
        if self.kind == "nan":
            return points * torch.nan, everything
        if self.kind == "shape":
            return points.flatten(1), everything
        return points, everything.float()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("far", r"beyond counts a point that is not allowed: up to 0.11 away from its sample in linf, allowed 0.1;"),
        ("box", r"beyond counts a point that is not allowed: .* values in \[-0.0\d+, 0.9\d+\], allowed \[0, 1\]"),
        ("nan", "beyond counts a point that is not allowed: up to nan away"),
        ("shape", r"beyond must return points torch.float32 \[60, 1, 4, 4\] and bool \[60\], got .* \[60, 16\] and"),
        ("mask", r"got torch.float32 \[60, 1, 4, 4\] and torch.float32 \[60\]"),
    ],
)
def test_points_that_are_not_allowed_are_refused(kind: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run([Beyond(kind)])


def run(attacks: list[Any], **options: Any) -> tuple[Tensor, dict[str, Any]]:
    model, x, y = problem()
    path, workers = options.pop("state_path", None), options.pop("workers", 1)
    adversary = sm.AutoAttack(
        model, eps=0.1, seed=0, version="custom", attacks_to_run=attacks, verbose=False, workers=workers
    )
    found = adversary.run_standard_evaluation(x, y, state_path=path, **options)
    return found, adversary.report


def test_a_part_costs_its_search_and_one_pass_that_confirms() -> None:
    model, x, y = problem()
    y[:5] = (y[:5] + 1) % 4
    passes: list[int] = []
    model.register_forward_hook(lambda module, inputs, logits: passes.append(len(logits)))
    adversary = sm.AutoAttack(
        model, eps=0.1, seed=0, version="custom", attacks_to_run=[RandomPoints(BALL, 2)], verbose=False, workers=1
    )
    adversary.run_standard_evaluation(x, y)
    first, again, second, last = passes[-4:]
    assert first == again == 55
    assert second == last < 55, "what has fallen is not attacked again"
    assert adversary.report["attacks"]["random points"]["forwards"] == sum(passes[-4:])


def test_a_loss_of_ones_own_is_ascended() -> None:
    """Cross-entropy written by hand finds what APGD's own finds from the same starts."""
    model, x, y = problem()
    own, ours = APGD(BALL, loss=plain_cross_entropy, n_iter=20), APGD(BALL, loss="ce", n_iter=20)
    assert own.name == "apgd-plain_cross_entropy"
    fooled = []
    for attack in (own, ours):
        with torch.no_grad():
            fooled.append(int((model(attack(model, x, y)).argmax(1) != y).sum()))
    assert fooled[0] > 5
    assert abs(fooled[0] - fooled[1]) <= 2


def test_a_loss_that_falls_fools_less() -> None:
    model, x, y = problem()
    fooled = []
    for sign in (1, -1):
        attack = APGD(
            BALL, loss=lambda logits, labels, sign=sign: sign * plain_cross_entropy(logits, labels), n_iter=20
        )
        with torch.no_grad():
            fooled.append(int((model(attack(model, x, y)).argmax(1) != y).sum()))
    assert fooled[1] < fooled[0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: logits.sum(),
        lambda logits, labels: logits,
        lambda logits, labels: logits.argmax(1).float(),
        lambda logits, labels: 1.0,
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any) -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match="loss must return a tensor"):
        APGD(BALL, loss=loss, n_iter=2)(model, x, y)


def test_attacks_of_ones_own_run_in_their_place() -> None:
    attack = RandomPoints(BALL)
    assert isinstance(attack, Attack)
    found, report = run([attack, APGD(BALL, loss=plain_cross_entropy, n_iter=10)])
    assert list(report["attacks"]) == ["random points", "apgd-plain_cross_entropy"]
    model, x, y = problem()
    fallen = torch.tensor([name is not None for name in report["fallen_by"]])
    assert {"random points", "apgd-plain_cross_entropy"} == set(report["fallen_by"]) - {None}
    with torch.no_grad():
        assert bool((model(found)[fallen].argmax(1) != y[fallen]).all())
    assert float((found - x).abs().max()) <= 0.1 + 1e-6


@pytest.mark.parametrize(("backwards", "doubted"), [(0, False), (1, True)])
def test_gradients_are_looked_at_where_an_attack_uses_one(backwards: int, doubted: bool) -> None:
    model, x, y = problem()
    attack = RandomPoints(BALL)
    attack.cost = lambda: (1, backwards)
    adversary = sm.AutoAttack(
        lambda points: model(points.round()), eps=0.1, version="custom", attacks_to_run=[attack], verbose=False
    )
    with pytest.warns(sm.attacks.AutoAttackWarning) if doubted else contextlib.nullcontext():
        adversary.run_standard_evaluation(x, y)
    assert any("zero gradient" in text for text in adversary.report["warnings"]) == doubted


def test_what_an_attack_says_is_checked() -> None:
    _, honest = run([RandomPoints(BALL)])
    _, lying = run([RandomPoints(BALL, lies=True)])
    assert lying["robust"] == honest["robust"]


def test_verdicts_depend_neither_on_the_batch_nor_on_the_workers() -> None:
    _, whole = run([RandomPoints(BALL)])
    for options in ({"bs": 7}, {"workers": 2, "bs": 9}):
        assert run([RandomPoints(BALL)], **options)[1]["robust"] == whole["robust"]


def test_a_state_knows_attacks_by_their_settings(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    _, first = run([RandomPoints(BALL), APGD(BALL, loss=plain_cross_entropy, n_iter=4)], state_path=path)
    _, again = run([RandomPoints(BALL), APGD(BALL, loss=plain_cross_entropy, n_iter=4)], state_path=path)
    assert again["robust"] == first["robust"]
    with pytest.raises(ValueError, match="another list of attacks"):
        run([RandomPoints(BALL, 6), APGD(BALL, loss=plain_cross_entropy, n_iter=4)], state_path=path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([0.0], [0.3]),
        ((torch.zeros(2),), (torch.ones(2),)),
        ({"shift": {"x": 1}}, {"shift": {"x": 2}}),
        ({1, 2}, {1, 3}),
        (np.int64(1), np.int64(300)),
        (np.bool_(True), np.bool_(False)),
        (np.zeros(3), np.array([0.0, 0.0, 1.0])),
        (np.zeros((4, 2))[::2], np.ones((4, 2))[::2]),
        (plain_cross_entropy, torch.nn.functional.cross_entropy),
        (torch.nn.Identity(), torch.nn.ReLU()),
        (Named(), NamedOtherwise()),
        (None, 0.0),
    ],
)
def test_a_state_knows_settings_of_any_kind(one: Any, other: Any, tmp_path: Path) -> None:
    def attack_with(setting: Any) -> RandomPoints:
        attack = RandomPoints(BALL)
        attack.setting = setting
        return attack

    path = tmp_path / "state.pt"
    run([attack_with(one)], state_path=path)
    run([attack_with(copy.deepcopy(one))], state_path=path)
    with pytest.raises(ValueError, match="another list of attacks"):
        run([attack_with(other)], state_path=path)


@pytest.mark.parametrize(
    ("attacks", "error", "message"),
    [
        ([object()], TypeError, "is not an attack, expected one of apgd-ce"),
        ([RandomPoints], TypeError, "is not an attack"),
        ([RandomPoints(BALL, 0)], ValueError, "n_restarts must be at least 1"),
        ([RandomPoints(sm.ThreatModel("linf", 0.2))], ValueError, "random points.eps is 0.2"),
        (
            [RandomPoints(sm.ThreatModel("l2", 0.1))],
            ValueError,
            r"must have norm linf and box \[0.0, 1.0\] as the evaluation, got l2",
        ),
        ([RandomPoints(BALL), RandomPoints(BALL, 2)], ValueError, "two attacks are called 'random points'"),
        (["apgd-ce", APGD(BALL)], ValueError, "two attacks are called 'apgd-ce'"),
    ],
)
def test_bad_attacks_are_refused(attacks: list[Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(attacks)


def test_own_attacks_draw_other_numbers_than_ours() -> None:
    keys = {attack_key(name) for name in ATTACK_KEYS}
    assert keys == set(ATTACK_KEYS.values())
    assert attack_key("random points") not in keys
    assert attack_key("anything") == 64 + zlib.crc32(b"anything") % 64


def test_an_attack_without_gradients_needs_none_of_the_model() -> None:
    model, x, y = problem()
    adversary = sm.AutoAttack(
        *(lambda images: model(images.detach()), "linf", BALL.eps),
        **{"seed": 0, "verbose": False, "version": "custom", "attacks_to_run": [RandomPoints(BALL)]},
    )
    adversary.run_standard_evaluation(x, y)
    assert adversary.report["robust"] == run([RandomPoints(BALL)])[1]["robust"]
