"""Nothing in a step waits for the device.

Where there is a GPU, CUDA itself reports every synchronisation. Elsewhere a step runs on the meta device, whose tensors
have no values: whatever reads one fails, and every copy from the CPU to it is recorded.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from scorematch import augmentation, matching
from scorematch.ops import _checks
from training import data, models
from training.data import batches, generated
from training.engine import loop, posteriors, scores
from training.engine.hardware import Speed
from training.engine.loop import Trainer
from training.settings import config
from training.settings.posterior import PosteriorSettings

OPTIONS = "--epochs 4 --limit 60 --batch-size 25 --steps 2 --shift 1 --flip --averaging 0.9 --threads 1"
CASES = {
    "standard": "--objective standard",
    "Gaussian": "--objective gaussian --sigma 0.1 0.4 --gamma 0.5 --accumulate 2",
    "Gaussian, annealed": "--objective gaussian --sigma 0.4 --final-sigma 0.1 --gamma 2 --antithetic",
    "PGD-AT with SGD": "--objective pgd_at --divergence se --clip 0.3 --optimizer sgd --batchnorm-momentum 0.1",
    "TRADES": "--objective trades --label-smoothing 0.1 --averaging-buffers copy --averaging-ramp",
    "CutMix": "--objective trades --cutmix 0.5",
    "one step": "--objective trades --attack fgsm_rs --accumulate 2",
    "free": "--objective pgd_at --free-replays 2",
    "weight perturbation": "--objective pgd_at --awp 0.01",
    "L2": "--objective pgd_at --norm l2 --eps 0.5 --attack-start gaussian",
    "score network": "--objective score_direct --posterior-settings.anchor label",
    "anchored at a classifier": "--objective score_direct --posterior-settings.anchor classifier",
    "kernel density": "--objective score_direct --posterior kernel_density",
    "target that follows in part, noise": "--objective score_direct --posterior kernel_density --target-mix 0.5 "
    "--data-gradient noise",
    "TRADES moved by the data": "--objective trades --posterior kernel_density",
    "soft targets": "--objective pgd_at --posterior kernel_density --soft-targets",
    "classifier": "--objective score_direct --posterior noise_conditional_classifier",
}


class Waits(TorchDispatchMode):
    """Records the operations that move values from the CPU to the device, or back, and that the CPU would wait for."""

    def __init__(self, sent: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.sent = sent  # whether a CPU tensor lies in pinned memory
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if {t.device.type for t in tensors} == {"cpu", "meta"} and not self._harmless(func, tensors, kwargs or {}):
            self.found.append(f"{func} {[(t.device.type, list(t.shape)) for t in tensors]}")
        return out

    def _harmless(self, func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        on_cpu = [t for t in tensors if t.device.type == "cpu"]
        if not copies:  # numbers become arguments of a kernel
            return all(t.dim() == 0 for t in on_cpu)
        return bool(kwargs.get("non_blocking")) and all(self.sent(t) for t in on_cpu)


class Constants(TorchFunctionMode):
    """Records tensors that are made from Python numbers on the device: each is a copy that the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor)
        if made and out.device.type != "cpu":
            self.found.append(f"{func.__name__}({args[0]!r})")
        return out


def generated_file(folder: Path) -> Path:
    path = folder / "generated.npz"
    generated.save(path, np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 10)
    return path


def trainer(options: str, device: torch.device, folder: Path, files: tuple[Path, ...] = ()) -> Trainer:
    torch.set_num_threads(1)
    settings = config.parse(f"{OPTIONS} --model digits_cnn_bn {options}".split())
    loaded = data.load(settings.data_settings)
    settings = dataclasses.replace(settings, generated=files)
    posterior = None
    if settings.posterior is not None:
        quick = dataclasses.replace(settings.posterior_settings, steps=1, width=16)
        posterior = posteriors.build(quick, loaded, seed=0, folder=folder).to(device)
    torch.manual_seed(0)
    model = models.build(settings.model, loaded.input_shape, 10).to(device)
    return Trainer(settings, loaded.to(device), model, posterior, folder)


def inspected(options: str, folder: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[Path, ...] = ()) -> list[str]:
    """What a step of this run would wait for."""
    make, pinned = loop.generator, set()

    def pin(values: Tensor, device: torch.device) -> Tensor:
        pinned.add(values.data_ptr())
        return values

    monkeypatch.setattr(loop, "generator", lambda seed, purpose, device="cpu": make(seed, purpose))
    monkeypatch.setattr(_checks, "_refuse_device", lambda name, t: None)
    monkeypatch.setattr(batches, "sendable", pin)
    run = trainer(options, torch.device("meta"), folder, files)
    run.generators["attack"] = run.batches.augmentation = None  # type: ignore[assignment]  # the device has none
    index = torch.empty(run.batches.originals, dtype=torch.int64, device="meta")
    found = []
    for _ in range(3):
        with Constants() as constants, Waits(lambda t: t.data_ptr() in pinned) as waits:
            run._step(index)
        run.step += 1
        found += [*constants.found, *waits.found]
    return found


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_no_operation_of_a_step_waits(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspected(options, tmp_path, monkeypatch) == []


def test_generated_images_come_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (generated_file(tmp_path),)
    assert inspected("--objective trades", tmp_path, monkeypatch, files) == []


SCORES = {
    "heads": {},
    "embedding, augmented": {"network": "conv", "classes": "embedding", "augment": 0.5, "dropout": 0.2},
    "mirrored U-Net": {"network": "unet", "width": 8, "mirror": True, "noise": "log_normal", "half_life": 100.0},
}


def score_trainer(options: dict[str, Any], device: torch.device, folder: Path) -> scores.ScoreTrainer:
    loaded = data.load(data.DataSettings("digits", limit=60))
    settings = PosteriorSettings(**{"steps": 8, "width": 16, "depth": 1, **options}).resolved("digits")
    parts = (loaded.x_train, loaded.y_train), (loaded.x_validation, loaded.y_validation)
    builder = posteriors._Builder(settings, loaded, *parts[0], parts[1], seed=0)
    denoiser = builder.denoiser().to(device)
    training = scores.Training(
        *(tensor.to(device) for part in parts for tensor in part),
        fit=builder.fit,
        augment=augmentation.NonLeaking(settings.augment) if settings.augment else builder._mirror(),
        sigma=0.3,
        seed=0,
        random_layers=settings.dropout > 0,
        speed=Speed("bfloat16" if device.type == "cuda" else "float32"),
        save_minutes=15.0,
        about={},
    )
    generator: Any = torch.Generator(device).manual_seed(0) if device.type == "cuda" else None
    loss = matching.DenoisingLoss(denoiser)
    return scores.ScoreTrainer("score network", denoiser, loss, training, generator, folder)


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES.keys())
def test_no_operation_of_a_step_of_a_score_network_waits(options: dict[str, Any], tmp_path: Path) -> None:
    run = score_trainer(options, torch.device("meta"), tmp_path)
    for _ in range(3):
        with Constants() as constants, Waits(lambda t: False) as waits:
            run._step()
        run.step += 1
        assert [*constants.found, *waits.found] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES.keys())
def test_cuda_reports_no_synchronisation_of_a_score_network(options: dict[str, Any], tmp_path: Path) -> None:
    run = score_trainer(options, torch.device("cuda"), tmp_path)
    for _ in range(3):
        run._step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        (lambda x: torch.as_tensor(0.5, device=x.device), "as_tensor"),
        (lambda x: torch.zeros(2).to(x.device), "_to_copy"),
        (lambda x: torch.zeros(2).to(x.device, non_blocking=True), "_to_copy"),
        (lambda x: x.new_empty(2).copy_(torch.zeros(2)), "copy_"),
    ],
)
def test_the_inspection_sees_what_waits(
    wait: Callable[[Tensor], Tensor], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = loop.objectives.standard

    def waiting(model: Any, x: Tensor, y: Tensor, **options: Any) -> Any:
        wait(x)
        return objective(model, x, y, **options)

    monkeypatch.setattr(loop.objectives, "standard", waiting)
    assert message in " ".join(inspected("--objective standard", tmp_path, monkeypatch))


@pytest.mark.parametrize("read", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_a_value_that_is_read_fails(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", [*CASES.values(), "--objective trades --precision bfloat16"])
def test_cuda_reports_no_synchronisation(options: str, tmp_path: Path) -> None:
    run = trainer(options, torch.device("cuda"), tmp_path, (generated_file(tmp_path),))
    index = next(run.batches.epoch())
    for _ in range(3):  # kernels are chosen, memory is taken
        run._step(index)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._step(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
