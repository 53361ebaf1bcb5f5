"""A worker with a copy of the model on each of several devices. The CPU, named twice, stands for two of them."""

import copy
import threading
import time
from pathlib import Path

import pytest
import torch
from library_autoattack import EPS, alone, attack, data, verdict
from torch import Tensor, nn

from scorematch import AutoAttack
from scorematch.attacks.precision import full_precision

TWO = ["cpu", torch.device("cpu")]


class Private(nn.Module):
    """A model that no two threads may call at the same time."""

    seen: dict[int, int]  # passes of each copy

    def __init__(self, model: nn.Module, seen: dict[int, int]) -> None:
        super().__init__()
        self.model, self.busy, self.seen = model, False, seen

    def __deepcopy__(self, memo: dict) -> "Private":
        return Private(copy.deepcopy(self.model, memo), self.seen).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.busy, "called by two threads"
        self.busy = True
        try:
            self.seen[id(self)] = self.seen.get(id(self), 0) + len(x)
            time.sleep(1e-4)  # so that another thread has its turn
            return self.model(x)
        finally:
            self.busy = False


@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("batch_norm", [False, True])
def test_two_devices_find_what_one_finds(norm: str, batch_norm: bool) -> None:
    model, x, y = data(batch_norm=batch_norm)
    one, two = attack(model, norm, workers=1), attack(model, norm, device=TWO)
    expected = one.run_standard_evaluation(x, y)
    actual = two.run_standard_evaluation(x, y, bs=8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)
    assert two.report["fallen_by"] == one.report["fallen_by"]
    assert 0 < two.report["robust_accuracy"] < two.report["clean_accuracy"]


def test_each_device_has_its_copy() -> None:
    model, x, y = data()
    seen: dict[int, int] = {}
    private = Private(model, seen).train()
    weights = {name: value.clone() for name, value in private.state_dict().items()}
    adversary = attack(private, device=TWO)
    with pytest.warns(UserWarning, match="training mode"):
        x_adv = adversary.run_standard_evaluation(x, y, bs=8)
    assert len(seen) == 2
    assert min(seen.values()) > 0.2 * max(seen.values()), "both have work"
    assert adversary.report["robust_accuracy"] == verdict(model, x_adv, y).double().mean().item()
    assert private.training
    assert all(torch.equal(value, weights[name]) for name, value in private.state_dict().items())
    seen.clear()
    attack(private.eval(), device=["cpu"], workers=1).run_standard_evaluation(x, y)
    assert list(seen) == [id(private)], "one device: the model itself"


def test_a_state_goes_on_with_another_number_of_devices(tmp_path: Path) -> None:
    model, x, y = data()
    path = tmp_path / "state.pt"
    expected = attack(model, workers=1).run_standard_evaluation(x, y)
    first = attack(model, device=TWO, budget=0.2, save_every=0)
    first.run_standard_evaluation(x, y, state_path=path)
    actual = attack(model, workers=1).run_standard_evaluation(x, y, state_path=path)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_curves_and_other_calls_take_devices() -> None:
    model, x, y = data()
    adversary, single = attack(model, device=TWO, version="fast"), attack(model, workers=1, version="fast")
    curve = adversary.accuracy_curve(x, y, radii=[0.01, 0.03])
    torch.testing.assert_close(curve.nearest, single.accuracy_curve(x, y, radii=[0.01, 0.03]).nearest)
    assert adversary.clean_accuracy(x, y) == single.clean_accuracy(x, y)
    torch.testing.assert_close(adversary.apgd.perturb(x, y), single.apgd.perturb(x, y))


def test_one_attack_alone_runs_on_the_first_device() -> None:
    model, x, y = data()
    points = attack(model, device=["cpu", "meta"]).apgd.perturb(x, y)
    torch.testing.assert_close(points, attack(model, workers=1).apgd.perturb(x, y))


def test_a_failure_on_one_device_ends_all() -> None:
    model, x, y = data()

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.copied = model, False

        def __deepcopy__(self, memo: dict) -> "Failing":
            other = Failing().eval()
            other.copied = True
            return other

        def forward(self, x: Tensor) -> Tensor:
            if self.copied and threading.current_thread() is not threading.main_thread():
                raise RuntimeError("out of memory")
            return self.model(x)

    with pytest.raises(RuntimeError, match="out of memory"):
        alone(Failing().eval(), "apgd-ce", device=TWO).run_standard_evaluation(x, y, bs=8)


class Uncopied(nn.Module):
    def __deepcopy__(self, memo: dict) -> "Uncopied":
        raise TypeError("holds a socket")

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_devices_that_cannot_be_are_refused() -> None:
    model, x, y = data()
    with pytest.raises(ValueError, match="device names no device"):
        AutoAttack(model, device=[])
    with pytest.raises(ValueError, match='workers must be "auto" with several devices, one for each, got 3'):
        AutoAttack(model, device=TWO, workers=3)
    with pytest.raises(ValueError, match="device: a copy on cpu needs a module, the model is a method"):
        alone(model.forward, "apgd-ce", device=TWO).run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match=r"cannot be copied to cpu \(TypeError: holds a socket\)"):
        alone(Uncopied(), "apgd-ce", device=TWO).run_standard_evaluation(x, y)


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_comes_back_when_the_last_thread_has_verified() -> None:
    """The flags are of the whole process: a thread that leaves must not give them back to one that still verifies."""
    found, device = allowed(), torch.device("cuda:1")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    second_entered, first_left = threading.Event(), threading.Event()
    inside: list[tuple[bool, bool]] = []

    def verify() -> None:
        with full_precision(device):
            second_entered.set()
            first_left.wait(10)
            inside.append(allowed())

    try:
        with full_precision(torch.device("cpu")):
            assert allowed() == (True, True)
        second = threading.Thread(target=verify)
        with full_precision(device):
            assert allowed() == (False, False)
            second.start()
            assert second_entered.wait(10)
            assert allowed() == (False, False)
        first_left.set()
        second.join()
        assert inside == [(False, False)]
        assert allowed() == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found


@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("rng", ["keyed", "reference"])
def test_the_default_device_does_not_matter(norm: str, rng: str, tmp_path: Path) -> None:
    model, x, y = data()
    adversary = attack(model, norm, rng=rng, version="plus", workers=1, save_every=0)
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 2
    adversary.apgd.use_largereps = False
    adversary.apgd.n_iter = adversary.fab.n_iter = 3
    adversary.apgd_targeted.n_target_classes = 2
    adversary.square.n_queries = 70
    radius = EPS[norm]

    def outcome(folder: Path) -> list[Tensor]:
        found = [adversary.run_standard_evaluation(x, y, state_path=folder / "state.pt") for _ in range(2)]
        curve = adversary.accuracy_curve(x, y, radii=[radius / 2, radius])
        return [*found, curve.adversarial, curve.nearest, adversary.square.perturb(x, y)]

    expected = outcome(tmp_path / "plain")
    with torch.device("meta"):
        actual = outcome(tmp_path / "meta")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
