"""Augmentation of score networks: what the network is told is what was done."""

import math

import pytest
import torch

from scorematch.augmentation import NonLeaking, mirror


def images(count: int = 64) -> torch.Tensor:
    """Smooth images without any symmetry."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 2, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(24, 24), mode="bicubic", align_corners=True)


def test_mirror_flips_every_second_image() -> None:
    x = images(400)
    y, told = mirror(x, torch.Generator().manual_seed(0))
    assert told is None
    kept = (y == x).flatten(1).all(1)
    flipped = (y == x.flip(3)).flatten(1).all(1)
    assert (kept ^ flipped).all()
    assert 150 < flipped.sum() < 250


def test_nothing_is_done_and_nothing_told_at_probability_zero() -> None:
    x = images()
    y, told = NonLeaking(0.0, mirrored=False)(x, torch.Generator().manual_seed(0))
    assert torch.equal(x, y)
    assert told.shape == (64, NonLeaking.conditions)
    assert not told.any()


def test_images_that_are_told_untouched_are_untouched() -> None:
    x = images(200)
    y, told = NonLeaking(0.3)(x, torch.Generator().manual_seed(0))
    untouched = (told == 0).all(1)
    assert 10 < untouched.sum() < 100
    assert torch.equal(x[untouched], y[untouched])
    assert (x[~untouched] != y[~untouched]).flatten(1).any(1).all()


class Drawn:
    """Stands for torch's generators in NonLeaking: gives the numbers that a test has chosen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uniform: dict[int, float], normal: dict[int, float]) -> None:
        # Columns 0 to 4 choose the transformations, 5 and 6 mirror, 7 is the angle, 8 the direction of the stretch.
        row = torch.ones(10)
        for column, value in uniform.items():
            row[column] = value
        numbers = torch.zeros(4)
        for column, value in normal.items():
            numbers[column] = value
        monkeypatch.setattr(torch, "rand", lambda count, columns, **_: row.expand(count, columns))

        def fill(tensor: torch.Tensor, **_: object) -> torch.Tensor:
            return tensor.copy_(numbers.expand_as(tensor))

        monkeypatch.setattr(torch.Tensor, "normal_", fill)


CASES = [
    # what is drawn, what is told, what is done to the image
    ({5: 0.0}, {}, {0: 1.0}, lambda x: x.flip(3)),
    ({0: 0.0, 6: 0.0}, {}, {1: 1.0}, lambda x: x.flip(2)),
    ({2: 0.0, 7: 0.75}, {}, {3: -1.0, 4: 1.0}, lambda x: x.rot90(-1, (2, 3))),
    (
        {4: 0.0},
        {2: 8 / 3},
        {7: 8 / 3},
        lambda x: x[..., :-8],
    ),  # an eighth of 24 pixels times 8/3: 8 pixels to the right
]


@pytest.mark.parametrize(("uniform", "normal", "told", "expected"), CASES, ids=["mirror", "flip", "rotate", "move"])
def test_exact_transformations(uniform, normal, told, expected, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    x = images(3)
    Drawn(monkeypatch, uniform, normal)
    y, found = NonLeaking(0.5)(x, torch.Generator())
    wanted = torch.zeros(9)
    for column, value in told.items():
        wanted[column] = value
    torch.testing.assert_close(found, wanted.expand(3, 9), rtol=0, atol=1e-6)
    exact = expected(x)
    torch.testing.assert_close(y[..., -exact.shape[3] :], exact, rtol=0, atol=1e-4)


def test_scaling_and_stretching(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob in the middle becomes larger; stretched, longer along the direction and shorter across."""
    rows = torch.linspace(-1, 1, 65)
    x = torch.exp(-(rows[:, None] ** 2 + rows**2) / (2 * 0.1**2))[None, None]

    def moments(image: torch.Tensor) -> tuple[float, float]:
        inside = (rows.abs() < 0.6).to(image)  # beyond it lies what the border reflects
        weight = image[0, 0] * inside * inside[:, None]
        weight = weight / weight.sum()
        return float((weight.sum(0) * rows**2).sum().sqrt()), float((weight.sum(1) * rows**2).sum().sqrt())

    Drawn(monkeypatch, {1: 0.0}, {0: 5.0})
    larger, told = NonLeaking(0.5, mirrored=False)(x, torch.Generator())
    assert told[0].tolist() == [0, 0, 5, 0, 0, 0, 0, 0, 0]
    assert moments(larger) == pytest.approx((0.2, 0.2), rel=0.02)
    monkeypatch.undo()
    Drawn(monkeypatch, {3: 0.0, 8: 0.5}, {1: 5.0})
    stretched, told = NonLeaking(0.5, mirrored=False)(x, torch.Generator())
    assert told[0].tolist() == [0, 0, 0, 0, 0, 5, 0, 0, 0]
    assert moments(stretched) == pytest.approx((0.2, 0.05), rel=0.05)


def test_how_often() -> None:
    _, told = NonLeaking()(torch.zeros(5000, 1, 4, 4), torch.Generator().manual_seed(0))
    share = (told != 0).double().mean(0)
    assert share[0] == pytest.approx(0.5, abs=0.03)
    assert share[1] == pytest.approx(0.06, abs=0.015)
    for column in (2, 3, 4, 5, 6, 7, 8):
        assert share[column] == pytest.approx(0.12, abs=0.02), column
    assert told[:, 2].std() == pytest.approx(math.sqrt(0.12), rel=0.1)


def test_probability_is_checked() -> None:
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 1\.5"):
        NonLeaking(1.5)
