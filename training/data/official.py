"""CIFAR-10, CIFAR-100 and SVHN from their official files, which torchvision reads and, if asked to, downloads."""

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.datasets.utils import check_integrity

from training.data import FORMATS, ROOT_VARIABLE, DataSettings
from training.settings.errors import InputError

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
HOUSE_NUMBERS = {"svhn": SVHN}


def read(settings: DataSettings, *, train: bool) -> tuple[Tensor, Tensor]:
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
