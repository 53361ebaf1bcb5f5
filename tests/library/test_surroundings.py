"""The library within modes, settings and programs that its caller has chosen for other reasons."""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scorematch import PGD, AutoAttack, Normalised, ThreatModel, objectives
from scorematch.attacks.console import Console, Logger
from scorematch.attacks.workers import can_be_shared
from scorematch.augmentation import mirror
from scorematch.bounds import robust_errors, theorem_2, theorem_4
from scorematch.divergences import KINDS, clip_bound
from scorematch.matching import Fit, JointEnergy, fit_classifier, fit_denoiser, sliced
from scorematch.model_state import as_found, borrowed
from scorematch.networks import Denoiser, MLPBackbone
from scorematch.posteriors import KernelDensity, NoiseConditionalClassifier
from scorematch.sampling import noise_levels
from scorematch.smoothing import noise_seeds

BALL = ThreatModel("linf", 0.1, step_size=0.05)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = seeded()
    return torch.rand(count, 1, 4, 4, generator=generator), torch.arange(count) % 3


def linear() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=seeded(1))
    return model.eval()


class Noisy(nn.Module):
    """A classifier that is told the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLPBackbone((1, 4, 4), 3, width=16, depth=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=seeded(2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        logits: Tensor = self.inner(x, sigma.log() / 4)
        return logits


class Slope(nn.Module):
    """A score."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ torch.eye(16)).view_as(x) ** 2


def attacked() -> Tensor:
    return PGD(BALL, steps=2)(linear(), *data(), seeded())


def evaluated() -> Tensor:
    attack = AutoAttack(linear(), "Linf", 0.1, 0, False, version="custom", attacks_to_run=["apgd-ce", "fab"])
    attack.apgd.n_iter = attack.fab.n_iter = 3
    points: Tensor = attack.run_standard_evaluation(*data())
    return points


def trained_directly() -> Tensor:
    posterior = NoiseConditionalClassifier(Noisy(), num_classes=3, sigma=0.3)
    outcome = objectives.score_direct(
        linear(), *data(), threat_model=BALL, posterior=posterior, steps=2, generator=seeded()
    )
    return outcome.x_adv


def compared() -> Tensor:
    x, y = data()
    posterior = KernelDensity(x, y, num_classes=3, sigma=0.4)
    errors = robust_errors(linear(), posterior, x, y, BALL, divergences=("l1",), steps=2, generator=seeded())
    return errors["l1"].score


def bounded() -> Tensor:
    x, y = data()
    x, posterior = 0.2 + 0.5 * x, KernelDensity(x, y, num_classes=3, sigma=0.4)
    return theorem_4(linear(), posterior, x, y, BALL, steps=2, generator=seeded()).first_order


def sliced_loss() -> Tensor:
    x, _ = data()
    return sliced(Slope(), x, torch.ones_like(x)).detach()


def fitted_classifier() -> Tensor:
    network = Noisy()
    fit = Fit(steps=2, batch_size=4)
    fit_classifier(network, *data(), fit, generator=seeded(), energy=JointEnergy(0.1, 0.5, 0.3))
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def fitted_denoiser() -> Tensor:
    denoiser = Denoiser(MLPBackbone((1, 4, 4), 16 * 4, width=16, depth=1), num_classes=3, sigma_data=0.3)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1, generator=seeded(3))
    fit_denoiser(denoiser, *data(), Fit(steps=2, batch_size=4), generator=seeded())
    return nn.utils.parameters_to_vector(denoiser.parameters()).detach()


@pytest.mark.parametrize(
    "work", [attacked, evaluated, trained_directly, compared, bounded, sliced_loss, fitted_classifier]
)
def test_operations_may_be_counted(work: Callable[[], Tensor]) -> None:
    expected = work()
    with FlopCounterMode(display=False) as counter:
        found = work()
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fitted", [fitted_classifier, fitted_denoiser])
def test_a_fit_takes_gradients_in_any_mode(
    fitted: Callable[[], Tensor], mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fitted()
    call = fit_classifier if fitted is fitted_classifier else fit_denoiser

    def within(*arguments: object, **options: object) -> nn.Module:
        with mode():
            result: nn.Module = call(*arguments, **options)  # type: ignore[arg-type]
            assert not torch.is_grad_enabled()
            return result

    monkeypatch.setitem(globals(), call.__name__, within)
    assert torch.equal(fitted(), expected)


@pytest.mark.parametrize("stderr", [None, object()], ids=["none", "no terminal"])
def test_no_progress_without_a_console(
    stderr: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python has no stderr in a program without a window, and a program may put something else into its place."""
    console = Console(True, Logger(tmp_path / "log.txt"), speaks=True)
    with monkeypatch.context() as changed:
        changed.setattr(sys, "stderr", stderr)
        console.start_progress(10)
        console.advance(10)
        console.end_progress()
    assert capsys.readouterr().err == ""


def test_what_a_model_holds_may_be_deep() -> None:
    model = linear()
    entry: list[object] = []
    model.chain = entry
    for _ in range(2 * sys.getrecursionlimit()):
        entry.append([])
        entry = entry[0]  # type: ignore[assignment]
    assert can_be_shared(model, data()[0])
    entry.append(object())  # which may keep anything
    assert not can_be_shared(model, data()[0])


def test_a_model_in_training_mode_may_be_evaluated_by_several_threads() -> None:
    """The first to leave must not put the model into training mode while another one is still at work."""
    model, first_left = linear().train(), threading.Event()

    def first(entered: threading.Barrier) -> None:
        with borrowed(model):
            entered.wait(60)
            entered.wait(60)
        first_left.set()

    entered = threading.Barrier(2)
    thread = threading.Thread(target=first, args=(entered,))
    thread.start()
    entered.wait(60)
    with borrowed(model):
        entered.wait(60)
        assert first_left.wait(60)
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    thread.join()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Picture(Tensor):
    """Stays of its class in all operations, but for these."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return super().__torch_function__(func, types, args, kwargs)


def test_pictures_of_a_class_of_their_own_resume(tmp_path: Path) -> None:
    x, y = data()
    attack = AutoAttack(linear(), "Linf", 0.1, 0, False, version="custom", attacks_to_run=["apgd-ce"])
    attack.apgd.n_iter = 3
    expected = attack.run_standard_evaluation(x, y)
    for images in (x.as_subclass(Picture), x.as_subclass(Picture), x):
        found = attack.run_standard_evaluation(images, y, state_path=tmp_path / "state.pt")
        assert torch.equal(found, expected)


def test_a_default_device_without_values() -> None:
    """Models are made on the meta device to be filled from a file."""
    x, y = data()
    errors = robust_errors(linear(), KernelDensity(x, y, num_classes=3, sigma=0.4), x, y, BALL, divergences=("l1",))
    bound, levels = theorem_2(errors["l1"]), noise_levels(1.0, 0.1, 3)
    clips = [clip_bound(kind, 0.1, 3) for kind in KINDS]
    with torch.device("meta"):
        made = Normalised(nn.Linear(2, 3), [0.5, 0.25], 2 * [0.2])
        assert theorem_2(errors["l1"]).slack == bound.slack
        assert noise_levels(1.0, 0.1, 3) == levels
        assert [clip_bound(kind, 0.1, 3) for kind in KINDS] == clips
        assert noise_seeds(0).device.type == "cpu"
    assert made.mean.is_meta
    filled = Normalised(nn.Linear(2, 3), [0.5, 0.25], 2 * [0.2])
    made.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(made(torch.ones(1, 2)), filled(torch.ones(1, 2)))


def test_mirrored_images_do_not_depend_on_the_default_dtype() -> None:
    x, _ = data(32)
    expected, _ = mirror(x, seeded())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(mirror(x, seeded())[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_gets_its_buffers_back() -> None:
    """Even one that counts its calls, and puts another tensor in the place of a buffer; None is no tensor."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.full((1,), 7.0))
            self.register_buffer("nothing", None)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return x

    model = Counting()
    calls, last = model.calls, model.last
    with as_found(model):
        model(torch.zeros(2))
    assert model.calls is calls
    assert model.last is last
    assert (calls.item(), last.item(), model.nothing) == (0.0, 7.0, None)
