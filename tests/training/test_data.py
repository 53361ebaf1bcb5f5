import pytest
import torch
from sklearn.datasets import load_digits

from training import toy
from training.data import Data, DataSettings, load
from training.errors import InputError


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.flatten(1).tolist()))


def test_digits_splits_are_disjoint_and_together_the_whole_set() -> None:
    data = load(DataSettings("digits"))
    assert data.sizes == {"train": 1150, "validation": 147, "test": 500}
    whole = torch.from_numpy(load_digits().data / 16.0).float()
    assert rows(torch.cat([data.x_train, data.x_validation, data.x_test])) == rows(whole)


def test_digits_splits_are_stratified() -> None:
    data = load(DataSettings("digits"))
    for y in (data.y_train, data.y_validation, data.y_test):
        shares = torch.bincount(y, minlength=10) / len(y)
        assert (shares - 0.1).abs().max() < 0.02


@pytest.mark.parametrize("name", ["digits", "toy"])
def test_loading_is_deterministic_and_ignores_the_global_seed(name: str) -> None:
    first = load(DataSettings(name))
    torch.manual_seed(123)
    second = load(DataSettings(name))
    for key, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(second, key)), key


@pytest.mark.parametrize("limit", [10, 57, 1000])
def test_limit_keeps_class_balanced_images(limit: int) -> None:
    data = load(DataSettings("digits", limit=limit))
    counts = torch.bincount(data.y_train, minlength=10)
    assert len(data.x_train) == limit
    assert counts.max() - counts.min() <= 1
    assert data.sizes["test"] == 500


def test_limit_keeps_the_pairs_together() -> None:
    whole, part = load(DataSettings("digits")), load(DataSettings("digits", limit=50))
    labels = {tuple(x.flatten().tolist()): int(y) for x, y in zip(whole.x_train, whole.y_train, strict=True)}
    assert all(labels[tuple(x.flatten().tolist())] == y for x, y in zip(part.x_train, part.y_train, strict=True))


@pytest.mark.parametrize("limit", [3, 1151])
def test_limit_out_of_range(limit: int) -> None:
    with pytest.raises(InputError, match=f"limit: {limit}"):
        load(DataSettings("digits", limit=limit))


def toy_data(labels: str) -> Data:
    return load(DataSettings("toy", toy_labels=labels))  # type: ignore[arg-type]


def test_toy_follows_its_priors_means_and_deviations() -> None:
    data = toy_data("hard")
    assert data.p_train is None
    assert data.y_train.double().mean() == pytest.approx(1 / 6, abs=0.01)
    for label, mean, deviation in zip((0, 1), toy.MEANS, toy.DEVIATIONS, strict=True):
        members = data.x_train[data.y_train == label]
        assert members.mean() == pytest.approx(mean, abs=0.05)
        assert members.std() == pytest.approx(deviation, abs=0.05)


def test_toy_oracle_labels_are_calibrated() -> None:
    data = toy_data("oracle")
    assert data.p_train is not None
    likely = data.p_train[:, 1] > 0.3
    assert data.y_train[likely].double().mean().item() == pytest.approx(
        data.p_train[likely, 1].double().mean().item(), abs=0.01
    )
