"""What is particular to L1: sparse ascents, larger radii, Square's proposals, and where L1 is refused."""

import math

import pytest
import torch
from library_autoattack import data
from library_models import mixture, small_cnn, smooth_mlp
from torch import Tensor

from scorematch import PGD, AutoAttack, FreeAttack, ThreatModel, bounds, logit_divergence, objectives
from scorematch.attacks import APGD, FAB, Square
from scorematch.attacks.apgd_l1 import _State, ascend_sparsely
from scorematch.attacks.classifier import Classifier
from scorematch.attacks.losses import dlr_loss, margin_loss, targeted_dlr_loss
from scorematch.attacks.parts import Batch
from scorematch.attacks.randomness import KeyedNoise, ReferenceNoise
from scorematch.attacks.single_step import single_step, single_step_start
from scorematch.attacks.square import WITHIN, l1_pattern, square_l1

BALL = ThreatModel("l1", 1.0)


def batch_of(x: Tensor, y: Tensor, noise=None) -> Batch:
    return Batch(x, y, torch.arange(len(x)), 0, noise or KeyedNoise(0, "apgd-ce", 0))


def lengths(offset: Tensor) -> Tensor:
    return offset.flatten(1).abs().sum(1)


@pytest.mark.parametrize("version", ["standard", "fast", "plus", "rand"])
def test_versions_in_l1_have_the_settings_of_the_official_package(version: str) -> None:
    adversary = AutoAttack(small_cnn(), "L1", 12.0, version=version)
    larger = version in ("standard", "fast")
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        assert apgd.use_largereps == larger
        assert apgd.threat_model == ThreatModel("l1", 12.0)
    assert adversary.apgd.n_restarts == (1 if version == "rand" else 5)
    assert adversary.apgd_targeted.n_target_classes == (5 if larger else 9)
    assert adversary.apgd_targeted.n_restarts == 1
    assert (adversary.fab.n_restarts, adversary.fab.n_target_classes) == (5 if version == "plus" else 1, 9)
    assert adversary.apgd.eot_iter == (20 if version == "rand" else 1)


@pytest.mark.parametrize(("steps", "expected"), [(100, [30, 30, 40]), (20, [6, 6, 8]), (7, [3, 3, 1])])
def test_steps_are_shared_out_to_three_radii(steps: int, expected: list[int]) -> None:
    run = APGD(BALL, n_iter=steps, use_largereps=True)
    assert run._radii() == [(3.0, expected[0]), (2.0, expected[1]), (1.0, expected[2])]
    assert APGD(BALL, n_iter=steps)._radii() == [(1.0, steps)]


@pytest.mark.parametrize("larger", [False, True])
def test_cost_is_what_a_survivor_costs(larger: bool) -> None:
    model, x, y = data()
    x, y = x[2:], y[2:]
    run = APGD(ThreatModel("l1", 1e-6), n_iter=11, use_largereps=larger, eot_iter=2)
    classifier = Classifier(model)
    _, fooled = run.run_part(classifier, batch_of(x, y))
    assert not fooled.any()
    assert (classifier.forwards, classifier.backwards) == tuple(len(x) * passes for passes in run.cost())


class Beyond(torch.nn.Module):
    """Wrong from a distance of ``reach`` to 0.5 on, and nowhere nearer; the logits know the way."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        gap = self.reach - (x - 0.5).flatten(1).abs().sum(1)
        return torch.stack([gap, torch.zeros_like(gap), -1 - 0 * gap, -2 - 0 * gap], 1)


@pytest.mark.parametrize(("reach", "falls"), [(1.5, False), (2.5, False), (0.9, True)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_points_of_the_larger_balls_do_not_count(reach: float, falls: bool, loss: str) -> None:
    x, y = torch.full((6, 1, 5, 5), 0.5), torch.zeros(6, dtype=torch.int64)
    run = APGD(BALL, loss=loss, n_iter=40, use_largereps=True)
    points, fooled = run.run_part(Classifier(Beyond(reach)), batch_of(x, y))
    assert fooled.all() == falls
    assert fooled.any() == falls
    assert (lengths(points - x) <= 1 + 1e-6).all()


def test_a_checkpoint_decides_on_sparsity_and_step_size() -> None:
    x0 = torch.zeros(3, 1, 1, 30)
    x = x0.clone()
    x[..., :12] = 0.1
    zeros = torch.zeros(3)
    state = _State.begin(x0, x, zeros, torch.ones_like(x), torch.zeros(3, dtype=torch.bool), 1.2, random_start=False)
    assert state.changed.tolist() == [12, 12, 12]
    assert state.share.tolist() == pytest.approx([12 / 30 / 1.5] * 3)
    state.best_x[0, ..., 6:] = 0.0  # sparser
    state.best_x[1, ..., 12:18] = 0.1  # denser
    state.step_size = torch.tensor([0.3, 0.3, 0.15])
    state.best_grad = state.best_grad + 1
    state.adapt(x0, 1.2)
    assert state.step_size.tolist() == pytest.approx([1.2, 0.2, 0.12]), "eps, shorter, not below a tenth of eps"
    assert state.share.tolist() == pytest.approx([6 / 30 / 1.5, 18 / 30 / 1.5, 12 / 30 / 1.5])
    assert state.changed.tolist() == [6, 18, 12]
    assert torch.equal(state.x[0], state.best_x[0]), "goes on from the best point"
    assert torch.equal(state.x[1], x[1])
    assert state.grad.flatten(1)[:, 0].tolist() == [2, 1, 1]


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_what_fools_the_model_leaves_the_search_unless_chance_may_have_decided(norm: str) -> None:
    model, x, _ = data()
    run, y = APGD(ThreatModel(norm, 1e-6), n_iter=11), (model(x).argmax(1) + 1) % 10
    for passes, (forwards, backwards) in {1: (1, 1), 2: (2 * 12, 12)}.items():
        classifier = Classifier(model, verdict_passes=passes)
        assert run.run_part(classifier, batch_of(x, y))[1].all()
        assert (classifier.forwards, classifier.backwards) == (forwards * len(x), backwards * len(x))


def test_checkpoints_are_a_twenty_fifth_of_the_steps_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("step", "adapt"):
        original = getattr(_State, name)
        monkeypatch.setattr(
            _State, name, lambda *given, call=original, name=name: (taken.append(name), call(*given))[1]
        )
    model, x, y = data(count=4)
    for steps, distance in ((100, 4), (60, 2), (20, 1), (3, 1)):
        taken.clear()
        APGD(ThreatModel("l1", 1e-6), n_iter=steps).run_part(Classifier(model), batch_of(x[2:], y[2:]))
        turn = ["step"] * distance + ["adapt"]
        assert taken == (turn * steps)[: steps + steps // distance]


@pytest.mark.parametrize(("larger", "draws"), [(False, 1), (True, 4)])
def test_the_reference_stream_moves_on_as_the_official_one(larger: bool, draws: int) -> None:
    """It draws a start for each radius that it then does not use."""
    model, x, y = data()
    noise = ReferenceNoise(3)
    run = APGD(ThreatModel("l1", 1e-6), n_iter=3, use_largereps=larger)
    run.run_part(Classifier(model), batch_of(x[2:], y[2:], noise))
    torch.manual_seed(3)
    for _ in range(draws):
        torch.randn(x[2:].shape)
    assert torch.equal(noise._rand(5), torch.rand(5))


def plain_square(best: Tensor, x0: Tensor, corners: Tensor, sign: Tensor, pattern: Tensor, transpose: Tensor) -> Tensor:
    """The perturbation before its projection, window by window."""
    delta = best - x0
    side, channels = len(pattern), best.shape[1]
    for n, (row, column, row2, column2) in enumerate(corners.tolist()):
        bump = pattern.T if transpose[n] else pattern
        spare = (BALL.eps - delta[n].abs().sum()).clamp_min(0)
        gains = (slice(row, row + side), slice(column, column + side))
        loses = (slice(row2, row2 + side), slice(column2, column2 + side))
        for c in range(channels):
            plane = delta[n, c]
            either = torch.zeros_like(plane, dtype=torch.bool)
            either[gains] = either[loses] = True
            both = plane[either].abs().sum()
            new = bump * sign[n, c] + plane[gains] / (1e-12 + plane[gains].abs().sum())
            new = new / (1e-12 + new.abs().sum()) * (spare / channels + both) * channels
            plane[loses] = 0
            plane[gains] = new
    return delta


@pytest.mark.parametrize("side", [3, 5])
def test_a_proposal_of_square(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(20, 3, 8, 7, generator=generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    best = BALL.replace(eps=0.8).project(x0 + 0.1 * noise, x0)
    corners = torch.randint(0, 8 - side, (20, 4), generator=generator)
    sign = torch.randn(20, 3, generator=generator, dtype=torch.float64).sign()
    transpose = torch.arange(20) % 2 == 0
    pattern = l1_pattern(side).double()
    found = square_l1(best, x0, corners, sign, pattern, transpose, BALL)
    expected = plain_square(best.clone(), x0, corners, sign, pattern, transpose)
    torch.testing.assert_close(found, BALL.replace(eps=WITHIN).project(x0 + expected, x0))
    assert (lengths(found - x0) <= 1).all()
    assert (lengths(found - best) > 1e-3).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_of_the_points_that_fool_the_clearest_is_kept(targeted: bool) -> None:
    """Of a randomised model, whose verdicts differ: the one with the largest margin over the label."""
    model, x, y = data()
    seen = []

    def watched(points: Tensor) -> Tensor:
        seen.append(points.detach().clone())
        return model(points)

    goals, loss = ((y, (y + 1) % 10), targeted_dlr_loss) if targeted else ((y,), dlr_loss)
    ball, start = ThreatModel("l1", 3.0), x.clone()
    options = {"ball": ball, "steps": 8, "eot_iter": 1, "random_start": False, "counts": True}
    _, found, fooled = ascend_sparsely(Classifier(watched, verdict_passes=2), x, loss, goals, start, **options)
    points = torch.stack(seen)
    with torch.no_grad():
        logits = torch.stack([model(point) for point in points])
    margin = torch.stack([margin_loss(at, y) for at in logits]).masked_fill(logits.argmax(2) == y, -math.inf)
    assert torch.equal(fooled, margin.amax(0) > -math.inf)
    assert fooled.sum() > 10
    best = points[margin.argmax(0), torch.arange(len(x))]
    assert torch.equal(found[fooled], best[fooled])


def test_square_in_l1_starts_and_ends_inside() -> None:
    x = torch.rand(8, 3, 11, 13, generator=torch.Generator().manual_seed(2))
    run = Square(BALL.replace(eps=5.0))
    first = run._first(x, torch.arange(8), KeyedNoise(0, "square", 0))
    assert (lengths(first - x) <= 5).all()
    assert (lengths(first - x) > 4.9).all()
    assert first.min() >= 0
    assert first.max() <= 1


def test_fab_restarts_at_half_of_eps() -> None:
    x = 0.5 + 0 * torch.rand(6, 1, 8, 8)
    start = FAB(BALL)._random_start(batch_of(x, torch.zeros(6, dtype=torch.int64), KeyedNoise(0, "fab", 1)))
    torch.testing.assert_close(lengths(start - x), torch.full((6,), 0.5))


@pytest.mark.parametrize("attack", [APGD(BALL, use_largereps=True), FAB(BALL), Square(BALL, n_queries=60)])
def test_images_in_channels_last(attack) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    model = model.double().eval()
    x = torch.rand(20, 3, 8, 8, dtype=torch.float64)
    y = model(x).argmax(1)
    plain = attack(model, x, y)
    arranged = attack(model, x.contiguous(memory_format=torch.channels_last), y)
    assert (plain != x).any()
    torch.testing.assert_close(arranged, plain, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_the_surrogates_train_in_l1(name: str) -> None:
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    model = small_cnn()
    for start in ("uniform", "gaussian"):
        outcome = objectives.OBJECTIVES[name](model, x, y, threat_model=BALL, steps=5, start=start)
        assert (lengths(outcome.x_adv - x) <= 1 + 1e-5).all()
        assert (outcome.x_adv != x).any()
        model.zero_grad()
        outcome.loss.mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_direct_score_in_l1_climbs() -> None:
    truth, model = mixture(3, 2, 5), smooth_mlp(5, 3)
    x, y = truth.sample(64, torch.Generator().manual_seed(0))
    ball = ThreatModel("l1", 1.0, step_size=0.2, share=0.2, lower=-math.inf, upper=math.inf)
    outcome = objectives.score_direct(model, x, y, threat_model=ball, posterior=truth, steps=20)
    clean = logit_divergence(model(x), truth(x), kind="kl")
    assert (lengths(outcome.x_adv - x) <= 1 + 1e-5).all()
    assert outcome.loss.mean().item() > 1.2 * clean.mean().item()


def test_pgd_in_l1_is_deterministic_and_inside() -> None:
    model, x, y = data()
    attack = PGD(ThreatModel("l1", 1.0), steps=20)
    first, second = (attack(model, x, y, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert (lengths(first - x) <= 1 + 1e-9).all()
    assert 2 < int((model(first).argmax(1) != y).sum()) < len(x)


def test_theorem_4_holds_in_l1() -> None:
    """The dual norm is the largest slope, and the step along it moves one feature."""
    truth, model = mixture(3, 2, 5).double(), smooth_mlp(5, 3).double()
    x, y = truth.sample(40, torch.Generator().manual_seed(0))
    remainders = []
    for eps in (1e-2, 1e-3, 1e-4):
        ball = ThreatModel("l1", eps, lower=-math.inf, upper=math.inf)
        found = bounds.theorem_4(model, truth, x.double(), y, ball, steps=20)
        remainders.append(float((found.increase - found.first_order).abs().max() / eps))
    assert remainders[2] < 0.02 * remainders[0] + 1e-4, remainders


def test_where_l1_is_refused() -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for attack in ("fgsm_rs", "n_fgsm"):
        message = f"attack '{attack}' is for a threat_model of norm linf or l2, got norm l1"
        with pytest.raises(ValueError, match=message):
            single_step_start(x, BALL, attack)
        with pytest.raises(ValueError, match=message):
            single_step(x, torch.sin, BALL, attack=attack, start=x)
        with pytest.raises(ValueError, match=message):
            objectives.pgd_at(small_cnn(), x, y, threat_model=BALL, attack=attack)
    with pytest.raises(ValueError, match="threat_model must have norm linf or l2 for free training, got l1"):
        FreeAttack(BALL)
    with pytest.raises(ValueError, match="use_largereps is for norm l1, got norm l2"):
        APGD(ThreatModel("l2", 0.1), use_largereps=True)
    adversary = AutoAttack(small_cnn(), "L2", 0.1)
    adversary.apgd.use_largereps = True
    with pytest.raises(ValueError, match="use_largereps is for norm l1, got norm l2"):
        adversary.run_standard_evaluation(x, y)
