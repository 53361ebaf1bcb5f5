"""Generated training images in files: read without loading them, drawn in a seeded order, written.

A file is an ``.npz`` with ``image``, uint8 [N, H, W, C], and ``label``, any integers [N] (Rebuffi et al., 2021; Wang et
al., 2023), or the pickle of pseudo-labelled images of Carmon et al. (2019) with ``data`` and ``extrapolated_targets``.
Nothing but arrays is ever unpickled.

    python -m training.data.generated --source packed.npz                  # checked to its end
    python -m training.data.generated --source packed.npz --out plain.npz  # uncompressed, so that it need not be loaded
"""

import itertools
import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data import npy, pickles
from training.engine import checkpoint
from training.settings import command_line
from training.settings.errors import InputError, run_program

IMAGE, LABEL = "image", "label"
PICKLES = (".pickle", ".pkl")
EXPECTED = "an .npz with image uint8 [N, H, W, C] and label [N], or a .pickle with data and extrapolated_targets"
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError)
CHUNK = 1 << 24  # bytes read or written at a time
ROUNDS = 8  # of the permutation; four make it random enough (Luby & Rackoff, 1988)


class GeneratedImages:
    """The images of one or several files, as one sequence.

    Uncompressed ``.npz`` files are mapped into memory: only the pages that are drawn are read, and only the labels are
    loaded. Compressed ones and pickles are loaded.

    Args:
        paths: the files, in order.
        shape: [C, H, W] of the data set that they belong to.
        num_classes: L; every class must occur.

    Raises:
        InputError: a file cannot be used, or belongs to another data set.
    """

    def __init__(self, paths: Sequence[Path | str], *, shape: Sequence[int], num_classes: int) -> None:
        if not paths:
            raise InputError(f"generated: no file given, expected {EXPECTED}")
        channels, *size = shape
        self.image_shape = (*size, channels)
        self.num_classes = num_classes
        files = [_labelled(Path(path), self.image_shape, num_classes) for path in paths]
        self.images = [images for images, _ in files]
        self.labels = np.concatenate([labels for _, labels in files])  # [N], in the smallest type that holds them
        self.starts = np.cumsum([0, *map(len, self.images)])  # number of the first image of each file, then N
        missing = np.flatnonzero(np.bincount(self.labels, minlength=num_classes) == 0)
        if len(missing):
            names = ", ".join(str(path) for path in paths)
            raise InputError(
                f"generated: no image of class {missing[0]} in {names}, expected all of 0 to {num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images uint8 [n, H, W, C] and labels int64 [n] of numbers int64 [n] in [0, N), on the CPU.

        Raises:
            IndexError: a number is out of range.
        """
        wanted = index.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"index {wanted.min()} to {wanted.max()} is out of range, allowed: 0 to {len(self) - 1}")
        order = wanted.argsort(kind="stable")  # a disk is read in one direction
        ordered = wanted[order]
        images = np.empty((len(wanted), *self.image_shape), np.uint8)
        bounds = ordered.searchsorted(self.starts)
        for source, first, low, high in zip(self.images, self.starts, bounds, bounds[1:], strict=False):
            images[order[low:high]] = source[ordered[low:high] - first]
        return torch.from_numpy(images), torch.from_numpy(self.labels[wanted].astype(np.int64))


class GeneratedStream:
    """An endless sequence of generated images: all of them in a random order, then all of them in another one.

    The order is a function of the seed, so a position is all that a run has to remember, and every process of several
    can take its share of one sequence.

    Args:
        images: where they come from; files may be sorted by class.
        seed: decides every order; 0 to 2³² − 1.
    """

    def __init__(self, images: GeneratedImages, seed: int) -> None:
        self.images, self.seed = images, seed

    def index(self, position: int, count: int) -> Tensor:
        """The numbers int64 [count] of the images at ``position`` to ``position + count − 1`` of the sequence."""
        if position < 0 or count < 0:
            raise ValueError(f"position and count must be at least 0, got {position} and {count}")
        size, end = len(self.images), position + count
        parts = [np.empty(0, np.int64)]
        while position < end:
            number, first = divmod(position, size)
            last = min(size, first + end - position)
            parts.append(Permutation(size, self.seed, number)(np.arange(first, last)))
            position += last - first
        return torch.from_numpy(np.concatenate(parts))

    def draw(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """The images uint8 [count, H, W, C] and labels int64 [count] at these positions, on the CPU."""
        return self.images.batch(self.index(position, count))


class Permutation:
    """A random order of 0 … size − 1 that is computed on demand and never stored.

    Alternating Feistel rounds on Z_a × Z_b with a · b just above ``size``; what falls outside goes through them again
    (Black & Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).

    Args:
        size: at least 1.
        key: integers of at least 0 that decide the order.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.left = math.isqrt(size - 1) + 1
        self.right = -(-size // self.left)
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers int64 [n] at positions int64 [n] in [0, size) of the order."""
        numbers = self._rounds(positions)
        while len(outside := np.flatnonzero(numbers >= self.size)):
            numbers[outside] = self._rounds(numbers[outside])
        return numbers

    def _rounds(self, positions: np.ndarray) -> np.ndarray:
        first, second = (part.astype(np.uint64) for part in divmod(positions, self.right))
        for number, key in enumerate(self.keys):
            modulus = np.uint64((self.left, self.right)[number % 2])
            mixed: np.ndarray = (first + _scrambled(second + key) % modulus) % modulus
            first, second = second, mixed
        return (first * np.uint64(self.right) + second).astype(np.int64)


def _scrambled(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 on uint64 (Steele, Lea & Flood, OOPSLA 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def save(path: Path | str, images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> None:
    """Write images uint8 [N, H, W, C] and labels [N] as an uncompressed .npz, atomically; the same bytes every time.

    Raises:
        ValueError: shapes or types do not fit.
        StopError: the file cannot be written.
    """
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise ValueError(f"images must be uint8 [N, H, W, C], got {pixels.dtype} {list(pixels.shape)}")
    rows = max(1, CHUNK // max(1, pixels[:1].nbytes))
    write(Path(path), pixels.shape, (pixels[i : i + rows] for i in range(0, len(pixels), rows)), np.asarray(labels))


def write(path: Path, shape: Sequence[int], parts: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """:func:`save` for images [N, H, W, C] that come in parts, one after the other; never two are held."""
    if labels.dtype.kind not in "iu" or labels.shape != (shape[0],):
        raise ValueError(f"labels must be integers [{shape[0]}], got {labels.dtype} {list(labels.shape)}")
    with checkpoint.replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, IMAGE, shape, np.dtype(np.uint8), parts)
        _write_member(archive, LABEL, labels.shape, np.dtype(np.int64), [labels.astype(np.int64)])


def _write_member(
    archive: zipfile.ZipFile, key: str, shape: Sequence[int], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
    written = 0
    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            content = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            member.write(content.data)
            written += len(content)
    if written != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"parts hold {written} bytes, {key} {list(shape)} has {math.prod(shape) * dtype.itemsize}")


def _labelled(path: Path, image_shape: tuple[int, ...], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of a file, mapped where that can be, and its labels in the smallest type; both checked."""
    images, labels = read(path)
    if images.shape[1:] != image_shape:
        given = f"{path} has images {list(images.shape[1:])}"
        raise InputError(f"generated: {given}, the data set has {list(image_shape)} (height, width, channels)")
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < num_classes:
        raise InputError(f"generated: {path} has labels from {low} to {high}, allowed: 0 to {num_classes - 1}")
    return images, labels.astype(np.min_scalar_type(num_classes))


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C], mapped where that can be, and integer labels [N] of one file, N at least 1.

    Raises:
        InputError: it is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"generated: {path} is not a file, expected {EXPECTED}")
    try:
        images, labels = _from_pickle(path) if path.suffix in PICKLES else _from_npz(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    for name, array, dimensions in ((IMAGE, images, 4), (LABEL, labels, 1)):
        if array.ndim != dimensions or not (array.dtype == np.uint8 if name == IMAGE else array.dtype.kind in "iu"):
            raise InputError(f"generated: {path} has {name} {array.dtype} {list(array.shape)}, expected {EXPECTED}")
    if len(images) != len(labels) or not len(images):
        raise InputError(
            f"generated: {path} has {len(images)} images and {len(labels)} labels, expected as many, above 0"
        )
    return images, labels


def _unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(f"generated: {path} cannot be read ({error or type(error).__name__}), expected {EXPECTED}")


class _Member(NamedTuple):
    """An array in an .npz, described by its header."""

    path: Path
    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    header: int  # bytes of the .npy header

    @property
    def compressed(self) -> bool:
        return self.entry.compress_type != zipfile.ZIP_STORED

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _members(archive: zipfile.ZipFile, path: Path) -> tuple[_Member, _Member]:
    """The two arrays of an .npz, nothing of them read but the headers."""
    missing = [key for key in (IMAGE, LABEL) if f"{key}.npy" not in archive.namelist()]
    if missing:
        given = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:8])
        raise InputError(
            f"generated: {path} has no {' and no '.join(missing)} but {given or 'nothing'}, expected {EXPECTED}"
        )
    image, label = (_member(archive, path, archive.getinfo(f"{key}.npy")) for key in (IMAGE, LABEL))
    return image, label


def _member(archive: zipfile.ZipFile, path: Path, entry: zipfile.ZipInfo) -> _Member:
    with archive.open(entry) as file:
        member = _Member(path, entry, *npy.read_header(file), header=file.tell())
    if member.dtype.hasobject:
        raise InputError(f"generated: {path} has pickled objects in {entry.filename}, expected {EXPECTED}")
    if entry.file_size != member.header + member.size:
        given = f"{entry.file_size - member.header} bytes of {entry.filename}"
        raise ValueError(f"{given}, {list(member.shape)} has {member.size}")
    return member


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        image, label = _members(archive, path)
        return (_loaded(archive, image) if image.compressed else _mapped(image)), _loaded(archive, label)


def _mapped(member: _Member) -> np.ndarray:
    """A stored member as an array on the bytes of the file (``np.load`` maps no member of an .npz)."""
    order = "F" if member.fortran_order else "C"
    with open(member.path, "rb") as file:
        file.seek(member.entry.header_offset)
        local = file.read(30)
        if local[:4] != b"PK\3\4":
            raise zipfile.BadZipFile(f"{member.entry.filename} is not where the directory says")
        # The local header has a name and extras of its own lengths, which need not be those of the directory.
        begin = member.entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30])) + member.header
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(content) > (available_memory() or math.inf):
        # Read-ahead fetches 250 KB for an image of 3 KB: good if the whole file soon is in memory, ruinous if not.
        content.madvise(mmap.MADV_RANDOM)
    if begin + member.size > len(content):
        raise zipfile.BadZipFile(f"{member.entry.filename} goes on after the end of the file")
    return np.ndarray(member.shape, member.dtype, content, begin, order=order)  # type: ignore[arg-type]


def _loaded(archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
    if member.compressed and member.size > CHUNK:
        available = available_memory()
        rewrite = command_line.command("python", "-m", "training.data.generated", "--source", member.path)
        remedy = f"{rewrite} --out FILE.npz rewrites it uncompressed"
        size = f"{member.path} is compressed: {member.entry.filename} takes {member.size / 1e9:.1f} GB of memory"
        if available is not None and member.size > available:
            raise InputError(f"generated: {size}, available: {available / 1e9:.1f} GB; {remedy}")
        print(f"{size}; {remedy}", file=sys.stderr)
    with archive.open(member.entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say (it does on Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _from_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pseudo-labelled images of Carmon et al. (2019)."""
    try:
        content = pickles.load(path)
    except Exception as error:  # what a damaged pickle raises depends on where the damage is
        raise _unreadable(path, error) from None
    if not isinstance(content, dict) or not {"data", "extrapolated_targets"} <= content.keys():
        given = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"generated: {path} holds {given}, expected {EXPECTED}")
    try:
        return pickles.as_array(content["data"]), pickles.as_array(content["extrapolated_targets"])
    except Exception as error:
        raise _unreadable(path, error) from None


def rewrite(source: Path, out: Path) -> int:
    """``source`` as an uncompressed .npz, without loading its images if it is an .npz; the number of images."""
    if source.suffix in PICKLES:
        images, labels = read(source)
        save(out, images, labels)
        return len(labels)
    if not source.is_file():
        raise InputError(f"generated: {source} is not a file, expected {EXPECTED}")
    try:
        with zipfile.ZipFile(source) as archive:
            image, label = _members(archive, source)
            if image.fortran_order or image.dtype != np.uint8 or len(image.shape) != 4:
                order = ", in Fortran order" if image.fortran_order else ""
                raise InputError(
                    f"source: {source} has image {image.dtype} {list(image.shape)}{order}, expected {EXPECTED}"
                )
            write(out, image.shape, _content(archive, image), _loaded(archive, label))
            return image.shape[0]
    except UNREADABLE as error:
        raise _unreadable(source, error) from None


def _content(archive: zipfile.ZipFile, member: _Member) -> Iterator[np.ndarray]:
    """The bytes of an array after its header."""
    with archive.open(member.entry) as file:
        file.read(member.header)
        while part := file.read(CHUNK):
            yield np.frombuffer(part, np.uint8)


def check(source: Path) -> str:
    """Read a file to its end and say in words what it holds. Its images are not held in memory, unless it is a pickle.

    Raises:
        InputError: it is missing, damaged, or holds something else.
    """
    if source.suffix in PICKLES or not source.is_file():
        images, labels = read(source)
        return _described(images.shape, labels, "a pickle: loaded for training")
    try:
        with zipfile.ZipFile(source) as archive:
            image, label = _members(archive, source)
            damaged = archive.testzip()
            if damaged is not None:
                raise InputError(f"generated: {source} is damaged, the checksum of {damaged} is wrong")
            labels = _loaded(archive, label)
    except UNREADABLE as error:
        raise _unreadable(source, error) from None
    shapes = {IMAGE: (image.dtype == np.uint8, image.shape, 4), LABEL: (labels.dtype.kind in "iu", labels.shape, 1)}
    for name, (fits, shape, dimensions) in shapes.items():
        if not fits or len(shape) != dimensions:
            dtype = image.dtype if name == IMAGE else labels.dtype
            raise InputError(f"generated: {source} has {name} {dtype} {list(shape)}, expected {EXPECTED}")
    if image.shape[0] != len(labels) or not len(labels):
        raise InputError(
            f"generated: {source} has {image.shape[0]} images and {len(labels)} labels, expected as many, above 0"
        )
    held = f"compressed: training loads it, {image.size / 1e9:.2f} GB" if image.compressed else "read where it lies"
    return _described(image.shape, labels, held)


def _described(shape: Sequence[int], labels: np.ndarray, held: str) -> str:
    classes, counts = np.unique(labels, return_counts=True)
    known = classes[classes >= 0].astype(np.int64)
    counts_before = (np.diff(known, prepend=-1) - 1).tolist()  # labels without an image, before each that has some
    absent = (range(label - count, label) for label, count in zip(known.tolist(), counts_before, strict=True))
    missing = list(itertools.islice(itertools.chain.from_iterable(absent), 5))
    gaps = f", none of {', '.join(map(str, missing[:4]))}{' and others' if len(missing) > 4 else ''}" if missing else ""
    rows = (
        ("images", f"{shape[0]} of {list(shape[1:])} (height, width, channels)"),
        ("classes", f"{len(classes)}, {classes[0]} to {classes[-1]}{gaps}"),
        ("of a class", f"{counts.min()} to {counts.max()}"),
        ("file", held),
    )
    return "\n".join(f"  {name:<12}{value}" for name, value in rows)


@dataclass(frozen=True)
class RewriteSettings:
    """A file of generated images to check, or to rewrite as an uncompressed .npz, which is mapped instead of loaded."""

    source: Path  # .npz with image and label, or .pickle with data and extrapolated_targets
    out: Path | None = None  # .npz to write; None checks the source and says what it holds


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        RewriteSettings,
        arguments,
        program="python -m training.data.generated",
        description="Check a file of generated images, or rewrite it as an uncompressed .npz.",
    )
    if settings.out is None:
        print(check(settings.source))
        return
    check_free(settings.out)
    count = rewrite(settings.source, settings.out)
    print(f"{count} images in {settings.out}, {settings.out.stat().st_size / 1e9:.2f} GB")


def check_free(out: Path) -> None:
    """A file of generated images takes long to make: none is ever overwritten."""
    if out.exists() or out.suffix != ".npz" or not out.parent.is_dir():
        reason = "exists already" if out.exists() else "is not an .npz" if out.suffix != ".npz" else "has no folder"
        raise InputError(f"out: {out} {reason}, expected a new .npz in a folder that exists")


if __name__ == "__main__":
    sys.exit(run_program(main))
