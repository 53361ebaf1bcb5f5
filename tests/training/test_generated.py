"""Files of generated images: reading, order, damage, and the safety of unpickling."""

import io
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from training.data import generated, pickles
from training.data.generated import GeneratedImages, GeneratedStream, Permutation
from training.settings.errors import InputError, StopError

SHAPE, CLASSES = (3, 4, 5), 10


def some(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 4, 5, 3] that are all different, sorted by class."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    return images, np.sort(np.arange(count) % CLASSES)


def opened(*paths: Path, shape: tuple[int, ...] = SHAPE, num_classes: int = CLASSES) -> GeneratedImages:
    return GeneratedImages(paths, shape=shape, num_classes=num_classes)


def plain(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    generated.save(path, images, labels)


def numpys(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.savez(path, image=images, label=labels.astype(np.uint8))


def compressed(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.savez_compressed(path, label=labels.astype(np.int32), image=images, more=np.zeros(3))


def fortran(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.savez(path, image=np.asfortranarray(images), label=labels)


FORMATS = [plain, numpys, compressed, fortran]


@pytest.mark.parametrize("write", FORMATS)
def test_batches_are_the_images_and_labels_asked_for(write: Callable, tmp_path: Path) -> None:
    parts = [some(30, 0), some(10, 1), some(25, 2)]
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    for path, part in zip(paths, parts, strict=True):
        write(path, *part)
    whole = opened(*paths)
    assert len(whole) == 65
    images, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
    for index in ([64, 0, 29, 30, 39, 40, 30, 7], [], [50, 49, 48], list(range(65))):
        x, y = whole.batch(torch.tensor(index, dtype=torch.int64))
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(x.numpy(), images[index] if index else images[:0])
        assert y.tolist() == (labels[index].tolist() if index else [])
    for index in ([-1], [0, 65]):
        with pytest.raises(IndexError, match="allowed: 0 to 64"):
            whole.batch(torch.tensor(index))


def test_uncompressed_files_are_mapped_not_loaded(tmp_path: Path) -> None:
    labels = np.arange(20_000) % CLASSES
    generated.write(
        tmp_path / "many.npz", (20_000, 32, 32, 3), (np.full((1000, 32, 32, 3), i, np.uint8) for i in range(20)), labels
    )
    assert (tmp_path / "many.npz").stat().st_size > 61_000_000
    tracemalloc.start()
    try:
        images = opened(tmp_path / "many.npz", shape=(3, 32, 32))
        x, _ = GeneratedStream(images, 0).draw(0, 500)
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()
    assert len(x.unique()) == 20
    with pytest.raises(ValueError, match="read-only"):
        images.images[0][0] = 0


def test_a_file_beyond_the_memory_is_read_without_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = some(50)
    generated.save(tmp_path / "a.npz", images, labels)
    monkeypatch.setattr(generated, "available_memory", lambda: 1000)
    assert np.array_equal(opened(tmp_path / "a.npz").batch(torch.arange(50))[0].numpy(), images)


def test_compressed_files_say_how_much_they_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = some(50)
    compressed(tmp_path / "a.npz", images, labels)
    monkeypatch.setattr(generated, "CHUNK", 1000)
    opened(tmp_path / "a.npz")
    message = "a.npz is compressed: image.npy takes 0.0 GB of memory; python -m training.data.generated --source"
    assert message in capsys.readouterr().err
    monkeypatch.setattr(generated, "available_memory", lambda: 2999)
    with pytest.raises(
        InputError, match=r"a.npz is compressed: .* available: 0.0 GB; python -m training.data.generated"
    ):
        opened(tmp_path / "a.npz")


def test_a_compressed_file_beyond_the_memory_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed(tmp_path / "a.npz", *some(50))
    monkeypatch.setattr(generated, "available_memory", lambda: 5_240_000_000)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        entry = archive.getinfo("image.npy")
        large = generated._Member(tmp_path / "a.npz", entry, (2_500_000, 32, 32, 3), False, np.dtype(np.uint8), 128)
        with pytest.raises(InputError, match=r"image.npy takes 7\.7 GB of memory, available: 5\.2 GB; "):
            generated._loaded(archive, large)


def test_this_machine_says_how_much_memory_it_has() -> None:
    available = generated.available_memory()
    assert available is None or 1 << 20 < available < 1 << 50


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 97, 1000, 65_536, 65_537])
def test_permutations_are_permutations(size: int) -> None:
    orders = [Permutation(size, 3, number)(np.arange(size)) for number in range(4)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(size))
    if size > 100:
        assert len({order.tobytes() for order in orders}) == 4


def test_a_permutation_of_50_million_in_parts() -> None:
    size = 50_000_000
    order = Permutation(size, 0, 0)
    inside = order(np.arange(0, size, 997))
    assert len(np.unique(inside)) == len(inside)
    assert 0 <= inside.min() < 20_000 < size - 20_000 < inside.max() < size
    assert np.array_equal(order(np.array([997 * 5])), inside[5:6])


def test_every_place_gets_every_number_equally_often() -> None:
    """χ² of place × number over many keys, and of pairs of neighbours: each below its 99.99 % quantile."""
    size, keys = 12, 6000
    orders = np.stack([Permutation(size, 5, key)(np.arange(size)) for key in range(keys)])
    counts = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    statistic = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert statistic < chi2.ppf(0.9999, (size - 1) ** 2)
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size**2).reshape(size, size)
    expected = keys / (size * (size - 1))
    away = ~np.eye(size, dtype=bool)
    assert ((pairs[away] - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, size * (size - 1) - 1)


def test_a_large_order_is_uniform_and_without_memory() -> None:
    """χ² of 100,000 numbers in 100 bins, and of how the bin of a number goes with that of the next."""
    size, count, bins = 5_000_000, 100_000, 20
    numbers = Permutation(size, 1, 2)(np.arange(1_000_000, 1_000_000 + count))
    fine = np.bincount(numbers * 100 // size, minlength=100)
    assert ((fine - count / 100) ** 2 / (count / 100)).sum() < chi2.ppf(0.9999, 99)
    place = numbers * bins // size
    following = np.bincount(place[:-1] * bins + place[1:], minlength=bins**2)
    expected = (count - 1) / bins**2
    assert ((following - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, bins**2 - 1)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / count**0.5


def test_the_stream_passes_over_all_images_again_and_again(tmp_path: Path) -> None:
    plain(tmp_path / "a.npz", *some(40))
    plain(tmp_path / "b.npz", *some(30, 1))
    stream = GeneratedStream(opened(tmp_path / "a.npz", tmp_path / "b.npz"), seed=7)
    passes = stream.index(0, 210).reshape(3, 70)
    for order in passes:
        assert order.sort().values.tolist() == list(range(70))
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], torch.arange(70))
    other = GeneratedStream(stream.images, seed=8)
    assert not torch.equal(other.index(0, 70), passes[0])


def test_the_stream_is_a_function_of_the_position(tmp_path: Path) -> None:
    """A resumed run, or one of several processes, sees what a single uninterrupted one sees."""
    plain(tmp_path / "a.npz", *some(40))
    stream = GeneratedStream(opened(tmp_path / "a.npz"), seed=0)
    x, y = stream.draw(0, 200)
    again = GeneratedStream(opened(tmp_path / "a.npz"), seed=0)
    for position, count in ((0, 1), (37, 5), (79, 90), (120, 0), (199, 1)):
        part_x, part_y = again.draw(position, count)
        assert torch.equal(part_x, x[position : position + count])
        assert torch.equal(part_y, y[position : position + count])
    with pytest.raises(ValueError, match="at least 0, got -1"):
        stream.draw(-1, 2)


def test_the_order_never_changes(tmp_path: Path) -> None:
    """Runs are resumed with later versions too."""
    plain(tmp_path / "a.npz", *some(1000))
    assert GeneratedStream(opened(tmp_path / "a.npz"), seed=42).index(998, 5).tolist() == [624, 263, 957, 340, 728]


def test_saved_files_are_the_same_bytes_and_numpy_reads_them(tmp_path: Path) -> None:
    images, labels = some(30)
    generated.save(tmp_path / "a.npz", images, labels)
    generated.save(str(tmp_path / "b.npz"), torch.from_numpy(images), torch.from_numpy(labels))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["image"], images)
        assert np.array_equal(file["label"], labels)
        assert file["label"].dtype == np.int64


def test_saving_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    generated.save(path, *some(30))
    before = path.read_bytes()

    def interrupted() -> Any:
        yield np.zeros((10, 4, 5, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generated.write(path, (20, 4, 5, 3), interrupted(), np.zeros(20, np.int64))
    with pytest.raises(ValueError, match=r"parts hold 600 bytes, image \[20, 4, 5, 3\] has 1200"):
        generated.write(path, (20, 4, 5, 3), [np.zeros((10, 4, 5, 3), np.uint8)], np.zeros(20, np.int64))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]
    with pytest.raises(StopError, match="cannot be written"):
        generated.save(tmp_path / "nowhere" / "a.npz", *some(30))
    for images, labels in ((np.zeros((2, 4, 5)), np.zeros(2, np.int64)), (some(2)[0], np.zeros(3, np.int64))):
        with pytest.raises(ValueError, match=r"must be"):
            generated.save(path, images, labels)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def cut_in_front(path: Path) -> None:
    path.write_bytes(path.read_bytes()[300:])


def flipped_label(path: Path) -> None:
    content = bytearray(path.read_bytes())
    position = content.index(b"label.npy") + 200
    content[position] ^= 1
    path.write_bytes(bytes(content))


def holds(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


IMAGES, LABELS = some(20)
DAMAGES = {
    "missing": (Path.unlink, "is not a file, expected an .npz with image uint8"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "no zip": (lambda path: path.write_bytes(b"PK\3\4 or so"), "cannot be read .*not a zip"),
    "a bare array": (lambda path: np.save(path.open("wb"), IMAGES), "cannot be read .*not a zip"),
    "truncated": (cut, "cannot be read"),
    "without its beginning": (cut_in_front, "cannot be read"),
    "an altered label": (flipped_label, "cannot be read .*Bad CRC-32"),
    "no label": (holds(image=IMAGES, y=LABELS), "has no label but image, y, expected"),
    "neither": (holds(a=IMAGES), "has no image and no label but a, expected"),
    "pickled objects": (holds(image=IMAGES, label=np.array([1, "a"] * 10, object)), "has pickled objects in label.npy"),
    "float images": (holds(image=IMAGES / 255, label=LABELS), r"has image float64 \[20, 4, 5, 3\], expected"),
    "flat images": (holds(image=IMAGES.reshape(20, -1), label=LABELS), r"has image uint8 \[20, 60\], expected"),
    "channels first": (
        holds(image=IMAGES.transpose(0, 3, 1, 2), label=LABELS),
        r"images \[3, 4, 5\], .* \[4, 5, 3\]",
    ),
    "float labels": (holds(image=IMAGES, label=LABELS / 1), r"has label float64 \[20\], expected"),
    "one-hot labels": (holds(image=IMAGES, label=np.eye(10, dtype=int)[LABELS]), r"has label int64 \[20, 10\]"),
    "fewer labels": (holds(image=IMAGES, label=LABELS[:19]), "has 20 images and 19 labels"),
    "nothing": (holds(image=IMAGES[:0], label=LABELS[:0]), "has 0 images and 0 labels"),
    "a class too many": (holds(image=IMAGES, label=LABELS + 1), "has labels from 1 to 10, allowed: 0 to 9"),
    "a negative label": (holds(image=IMAGES, label=LABELS - 1), "has labels from -1 to 8, allowed: 0 to 9"),
    "a class too few": (holds(image=IMAGES, label=LABELS // 2), "no image of class 5 in .*, expected all of 0 to 9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / "a.npz"
    plain(path, IMAGES, LABELS)
    opened(path)
    change(path)
    with pytest.raises(InputError, match=f"generated: .*{message}") as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 4, 5, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", content.getvalue() + b"\0" * 60)
        archive.writestr("label.npy", content.getvalue())
    with pytest.raises(InputError, match=r"cannot be read \(60 bytes of image.npy, \[1000000000, 4, 5, 3\] has 60000"):
        opened(path)


def test_no_file_at_all() -> None:
    with pytest.raises(InputError, match="generated: no file given"):
        opened()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".pickle", ".pkl"])
def test_pseudo_labelled_pickles(protocol: int, suffix: str, tmp_path: Path) -> None:
    images, labels = some(30)
    path = tmp_path / f"a{suffix}"
    more = {"prediction_model": "wrn", "prediction_model_epoch": 200, "scale": np.float64(0.5)}
    for targets in (labels, labels.tolist()):
        path.write_bytes(pickle.dumps({"data": images, "extrapolated_targets": targets, **more}, protocol))
        x, y = opened(path).batch(torch.arange(30))
        assert np.array_equal(x.numpy(), images)
        assert y.tolist() == labels.tolist()


def test_pickles_of_older_numpy(tmp_path: Path) -> None:
    """numpy 1 calls ``numpy._core`` by its old name."""
    images, labels = some(30)
    content = pickle.dumps({"data": images, "extrapolated_targets": labels}, 3)
    assert b"numpy._core" in content or b"numpy.core" in content
    (tmp_path / "a.pickle").write_bytes(content.replace(b"cnumpy._core", b"cnumpy.core"))
    assert len(opened(tmp_path / "a.pickle")) == 30


class Calls:
    """Unpickling it calls ``function``."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "true"), "posix.system"),
        (Calls(eval, "1"), "builtins.eval"),
        (Calls(getattr, "a", "upper"), "builtins.getattr"),
        (Calls(np.load, "a.npy"), "numpy.load"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (Path("a"), r"pathlib.*Path"),
    ],
)
def test_pickles_that_would_run_something_are_refused(value: Any, name: str, tmp_path: Path) -> None:
    images, labels = some(30)
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels, "more": value}))
    with pytest.raises(InputError, match=rf"cannot be read \(it would import {name}, allowed: arrays\)"):
        opened(path)


def test_the_function_named_is_not_called(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pickle", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Calls(os.mkdir, str(trace))))
    pickle.loads(path.read_bytes())
    trace.rmdir()  # so it would have been
    with pytest.raises(InputError, match=r"it would import posix\.mkdir"):
        opened(path)
    assert not trace.exists()


def test_a_type_that_would_end_the_process(tmp_path: Path) -> None:
    """numpy crashes on the state of a type that lacks one of its values."""
    content = pickle.dumps({"data": IMAGES, "extrapolated_targets": LABELS}, 2)
    whole = b"NNNJ\xff\xff\xff\xff"  # three times None, then -1
    assert whole in content
    path = tmp_path / "a.pickle"
    path.write_bytes(content.replace(whole, whole[1:], 1))
    with pytest.raises(InputError, match=r"cannot be read \(it has an array of type \|u1, expected plain numbers\)"):
        opened(path)


def test_a_pickle_cannot_change_what_it_names(tmp_path: Path) -> None:
    """The opcode BUILD sets attributes of whatever lies on the stack, here of the stand-ins for functions of numpy."""
    path = tmp_path / "a.pickle"
    for named in (b"cnumpy.core.multiarray\nscalar", b"c_codecs\nencode", b"cnumpy\ndtype", b"cnumpy\nndarray"):
        for state in (b"}X\4\0\0\0itemK\1s", b"N}X\4\0\0\0itemK\1s\x86"):
            path.write_bytes(b"\x80\2" + named + b"\n" + state + b"b.")
            with pytest.raises(InputError, match="cannot be read"):
                opened(path)
    assert callable(pickles._Scalar.item)


def test_pickled_arrays_of_any_order_and_lists_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for images in (np.asfortranarray(IMAGES), IMAGES.transpose(0, 2, 1, 3), IMAGES[:, ::2]):
            path.write_bytes(pickle.dumps({"data": images, "extrapolated_targets": list(LABELS)}, protocol))
            found, labels = generated.read(path)
            np.testing.assert_array_equal(found, images)
            np.testing.assert_array_equal(labels, LABELS)
            assert labels.dtype == LABELS.dtype
        for order in (">i4", "<i2"):
            path.write_bytes(pickle.dumps({"data": IMAGES, "extrapolated_targets": LABELS.astype(order)}, protocol))
            np.testing.assert_array_equal(generated.read(path)[1], LABELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": IMAGES, "extrapolated_targets": LABELS})[:-100], "cannot be read"),
        (b"", "cannot be read"),
        (b"no pickle", "cannot be read"),
        (pickle.dumps([1, 2]), "holds list, expected"),
        (pickle.dumps({"data": IMAGES, "labels": LABELS}), "holds data, labels, expected"),
        (
            pickle.dumps({"data": IMAGES.astype(object), "extrapolated_targets": LABELS}),
            r"has an array of type \|O8, expected plain",
        ),
        (pickle.dumps({"data": IMAGES, "extrapolated_targets": LABELS[1:]}), "has 20 images and 19 labels"),
    ],
)
def test_other_pickles_are_one_clear_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"generated: .*{message}") as caught:
        opened(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [numpys, compressed])
def test_rewriting(write: Callable, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = some(50)
    write(tmp_path / "a.npz", images, labels)
    monkeypatch.setattr(generated, "CHUNK", 100)  # many parts
    ending = call("generated", "--source", "a.npz", "--out", "b.npz")
    assert ending.status == 0, ending
    assert "50 images in b.npz" in ending.out
    plain(tmp_path / "c.npz", images, labels)
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    for out, message in (("b.npz", "exists already"), ("b.npy", "is not an .npz"), ("no/b.npz", "has no folder")):
        ending = call("generated", "--source", "a.npz", "--out", out)
        assert (ending.status, ending.err) == (2, f"error: out: {out} {message}, {ending.err.split(', ', 1)[1]}")


def test_rewriting_a_pickle_and_what_cannot_be(call: Any, tmp_path: Path) -> None:
    images, labels = some(50)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels}))
    assert call("generated", "--source", "a.pickle", "--out", "b.npz").status == 0
    assert np.array_equal(opened(tmp_path / "b.npz").batch(torch.arange(50))[0].numpy(), images)
    fortran(tmp_path / "f.npz", images, labels)
    ending = call("generated", "--source", "f.npz", "--out", "g.npz")
    assert ending.status == 2
    assert "in Fortran order" in ending.err
    assert call("generated", "--source", "none.npz", "--out", "g.npz").status == 2
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    assert "bad.npz cannot be read" in call("generated", "--source", "bad.npz", "--out", "g.npz").err
    assert not (tmp_path / "g.npz").exists()


def test_checking(call: Any, tmp_path: Path) -> None:
    labels = np.array([0, 2, 2, 3] * 10)
    images = np.zeros((40, 4, 6, 3), np.uint8)
    generated.save(tmp_path / "a.npz", images, labels)
    ending = call("generated", "--source", "a.npz")
    assert ending.status == 0, ending
    assert "40 of [4, 6, 3] (height, width, channels)" in ending.out
    assert "3, 0 to 3, none of 1\n" in ending.out
    assert "10 to 20" in ending.out
    assert "read where it lies" in ending.out
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz"}
    generated.save(tmp_path / "far.npz", images, np.array([2, 4, 4, 10**18] * 10))
    ending = call("generated", "--source", "far.npz")
    assert f"3, 2 to {10**18}, none of 0, 1, 3, 5 and others\n" in ending.out
    np.savez_compressed(tmp_path / "b.npz", image=images, label=labels)
    assert "compressed: training loads it, 0.00 GB" in call("generated", "--source", "b.npz").out
    (tmp_path / "c.pickle").write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels}))
    assert "a pickle: loaded" in call("generated", "--source", "c.pickle").out


def flipped_bit(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    generated.save(path, images, labels)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (flipped_bit, "a.npz is damaged, the checksum of image.npy is wrong"),
        (lambda path, images, labels: path.write_bytes(b"PK"), "a.npz cannot be read"),
        (lambda path, images, labels: np.savez(path, image=images), "has no label"),
        (lambda path, images, labels: np.savez(path, image=images / 2, label=labels), "has image float64"),
        (lambda path, images, labels: np.savez(path, image=images, label=labels / 2), "has label float64"),
        (lambda path, images, labels: np.savez(path, image=images, label=labels[1:]), "has 40 images and 39 labels"),
        (lambda path, images, labels: None, "a.npz is not a file"),
    ],
)
def test_checking_what_cannot_be_used(write: Callable, told: str, call: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.npz", np.zeros((40, 40, 40, 3), np.uint8), np.arange(40) % 4)
    ending = call("generated", "--source", "a.npz")
    assert ending.status == 2, ending
    assert ending.err.count("\n") == 1
    assert told in ending.err
