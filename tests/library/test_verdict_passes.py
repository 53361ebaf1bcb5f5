"""Verdicts on randomised models: by the mean over several passes, so that a lucky one does not count."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from library_autoattack import alone, attack, data
from torch import Tensor

from scorematch import AutoAttack
from scorematch.attacks import AutoAttackWarning, Classifier
from scorematch.attacks.classifier import log_mean_probabilities, predicted

SURE = 50  # passes
MANY = 200  # samples


def noisy(x: Tensor, slope: float = 0.01) -> Tensor:
    """Two classes, the first ahead by 2 + slope (x₁ − ½) + 2 n, n standard normal: one pass in six is wrong.

    The mean probability of the first class is .77 in the middle, with a standard deviation of .035 over 50 passes.
    """
    ahead = 2 + slope * (x[:, 0, 0, 0] - 0.5) + 2 * torch.randn(len(x), dtype=x.dtype)
    return torch.stack([ahead, torch.zeros_like(ahead)], 1)


def robust_accuracy(slope: float, names: list[str], passes: int, **options) -> tuple[float, dict]:
    torch.manual_seed(0)
    x, y = torch.full((MANY, 1, 4, 4), 0.5), torch.zeros(MANY, dtype=torch.int64)
    adversary = attack(
        lambda images: noisy(images, slope),
        version="custom",
        attacks_to_run=names,
        eps=0.25,
        verdict_passes=passes,
        **options,
    )
    adversary.apgd.eot_iter = 5
    adversary.square.n_queries = 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        adversary.run_standard_evaluation(x, y)
    return adversary.report["robust_accuracy"], adversary.report


@pytest.mark.parametrize("names", [["apgd-ce", "apgd-dlr"], ["square"], ["fab-t"], ["apgd-t"]])
def test_a_lucky_pass_does_not_count(names: list[str]) -> None:
    """No point of the ball changes the expected prediction, so every sample is robust."""
    one, _ = robust_accuracy(0.01, names, 1)
    many, report = robust_accuracy(0.01, names, SURE)
    assert one < 0.88, "5 in 6 are right when clean, fewer after a search"
    assert many == report["clean_accuracy"] == 1.0
    assert report["verdict_passes"] == SURE


@pytest.mark.parametrize("names", [["apgd-ce"], ["square"]])
def test_points_that_fool_the_mean_are_found(names: list[str]) -> None:
    """At x₁ = ¼ the first class is behind by 3 on average. On the way there lie points where chance decides."""
    accuracy, report = robust_accuracy(20.0, names, SURE)
    assert accuracy == 0.0
    assert report["attacks"][names[0]]["unverified"] == 0


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_apgd_takes_the_clearest_point_in_every_norm(norm: str) -> None:
    assert robust_accuracy(20.0, ["apgd-ce"], SURE, norm=norm)[0] == 0.0


def test_the_mean_is_of_probabilities() -> None:
    """One pass of large logits does not outvote two others."""
    passes = torch.tensor([[[0.0, 2.0]], [[0.0, 2.0]], [[30.0, 0.0]]])
    assert int(passes.mean(0).argmax(1)) == 0
    assert int(log_mean_probabilities(list(passes)).argmax(1)) == 1
    logits = 3 * torch.randn(4, 6, 5, dtype=torch.float64)
    expected = logits.softmax(2).mean(0)
    torch.testing.assert_close(log_mean_probabilities(list(logits)).exp(), expected)
    single = log_mean_probabilities([logits[0]])
    torch.testing.assert_close(single - single[:, :1], logits[0] - logits[0][:, :1])


def test_what_is_not_finite_in_some_pass() -> None:
    plain = torch.tensor([[1.0, 2.0, 3.0]] * 4)
    odd = plain.clone()
    odd[0, 0], odd[1, 2], odd[2, 0], odd[3] = math.nan, -math.inf, math.inf, torch.tensor([1e4, 0, -1e4])
    mean = log_mean_probabilities([plain, plain, odd])
    assert predicted(mean).tolist() == [-1, 2, 2, 2]
    assert not mean[1:].isnan().any()


def test_a_verdict_takes_what_the_gradient_has_passed_already() -> None:
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.flatten(1)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[:, 0]

    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    for passes, verdict_passes, judge, expected in (
        (1, 1, True, 1),
        (2, 5, True, 5),
        (8, 5, True, 8),
        (2, 5, False, 2),
    ):
        calls.clear()
        classifier = Classifier(model, verdict_passes=verdict_passes)
        logits, _, _ = classifier.gradient(x, loss, y, passes=passes, judge=judge)
        assert len(calls) == expected
        assert classifier.forwards == 3 * expected
        assert classifier.backwards == 3 * passes
        assert torch.equal(predicted(logits), x.argmax(1))


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "square", "fab-t"])
def test_passes_are_counted(name: str) -> None:
    """Where no sample falls, every judged point costs so many passes."""
    model, x, y = data()
    reports = []
    for passes in (1, 3):
        adversary = alone(model, name, eps=1e-6, workers=1, verdict_passes=passes)
        adversary.square.n_queries = 1  # a model that is sure is not asked for a second proposal like the first
        adversary.run_standard_evaluation(x, y)
        reports.append(adversary.report)
    one, three = (report["attacks"][name] for report in reports)
    assert reports[0]["robust"] == reports[1]["robust"]
    assert three["backwards"] == one["backwards"]
    unjudged = one["backwards"] if name == "fab-t" else 0  # the steps of FAB follow one pass
    assert three["forwards"] - unjudged == 3 * (one["forwards"] - unjudged)


def test_one_attack_and_clean_accuracy_judge_alike() -> None:
    torch.manual_seed(0)
    x, y = torch.full((MANY, 1, 4, 4), 0.5), torch.zeros(MANY, dtype=torch.int64)
    adversary = AutoAttack(noisy, eps=0.25, seed=0, verbose=False, verdict_passes=SURE)
    adversary.square.n_queries = 10
    assert adversary.clean_accuracy(x, y) == 1.0
    for labels in (y, None):
        assert torch.equal(adversary.square.perturb(x, labels), x)
    adversary.verdict_passes = 1
    assert adversary.clean_accuracy(x, y) < 0.93


def test_the_warning_names_what_is_missing() -> None:
    _, report = robust_accuracy(0.01, ["square"], 1)
    assert any("verdict_passes" in text and 'version="rand"' in text for text in report["warnings"])
    _, report = robust_accuracy(0.01, ["square"], 2)
    assert not any("verdict_passes" in text for text in report["warnings"])


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_other_numbers_of_passes_are_refused(value: object) -> None:
    model, x, y = data()
    message = f"verdict_passes must be a whole number of at least 1, got {value!r}"
    with pytest.raises(ValueError, match=message):
        attack(model, verdict_passes=value)
    adversary = attack(model)
    adversary.verdict_passes = value
    with pytest.raises(ValueError, match=message):
        adversary.run_standard_evaluation(x, y)


def test_a_state_is_of_one_number_of_passes(tmp_path: Path) -> None:
    model, x, y = data()
    path = tmp_path / "state.pt"
    expected = alone(model, "apgd-ce", verdict_passes=2).run_standard_evaluation(x, y, state_path=path)
    assert torch.equal(
        alone(model, "apgd-ce", verdict_passes=2).run_standard_evaluation(x, y, state_path=path), expected
    )
    with pytest.raises(ValueError, match="is of another verdict_passes: 2, now 1"):
        alone(model, "apgd-ce").run_standard_evaluation(x, y, state_path=path)
