"""The user's own data: what a function returns, and images in folders. :mod:`training.data` makes data sets of both."""

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.generated import available_memory
from training.settings.errors import InputError

LAYOUT = "DIR/train/CLASS/*.png, DIR/test/CLASS/*.png and, if you like, DIR/validation/CLASS/*.png"
GREY = ("1", "L", "LA")  # modes of PIL with one channel of 8 bits at most
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # with more
THREADS = 8  # that decode images


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """A context in which modules of the current folder can be imported, after all others."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def imported(name: str, option: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, from the search path or the current folder.

    Raises:
        InputError: there is no such function; the message begins with ``option``.
    """
    module_name, function_name = name.split(":", 1)
    importlib.invalidate_caches()
    try:
        with current_folder_importable():
            function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise InputError(
            f"{option}: {name!r} cannot be imported ({_short(error)}), expected module:function, the module in "
            f"{os.getcwd()} or on the search path of Python"
        ) from None
    if not callable(function):
        raise InputError(f"{option}: {name!r} is of type {type(function).__name__}, expected a function")
    return function


def check_call(function: Callable[..., Any], name: str, how: str, *arguments: object, **named: object) -> None:
    """Refuse a function that does not take these arguments.

    Args:
        name: what the error calls the function.
        how: says in words with which arguments it is called.

    Raises:
        InputError: it does not take them.
    """
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise InputError(f"{name} is called {how}, which it does not allow ({error})") from None
    except ValueError:
        pass  # a function without a signature


def called(name: str) -> tuple[object, str]:
    """What the function ``module:function`` returns, and the file that it is in; it is called once in a process."""
    function = imported(name, "data")
    check_call(function, f"data: {name!r}", "without arguments")
    return _result(function, name), _file_of(function)


@functools.lru_cache(maxsize=4)
def _result(function: Callable[[], object], name: str) -> object:
    return result_of(function, f"data: {name}")


def result_of(function: Callable[..., Any], name: str, *arguments: object, **named: object) -> Any:
    """What a function of the user's own returns.

    Args:
        name: what the error calls the function.

    Raises:
        InputError: it fails; the message says where.
    """
    try:
        with current_folder_importable():
            return function(*arguments, **named)
    except InputError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"{name}() failed ({_short(error)}, in {frame.filename}:{frame.lineno})") from None


def _file_of(function: Callable[..., Any]) -> str:
    try:
        return str(Path(inspect.getfile(function)).absolute())
    except TypeError:
        return function.__module__


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Split(NamedTuple):
    """The files of one split, sorted by class and name."""

    paths: tuple[str, ...]
    labels: Tensor  # int64 [N]


class Folder(NamedTuple):
    """What lies in an image folder; of the images only the headers have been read."""

    classes: tuple[str, ...]
    splits: dict[str, Split]  # train, test and maybe validation
    channels: int  # 1 where all images are grey
    sizes: dict[tuple[int, int], int]  # how many images have a (height, width)

    def shape(self, image_size: int | None) -> tuple[int, int, int]:
        """[C, H, W] of the images once they are cut to ``image_size``; None leaves them as they are.

        Raises:
            InputError: they have several sizes, and none is asked for.
        """
        if image_size is not None and image_size < 1:
            raise InputError(f"image_size: {image_size} is out of range, allowed: at least 1 pixel")
        if image_size is not None:
            return (self.channels, image_size, image_size)
        if len(self.sizes) > 1:
            common = ", ".join(f"{height}×{width} ({count})" for (height, width), count in list(self.sizes.items())[:3])
            more = f" and {len(self.sizes) - 3} more" if len(self.sizes) > 3 else ""
            raise InputError(
                f"image_size: none given, and the images have {len(self.sizes)} sizes: {common}{more}; needed: "
                "--image-size N, to which the shorter side is resized before the centre is cut out"
            )
        return (self.channels, *next(iter(self.sizes)))


@functools.lru_cache(maxsize=4)
def folder(root: Path) -> Folder:
    """The image folder ``root``, laid out as torchvision's ImageFolder has it.

    Raises:
        InputError: a split is missing or empty, splits differ in their classes, or a file is not an image.
    """
    from torchvision.datasets import ImageFolder  # here, for the start of programs

    found: dict[str, ImageFolder] = {}
    for name in ("train", "test", "validation"):
        if not (root / name).is_dir():
            if name == "validation":
                continue
            what = f"has no folder {name}" if root.is_dir() else "is not a folder"
            raise InputError(f"data_root: {root} {what}, expected {LAYOUT}")
        try:
            found[name] = ImageFolder(str(root / name))
        except (OSError, RuntimeError) as error:  # no class, or a class without images
            raise InputError(f"data_root: {root / name} cannot be used ({_short(error)}), expected {LAYOUT}") from None
    classes = tuple(found["train"].classes)
    if len(classes) < 2:
        raise InputError(f"data_root: {root / 'train'} has the one class {classes[0]}, expected at least two folders")
    for name, images in found.items():
        different = sorted(set(classes) ^ set(images.classes))
        if different:
            listed = ", ".join(different[:4])
            raise InputError(f"data_root: {root / name} and {root / 'train'} differ in the classes {listed}")
    splits = {
        name: Split(tuple(path for path, _ in images.samples), torch.tensor(images.targets))
        for name, images in found.items()
    }
    headers = [_header(path) for split in splits.values() for path in split.paths]
    grey = all(mode in GREY for mode, _ in headers)
    return Folder(classes, splits, 1 if grey else 3, dict(Counter(size for _, size in headers).most_common()))


def _header(path: str) -> tuple[str, tuple[int, int]]:
    """Mode and (height, width) of an image."""
    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"data_root: {path} cannot be read as an image ({_short(error)})") from None
    if mode in DEEP:
        raise InputError(f"data_root: {path} has pixels of mode {mode}, allowed: 8 bits a channel")
    return mode, (height, width)


def images(paths: Sequence[str], shape: tuple[int, int, int], image_size: int | None) -> Tensor:
    """The images of these files, float32 [N, C, H, W] in [0, 1].

    Args:
        paths: the files.
        shape: [C, H, W].
        image_size: H = W, to which they are resized (the shorter side, with antialiasing) and cut (the centre).

    Raises:
        InputError: a file is damaged, or all of them do not fit into memory.
    """
    needed, available = 4 * len(paths) * int(np.prod(shape)), available_memory()
    if available is not None and needed > available:
        given = f"{len(paths)} images {list(shape)} take {needed / 1e9:.1f} GB, available: {available / 1e9:.1f} GB"
        raise InputError(f"data_root: {given}; --limit or a smaller --image-size takes less")
    out = torch.empty(len(paths), *shape)

    def read(number: int) -> None:
        out[number] = _image(paths[number], shape[0], image_size)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(read, range(len(paths))):
            pass
    return out


def _image(path: str, channels: int, image_size: int | None) -> Tensor:
    from torchvision.transforms import functional  # here, for the start of programs

    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: a PNG whose chunks are damaged
        raise InputError(f"data_root: {path} cannot be read as an image ({_short(error)})") from None
    if image_size is not None:
        image = functional.center_crop(functional.resize(image, image_size, antialias=True), image_size)
    return functional.pil_to_tensor(image).float() / 255


def held_out(y: Tensor, count: int, seed: int) -> Tensor:
    """Which of the samples with labels y [N] are held out: bool [N], ``count`` of them, the same share of each class.

    Where shares are not whole numbers, the largest remainders are rounded up; a class keeps at least one sample.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, sizes = y.unique(return_counts=True)
    shares = sizes.double() * (count / len(y))
    taken = torch.minimum(shares.floor().long(), sizes - 1)
    order = (shares - shares.floor()).argsort(descending=True, stable=True).tolist()
    while taken.sum() < min(count, int((sizes - 1).sum())):
        for index in order:
            if taken.sum() < count and taken[index] < sizes[index] - 1:
                taken[index] += 1
    out = torch.zeros(len(y), dtype=torch.bool)
    for label, number in zip(labels, taken.tolist(), strict=True):
        members = (y == label).nonzero().flatten()
        out[members[torch.randperm(len(members), generator=generator)[:number]]] = True
    return out
