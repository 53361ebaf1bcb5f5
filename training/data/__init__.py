"""The data sets: fixed splits, held as tensors. The split never depends on the seed of a run.

Beside those of this package there are images in folders (``folder``) and what a function of the user's returns
(``module:function``).
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scorematch.posteriors import Posterior
from scorematch.threat_model import largest_radius
from training.data import own_data, toy
from training.settings.errors import InputError, unknown_name

DataName = str  # of FORMATS, FOLDER, or module:function
ToyLabels = Literal["oracle", "hard"]

SPLIT_SEED = 0
DIGITS_TEST, DIGITS_VALIDATION = 500, 147
TOY_VALIDATION, TOY_TEST = 2_000, 2_000
CIFAR_VALIDATION = 1_024  # the first training images, as in the generated-data recipes; the same number of SVHN
ROOT_VARIABLE = "SCOREMATCH_DATA"  # environment variable with the folder of the data sets
FOLDER = "folder"
FOLDER_VALIDATION = 0.1  # share of the training images that validate where no folder has images for that
OFFICIAL = ("cifar10", "cifar100", "svhn")  # read by training.data.official

# The shape of one input and the number of classes.
FORMATS: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((1, 8, 8), 10),
    "toy": ((1,), 2),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}
NAMES = (*FORMATS, FOLDER)  # and module:function

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
    # folder with cifar-10-batches-py, cifar-100-python or *_32x32.mat, or with train and test; None: $SCOREMATCH_DATA
    root: Path | None = None
    download: bool = False  # let torchvision download the data set into that folder where it is missing
    # number of training images kept for validation. CIFAR, SVHN: the first ones, None is 1,024. folder: the same share
    # of each class, None is a tenth
    validation_size: int | None = None
    image_size: int | None = None  # folder: height and width that images are cut to; None leaves them as they are


class Format(NamedTuple):
    """What is known of a data set without its values."""

    input_shape: tuple[int, ...]
    num_classes: int
    lower: float = 0.0
    upper: float = 1.0
    train: int | None = None  # number of training points; None: not known without the files
    validation: int | None = None
    soft: bool = False  # whether its targets are p_d(y|x)

    @property
    def width(self) -> float:
        """Of the box of images, in which radii and noise levels are counted; 1 of other data, and without bounds."""
        width = self.upper - self.lower
        return width if len(self.input_shape) == 3 and math.isfinite(width) else 1.0

    def largest_radius(self, norm: str) -> float:
        """The radius of a ball that holds all allowed values of an input."""
        return largest_radius(norm, math.prod(self.input_shape), self.upper - self.lower)

    def check_radius(self, norm: str, eps: float, name: str = "eps") -> None:
        """Refuse a radius, or a step, that is larger; the message calls it ``name``.

        Raises:
            InputError: as said.
        """
        largest = self.largest_radius(norm)
        if eps > largest:
            hint = f"; {eps:g}/255 is {eps / 255:.4g}" if self.upper - self.lower == 1.0 else ""
            raise InputError(
                f"{name}: {eps:g} in {norm} is out of range, allowed: at most {largest:.4g}, since values lie in "
                f"[{self.lower:g}, {self.upper:g}]{hint}"
            )


@dataclass(frozen=True)
class Data:
    """One data set. Selection sees ``validation`` only, ``test`` is for the final numbers.

    This is also what a function for ``--data module:function`` returns; :func:`checked` says what is allowed.
    """

    name: str  # of a function's data: any, the programs say module:function
    num_classes: int
    x_train: Tensor  # [N, ...] float32
    y_train: Tensor  # [N] int64
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    lower: float = 0.0  # the smallest and the largest value that a feature may take
    upper: float = 1.0
    # Of the channels, which classifiers normalise with. None: those of x_train if it holds images, which load() sets.
    statistics: Statistics | None = None
    p_train: Tensor | None = None  # [N, L] p_d(y|x) at the training points, where it is known and asked for
    p_d: Posterior | None = None  # the data's own posterior, where it is known: --posterior oracle, and a judge
    split_seed: int = SPLIT_SEED
    classes: tuple[str, ...] | None = None  # their names
    source: str | None = None  # of one's own data: the file of the function, or the folder; set by load()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.x_train), "validation": len(self.x_validation), "test": len(self.x_test)}

    @property
    def format(self) -> Format:
        sizes, soft = self.sizes, self.p_train is not None
        return Format(
            self.input_shape, self.num_classes, self.lower, self.upper, sizes["train"], sizes["validation"], soft
        )

    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data, in plain values; see :func:`check_record`."""
        labels = hashlib.sha256()
        for y in (self.y_train, self.y_validation, self.y_test):
            labels.update(y.cpu().numpy().tobytes())
        return {
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "classes": None if self.classes is None else list(self.classes),
            "lower": self.lower,
            "upper": self.upper,
            "sizes": self.sizes,
            "labels": labels.hexdigest()[:16],
            "source": self.source,
        }

    def few(self, count: int, available: int) -> Tensor:
        """The indices of at most ``count`` samples of a split to look at, in the place of all ``available`` ones.

        They are the first ones, but for what a function returns, which may be sorted by class.
        """
        index = spread(count, available) if ":" in self.name else torch.arange(min(count, available))
        return index.to(self.x_train.device)

    def to(self, device: torch.device) -> "Data":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, (Tensor, Posterior))}
        return dataclasses.replace(self, **moved)


def is_own(name: str) -> bool:
    """Whether the data are the user's own: a folder, or what a function returns."""
    return name == FOLDER or ":" in name


def check_name(name: str) -> None:
    if name not in NAMES and not is_own(name):
        raise unknown_name("data", name, [*NAMES, "module:function"])


def slug(name: str) -> str:
    """The name as a part of the name of a file."""
    return name.replace(":", "-").replace("/", "-")


def load(settings: DataSettings) -> Data:
    """The data set that ``settings`` names, on the CPU."""
    check_name(settings.name)
    if settings.image_size is not None and settings.name != FOLDER:
        raise InputError(f"image_size: {settings.image_size} on {settings.name}, allowed: on folder")
    if settings.name == FOLDER:
        return _of_folder(settings)
    if settings.name in OFFICIAL:
        return _of_files(settings)
    if settings.validation_size is not None:
        given = f"{settings.validation_size} on {settings.name}, whose split is fixed"
        raise InputError(f"validation_size: {given}, allowed on {', '.join([*OFFICIAL, FOLDER])}")
    if settings.name == "digits":
        data = _digits()
    elif settings.name == "toy":
        data = _toy(settings.toy_labels)
    else:
        data = _of_function(settings.name)
    if not _limited(settings, data.num_classes, len(data.x_train)):
        return data
    # The toy's points are independent draws, so the first ones keep the priors.
    index = torch.arange(settings.limit) if settings.name == "toy" else _balanced(data.y_train, settings.limit)
    return _keep(data, index)


def format_of(settings: DataSettings) -> Format:
    """What is known of a data set before it is loaded. For this a function is called, and headers of a folder are read.

    Raises:
        InputError: there is no such data set, or it is not what it must be.
    """
    check_name(settings.name)
    if settings.name == FOLDER:
        found, counts = _listed(settings)
        return Format(found.shape(settings.image_size), len(found.classes), train=counts[0], validation=counts[1])
    if is_own(settings.name):
        return _of_function(settings.name).format
    bounds = (-math.inf, math.inf) if settings.name == "toy" else (0.0, 1.0)
    return Format(*FORMATS[settings.name], *bounds)


def check_record(saved: dict[str, Any] | None, data: Data, where: object, *, exact: bool = False) -> list[str]:
    """Compare data with what a checkpoint remembers of those that it was trained on.

    Args:
        saved: a :meth:`Data.record`; None (a checkpoint from before there were any) is not compared.
        data: the data set as it is now.
        where: the file, for the message.
        exact: whether the samples have to be the same ones, as they must to go on with a training.

    Returns:
        What is different about the samples, where that is allowed.

    Raises:
        InputError: inputs, classes or bounds differ; or samples do, where they must be the same.
    """
    if saved is None:
        return []
    now = data.record()
    come_from = f" from {now['source']}" if now["source"] else ""
    names = {"input_shape": "inputs", "num_classes": "number of classes", "classes": "classes"}
    names |= {"lower": "lower bound", "upper": "upper bound"}
    changed = [f"{names[key]} {saved[key]}, now {now[key]}" for key in names if saved[key] != now[key]]
    others = [f"{saved['sizes'][k]} samples to {k}, now {n}" for k, n in now["sizes"].items() if saved["sizes"][k] != n]
    if not others and saved["labels"] != now["labels"]:
        others = ["other labels, or in another order"]
    if changed or (exact and others):
        raise InputError(
            f"data: {data.name}{come_from} is not what {where} was trained on: {'; '.join([*changed, *others])}"
        )
    return others


def _digits() -> Data:
    """The 1,797 scans of 8×8 pixels bundled with scikit-learn, in [0, 1]: 1,150 train, 147 validate, 500 test."""
    from sklearn.datasets import load_digits  # here, for the start of programs: scikit-learn takes a second to import
    from sklearn.model_selection import train_test_split

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
    return dataclasses.replace(data, lower=-math.inf, upper=math.inf, p_train=p_train, p_d=toy.oracle())


def _of_files(settings: DataSettings) -> Data:
    """CIFAR or SVHN in [0, 1]: the first 1,024 training images validate, or as many as asked for.

    48,976 images of CIFAR-10 and CIFAR-100 train and 10,000 test, 72,233 and 26,032 of SVHN.
    """
    from training.data import official  # here, for the start of programs: torchvision takes two seconds to import

    x, y = official.read(settings, train=True)
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
    x_test, y_test = official.read(settings, train=False)
    return _assembled(settings.name, num_classes, [(_pixels(x), y), validation, (_pixels(x_test), y_test)])


def _listed(settings: DataSettings) -> tuple[own_data.Folder, tuple[int, int]]:
    """The image folder, and how many images train and validate."""
    found = own_data.folder(folder_root(settings.root))
    available, size = len(found.splits["train"].labels), settings.validation_size
    if "validation" in found.splits:
        if size is not None:
            given = f"{size}, but {folder_root(settings.root)} has a folder validation"
            raise InputError(f"validation_size: {given}, allowed: none beside it")
        return found, (available, len(found.splits["validation"].labels))
    if size is not None and not 0 <= size <= available - len(found.classes):
        allowed = f"0 to {available - len(found.classes)}, so that each class keeps one"
        raise InputError(f"validation_size: {size} of {available} training images, allowed: {allowed}")
    kept = round(FOLDER_VALIDATION * available) if size is None else size
    kept = min(kept, available - len(found.classes))
    return found, (available - kept, kept)


def folder_root(root: Path | None) -> Path:
    """Where the image folder lies."""
    chosen = root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    if chosen is None:
        raise InputError(f"data_root: none given, {FOLDER} needs --data-root DIR or ${ROOT_VARIABLE}")
    return chosen.absolute()


def root_from_anywhere(name: DataName, root: Path | None) -> Path | None:
    """``root`` as what is saved: another program may read it in another working directory."""
    if name == FOLDER:
        return folder_root(root)
    return None if root is None else root.absolute()


def _of_folder(settings: DataSettings) -> Data:
    """Images in folders, shuffled: programs look at the first so many of a split, which would be those of one class.

    Without a folder for validation a tenth of the training images validate, of each class as many.
    """
    found, (_, kept) = _listed(settings)
    shape = found.shape(settings.image_size)
    train = found.splits["train"]
    aside = own_data.held_out(train.labels, kept, SPLIT_SEED) if "validation" not in found.splits else None
    kinds = {name: (list(split.paths), split.labels) for name, split in found.splits.items()}
    if aside is not None:
        for name, mask in (("validation", aside), ("train", ~aside)):
            index = mask.nonzero().flatten()
            kinds[name] = ([train.paths[i] for i in index.tolist()], train.labels[index])
    paths, labels = kinds["train"]
    if _limited(settings, len(found.classes), len(paths)):
        index = _balanced(labels, settings.limit)
        kinds["train"] = ([paths[i] for i in index.tolist()], labels[index])
    generator, parts = torch.Generator().manual_seed(SPLIT_SEED), []
    for name in ("train", "validation", "test"):
        paths, labels = kinds[name]
        order = torch.randperm(len(paths), generator=generator)
        parts.append((own_data.images([paths[i] for i in order.tolist()], shape, settings.image_size), labels[order]))
    data = _assembled(FOLDER, len(found.classes), parts)
    return dataclasses.replace(data, classes=found.classes, source=str(folder_root(settings.root)))


def _of_function(name: str) -> Data:
    """What ``module:function`` returns."""
    data, source = own_data.called(name)
    return dataclasses.replace(checked(data, name), name=name, source=source)


def checked(data: object, where: str) -> Data:
    """The data set that a function has returned, complete: with the statistics of its channels.

    Args:
        data: what it returned.
        where: its name, for messages.

    Raises:
        InputError: it is not a :class:`Data`, or a field of it is not what it must be.
    """
    if not isinstance(data, Data):
        raise InputError(f"data: {where} returned {type(data).__name__}, expected training.data.Data")
    # Numbers may be those of numpy, which no checkpoint holds.
    try:
        data = dataclasses.replace(
            data, num_classes=int(data.num_classes), lower=float(data.lower), upper=float(data.upper)
        )
    except (TypeError, ValueError):
        given = f"{data.num_classes!r}, {data.lower!r}, {data.upper!r}"
        raise InputError(f"data: {where}: num_classes, lower, upper are {given}, allowed: numbers") from None
    if data.num_classes < 2:
        raise InputError(f"data: {where}: num_classes is {data.num_classes}, allowed: at least 2")
    if not data.lower < data.upper:
        raise InputError(f"data: {where}: lower {data.lower:g}, upper {data.upper:g}, allowed: lower below upper")
    tensors: dict[str, Any] = {}
    for part in ("train", "validation", "test"):
        x, y = (getattr(data, f"{kind}_{part}") for kind in "xy")
        _check_inputs(data, x, f"{where}: x_{part}")
        _check_labels(data, y, len(x), f"{where}: y_{part}")
        if not len(x) and part != "validation":
            raise InputError(f"data: {where}: x_{part} is empty, allowed: at least one sample")
        tensors |= {f"x_{part}": x.detach().cpu(), f"y_{part}": y.detach().cpu()}
    missing = sorted(set(range(data.num_classes)) - set(tensors["y_train"].unique().tolist()))
    if missing:
        raise InputError(
            f"data: {where}: y_train has no label {missing[0]}, allowed: all of 0 to {data.num_classes - 1} occur"
        )
    _check_probabilities(data, where)
    if data.p_d is not None and not isinstance(data.p_d, Posterior):
        given = type(data.p_d).__name__
        raise InputError(f"data: {where}: p_d is {given}, allowed: None or a scorematch.posteriors.Posterior")
    if data.p_d is not None and data.p_d.num_classes != data.num_classes:
        given = f"{data.p_d.num_classes} classes"
        raise InputError(f"data: {where}: p_d has {given}, allowed: {data.num_classes}, as the data")
    if data.p_train is not None:
        tensors["p_train"] = data.p_train.detach().cpu()
    tensors["classes"] = _class_names(data, where)
    data = dataclasses.replace(data, **tensors)
    return dataclasses.replace(data, statistics=_statistics(data, where))


def _check_inputs(data: Data, x: object, where: str) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() < 2:
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"data: {where} is {given}, allowed: a tensor float32 [N, ...]")
    if x.dim() == 4 and x.shape[3] in (1, 3) and x.shape[1] == x.shape[2] > 4:
        raise InputError(
            f"data: {where} is {list(x.shape)}, which looks like [N, H, W, C], allowed: images [N, C, H, W]; "
            "x.permute(0, 3, 1, 2) makes them"
        )
    if x.shape[1:] != data.x_train.shape[1:] or not x[:1].numel() >= len(x[:1]):
        expected = ", ".join(["N", *map(str, data.x_train.shape[1:])])
        raise InputError(f"data: {where} is {list(x.shape)}, allowed: [{expected}], as x_train, none of them 0 but N")
    if not torch.isfinite(x).all():
        raise InputError(f"data: {where} has {int((~torch.isfinite(x)).sum())} values that are not finite, allowed: 0")
    if x.numel() and not data.lower <= float(x.min()) <= float(x.max()) <= data.upper:
        given = f"values from {float(x.min()):g} to {float(x.max()):g}"
        raise InputError(f"data: {where} has {given}, allowed: lower {data.lower:g} to upper {data.upper:g}")


def _check_labels(data: Data, y: object, count: int, where: str) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or list(y.shape) != [count]:
        given = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"data: {where} is {given}, allowed: a tensor int64 [{count}], a label for each input")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < data.num_classes:
        raise InputError(
            f"data: {where} has labels from {int(y.min())} to {int(y.max())}, allowed: 0 to {data.num_classes - 1}"
        )


def _check_probabilities(data: Data, where: str) -> None:
    p, expected = data.p_train, [len(data.x_train), data.num_classes]
    if p is None:
        return
    if not isinstance(p, Tensor) or p.dtype != torch.float32 or list(p.shape) != expected:
        given = f"{p.dtype} {list(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
        raise InputError(f"data: {where}: p_train is {given}, allowed: None or a tensor float32 {expected}")
    if not (p >= 0).all() or not ((p.sum(1) - 1).abs() < 1e-4).all():
        raise InputError(f"data: {where}: p_train has rows that are not distributions, allowed: at least 0, of sum 1")


def _class_names(data: Data, where: str) -> tuple[str, ...] | None:
    names = data.classes
    if names is None:
        return None
    names = tuple(names)
    if len(names) != data.num_classes or not all(isinstance(name, str) for name in names):
        raise InputError(f"data: {where}: classes is {list(names)}, allowed: None or {data.num_classes} names")
    return names


def _statistics(data: Data, where: str) -> Statistics | None:
    if data.statistics is None or len(data.input_shape) != 3:
        return statistics_of(data.x_train)
    try:
        mean, deviation = (tuple(float(value) for value in values) for values in data.statistics)
        fits = len(mean) == len(deviation) == data.input_shape[0] and all(0 < value < math.inf for value in deviation)
    except (TypeError, ValueError):
        fits = False
    if not fits or not all(map(math.isfinite, mean)):
        raise InputError(
            f"data: {where}: statistics is {data.statistics!r}, allowed: None or (means, standard deviations above 0), "
            f"{data.input_shape[0]} of each"
        )
    return mean, deviation


def statistics_of(x: Tensor) -> Statistics | None:
    """Mean and standard deviation of each channel of images x [N, C, H, W]; a constant channel has deviation 1.

    None for inputs that are not images.
    """
    if x.dim() != 4:
        return None
    mean, deviation = [], []
    for channel in range(x.shape[1]):
        # One channel after the other, and its sums in double precision, for the memory of a large data set.
        values = x[:, channel]
        mean.append(float(values.mean(dtype=torch.float64)))
        square = float((values - mean[-1]).square_().mean(dtype=torch.float64))
        deviation.append(math.sqrt(square) or 1.0)
    return tuple(mean), tuple(deviation)


def _pixels(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] as float32 [N, C, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 255


def _assembled(name: str, num_classes: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Data:
    """A data set from its training, validation and test pairs."""
    (x_train, y_train), (x_validation, y_validation), (x_test, y_test) = parts
    parts_of_data = (x_train, y_train, x_validation, y_validation, x_test, y_test)
    return Data(name, num_classes, *parts_of_data, statistics=STATISTICS.get(name) or statistics_of(x_train))


def _limited(settings: DataSettings, num_classes: int, available: int) -> bool:
    """Whether ``limit`` leaves some of the available training points out."""
    if settings.limit and not num_classes <= settings.limit <= available:
        raise InputError(
            f"limit: {settings.limit} training points, allowed: 0 (all) or {num_classes} to {available} "
            f"on {settings.name}"
        )
    return 0 < settings.limit < available


def spread(count: int, available: int) -> Tensor:
    """The indices of at most ``count`` samples at equal distances; of sorted ones each class has its share."""
    count = min(count, available)
    return torch.arange(count) * available // max(count, 1)


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
