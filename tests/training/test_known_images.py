"""Data with a known p_d(y|x): the fit in its file, the draws, and how hard the problem is against closed forms."""

import math
from pathlib import Path

import pytest
import torch

from scorematch import ThreatModel
from scorematch.posteriors import FactorAnalysers
from training import data
from training.data import DataSettings
from training.data.known_images import difficulty, drawn, fitted, in_ball, noise_for, probabilities
from training.engine import checkpoint
from training.settings.errors import InputError

SMALL = {"components": 2, "rank": 3, "iterations": 4}


def two_classes(distance: float = 1.0, variance: float = 1.0, features: int = 12) -> FactorAnalysers:
    """N(±distance e_1, variance I), nearly: the log-odds are 2 distance x_1 / variance."""
    means = torch.zeros(2, 1, features)
    means[:, 0, 0] = torch.tensor([-distance, distance])
    return FactorAnalysers(means, torch.full((2, 1, features, 1), 1e-6), torch.full((2, 1), variance))


def test_the_file_of_a_fit_stands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settings = tmp_path / "made" / "analysers.pt", DataSettings("digits")
    first = fitted(settings, path, **SMALL)
    digits = data.load(settings)
    expected = FactorAnalysers.fit(
        digits.x_train, digits.y_train, num_classes=10, **SMALL, generator=torch.Generator().manual_seed(0)
    )
    monkeypatch.setattr(data, "load", lambda settings: pytest.fail("the data set is not needed"))
    again = fitted(settings, path, **SMALL)
    for other in (first, again):
        torch.testing.assert_close(other(digits.x_test), expected(digits.x_test), rtol=1e-5, atol=1e-4)
    assert float((again(digits.x_test).argmax(1) == digits.y_test).float().mean()) > 0.9
    with pytest.raises(InputError, match="was fitted with rank 3, now 2; seed 0, now 1; give another file"):
        fitted(settings, path, **{**SMALL, "rank": 2, "seed": 1})


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "analysers.pt"
    checkpoint.save(path, epoch=1, settings={"data": "digits"}, network={})
    with pytest.raises(InputError, match=r"analysers\.pt: holds no factor analysers"):
        fitted(DataSettings("digits"), path)


def test_draws_are_independent_and_named_by_the_seed() -> None:
    p_d = two_classes()
    one, more, other = (
        drawn(p_d, sizes, shape=(3, 2, 2), seed=seed, soft=True)
        for sizes, seed in (((40, 40, 40), 0), ((90, 20, 40), 0), ((40, 40, 40), 1))
    )
    assert more.sizes == {"train": 90, "validation": 20, "test": 40}
    assert one.input_shape == (3, 2, 2)
    assert (one.lower, one.upper) == (-math.inf, math.inf)
    assert one.statistics is not None
    assert one.p_train is not None
    torch.testing.assert_close(one.p_train, p_d(one.x_train).exp())
    assert torch.equal(one.x_test, more.x_test)
    splits = [one.x_train, one.x_validation, one.x_test, other.x_train, other.x_validation, other.x_test]
    assert len({float(x[0, 0, 0, 0]) for x in splits}) == 6
    assert drawn(p_d, (40, 40, 40), shape=(12,)).p_train is None


def test_noise_for_a_bayes_error() -> None:
    """Φ(−distance / √(variance + σ²)) is .2 where √(variance + σ²) = distance / .8416."""
    sigma = noise_for(two_classes(distance=2.0, variance=0.5), 0.2, count=50_000)
    assert sigma == pytest.approx(math.sqrt((2.0 / 0.8416) ** 2 - 0.5), rel=0.02)
    with pytest.raises(ValueError, match=r"bayes_error must lie between .*, got 0\.6"):
        noise_for(two_classes(), 0.6, count=100)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_change_in_a_ball_equals_the_closed_form(norm: str) -> None:
    p_d = two_classes()
    x, _ = p_d.sample(300, torch.Generator().manual_seed(1), (3, 4))
    eps = 0.4
    largest, flipped = in_ball(p_d, x, ThreatModel(norm, eps, lower=-math.inf, upper=math.inf), steps=20)
    move = torch.zeros(12)
    move[0] = eps
    log_p = p_d(x)
    ends = [p_d(x.flatten(1) + sign * move) for sign in (-1, 1)]
    expected = torch.stack([(log_p.exp() * (log_p - end)).sum(1) for end in ends]).amax(0)
    torch.testing.assert_close(largest, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(flipped, x.flatten(1)[:, 0].abs() < eps)


def test_difficulty_of_a_known_problem() -> None:
    """Bayes error Φ(−1); flips where |x_1| < eps, the difference of normal distribution functions."""
    found = difficulty(two_classes(), shape=(3, 4), eps=(0.2, 0.5), count=20_000, steps=8, batch=5000)

    def below(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    assert found["bayes_error"]["low"] < below(-1) < found["bayes_error"]["high"]
    assert found["bayes_error"]["high"] - found["bayes_error"]["low"] < 0.005
    x, y = two_classes().sample(200_000, torch.Generator().manual_seed(9))
    cross_entropy = -float(probabilities(two_classes(), x).log().gather(1, y[:, None]).mean())
    assert found["entropy"]["mean"] == pytest.approx(cross_entropy, abs=0.01)
    assert [ball["eps"] for ball in found["balls"]] == [0.2, 0.5]
    for ball in found["balls"]:
        flips = below(1 + ball["eps"]) - below(1 - ball["eps"])
        assert ball["flips"]["mean"] == pytest.approx(flips, abs=0.01)
    assert 0 < found["balls"][0]["c_kl"]["mean"] < found["balls"][1]["c_kl"]["mean"]
