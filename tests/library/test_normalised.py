"""Models of normalised inputs, attacked in pixels."""

import math
from pathlib import Path

import pytest
import torch
from library_autoattack import alone, data
from library_models import small_cnn
from torch import nn

import scorematch as sm
from scorematch.folding import Folding


def test_inputs_are_normalised_by_channel() -> None:
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.4]
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5)):
        x = torch.rand(shape)
        by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
        torch.testing.assert_close(sm.Normalised(nn.Identity(), mean, std)(x), by_hand)
        torch.testing.assert_close(sm.Normalised(nn.Identity(), 0.5, 0.25)(x), (x - 0.5) / 0.25)
    exact = sm.Normalised(nn.Identity(), torch.tensor([1 / 3], dtype=torch.float64), torch.ones(1).double())
    assert exact(torch.zeros(1, 1, dtype=torch.float64)) == -1 / 3
    assert sm.Normalised(nn.Identity(), mean, std)(torch.rand(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_it_is_a_module_around_the_model() -> None:
    model = small_cnn(batch_norm=True).train()
    wrapped = sm.Normalised(model, 0.1, 2.0)
    assert {name for name, _ in wrapped.named_buffers()} >= {"mean", "std"}
    assert [p is q for p, q in zip(wrapped.parameters(), model.parameters(), strict=True)]
    wrapped.eval()
    assert not model.training
    assert len(Folding(wrapped).pairs) == len(Folding(model).pairs) > 0
    x = torch.rand(2, 1, 8, 8)
    scripted = torch.jit.script(wrapped)
    torch.testing.assert_close(scripted(x), model((x - 0.1) / 2.0))


def test_eps_counts_in_pixels(tmp_path: Path) -> None:
    """The same verdicts as of the normalised model on normalised inputs, whose ball and box are divided by std."""
    model, x, y = data()
    wrapped = sm.Normalised(model, torch.tensor([0.5]).double(), torch.tensor([0.25]).double())
    pixels = 0.25 * x + 0.5 - 0.125  # within [0, 1]
    y = wrapped(pixels).argmax(1)
    path = tmp_path / "state.pt"
    x_adv = alone(wrapped, "apgd-ce", eps=0.005).run_standard_evaluation(pixels, y, state_path=path)
    assert (x_adv - pixels).abs().max() == pytest.approx(0.005, abs=1e-9)
    inner = alone(model, "apgd-ce", eps=0.02, lower=-2.0, upper=2.0)
    z_adv = inner.run_standard_evaluation((pixels - 0.5) / 0.25, y)
    torch.testing.assert_close(0.25 * z_adv + 0.5, x_adv, rtol=0, atol=1e-9)
    assert 0 < inner.report["robust_accuracy"] < 1
    other = sm.Normalised(model, torch.tensor([0.5]).double(), torch.tensor([0.26]).double())
    with pytest.raises(ValueError, match="is of another model"):
        alone(other, "apgd-ce", eps=0.005).run_standard_evaluation(pixels, y, state_path=path)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5, 0.5], [0.1], "mean and std must be equally many, got 2 and 1"),
        (0.5, 0.0, "std must be positive, got 0.0"),
        (0.5, [-1.0], r"std must be positive, got \[-1.0\]"),
        (math.nan, 1.0, "mean must be finite numbers, at least one, got nan"),
        (0.0, math.inf, "std must be finite numbers"),
        ([], [], "mean must be finite numbers, at least one"),
        ("half", 1.0, "mean must be a number, or one for each channel, got 'half'"),
        (None, 1.0, "mean must be a number, or one for each channel, got None"),
    ],
)
def test_statistics_that_are_none_are_refused(mean, std, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sm.Normalised(nn.Identity(), mean, std)


def test_inputs_of_other_channels_are_refused() -> None:
    wrapped = sm.Normalised(nn.Identity(), [0.5] * 3, [0.5] * 3)
    for shape in ((2, 1, 8, 8), (2, 4, 8, 8), (3,)):
        with pytest.raises(ValueError, match=r"x must be \[N, 3, …\], as mean and std have 3 channels, got"):
            wrapped(torch.rand(shape))
    with pytest.raises(TypeError, match="model must be a module, got function"):
        sm.Normalised(lambda x: x, 0.0, 1.0)


@pytest.mark.parametrize("scripted", [False, True])
def test_pixels_in_whole_numbers_are_refused(scripted: bool) -> None:
    """In uint8 the mean would be 0 and the inputs infinite or wrapped."""
    wrapped: nn.Module = sm.Normalised(nn.Identity(), [0.5] * 3, [0.25] * 3)
    wrapped = torch.jit.script(wrapped) if scripted else wrapped
    error: type[Exception] = torch.jit.Error if scripted else TypeError
    for pixels in ((255 * torch.rand(2, 3, 8, 8)).byte(), torch.ones(2, 3, 8, 8).long()):
        with pytest.raises(error, match="x must be floating point, got"):
            wrapped(pixels)
