"""Recipes of the paper on CIFAR-10: the real images where $SCOREMATCH_DATA names them, coloured noise elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CIFAR_TEST, CIFAR_TRAIN

from training import data
from training.data.batches import Batches
from training.engine import checkpoint
from training.engine.loop import generator
from training.settings import config

Call = Callable[..., Any]

SMALL = (
    "--limit 160 --batch-size 32 --validation-steps 1 --validate-every 8 --eval-steps 1 --eval-restarts 1 "
    "--eval-losses ce --curve-points 0 --autoattack none --threads 1"
)


def trained(call: Call, root: Path, out: Path, *options: object) -> float:
    """Run a recipe; the clean accuracy."""
    ending = call("run", *SMALL.split(), "--data-root", root, "--out", out, *options)
    assert ending.status == 0, ending.err
    log = checkpoint.read_metrics(out / "metrics.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(0 <= entry["zero_gradient_share"] < 0.5 for entry in log)
    clean: float = json.loads((out / "summary.json").read_text())["clean_acc"]
    return clean


def learned(real_images: bool) -> float:
    """In per cent, chance being 10: noise of ten colours is learned soon, of real images little is in forty steps."""
    return 12.0 if real_images else 20.0


def test_table2(call: Call, cifar10_root: Path, real_images: bool, tmp_path: Path) -> None:
    options = "--recipe table2 --objective pgd_at --divergence se --clip 0.3 --lr 0.05 --epochs 8 --milestones 6 7"
    model = "--model wrn-10-1 --steps 3"
    assert trained(call, cifar10_root, tmp_path / "run", *options.split(), *model.split()) > learned(real_images)
    log = checkpoint.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["lr"] for entry in log] == pytest.approx([0.05] * 6 + [0.005] + [0.0005]), "of the steps, not after"


def test_table3_with_generated_images(
    call: Call, cifar10_root: Path, generated_files: list[Path], real_images: bool, tmp_path: Path
) -> None:
    options = "--recipe table3 --model wrn-10-1-silu --steps 2 --epochs 8 --warmup 0.3 --averaging 0.8 --lr 0.05"
    options += " --steps-per-epoch 5"
    out = tmp_path / "run"
    clean = trained(call, cifar10_root, out, *options.split(), "--generated", *generated_files)
    assert real_images or clean > learned(real_images), "the generated images are noise: only with the like"
    saved = checkpoint.load(out / "checkpoint.pt")
    assert saved["training"]["average"]["n_averaged"] == 8 * 5
    counted = [v for k, v in saved["training"]["model"].items() if k.endswith("num_batches_tracked")]
    assert {int(v) for v in counted} == {2 * 8 * 5}, "two forward passes a step: those of the attack leave no trace"


def test_batches_mix_both_kinds_of_images(cifar10_root: Path, generated_files: list[Path]) -> None:
    settings = config.parse(
        [
            *["--recipe", "table3", "--batch-size", "40", "--limit", "100", "--shift", "0", "--no-flip"],
            *["--steps-per-epoch", "None", "--data-root"],
            *map(str, [cifar10_root, "--generated", *generated_files]),
        ]
    )
    loaded = data.load(settings.data_settings)
    batches = Batches(settings, loaded, loaded.y_train, generator(0, "order"), generator(0, "augmentation"))
    assert batches.steps == 3, "as many steps as without generated images"
    originals, seen = [], []
    for step, index in enumerate(batches.epoch()):
        x, y = batches.batch(index, step)
        assert x.shape == (40, 3, 32, 32)
        assert x.stride(1) == 1, "channels_last"
        assert len(index) == 12, "three tenths"
        assert (x[:12] == loaded.x_train[index]).all()
        assert (y[:12] == loaded.y_train[index]).all()
        originals.append(index)
        seen.append(x[12:])
    assert len({int(i) for index in originals for i in index}) == 36
    pool = np.concatenate([np.load(file)["image"] for file in generated_files])
    known = {image.tobytes() for image in pool}
    drawn = [(image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8).tobytes() for x in seen for image in x]
    assert set(drawn) <= known
    assert len(set(drawn)) == len(drawn) == 3 * 28, "no image twice before all have been seen"


def test_a_share_that_leaves_no_original_image(call: Call, cifar10_root: Path, generated_files: list[Path]) -> None:
    options = ["--recipe", "table3", "--model", "wrn-10-1", "--original-share", "0.01", *SMALL.split()]
    ending = call("run", *options, "--data-root", cifar10_root, "--out", "run", "--generated", *generated_files)
    assert ending.status == 2
    assert "original_share: 0.01 of a batch of 32 is 0 originals a step, allowed: at least 1" in ending.err


def test_a_network_of_timm(call: Call, cifar10_root: Path, tmp_path: Path) -> None:
    """Trained, saved, read again and attacked by its name."""
    out = tmp_path / "run"
    options = "--objective trades --data cifar10 --model timm:test_resnet --steps 2 --epochs 4"
    trained(call, cifar10_root, out, *options.split())
    attack = "--attack autoattack --version fast --limit 8"
    ending = call("evaluate", "--run", out, "--data-root", cifar10_root, *attack.split())
    assert ending.status == 0, ending.err


def test_a_recipe_with_generated_images_is_refused_without_them(call: Call, cifar10_root: Path) -> None:
    options = ["--recipe", "table3", "--model", "wrn-10-1", *SMALL.split(), "--data-root", cifar10_root, "--out", "run"]
    ending = call("run", *options)
    assert ending.status == 2
    assert "generated: none given, but original_share is 0.3" in ending.err
    assert "--originals-only to train without" in ending.err
    assert not Path("run").exists()


def test_a_recipe_with_generated_images_trained_without_them(call: Call, cifar10_root: Path) -> None:
    options = ["--recipe", "table3", "--model", "wrn-10-1", *SMALL.split(), "--data-root", cifar10_root, "--out", "run"]
    ending = call("run", *options, "--originals-only", "--epochs", "1", "--steps", "1", "--steps-per-epoch", "3")
    assert ending.status == 0, ending.err
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 3
    assert call("evaluate", "--run", "run", "--attack", "clean", "--data-root", cifar10_root).status == 0


def test_training_on_all_images(call: Call, synthetic: Callable[[str], Path]) -> None:
    """``--validation-size 0``: nothing to select on, so the last epoch counts."""
    root = synthetic("cifar10")
    options = ["--data", "cifar10", "--objective", "pgd_at", "--model", "wrn-10-1", "--steps", "1", "--epochs", "1"]
    options += ["--validation-size", "0", "--batch-size", "300", "--autoattack", "none", "--curve-points", "0"]
    options += ["--eval-steps", "1", "--eval-restarts", "1", "--threads", "1", "--data-root", root, "--out", "run"]
    ending = call("run", *options)
    assert ending.status == 2
    assert "selection: 'best' with validation_size 0" in ending.err
    ending = call("run", *options, "--selection", "last")
    assert ending.status == 0, ending.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["split"] == {"seed": 0, "train": CIFAR_TRAIN, "validation": 0, "test": CIFAR_TEST}
    assert (summary["best_epoch"], summary["steps"]) == (None, 4)
    assert not Path("run/best.pt").exists()
    ending = call("run", *options[:-2], "--validation-size", "1195", "--dry-run")
    assert ending.status == 0
    ending = call("run", *options[:-2], "--validation-size", "1195", "--out", "other")
    assert ending.status == 2
    assert "validation_size: 1195 of 1200 images, allowed: 0 to 1190 on cifar10" in ending.err
