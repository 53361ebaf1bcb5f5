"""State files of AutoAttack: of which model they are, damage, and what is printed after a resume."""

import copy
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from library_autoattack import COUNT, alone, attack, data
from torch import Tensor, nn

from scorematch.attacks import AutoAttackWarning, EvaluationState, evaluation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def outcome(model, x: Tensor, y: Tensor, path: Path | None = None, **options) -> float:
    adversary = alone(model, "apgd-ce", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        adversary.run_standard_evaluation(x, y, state_path=path)
    return adversary.report["robust_accuracy"]


def test_a_callable_that_computes_otherwise_is_another_model(path: Path) -> None:
    model, x, y = data()
    outcome(model.forward, x, y, path)
    saved = path.read_bytes()
    with pytest.raises(ValueError, match="is of another model: at 40 of 40 samples its clean logits are others"):
        outcome(lambda images: -model(images), x, y, path)
    assert path.read_bytes() == saved


def test_the_same_weights_in_another_architecture_are_another_model(path: Path) -> None:
    model, x, y = data()
    other = nn.Sequential(model[0], nn.Tanh(), *model[2:])
    outcome(model, x, y, path)
    with pytest.raises(ValueError, match=r"is of another model: .*; give another file, or delete this one"):
        outcome(other, x, y, path)


def test_a_callable_trained_further_is_another_model(path: Path) -> None:
    model, x, y = data()
    further = copy.deepcopy(model)
    with torch.no_grad():
        further[-1].weight.mul_(1.01)
    outcome(model.forward, x, y, path)
    with pytest.raises(ValueError, match="is of another model"):
        outcome(further.forward, x, y, path)
    with pytest.raises(ValueError, match=r"is of another data set: .*; give another file, or delete this one"):
        outcome(model.forward, x[:20], y[:20], path)


@pytest.mark.parametrize("batches", [1, 17])
def test_rounding_does_not_make_another_model(batches: int, path: Path) -> None:
    model, x, y = data()
    exact = copy.deepcopy(model)
    model, x = model.float(), x.float()
    expected = outcome(model.forward, x, y, path)
    # The state is finished, so all that the other callable is asked for is whether it is the same model.
    assert outcome(lambda images: exact(images.double()).float(), x, y, path, seed=None) == expected
    assert outcome(lambda images: torch.cat([model(some) for some in images.split(batches)]), x, y, path) == expected


def test_classes_without_a_finite_logit_are_compared_by_their_kind(path: Path) -> None:
    model, x, y = data()

    def masked(images: Tensor, value: float = -torch.inf, scale: float = 1.0) -> Tensor:
        return torch.cat([scale * model(images), images.new_full((len(images), 1), value)], dim=1)

    expected = outcome(masked, x, y, path)
    assert outcome(masked, x, y, path) == expected
    with pytest.raises(ValueError, match="is of another model: at 40 of 40 samples its clean logits are others"):
        outcome(lambda images: masked(images, -1e30), x, y, path)
    with pytest.raises(ValueError, match="is of another model: at 40 of 40 samples its clean logits are others"):
        outcome(lambda images: masked(images, scale=1.01), x, y, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_does_not_make_another_model(dtype: torch.dtype, path: Path) -> None:
    """Two kernels of one layer differ by the last bits of their precision."""
    model, x, y = data()

    def half(images: Tensor, scale: float = 1.0) -> Tensor:
        return (model(images) * scale).to(dtype).float()

    x = x.float()
    model.float()
    y = half(x).argmax(1)
    expected = outcome(half, x, y, path)
    assert outcome(lambda images: half(images, 1.0 + torch.finfo(dtype).eps), x, y, path) == expected


@pytest.mark.parametrize("count", [1, 5, COUNT])
def test_a_randomised_model_is_recognised(count: int, path: Path) -> None:
    model, x, y = data(count=count)
    torch.manual_seed(0)

    def noisy(images: Tensor) -> Tensor:
        return model(images + 0.02 * torch.randn_like(images))

    outcome(noisy, x, y, path)
    for _ in range(10):
        outcome(noisy, x, y, path)
    with pytest.raises(ValueError, match="is of another model"):
        outcome(lambda images: -noisy(images), x, y, path)


def test_a_hard_decision_that_rounding_turns_does_not_make_another_model(path: Path) -> None:
    """One sample in ten may lie where a model jumps."""
    model, x, y = data()
    at_the_edge = x[7:8]

    def jumps(images: Tensor) -> Tensor:
        here = (images == at_the_edge).flatten(1).all(1)[:, None]
        return torch.where(here, model(images).flip(1), model(images))

    outcome(model.forward, x, y, path)
    outcome(jumps, x, y, path)


def test_flipped_bytes_are_noticed(path: Path) -> None:
    model, x, y = data()
    expected = outcome(model, x, y, path)
    saved = path.read_bytes()
    refused = 0
    for place in range(0, len(saved), 61):
        damaged = bytearray(saved)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert outcome(model, x, y, path) == expected  # the byte was padding
        except ValueError as error:
            assert "state of an evaluation" in str(error) or "another version" in str(error)  # noqa: PT017
            assert path.read_bytes() == bytes(damaged)
            refused += 1
    assert refused > len(saved) // 61 // 2


@pytest.mark.parametrize("search", [False, True])
def test_missing_and_short_fields_are_noticed(search: bool, path: Path) -> None:
    model, x, y = data()
    adversary = attack(model, save_every=0)
    if search:
        adversary.square.n_queries = 10_000
        calls = 0

        def dies(images: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if path.exists() and torch.load(path, weights_only=True)["search"] is not None:
                raise KeyboardInterrupt
            return model(images)

        adversary.model = dies
        with pytest.raises(KeyboardInterrupt):
            adversary.run_standard_evaluation(x, y, state_path=path)
        adversary.model = model.forward
    else:
        adversary.run_standard_evaluation(x, y, state_path=path)
    whole = torch.load(path, weights_only=True)
    assert (whole["search"] is not None) == search

    def changes():
        for name in whole:
            if name != "format":
                yield name, {k: v for k, v in whole.items() if k != name}
            if isinstance(whole[name], Tensor) and len(whole[name]):
                yield name, {**whole, name: whole[name][:-1]}
        yield "type", {**whole, "robust": [True] * COUNT}
        yield "costs", {**whole, "costs": {"apgd-ce": {"forwards": 1}}}
        yield "more", {**whole, "more": 1}

    for name, content in changes():
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"is not a readable state of an evaluation .* fit their checksum"):
            adversary.run_standard_evaluation(x, y, state_path=path)
        assert path.exists(), name


def test_states_of_another_format_say_so(path: Path) -> None:
    model, x, y = data()
    torch.save({"format": "scorematch AutoAttack 1", "settings": {}}, path)
    with pytest.raises(ValueError, match="was written by another version of scorematch"):
        outcome(model, x, y, path)


def test_a_state_without_a_fingerprint_is_not_written(path: Path) -> None:
    """It could not be read again: the file would fit any model."""
    with pytest.raises(AssertionError, match="taken before the first file is written"):
        EvaluationState.new({}, torch.rand(3, 1, 4, 4), torch.arange(3)).save(path)
    assert not path.exists()


def test_lines_of_finished_attacks_are_right_after_a_resume(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x, y = data()

    def lines(adversary) -> list[str]:
        adversary.run_standard_evaluation(x, y, state_path=path)
        printed.extend(capsys.readouterr().out.splitlines())
        return [line.split("),")[0] for line in printed if line.startswith("robust accuracy after")]

    printed: list[str] = []
    first = attack(model, verbose=True, eps=0.02)
    expected = lines(first)
    printed.clear()
    accuracies = [100 * found["accuracy"] for found in first.report["attacks"].values()]
    assert len(set(accuracies)) > 1, "the attacks must differ"
    assert lines(attack(model, verbose=True, eps=0.02)) == expected
    assert [float(line.split(": ")[1].split(" %")[0]) for line in expected] == accuracies
    standing = round(COUNT * first.report["robust_accuracy"])  # two samples are misclassified without an attack
    assert f"resumed from {path}: {standing} samples are still robust, {COUNT - 2} were attacked" in printed


@pytest.mark.parametrize("rng", ["keyed", "reference"])
def test_numbers_of_numpy_and_fractions_are_numbers(rng: str, path: Path) -> None:
    model, x, y = data()
    for whole, real in ((int, float), (np.int64, np.float64), (np.int32, Fraction)):
        adversary = alone(model, "apgd-ce", eps=real(0.03125), upper=real(1.0), rng=rng)
        adversary.apgd.n_iter = whole(5)
        adversary.run_standard_evaluation(x, y, bs=whole(16), state_path=path)
        adversary.accuracy_curve(x, y, radii=[real(0.015625), real(0.03125)], bs=whole(16), state_path=path)
        assert adversary.clean_accuracy(x, y, bs=whole(16)) == EvaluationState.from_disk(path).clean_accuracy


def test_an_interruption_while_successes_are_booked_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample is fooled with its point, or not at all."""
    model, x, y = data()
    path = tmp_path / "state.pt"

    class Interrupting:
        """Successes that are read until their points are asked for."""

        def __init__(self, found: evaluation._Found) -> None:
            self.samples, self.labels = found.samples, found.labels

        @property
        def points(self) -> Tensor:
            raise KeyboardInterrupt

    commit = evaluation._Engine._commit

    def interrupted(self: evaluation._Engine, index: int, worker: int, job: Any, within: Any, *more: Any) -> None:
        commit(self, index, worker, job, Interrupting(within), *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(evaluation._Engine, "_commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            alone(model, "apgd-ce", workers=1).run_standard_evaluation(x, y, state_path=path)
    points = alone(model, "apgd-ce", workers=1).run_standard_evaluation(x, y, state_path=path)
    assert torch.equal(points, alone(model, "apgd-ce").run_standard_evaluation(x, y))
