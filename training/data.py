"""The data sets: fixed splits, held as tensors. The split never depends on the seed of a run."""

import dataclasses
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.datasets.utils import check_integrity

from training import toy
from training.errors import InputError, unknown_name

DataName = Literal["digits", "toy", "cifar10", "cifar100", "svhn"]
ToyLabels = Literal["oracle", "hard"]

SPLIT_SEED = 0
DIGITS_TEST, DIGITS_VALIDATION = 500, 147
TOY_VALIDATION, TOY_TEST = 2_000, 2_000
CIFAR_VALIDATION = 1_024  # the first training images, as in the generated-data recipes; the same number of SVHN
ROOT_VARIABLE = "SCOREMATCH_DATA"  # environment variable with the folder of the data sets
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
HOUSE_NUMBERS = {"svhn": SVHN}

# The shape of one input and the number of classes.
FORMATS: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((1, 8, 8), 10),
    "toy": ((1,), 2),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}


Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel

# What published weights for these data sets expect; networks normalise with them.
STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class DataSettings:
    """Which data set, and how much of it."""

    name: str = "digits"
    limit: int = 0  # number of training points to keep; 0 keeps all
    toy_labels: ToyLabels = "oracle"  # targets on the toy: p_d(y|x) or the sampled labels
    root: Path | None = None  # folder with cifar-10-batches-py, cifar-100-python or *_32x32.mat; None: $SCOREMATCH_DATA
    download: bool = False  # let torchvision download the data set into that folder where it is missing
    validation_size: int | None = None  # CIFAR and SVHN: first training images, which validate; None is 1,024


@dataclass(frozen=True)
class Data:
    """One data set. Selection sees ``validation`` only, ``test`` is for the final numbers."""

    name: str
    num_classes: int
    x_train: Tensor  # [N, ...] float32
    y_train: Tensor  # [N] int64
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    lower: float = 0.0  # the smallest and the largest value that a feature may take
    upper: float = 1.0
    statistics: Statistics | None = None  # of the channels, which classifiers normalise with; None: as they are
    p_train: Tensor | None = None  # [N, L] p_d(y|x) at the training points, where it is known and asked for
    split_seed: int = SPLIT_SEED

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.x_train), "validation": len(self.x_validation), "test": len(self.x_test)}

    def to(self, device: torch.device) -> "Data":
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


def load(settings: DataSettings) -> Data:
    """The data set that ``settings`` names, on the CPU."""
    if settings.name in CIFAR or settings.name in HOUSE_NUMBERS:
        return _of_files(settings)
    if settings.validation_size is not None:
        given = f"{settings.validation_size} on {settings.name}, whose split is fixed"
        raise InputError(f"validation_size: {given}, allowed on {', '.join([*CIFAR, *HOUSE_NUMBERS])}")
    if settings.name == "digits":
        data = _digits()
    elif settings.name == "toy":
        data = _toy(settings.toy_labels)
    else:
        raise unknown_name("data", settings.name, get_args(DataName))
    if not _limited(settings, data.num_classes, len(data.x_train)):
        return data
    # The toy's points are independent draws, so the first ones keep the priors.
    index = torch.arange(settings.limit) if settings.name == "toy" else _balanced(data.y_train, settings.limit)
    return _keep(data, index)


def _digits() -> Data:
    """The 1,797 scans of 8×8 pixels bundled with scikit-learn, in [0, 1]: 1,150 train, 147 validate, 500 test."""
    images, labels = load_digits(return_X_y=True)
    x = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST, stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=DIGITS_VALIDATION, stratify=labels[rest], random_state=SPLIT_SEED
    )
    inputs, targets = torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))
    parts = [(inputs[index], targets[index]) for index in (train, validation, test)]
    return _assembled("digits", 10, parts)


def _toy(labels: ToyLabels) -> Data:
    parts = [
        toy.sample(count, seed=SPLIT_SEED + offset)
        for offset, count in enumerate((toy.TRAINING_POINTS, TOY_VALIDATION, TOY_TEST))
    ]
    p_train = toy.posterior(parts[0][0]) if labels == "oracle" else None
    data = _assembled("toy", 2, parts)
    return dataclasses.replace(data, lower=-math.inf, upper=math.inf, p_train=p_train)


def _of_files(settings: DataSettings) -> Data:
    """CIFAR or SVHN in [0, 1]: the first 1,024 training images validate, or as many as asked for.

    48,976 images of CIFAR-10 and CIFAR-100 train and 10,000 test, 72,233 and 26,032 of SVHN.
    """
    x, y = _part(settings, train=True)
    kept = CIFAR_VALIDATION if settings.validation_size is None else settings.validation_size
    if kept > len(x) - FORMATS[settings.name][1]:
        raise InputError(
            f"validation_size: {kept} of {len(x)} images, allowed: 0 to {len(x) - FORMATS[settings.name][1]} on "
            f"{settings.name}"
        )
    validation = (_pixels(x[:kept]), y[:kept])
    x, y = x[kept:], y[kept:]
    num_classes = FORMATS[settings.name][1]
    if _limited(settings, num_classes, len(x)):
        index = _balanced(y, settings.limit)
        x, y = x[index], y[index]
    x_test, y_test = _part(settings, train=False)
    return _assembled(settings.name, num_classes, [(_pixels(x), y), validation, (_pixels(x_test), y_test)])


def _part(settings: DataSettings, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 32, 32, 3], and labels, int64 [N], in the order of the files, both checked."""
    root = settings.root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    if root is None:
        raise InputError(f"data_root: none given, {settings.name} needs --data-root DIR or ${ROOT_VARIABLE}")
    try:
        images, labels = (_cifar if settings.name in CIFAR else _house_numbers)(settings, root, train)
    # A missing or altered file, a download that failed; the others where a file with the right checksum is no data set.
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, pickle.UnpicklingError) as error:
        folder = root / CIFAR[settings.name].base_folder if settings.name in CIFAR else root
        damage = _damage(settings.name, root)
        reasons = [*damage, *([str(error) or type(error).__name__] if settings.download or not damage else [])]
        expected = f"the official files in {folder}, or --download"
        raise InputError(
            f"data_root: {root} holds no intact {settings.name}, expected {expected} ({'; '.join(reasons)})"
        ) from None
    shape, num_classes = FORMATS[settings.name]
    if list(images.shape) != [len(labels), *shape[1:], shape[0]] or images.dtype != torch.uint8:
        given = f"{images.dtype} images {list(images.shape)} with {len(labels)} labels"
        raise InputError(f"data_root: {root} holds {given}, {settings.name} has uint8 [N, {shape[1]}, {shape[2]}, 3]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        given = f"labels from {labels.min()} to {labels.max()}"
        raise InputError(f"data_root: {root} holds {given}, {settings.name} has 0 to {num_classes - 1}")
    return images, labels


def _cifar(settings: DataSettings, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    files = CIFAR[settings.name](root, train=train, download=settings.download)
    return torch.from_numpy(np.ascontiguousarray(files.data)), torch.tensor(files.targets)


def _house_numbers(settings: DataSettings, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    files = HOUSE_NUMBERS[settings.name](root, split="train" if train else "test", download=settings.download)
    images = np.ascontiguousarray(files.data.transpose(0, 2, 3, 1))
    return torch.from_numpy(images), torch.from_numpy(files.labels.astype(np.int64))


def _damage(name: str, root: Path) -> list[str]:
    """Which files of a data set are missing, and which have another checksum."""
    if name in CIFAR:
        kind = CIFAR[name]
        files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
        folder = root / kind.base_folder
    else:
        files = [HOUSE_NUMBERS[name].split_list[split][1:] for split in ("train", "test")]
        folder = root
    missing = [file for file, _ in files if not (folder / file).is_file()]
    altered = [file for file, md5 in files if file not in missing and not check_integrity(folder / file, md5)]
    return [f"{what}: {', '.join(which)}" for what, which in (("missing", missing), ("altered", altered)) if which]


def _pixels(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] as float32 [N, C, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 255


def _assembled(name: str, num_classes: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Data:
    """A data set from its training, validation and test pairs."""
    (x_train, y_train), (x_validation, y_validation), (x_test, y_test) = parts
    parts_of_data = (x_train, y_train, x_validation, y_validation, x_test, y_test)
    return Data(name, num_classes, *parts_of_data, statistics=STATISTICS.get(name))


def _limited(settings: DataSettings, num_classes: int, available: int) -> bool:
    """Whether ``limit`` leaves some of the available training points out."""
    if settings.limit and not num_classes <= settings.limit <= available:
        raise InputError(
            f"limit: {settings.limit} training points, allowed: 0 (all) or {num_classes} to {available} "
            f"on {settings.name}"
        )
    return 0 < settings.limit < available


def _balanced(y: Tensor, limit: int) -> Tensor:
    """The indices of ``limit`` points of labels y [N], in their order, class counts as equal as the data allows."""
    rank_in_class = torch.empty_like(y)
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        rank_in_class[members] = torch.arange(len(members))
    return rank_in_class.argsort(stable=True)[:limit].sort().values if limit else torch.arange(len(y))


def _keep(data: Data, index: Tensor) -> Data:
    return dataclasses.replace(
        data,
        x_train=data.x_train[index],
        y_train=data.y_train[index],
        p_train=None if data.p_train is None else data.p_train[index],
    )
