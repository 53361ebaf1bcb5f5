"""Damaged and hostile files: every reader gives what the file holds, or an error that names the file.

No code in a file runs, and no file makes a reader take much more memory than it has bytes.
"""

import io
import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scorematch as sm
from scorematch.attacks.evaluation_state import EvaluationState
from training.data import generated, npy
from training.engine import checkpoint
from training.models import loading
from training.reports import audit
from training.settings import config
from training.settings.errors import InputError

from .drawing import examples

pytestmark = pytest.mark.soak

MEMORY = 64 << 20  # bytes that reading a file of a few kilobytes may take


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(buffer, image=np.arange(20 * 48, dtype=np.uint8).reshape(20, 4, 4, 3), label=np.arange(20) % 10)
    return buffer.getvalue()


def pseudo_labelled(protocol: int) -> bytes:
    images = np.arange(20 * 48, dtype=np.uint8).reshape(20, 4, 4, 3)
    return pickle.dumps({"data": images, "extrapolated_targets": np.arange(20) % 10}, protocol=protocol)


POINTS: Any = SimpleNamespace(x_test=torch.zeros(4, 2), num_classes=3)


def human_labels(folder: Path) -> bytes:
    np.save(folder / "labels.npy", np.full((4, 3), 1 / 3))
    return (folder / "labels.npy").read_bytes()


def state_file(folder: Path) -> bytes:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    attack = sm.AutoAttack(model, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False, save_every=0)
    attack.apgd.n_iter = 2
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    attack.run_standard_evaluation(x, torch.tensor([0, 1, 2, 0]), state_path=folder / "state.pt")
    return (folder / "state.pt").read_bytes()


class Reader:
    """A good file, and what reads it."""

    def __init__(self, suffix: str, content: Callable[[Path], bytes], read: Callable[[Path], object]) -> None:
        self.suffix, self.content, self.read = suffix, content, read


WEIGHTS = {"network": {"0.weight": torch.ones(3, 2)}, "epoch": 3}
JSON = b'{"objective": "standard", "clean_acc": 98.5, "split": {"train": 100, "seed": null}}\n'
TOML = b'objective = "standard"\neps = 0.1\n'
READERS = {
    "npz": Reader(".npz", lambda _: archive(False), generated.read),
    "compressed npz": Reader(".npz", lambda _: archive(True), generated.read),
    "whole npz": Reader(".npz", lambda _: archive(False), generated.check),
    "pickle of protocol 2": Reader(".pickle", lambda _: pseudo_labelled(2), generated.read),
    "pickle of protocol 5": Reader(".pickle", lambda _: pseudo_labelled(5), generated.read),
    "checkpoint": Reader(
        ".pt", lambda _: torch_bytes({"format": checkpoint.FORMAT, "settings": {}, **WEIGHTS}), checkpoint.load
    ),
    "weights": Reader(".pt", lambda _: torch_bytes(WEIGHTS), loading._read),
    "state": Reader(".pt", state_file, lambda path: EvaluationState.load(path, {}, torch.zeros(4, 1, 4, 4))),
    "json": Reader(".json", lambda _: JSON, checkpoint.read_json),
    "metrics": Reader(".jsonl", lambda _: 3 * JSON, checkpoint.read_metrics),
    "small npz": Reader(".npz", lambda _: archive(True), npy.read_archive),
    "human labels": Reader(".npy", human_labels, lambda path: audit.read_people(path, POINTS)),
    "toml": Reader(
        ".toml", lambda _: b'data = "digits"\neps = 0.1\n[posterior_settings]\nsigma = 0.4\n', config.read_toml
    ),
    "recipe": Reader(
        ".toml", lambda _: b'objective = "standard"\neps = 0.1\n', lambda path: config.read_recipe(str(path))
    ),
}


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes changed, cut out, put in or put twice; the end missing; or something else altogether."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64]))
        kind = draw(st.sampled_from(["change", "bit", "cut", "insert", "twice", "end", "number"]))
        if kind == "change":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=length))
        elif kind == "twice":
            data[at:at] = data[at : at + length]
        elif kind == "number":  # lengths and shapes become huge or negative
            data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"9999", b"\0\0\0\0"]))
        elif kind == "end":
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    content = reader.content(tmp_path)
    path = tmp_path / f"file{reader.suffix}"
    path.write_bytes(content)
    reader.read(path)  # the good file is read

    @examples(quick=60, soak=5000)
    @given(damages(content))
    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(path)
        except (InputError, ValueError) as error:
            assert str(path) in str(error), error  # noqa: PT017
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY

    check()


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [name for name in READERS if "toml" not in name and "recipe" not in name])
def test_no_code_in_a_file_runs(name: str, tmp_path: Path) -> None:
    reader, trap = READERS[name], tmp_path / "executed"
    hostile = Hostile(trap)
    path = tmp_path / f"hostile{reader.suffix}"
    if reader.suffix == ".npz":
        np.savez(path, image=np.array([hostile], dtype=object), label=np.zeros(1, np.int64), allow_pickle=True)
    elif reader.suffix == ".pt":
        path.write_bytes(torch_bytes({"format": checkpoint.FORMAT, "network": hostile}))
    else:
        path.write_bytes(pickle.dumps({"data": hostile, "extrapolated_targets": np.zeros(1)}))
    with pytest.raises((InputError, ValueError), match="hostile"):
        reader.read(path)
    assert not trap.exists()
