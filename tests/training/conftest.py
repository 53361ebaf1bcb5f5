"""What the tests of the programs share: calls in this process, and settings that make a run take a second."""

import hashlib
import os
import pickle
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from killing import FROM_FORK_SERVER, Hit, Start, leave_pictures_undrawn, program
from scipy.io import savemat

from training import compare, data, demo, evaluate, generate, plan, run, score
from training.data import generated, official
from training.engine import scores
from training.experiments import __main__ as experiments
from training.experiments import page
from training.figures import __main__ as figures
from training.settings.errors import run_program

PROGRAMS = {
    "demo": demo.main,
    "run": run.main,
    "evaluate": evaluate.main,
    "compare": compare.main,
    "score": score.main,
    "generate": generate.main,
    "generated": generated.main,
    "plan": plan.main,
    "experiments": experiments.main,
    "page": page.main,
    "figures": figures.main,
}
TINY = (
    "--epochs 2 --limit 100 --batch-size 50 --steps 2 --validation-steps 1 --eval-steps 2 --eval-restarts 1 "
    "--curve-points 2 --autoattack none --threads 1"
)

REAL_DATA = os.environ.get(data.ROOT_VARIABLE)  # `call` hides the variable from the programs
CIFAR_TRAIN, CIFAR_TEST = 5 * 240, 50  # sizes of the synthetic CIFAR
SVHN_TRAIN, SVHN_TEST = 1100, 40  # and of the synthetic SVHN


class Ending(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Ending]


@pytest.fixture(autouse=True)
def untouched(untouched_process: None) -> None:
    """All tests here are of programs."""


@pytest.fixture(autouse=True)
def few_held_out_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of score networks that take a few steps must not spend their time on measuring themselves."""
    monkeypatch.setattr(scores, "HELD_OUT", 16)
    monkeypatch.setattr(score, "AUDITED", 64)


@pytest.fixture(autouse=True)
def only_pictures_that_matter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports draw their pictures where a test is marked so: there is one for each kind of report."""
    if request.node.get_closest_marker("pictures") is None:
        leave_pictures_undrawn(monkeypatch.setattr)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """``call("run", "--objective", ...)`` runs a program in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCOREMATCH_DATA", raising=False)  # no test here trains on the real images

    def ending(program: str, *arguments: object) -> Ending:
        capfd.readouterr()
        status = run_program(PROGRAMS[program], [str(argument) for argument in arguments])
        return Ending(status, *capfd.readouterr())

    return ending


@pytest.fixture
def quick_runs(processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a comparison are such processes."""
    monkeypatch.setattr(compare, "subprocess", FROM_FORK_SERVER)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


@pytest.fixture
def start(processes: ForkServerContext, log: Path) -> Start:
    def started(arguments: list[str], hit: Hit | None = None, name: str = "run") -> ForkServerProcess:
        process = processes.Process(target=program, args=(arguments, log, hit, name))
        process.start()
        return process

    return started


@pytest.fixture
def tiny() -> list[str]:
    return TINY.split()


@pytest.fixture
def small_posterior() -> list[str]:
    """Options that train a posterior's network hardly at all."""
    return ["--posterior-settings.steps", "20", "--posterior-settings.width", "16"]


def coloured(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Images uint8 [N, 3, 32, 32]: a colour for each class, and noise."""
    colours = np.random.default_rng(0).uniform(60, 196, (num_classes, 3, 1, 1))
    noise = np.random.default_rng(seed).normal(0, 50, (len(labels), 3, 32, 32))
    return (colours[labels] + noise).clip(0, 255).astype(np.uint8)


def write_cifar(name: str, root: Path) -> type:
    """Coloured noise in the official format below ``root``; torchvision's class with the checksums of these files."""
    kind, (_, num_classes) = official.CIFAR[name], data.FORMATS[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file: str, content: dict[str, Any]) -> list[str]:
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    def part(file: str, count: int, seed: int) -> list[str]:
        labels = (seed * count + np.arange(count)) % num_classes
        images = coloured(labels, num_classes, seed).reshape(count, -1)
        return write(file, {"data": images, "labels" if name == "cifar10" else "fine_labels": labels.tolist()})

    files = [file for file, _ in kind.train_list]
    lists: dict[str, Any] = {
        "train_list": [part(file, CIFAR_TRAIN // len(files), seed) for seed, file in enumerate(files)],
        "test_list": [part(kind.test_list[0][0], CIFAR_TEST, len(files))],
    }
    file, digest = write(kind.meta["filename"], {kind.meta["key"]: [str(label) for label in range(num_classes)]})
    lists["meta"] = {**kind.meta, "filename": file, "md5": digest}
    return type(kind.__name__, (kind,), lists)


def write_svhn(root: Path) -> type:
    """The same for SVHN, whose files call the digit 0 class 10."""
    root.mkdir(parents=True)
    kind = official.HOUSE_NUMBERS["svhn"]
    split_list = {}
    for split, count, seed in (("train", SVHN_TRAIN, 0), ("test", SVHN_TEST, 1)):
        labels = np.arange(count) % 10
        path = root / f"{split}_32x32.mat"
        savemat(
            path, {"X": coloured(labels, 10, seed).transpose(2, 3, 1, 0), "y": np.where(labels, labels, 10)[:, None]}
        )
        split_list[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    return type(kind.__name__, (kind,), {"split_list": split_list})


@pytest.fixture
def synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``synthetic("cifar10")``: a --data-root with that data set, cifar10, cifar100 or svhn, in this process."""

    def root_of(name: str) -> Path:
        root = tmp_path / "data"
        if name == "svhn":
            monkeypatch.setitem(official.HOUSE_NUMBERS, name, write_svhn(root))
        else:
            monkeypatch.setitem(official.CIFAR, name, write_cifar(name, root))
        return root

    return root_of


@pytest.fixture
def cifar10_root(synthetic: Callable[[str], Path]) -> Path:
    """The folder of the real CIFAR-10 where $SCOREMATCH_DATA is set, and of a synthetic one elsewhere."""
    return Path(REAL_DATA) if REAL_DATA else synthetic("cifar10")


@pytest.fixture
def real_images() -> bool:
    """Whether ``cifar10_root`` holds the real ones."""
    return bool(REAL_DATA)


@pytest.fixture
def generated_files(tmp_path: Path) -> list[Path]:
    """Two files of images of the kind that the synthetic CIFAR-10 has, sorted by class as published ones are."""
    paths = [tmp_path / f"generated-{part}.npz" for part in range(2)]
    for part, path in enumerate(paths):
        labels = np.sort(np.arange(400) % 10)
        generated.save(path, coloured(labels, 10, 100 + part).transpose(0, 2, 3, 1), labels)
    return paths
