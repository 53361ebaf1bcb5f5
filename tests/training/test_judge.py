"""The judge of generated images."""

import dataclasses
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

from training import data
from training.data import DataSettings
from training.measures import judge
from training.settings.errors import InputError


def test_frechet_distance_is_that_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    first = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    second = torch.randn(300, 5, generator=generator, dtype=torch.float64) @ mix + 1.5
    covariances = [torch.cov(features.T) for features in (first, second)]
    root = torch.from_numpy(scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (first.mean(0) - second.mean(0)).square().sum() + torch.trace(covariances[0] + covariances[1] - 2 * root)
    assert judge.frechet(first, second) == pytest.approx(float(expected))
    assert judge.frechet(first, first) == pytest.approx(0, abs=1e-9)
    assert judge.frechet(first, first + 2) == pytest.approx(20)


def test_the_judge_tells_noise_from_digits() -> None:
    digits = data.load(DataSettings("digits"))
    network = judge.train(digits, 3, seed=0)
    x, y = digits.x_train[:200], digits.y_train[:200]
    real = judge.measure(network, x, y, digits)
    noise = judge.measure(network, torch.rand(x.shape, generator=torch.Generator().manual_seed(0)), y, digits)
    assert real["recognised"] > 80
    assert noise["recognised"] < 40
    assert noise["frechet"] > 5 * real["frechet_of_training_images"]
    assert real["frechet"] < 2 * real["frechet_of_training_images"]
    assert judge.features_of(network)(x).shape[0] == 200


def test_the_judge_learns_from_images_that_no_score_network_sees() -> None:
    digits = data.load(DataSettings("digits"))
    network = judge.train(dataclasses.replace(digits, x_train=torch.full_like(digits.x_train, torch.nan)), 1, seed=0)
    assert all(bool(values.isfinite().all()) for values in network.state_dict().values())
    assert not network.training


@pytest.mark.parametrize(("samples", "drawn"), [(30, 30), (80, 50)])
def test_images_are_not_compared_with_themselves(samples: int, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples as training images, at most half of these, and with all that were not drawn."""
    x = torch.arange(100.0).reshape(100, 1, 1, 1)
    split = {f"{what}_{part}": v for part in ("train", "validation", "test") for what, v in (("x", x), ("y", x.long()))}
    compared = []
    monkeypatch.setattr(judge, "frechet", lambda *sides: compared.append([side.tolist() for side in sides]) or 0.0)
    known = data.Data("mine:numbers", **split, num_classes=100, upper=100.0)
    found = judge.frechet_distances(lambda images: images.flatten(), x[:samples] + 1000, known, seed=0)
    (ours, others), (own, same) = compared
    assert others == same
    assert sorted(own + others) == list(range(100))
    assert ours == [1000.0 + k for k in range(drawn)]
    assert len(own) == found["frechet_count"] == drawn


class Means(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.size(1) == 3
        return images.float().mean((2, 3)) / 255


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_a_given_feature_network(lower: float, upper: float, tmp_path: Path) -> None:
    """It takes pixels in 0…255, whatever the box of the data."""
    loaded = dataclasses.replace(data.load(DataSettings("digits")), lower=lower, upper=upper)
    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(path)
    features = judge.load_features(path, loaded)
    x = torch.rand(6, 1, 4, 4)
    found = features(lower + (upper - lower) * x)
    torch.testing.assert_close(found, x.mean((1, 2, 3))[:, None].expand(6, 3), rtol=0, atol=3e-3)
    path.write_text("no module")
    with pytest.raises(InputError, match="cannot be read"):
        judge.load_features(path, loaded)


@pytest.mark.parametrize(("name", "flips"), [("mine:images", False), ("svhn", False), ("cifar10", True)])
def test_the_judge_mirrors_what_may_be_mirrored(name: str, flips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(4, 1, 20, 20), torch.tensor([0, 1, 0, 1])
    split = {f"{what}_{part}": v for part in ("train", "validation", "test") for what, v in (("x", x), ("y", y))}
    asked = []
    monkeypatch.setattr(judge, "augmented", lambda x, moves, shift, flip: asked.append((shift, flip)) or x)
    judge.train(data.Data(name, **split, num_classes=2, lower=0.0, upper=1.0), 1, seed=0)
    assert set(asked) == {(4, flips)}
