"""Numpy's own files, read so that a damaged one cannot ask for more memory than it has bytes."""

import io
import shutil
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from training.settings.errors import InputError


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the array whose bytes follow.

    Raises:
        ValueError: it is no header, or of a version that no array of plain numbers needs.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of its format")


def read(path: Path) -> np.ndarray:
    """The array in a small .npy file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return _array(path.read_bytes())
    except Exception as error:  # which one a damaged file raises depends on where the damage is
        raise InputError(f"{path}: cannot be read ({_said(error)}), expected a .npy file") from None


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a small .npz file, by their names.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _array(_content(archive, name)) for name in archive.namelist()}
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({_said(error)}), expected an .npz file") from None


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member, in pieces: as a whole it would be given as much memory as a damaged directory says."""
    content = io.BytesIO()
    with archive.open(name) as file:
        shutil.copyfileobj(file, content)
    return content.getvalue()


def _array(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    shape, in_fortran_order, dtype = read_header(file)
    flat = np.frombuffer(content, dtype, offset=file.tell()) if file.tell() < len(content) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if in_fortran_order else "C")


def _said(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return reason or type(error).__name__
