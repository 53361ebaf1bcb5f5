import errno
import io
import json
import math
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training.engine import checkpoint
from training.settings.errors import InputError, Interrupted, StopError


def save(path: Path, network: nn.Module) -> None:
    checkpoint.save(
        path, epoch=3, settings={"model": "linear"}, network=network.state_dict(), training={"best": {"epoch": 2}}
    )


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    save(tmp_path / "a.pt", network)
    state = checkpoint.load(tmp_path / "a.pt")
    other = nn.Linear(2, 2)
    checkpoint.load_weights(other, state, tmp_path / "a.pt")
    assert torch.equal(network.weight, other.weight)
    assert (state["epoch"], state["training"]["best"]["epoch"]) == (3, 2)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save(path, nn.Linear(2, 2))
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StopError, match=r"a\.pt cannot be written \(No space left on device\); the file"):
        save(path, nn.Linear(200, 200))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_signal_just_after_a_file_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*paths: Path) -> None:
        replace(*paths)
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM"):
        checkpoint.write_atomically(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"


def test_a_line_of_the_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = checkpoint.MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"epoch": 1})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StopError, match=r"metrics\.jsonl cannot be written \(No space left on device\); the last"):
            log.append({"epoch": 2})
    checkpoint.MetricsLog(tmp_path / "metrics.jsonl", last_epoch=1)
    assert checkpoint.read_metrics(tmp_path / "metrics.jsonl") == [{"epoch": 1}]


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "foreign"])
def test_unusable_files_give_one_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    if kind == "text":
        path.write_text("weights")
    elif kind == "cut":
        save(path, nn.Linear(100, 100))
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "foreign":
        torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, path)
    with pytest.raises(InputError, match=r"a\.pt: .*checkpoint of training\.run") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


class _Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pt").write_bytes(pickle.dumps(_Harmful()))
    torch.save(_Harmful(), "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError):
            checkpoint.load(Path(name))
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.epoch_of(Path("b.pt"))
    assert not Path("harmed").exists()


def test_weights_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(path, nn.Linear(2, 2))
    with pytest.raises(InputError, match="do not fit"):
        checkpoint.load_weights(nn.Linear(3, 3), checkpoint.load(path), path)


def test_metrics_keep_complete_lines_up_to_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    assert [entry["epoch"] for entry in checkpoint.read_metrics(path)] == [1, 2, 3]
    checkpoint.MetricsLog(path, last_epoch=2).append({"epoch": 3})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n'


def test_a_writer_saves_what_it_was_given_whatever_happens_to_it_afterwards(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    save = checkpoint.save

    def held(*arguments, **state):
        begun.set()
        assert go_on.wait(60)
        save(*arguments, **state)

    monkeypatch.setattr(checkpoint, "save", held)
    weights = {"w": torch.zeros(3)}
    writer = checkpoint.Writer()
    writer.save(tmp_path / "a.pt", epoch=1, settings={}, network=weights, training={"nested": [weights["w"]]})
    assert begun.wait(60)
    weights["w"].fill_(1)  # training goes on while the file is being written
    writer.keep_copy(tmp_path / "a.pt", 1, 2)
    go_on.set()
    writer.wait()
    state = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(state["network"]["w"], torch.zeros(3))
    assert torch.equal(state["training"]["nested"][0], torch.zeros(3))
    assert (tmp_path / "epoch-0001.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_no_copies_where_none_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_text("epoch 1")
    checkpoint.keep_copy(tmp_path / "checkpoint.pt", 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_copies_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "checkpoint.pt"
    for epoch in (1, 2, 3):
        path.write_text(f"epoch {epoch}")
        checkpoint.keep_copy(path, epoch, 2)
    kept = {found.name: found.read_text() for found in tmp_path.glob("epoch-*.pt")}
    assert kept == {"epoch-0002.pt": "epoch 2", "epoch-0003.pt": "epoch 3"}
    assert not list(tmp_path.glob(".*"))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(StopError, match=r"epoch-0004.pt cannot be written \(Operation not permitted\)$"):
        checkpoint.keep_copy(path, 4, 2)
    monkeypatch.undo()
    original = Path.unlink

    def kept_open(self: Path, missing_ok: bool = False) -> None:
        if not missing_ok:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        original(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", kept_open)
    with pytest.raises(StopError, match=r"epoch-0002.pt cannot be removed \(Device or resource busy\)"):
        checkpoint.keep_copy(path, 4, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_copy_is_complete_on_a_device_that_is_not_the_current_one():
    value = torch.zeros(1, device="cuda:1")
    torch.cuda.synchronize(1)
    with torch.cuda.device(1):
        torch.cuda._sleep(1_000_000_000)
    value += 1
    copied, ready = checkpoint.copied_to_host({"a": value})
    ready()
    assert copied["a"].tolist() == [1]


def test_a_copy_is_waited_for_on_the_device_of_each_tensor(monkeypatch):
    """The streams and the tensors of two devices are played here."""

    class Played(torch.Tensor):
        is_cuda = True

        @property
        def device(self):
            return self.on

        def detach(self):
            return torch.Tensor(self)

    class Stream:
        def __init__(self, device):
            self.device = device

        def record_event(self):
            recorded.append(self.device)
            return self

        def synchronize(self):
            waited.append(self.device)

    recorded, waited = [], []
    one, two = (torch.device("cuda", number) for number in (1, 2))
    state = {}
    for name, device in (("a", one), ("b", two), ("c", one)):
        state[name] = torch.ones(2).as_subclass(Played)
        state[name].on = device
    monkeypatch.setattr(torch, "empty_like", lambda value, **options: torch.zeros(2))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    copied, ready = checkpoint.copied_to_host(state)
    assert [value.tolist() for value in copied.values()] == [[1, 1]] * 3
    assert set(recorded) == {one, two}
    assert waited == []
    ready()
    assert set(waited) == {one, two}


def test_a_writer_reports_a_file_that_cannot_be_written(tmp_path):
    writer = checkpoint.Writer()
    writer.save(tmp_path / "missing" / "a.pt", epoch=1, settings={}, network={})
    with pytest.raises(StopError, match=r"a\.pt cannot be written"):
        writer.wait()
    writer.wait()  # once is enough
    writer.save(tmp_path / "missing" / "a.pt", epoch=1, settings={}, network={})
    assert writer._pending[0].exception(timeout=60) is not None
    with pytest.raises(StopError, match=r"a\.pt cannot be written"):  # who hands over the next file hears of it too
        writer.save(tmp_path / "b.pt", epoch=1, settings={}, network={})


def test_of_several_files_that_cannot_be_written_the_first_is_told(tmp_path, monkeypatch):
    go_on = threading.Event()

    def failing(path, **state):
        assert go_on.wait(60)
        raise StopError(f"{path.name} cannot be written")

    monkeypatch.setattr(checkpoint, "save", failing)
    writer = checkpoint.Writer()
    for name in ("first", "second"):
        writer.save(tmp_path / name, network={})
    go_on.set()
    with pytest.raises(StopError, match="first cannot be written"):
        writer.save(tmp_path / "third", network={})
    writer.wait()  # as a training does at its end, whatever ended it


@pytest.mark.parametrize("lost", ["first", "second"])
def test_one_file_of_several_that_cannot_be_written_is_told(lost, tmp_path, monkeypatch):
    """Whoever hands over the third may hear of the second, and else whoever waits."""
    go_on, written = threading.Event(), []

    def failing(path, **state):
        assert go_on.wait(60)
        written.append(path.name)
        if path.name == lost:
            raise StopError(f"{lost} cannot be written")

    def third_and_wait():
        writer.save(tmp_path / "third", network={})
        writer.wait()

    monkeypatch.setattr(checkpoint, "save", failing)
    writer = checkpoint.Writer()
    for name in ("first", "second"):
        writer.save(tmp_path / name, network={})
    go_on.set()
    with pytest.raises(StopError, match=f"{lost} cannot be written"):
        third_and_wait()
    writer.wait()
    assert written[:2] == ["first", "second"]


@pytest.mark.parametrize("zipped", [True, False])
def test_only_a_bare_pickle_is_read_into_memory_as_a_whole(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    sources, load = [], torch.load

    def watched(source: Any, **options: Any) -> Any:
        sources.append(source)
        return load(source, **options)

    monkeypatch.setattr(torch, "load", watched)
    assert checkpoint.load_values(tmp_path / "a.pt")["w"].tolist() == [1, 1]
    assert isinstance(sources[0], io.BytesIO) != zipped


def test_logs_and_results_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for read in (checkpoint.read_metrics, checkpoint.read_json):
        path.write_bytes(b"\xff\n")
        with pytest.raises(InputError, match=r"a\.json: cannot be read \(it is not text\)$"):
            read(path)
        with pytest.raises(InputError, match=r": cannot be read \(Is a directory\)$"):
            read(tmp_path)


def test_a_damaged_line_of_a_log_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2\n{"epoch": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: is damaged"):
        checkpoint.read_metrics(path)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    values = {"ratio": math.inf, "curve": [{"kl": math.nan}, (1.0, -math.inf)], "epoch": 1}
    written = {"ratio": None, "curve": [{"kl": None}, [1.0, None]], "epoch": 1}
    checkpoint.write_json(tmp_path / "summary.json", values)
    assert json.loads((tmp_path / "summary.json").read_text()) == written
    log = checkpoint.MetricsLog(tmp_path / "metrics.jsonl")
    log.append(values)
    assert checkpoint.read_metrics(log.path) == [written]
