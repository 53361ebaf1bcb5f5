"""The program that makes generated images, on the digits and on the CIFAR format, with networks that learned little."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scorematch.networks import Denoiser
from training import generate, score
from training.data.generated import GeneratedImages, read
from training.engine import checkpoint
from training.settings.errors import Interrupted, StopError

DIGITS = (
    "--samples 10 --levels 2 --steps-per-level 1 --judge-epochs 1 --posterior-settings.steps 30 "
    "--posterior-settings.width 16 --posterior-settings.depth 1"
)


@pytest.fixture
def posterior(call: Any) -> Path:
    """A folder with the posterior.pt of a score network of the digits."""
    ending = call("score", "--limit", "200", "--out", "score", *DIGITS.split())
    assert ending.status == 0, ending
    return Path("score")


def make(call: Any, out: str, *more: object) -> Any:
    return call("generate", "--run", "score", "--count", 43, "--batch-size", 10, "--levels", 3, "--out", out, *more)


def test_generated_digits(posterior: Path, call: Any) -> None:
    ending = make(call, "a.npz")
    assert ending.status == 0, ending
    assert "43, 4.3 of each of 10 classes" in ending.out
    images, labels = read(Path("a.npz"))
    assert (images.shape, images.dtype) == ((43, 8, 8, 1), np.uint8)
    assert sorted(np.bincount(labels)) == [4] * 7 + [5] * 3
    assert labels[:10].tolist() != sorted(labels[:10].tolist())
    assert len({image.tobytes() for image in images}) == 43
    assert not Path("a.npz.parts").exists()
    assert len(GeneratedImages(["a.npz"], shape=(1, 8, 8), num_classes=10)) == 43


def test_the_images_of_a_batch_depend_on_seed_and_number_alone(posterior: Path, call: Any) -> None:
    for out, more in (
        ("a.npz", ()),
        ("b.npz", ()),
        ("c.npz", ("--seed", 1)),
        ("d.npz", ("--levels", 4)),
        ("e.npz", ("--sampler", "heun")),
    ):
        assert make(call, out, *more).status == 0
    same, again, *others = (Path(f"{name}.npz").read_bytes() for name in "abcde")
    assert same == again
    assert len({same, *others}) == 4
    images, _ = read(Path("a.npz"))
    assert not np.array_equal(images[:10], images[10:20])


def test_the_sampler_suits_the_noise_of_the_training() -> None:
    denoiser = Denoiser(nn.Identity(), num_classes=2, sigma_data=0.25)
    chosen = [generate.sampler_of("auto", denoiser, sigma) for sigma in (1.0, 2.4, 2.5, 40.0)]
    assert chosen == ["langevin", "langevin", "heun", "heun"]
    assert generate.sampler_of("heun", denoiser, 1.0) == "heun"


@pytest.mark.parametrize("sampler", ["heun", "langevin"])
def test_images_are_of_the_class_of_their_label(sampler: str, posterior: Path, call: Any) -> None:
    """Even a little training tells the mean images of the classes."""
    assert call("score", "--out", "longer", *DIGITS.replace("steps 30", "steps 400").split()).status == 0
    options = ["--run", "longer", "--count", 300, "--levels", 12, "--sampler", sampler, "--out", "a.npz"]
    assert call("generate", *options).status == 0
    images, labels = read(Path("a.npz"))
    from training.data import DataSettings, load

    digits = load(DataSettings("digits"))
    means = torch.stack([digits.x_train[digits.y_train == label].mean(0).flatten() for label in range(10)])
    x = torch.from_numpy(images.astype(np.float32) / 255).flatten(1)
    recognised = (torch.cdist(x, means).argmin(1).numpy() == labels).mean()
    assert recognised > 0.5


def test_an_interrupted_call_goes_on_to_the_same_bytes(
    posterior: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(call, "a.npz").status == 0
    images = generate.Generator.images

    def interrupted(self: generate.Generator, number: int) -> np.ndarray:
        if number == 2:
            raise Interrupted("SIGTERM")
        return images(self, number)

    monkeypatch.setattr(generate.Generator, "images", interrupted)
    ending = make(call, "b.npz")
    assert ending.status == 1
    assert "stopped: SIGTERM, 2 of 5 batches are in b.npz.parts; the same command goes on" in ending.err
    assert not Path("b.npz").exists()

    made = []

    def counted(self: generate.Generator, number: int) -> np.ndarray:
        made.append(number)
        return images(self, number)

    monkeypatch.setattr(generate.Generator, "images", counted)
    ending = make(call, "b.npz", "--seed", 1)
    assert (ending.status, made) == (2, [])
    assert "b.npz.parts holds batches with another seed" in ending.err
    assert make(call, "b.npz").status == 0
    assert made == [2, 3, 4]
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


def test_a_network_that_gives_no_numbers_stops(posterior: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate.sampling, "annealed_langevin", lambda *_, **__: torch.full((10, 1, 8, 8), torch.nan))
    ending = make(call, "a.npz")
    assert ending.status == 1
    assert "not finite" in ending.err
    with pytest.raises(StopError):
        generate._pixels(torch.full((1, 1, 2, 2), torch.inf))


def test_pixels_are_clipped_and_rounded() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, 127.4 / 255, 127.6 / 255]).reshape(7, 1, 1, 1)
    assert generate._pixels(x).flatten().tolist() == [0, 0, 128, 255, 255, 127, 128]


def test_a_file_says_its_data_set_and_options_must_not_contradict(posterior: Path, call: Any) -> None:
    path = posterior / "posterior.pt"
    options = ["--posterior-from", path, "--count", 10, "--levels", 2]
    assert call("generate", *options, "--out", "a.npz").status == 0
    ending = call("generate", *options, "--out", "b.npz", "--limit", 300)
    assert (ending.status, "limit: 300, but score/posterior.pt was trained with 200" in ending.err) == (2, True)
    ending = call("generate", *options, "--out", "b.npz", "--data", "cifar10")
    assert (ending.status, "data: cifar10, but" in ending.err) == (2, True)

    state = checkpoint.load(path)
    settings = {key: value for key, value in state["settings"].items() if key not in ("data", "limit")}
    torch.save({**state, "settings": settings}, "old.pt")
    options[1] = "old.pt"
    ending = call("generate", *options, "--out", "b.npz")
    assert (ending.status, "expected --data NAME" in ending.err) == (2, True)
    assert call("generate", *options, "--out", "b.npz", "--data", "digits", "--limit", 200).status == 0
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    Path("config.toml").write_text('data = "digits"\nlimit = 200\n')  # of training.run, beside its posterior.pt
    assert call("generate", *options, "--out", "c.npz").status == 0
    assert Path("a.npz").read_bytes() == Path("c.npz").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out a.npz", "posterior_from, run: neither given, expected one of them"),
        ("--out a.npz --run score --posterior-from score/posterior.pt", "both given"),
        ("--out a.npz --run nowhere", "run: nowhere is not a folder, expected that of training.score"),
        ("--out a.npy --run score", "out: a.npy is not an .npz"),
        ("--out no/a.npz --run score", "out: no/a.npz has no folder"),
        ("--out a.npz --run score --count 0", "count: 0 is out of range"),
        ("--out a.npz --run score --count 9", "count: 9, allowed: at least 10, one of each class"),
        ("--out a.npz --run score --batch-size 0", "batch_size: 0 is out of range"),
        ("--out a.npz --run score --sigma-min 3", "sigma_min, sigma_max: 0 < sigma_min"),
        ("--out a.npz --run kde --data digits", "holds a kernel_density, expected a score_network"),
        ("--out a.npz --run toy", "data: toy has no images but inputs [1], expected images"),
        ("--out a.npz --posterior-from wide.pt", "its network does not fit digits"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_line(options: str, message: str, posterior: Path, call: Any) -> None:
    state = checkpoint.load(posterior / "posterior.pt")
    for folder, changes in (("kde", {"name": "kernel_density"}), ("toy", {"data": "toy", "limit": 100})):
        Path(folder).mkdir()
        torch.save({**state, "settings": {**state["settings"], **changes}}, f"{folder}/posterior.pt")
    torch.save({**state, "settings": {**state["settings"], "width": 24}}, "wide.pt")
    ending = call("generate", *options.split())
    assert ending.status == 2, ending
    assert message in ending.err
    assert ending.err.count("\n") == 1
    assert not list(Path().glob("*.parts"))


def test_generated_cifar_trains_a_classifier(
    call: Any, cifar10_root: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files in CIFAR's format to a score network, to generated images, to a run that mixes them in."""
    monkeypatch.setattr(score, "AUDITED", 8)  # a U-Net is slow on a CPU
    root = ["--data-root", cifar10_root]
    network = "--posterior-settings.network unet --posterior-settings.width 8 --posterior-settings.steps 1"
    more = "--posterior-settings.batch-size 2 --posterior-settings.anchor label --limit 20"
    options = ["--data", "cifar10", *root, *DIGITS.split(), *network.split(), *more.split()]
    assert call("score", *options, "--out", "score").status == 0
    options = ["--run", "score", *root, "--count", 24, "--batch-size", 12, "--levels", 2]
    ending = call("generate", *options, "--out", "a.npz")
    assert ending.status == 0, ending
    assert len(GeneratedImages(["a.npz"], shape=(3, 32, 32), num_classes=10)) == 24
    options = ["--data", "cifar10", *root, "--model", "wrn-10-1", *tiny, "--epochs", 1, "--generated", "a.npz"]
    ending = call("run", "--objective", "standard", *options, "--out", "run")
    assert ending.status == 0, ending
    assert 0 <= json.loads(Path("run/summary.json").read_text())["clean_acc"] <= 100
