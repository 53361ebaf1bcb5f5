"""Code written for the official class: what its documentation and its users do with it, on ours."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from library_autoattack import COUNT, EPS, alone, attack, data, verdict
from torch import nn

from scorematch import AutoAttack, ThreatModel
from scorematch.attacks import APGD, EvaluationState


def quick(adversary: AutoAttack) -> AutoAttack:
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 5
    adversary.square.n_queries = 20
    return adversary


def same(points: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for rounding: an attack by itself takes images in another memory format."""
    return torch.allclose(points, expected, rtol=0, atol=1e-9)


def test_the_documented_usages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The standard version, single attacks, a subset, a custom version, a seed and a log."""
    model, images, labels = data()
    log = tmp_path / "log_file.txt"
    adversary = quick(AutoAttack(model, norm="Linf", eps=EPS["Linf"], version="standard", log_path=log))
    with torch.no_grad():
        x_adv = adversary.run_standard_evaluation(images, labels, bs=16)
    assert x_adv.shape == images.shape
    assert not verdict(model, x_adv, labels).all()
    found = adversary.run_standard_evaluation_individual(images, labels, bs=16)
    assert list(found) == adversary.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert all(points.shape == images.shape for points in found.values())
    adversary.attacks_to_run = ["apgd-ce"]
    adversary.seed = 0
    assert torch.equal(
        adversary.run_standard_evaluation(images, labels), adversary.run_standard_evaluation(images, labels)
    )
    custom = quick(AutoAttack(model, eps=EPS["Linf"], version="custom", device="cpu", verbose=False))
    custom.attacks_to_run = ["apgd-ce", "fab"]
    custom.apgd.n_restarts = custom.fab.n_restarts = 2
    points, classes = custom.run_standard_evaluation(images, labels, bs=COUNT, return_labels=True)
    assert torch.equal(classes, model(points).argmax(1))
    adversary.logger.log("a line of one's own")
    assert capsys.readouterr().out == log.read_text()
    assert log.read_text().endswith("a line of one's own\n")


def test_what_it_can_be_asked() -> None:
    model, x, y = data()
    adversary = attack(model)
    assert adversary.epsilon == adversary.eps == EPS["Linf"]
    assert torch.equal(adversary.get_logits(x), model(x))
    assert adversary.clean_accuracy(x, y, bs=7) == (COUNT - 2) / COUNT
    assert adversary.is_tf_model is False
    assert adversary.get_seed() == 0
    adversary.seed = None
    before = time.time()
    assert before <= adversary.get_seed() <= time.time()
    with pytest.raises(AttributeError, match="epsilon is fixed when an AutoAttack is made"):
        adversary.epsilon = 0.1


@pytest.mark.parametrize("seed", [np.int64(7), 7.9, np.float32(7.5)])
def test_seeds_of_other_types_are_cut_to_whole_numbers(seed: float) -> None:
    model, x, y = data()
    expected = alone(model, "apgd-ce", seed=7)
    other = alone(model, "apgd-ce", seed=seed)
    assert torch.equal(other.run_standard_evaluation(x, y), expected.run_standard_evaluation(x, y))
    assert other.report["seed"] == 7


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("name", "run"), [("apgd", "apgd-ce"), ("apgd_targeted", "apgd-t"), ("square", "square")])
def test_an_attack_perturbs_a_batch(name: str, run: str, norm: str) -> None:
    model, x, y = data()
    adversary = attack(model, norm)
    points = getattr(adversary, name).perturb(x, y)
    assert same(points, alone(model, run, norm).run_standard_evaluation(x, y))
    assert not verdict(model, points, y).all()
    model.train()
    assert torch.equal(getattr(adversary, name).perturb(x, y), points)
    assert model.training


def test_fab_perturbs_without_targets_until_it_is_given_some() -> None:
    model, x, y = data()
    adversary = attack(model)
    assert same(adversary.fab.perturb(x, y), alone(model, "fab").run_standard_evaluation(x, y))
    adversary.fab.targeted = True
    assert same(adversary.fab.perturb(x, y), alone(model, "fab-t").run_standard_evaluation(x, y))


def test_perturb_without_labels_takes_those_that_are_predicted() -> None:
    model, x, _ = data()
    adversary = attack(model)
    adversary.apgd.loss = "dlr"
    assert torch.equal(adversary.apgd.perturb(x), adversary.apgd.perturb(x, model(x).argmax(1)))


def test_perturb_attacks_the_model_and_the_seed_that_are_assigned() -> None:
    model, x, y = data()
    adversary = attack(nn.Sequential(model, nn.Identity()).forward)
    first = adversary.apgd.perturb(x, y)
    adversary.seed = 1
    assert not torch.equal(adversary.apgd.perturb(x, y), first)
    adversary.model = lambda images: -model(images)
    assert torch.equal(adversary.apgd.perturb(x, y), x), "everything is wrong already"
    adversary.apgd = APGD(adversary.threat_model, n_iter=20)
    adversary.model, adversary.seed = model, 0
    assert torch.equal(adversary.apgd.perturb(x, y), first)


def test_an_attack_of_no_autoattack_says_how_to_call_it() -> None:
    _, x, y = data()
    with pytest.raises(
        ValueError, match=r"this APGD belongs to no AutoAttack; call it with a model: attack\(model, x, y\)"
    ):
        APGD(ThreatModel("linf", 0.1)).perturb(x, y)


def test_set_version_takes_the_attacks_of_another_version() -> None:
    model, _, _ = data()
    adversary = AutoAttack(model, verbose=False)
    for version in ("plus", "rand", "fast", "standard"):
        adversary.set_version(version)
        made = AutoAttack(model, version=version, verbose=False)
        assert (adversary.version, adversary.attacks_to_run) == (version, made.attacks_to_run)
        for name in ("apgd", "apgd_targeted", "fab", "square"):
            assert getattr(adversary, name) == getattr(made, name), (version, name)
    with pytest.raises(ValueError, match="version must be one of standard"):
        adversary.set_version("strongest")
    with pytest.raises(AttributeError, match="version is fixed"):
        adversary.version = "plus"


def test_what_robustbench_does(tmp_path: Path) -> None:
    """It gives a path in a folder, reads the verdicts from the file, and runs again from where it was."""
    model, x, y = data()
    path = tmp_path / "states" / "model.pt"
    adversary = quick(AutoAttack(model, norm="Linf", eps=EPS["Linf"], version="standard", device="cpu", log_path=None))
    x_adv = adversary.run_standard_evaluation(x, y, bs=32, state_path=path)
    state = EvaluationState.from_disk(path)
    assert state.robust_flags is not None
    assert EvaluationState.new({}, x, y).robust_flags is None
    assert torch.equal(state.robust_flags, verdict(model, x_adv, y))
    assert state.robust_accuracy == adversary.report["robust_accuracy"] < 1
    assert state.clean_accuracy == adversary.report["clean_accuracy"]
    fallen = state.fallen_by >= 0
    assert fallen.any()
    assert torch.equal(state.adversarial[fallen], x_adv[fallen])
    assert state.adversarial[~fallen].isnan().all()
    with pytest.raises(ValueError, match="is not a readable state"):
        EvaluationState.from_disk(tmp_path / "nothing.pt")


def test_individual_evaluations_have_a_file_each(tmp_path: Path) -> None:
    model, x, y = data()
    adversary = attack(model)
    expected = adversary.run_standard_evaluation_individual(x, y)
    path = tmp_path / "state.pt"
    calls = 0

    def dies(images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if (tmp_path / "state.pt.fab-t").exists():
            raise KeyboardInterrupt
        return model(images)

    adversary.model = dies
    with pytest.raises(KeyboardInterrupt):
        adversary.run_standard_evaluation_individual(x, y, state_path=path)
    first, calls = calls, 0
    (tmp_path / "state.pt.fab-t").unlink()

    def counted(images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(images)

    adversary.model = counted
    again = adversary.run_standard_evaluation_individual(x, y, state_path=path)
    assert all(same(again[name], expected[name]) for name in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"state.pt.{name}" for name in expected)
    calls = 0
    adversary.run_standard_evaluation_individual(x, y, state_path=path)
    assert calls < first, "nothing is attacked twice"
