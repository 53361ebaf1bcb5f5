import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import loadmat
from sklearn.datasets import load_digits

from scorematch.augmentation import mirror
from training.data import CIFAR_VALIDATION, FORMATS, ROOT_VARIABLE, Data, DataSettings, load, official, toy
from training.data.augmentation import augmented, cut_and_mixed, shifted
from training.settings.config import tomllib
from training.settings.errors import InputError


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.flatten(1).tolist()))


def test_digits_splits_are_disjoint_and_together_the_whole_set() -> None:
    data = load(DataSettings("digits"))
    assert data.sizes == {"train": 1150, "validation": 147, "test": 500}
    whole = torch.from_numpy(load_digits().data / 16.0).float()
    assert rows(torch.cat([data.x_train, data.x_validation, data.x_test])) == rows(whole)


def test_digits_splits_are_stratified() -> None:
    data = load(DataSettings("digits"))
    for y in (data.y_train, data.y_validation, data.y_test):
        shares = torch.bincount(y, minlength=10) / len(y)
        assert (shares - 0.1).abs().max() < 0.02


@pytest.mark.parametrize("name", ["digits", "toy"])
def test_loading_is_deterministic_and_ignores_the_global_seed(name: str) -> None:
    first = load(DataSettings(name))
    torch.manual_seed(123)
    second = load(DataSettings(name))
    for key, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(second, key)), key


@pytest.mark.parametrize("limit", [10, 57, 1000])
def test_limit_keeps_class_balanced_images(limit: int) -> None:
    data = load(DataSettings("digits", limit=limit))
    counts = torch.bincount(data.y_train, minlength=10)
    assert len(data.x_train) == limit
    assert counts.max() - counts.min() <= 1
    assert data.sizes["test"] == 500


def test_limit_keeps_the_pairs_together() -> None:
    whole, part = load(DataSettings("digits")), load(DataSettings("digits", limit=50))
    labels = {tuple(x.flatten().tolist()): int(y) for x, y in zip(whole.x_train, whole.y_train, strict=True)}
    assert all(labels[tuple(x.flatten().tolist())] == y for x, y in zip(part.x_train, part.y_train, strict=True))


@pytest.mark.parametrize("limit", [3, 1151])
def test_limit_out_of_range(limit: int) -> None:
    with pytest.raises(InputError, match=f"limit: {limit}"):
        load(DataSettings("digits", limit=limit))


def toy_data(labels: str) -> Data:
    return load(DataSettings("toy", toy_labels=labels))  # type: ignore[arg-type]


def test_toy_follows_its_priors_means_and_deviations() -> None:
    data = toy_data("hard")
    assert data.p_train is None
    assert data.y_train.double().mean() == pytest.approx(1 / 6, abs=0.01)
    for label, mean, deviation in zip((0, 1), toy.MEANS, toy.DEVIATIONS, strict=True):
        members = data.x_train[data.y_train == label]
        assert members.mean() == pytest.approx(mean, abs=0.05)
        assert members.std() == pytest.approx(deviation, abs=0.05)


def test_toy_oracle_labels_are_calibrated() -> None:
    data = toy_data("oracle")
    assert data.p_train is not None
    likely = data.p_train[:, 1] > 0.3
    assert data.y_train[likely].double().mean().item() == pytest.approx(
        data.p_train[likely, 1].double().mean().item(), abs=0.01
    )


TRAIN, TEST = 5 * 240, 50  # of the synthetic CIFAR


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(
    request: pytest.FixtureRequest, synthetic: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path]:
    """Name and root of coloured noise in the official format."""
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    return request.param, synthetic(request.param)


def raw(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All training images [N, 3, 32, 32] and labels, straight from the files."""
    parts = [
        pickle.loads((root / official.CIFAR[name].base_folder / e[0]).read_bytes())
        for e in official.CIFAR[name].train_list
    ]
    labels = [part.get("labels", part.get("fine_labels")) for part in parts]
    return np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32), np.concatenate(labels)


def test_cifar_is_split_in_the_order_of_its_files(cifar: tuple[str, Path]) -> None:
    name, root = cifar
    data = load(DataSettings(name, root=root))
    assert data.sizes == {"train": TRAIN - CIFAR_VALIDATION, "validation": CIFAR_VALIDATION, "test": TEST}
    assert (data.input_shape, data.num_classes) == FORMATS[name]
    x, y = raw(root, name)
    assert data.x_train.dtype == torch.float32
    assert torch.equal(torch.cat([data.x_validation, data.x_train]), torch.from_numpy(x).float() / 255)
    assert torch.cat([data.y_validation, data.y_train]).tolist() == y.tolist()
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    assert data.x_train.is_contiguous()


def test_cifar_of_the_environment(cifar: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, root = cifar
    with pytest.raises(InputError, match=rf"data_root: none given, {name} needs --data-root DIR or \$SCOREMATCH_DATA"):
        load(DataSettings(name))
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    assert load(DataSettings(name)).sizes["test"] == TEST


def test_cifar_limit_is_class_balanced_and_spares_the_other_splits(cifar: tuple[str, Path]) -> None:
    name, root = cifar
    whole, part = load(DataSettings(name, root=root)), load(DataSettings(name, limit=150, root=root))
    counts = torch.bincount(part.y_train, minlength=part.num_classes)
    assert len(part.x_train) == 150
    assert counts.max() - counts.min() <= 1
    assert torch.equal(part.x_validation, whole.x_validation)
    assert part.sizes["test"] == TEST
    labels = {x.numpy().tobytes(): int(y) for x, y in zip(whole.x_train, whole.y_train, strict=True)}
    assert all(labels[x.numpy().tobytes()] == y for x, y in zip(part.x_train, part.y_train, strict=True))
    with pytest.raises(InputError, match=f"limit: 177 .* to {TRAIN - CIFAR_VALIDATION} on {name}"):
        load(DataSettings(name, limit=177, root=root))


def altered(folder: Path) -> None:
    path = next(folder.iterdir()) / "data_batch_2"
    path = path if path.exists() else path.parent / "train"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def removed(folder: Path) -> None:
    for path in next(folder.iterdir()).glob("test*"):
        path.unlink()


def emptied(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("damage", [altered, removed, emptied])
def test_damaged_cifar_is_one_clear_line(cifar: tuple[str, Path], damage: Callable[[Path], None]) -> None:
    name, root = cifar
    load(DataSettings(name, root=root))
    damage(root)
    with pytest.raises(InputError, match=f"data_root: .*holds no intact {name}, expected the official files") as caught:
        load(DataSettings(name, root=root))
    assert "\n" not in str(caught.value)
    what, files = {
        altered: ("altered", r"(data_batch_2|train)"),
        removed: ("missing", "test"),
        emptied: ("missing", "(data_batch_1, data_batch_2|train, )"),
    }[damage]
    assert re.search(rf"\({what}: {files}", str(caught.value))


def rewritten(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> None:
    """Change the test file, and its checksum with it: what only the content can tell."""
    kind = official.CIFAR[name]
    path = root / kind.base_folder / kind.test_list[0][0]
    path.write_bytes(change(path.read_bytes()))
    monkeypatch.setattr(kind, "test_list", [[path.name, hashlib.md5(path.read_bytes()).hexdigest()]])


def pickled(**changes: Any) -> Callable[[bytes], bytes]:
    """A change of the values in a pickled batch."""
    return lambda content: pickle.dumps({**pickle.loads(content), **changes}, protocol=2)


@pytest.mark.parametrize("cifar", ["cifar10"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[: len(content) // 2],
            "holds no intact cifar10, expected the official files .*truncated",
        ),
        (lambda content: b"", "holds no intact cifar10, expected the official files .*Ran out of input"),
        (lambda content: pickle.dumps([1, 2]), "holds no intact cifar10, expected the official files"),
        (pickled(labels=[0] * 49 + [10]), "holds labels from 0 to 10, cifar10 has 0 to 9"),
        (pickled(labels=[-1] * 50), "holds labels from -1 to -1, cifar10 has 0 to 9"),
        (pickled(labels=[0] * 49), r"images \[50, 32, 32, 3\] with 49 labels, cifar10 has uint8 \[N, 32, 32, 3\]"),
        (pickled(data=np.zeros((50, 3072))), r"holds torch.float64 images .*, cifar10 has uint8"),
    ],
)
def test_cifar_of_another_content_is_one_clear_line(
    cifar: tuple[str, Path], change: Callable[[bytes], bytes], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, root = cifar
    rewritten(root, name, monkeypatch, change)
    with pytest.raises(InputError, match=f"data_root: .*{message}") as caught:
        load(DataSettings(name, root=root))
    assert "\n" not in str(caught.value)


def test_svhn(synthetic: Callable[[str], Path]) -> None:
    root = synthetic("svhn")
    data = load(DataSettings("svhn", root=root))
    assert data.sizes == {"train": 1100 - CIFAR_VALIDATION, "validation": CIFAR_VALIDATION, "test": 40}
    assert (data.input_shape, data.num_classes) == FORMATS["svhn"]
    assert data.y_validation[:11].tolist() == [*range(10), 0]  # the files say 10 for the digit 0
    x = loadmat(root / "test_32x32.mat")["X"]  # [H, W, C, N]
    assert torch.equal(data.x_test, torch.from_numpy(x.transpose(3, 2, 0, 1)).float() / 255)
    limited = load(DataSettings("svhn", root=root, limit=20))
    assert torch.bincount(limited.y_train).tolist() == [2] * 10
    (root / "test_32x32.mat").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no intact svhn, expected .* \(altered: test_32x32.mat\)"):
        load(DataSettings("svhn", root=root))
    (root / "train_32x32.mat").unlink()
    with pytest.raises(InputError, match=r"missing: train_32x32.mat; altered: test_32x32.mat"):
        load(DataSettings("svhn", root=root))


def test_training_on_svhn(synthetic: Callable[[str], Path], call: Any, tiny: list[str], tmp_path: Path) -> None:
    options = ["--data", "svhn", "--data-root", synthetic("svhn"), "--model", "wrn-10-1", *tiny]
    ending = call("run", "--objective", "standard", *options, "--epochs", "1", "--limit", "70", "--out", "here")
    assert ending.status == 0, ending
    settings = tomllib.loads((tmp_path / "here" / "config.toml").read_text())
    assert (settings["eps"], settings["flip"], settings["shift"]) == (8 / 255, False, 4)


@pytest.mark.parametrize("cifar", ["cifar10"], indirect=True)
def test_downloads_only_when_asked(cifar: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, root = cifar
    kind = official.CIFAR[name]
    removed(root)
    asked = []

    def refuse(self: Any) -> None:
        asked.append(self.root)
        raise OSError("no network here")

    monkeypatch.setattr(kind, "download", refuse)
    with pytest.raises(InputError, match=r"--download"):
        load(DataSettings(name, root=root))
    assert not asked
    with pytest.raises(InputError, match=r"no network here"):
        load(DataSettings(name, root=root, download=True))
    assert asked


@pytest.mark.parametrize("cifar", ["cifar10"], indirect=True)
def test_training_on_cifar(cifar: tuple[str, Path], call: Any, tiny: list[str], tmp_path: Path) -> None:
    name, root = cifar
    options = ["--data", name, "--data-root", root, "--model", "wrn-10-1", *tiny, "--epochs", "1", "--out", "here"]
    ending = call("run", "--objective", "pgd_at", "--divergence", "se", *options)
    assert ending.status == 0, ending
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert (summary["model"], summary["norm"], summary["eps"]) == ("wrn-10-1", "linf", 8 / 255)
    assert summary["split"] == {"seed": 0, "train": 100, "validation": CIFAR_VALIDATION, "test": TEST}
    assert call("evaluate", "--run", "here", "--attack", "clean").status == 0  # the folder of the data is saved


@pytest.mark.skipif(not os.environ.get(ROOT_VARIABLE), reason=f"needs ${ROOT_VARIABLE} with CIFAR-10")
def test_the_real_cifar10() -> None:
    data = load(DataSettings("cifar10", limit=1000))
    assert data.sizes == {"train": 1000, "validation": 1024, "test": 10_000}
    assert torch.bincount(data.y_test).tolist() == [1000] * 10
    assert data.y_validation[:5].tolist() == [6, 9, 9, 4, 1]
    mean = data.x_test.mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4942, 0.4851, 0.4504]), atol=1e-3, rtol=0)


def images(count: int = 200) -> torch.Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1


def test_about_half_of_the_images_are_mirrored() -> None:
    x = images()
    out = mirror(x, torch.Generator().manual_seed(1))[0]
    kept, mirrored = ((out == other).flatten(1).all(dim=1) for other in (x, x.flip(-1)))
    assert (kept ^ mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_a_shift_is_a_crop_of_the_padded_image() -> None:
    x = images()
    out = shifted(x, 4, torch.Generator().manual_seed(1))
    framed = shifted(x, 4, torch.Generator().manual_seed(1), border=-1.0)
    assert torch.equal(framed, out.where(framed >= 0, -1.0))
    assert (framed == -1.0).any()
    padded = torch.nn.functional.pad(x, (4,) * 4)
    offsets = set()
    for image, around in zip(out, padded, strict=True):
        crops = [(top, left) for top in range(9) for left in range(9)]
        found = [c for c in crops if torch.equal(around[:, c[0] : c[0] + 6, c[1] : c[1] + 6], image)]
        assert len(found) == 1
        offsets.add(found[0])
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(9))


def test_without_augmentation_nothing_is_drawn() -> None:
    x, generator = images(), torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert augmented(x, generator, shift=0, flip=False) is x
    assert torch.equal(generator.get_state(), before)
    both = augmented(x, torch.Generator().manual_seed(1), shift=2, flip=True)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(both, mirror(shifted(x, 2, generator), generator)[0])


def mixed(seed: int, share: float = 1.0, shape: tuple[int, ...] = (3, 20, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    """Of eight images each of one value, its number, the mixed ones and their targets."""
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, *shape)
    return cut_and_mixed(x, torch.eye(8), share, torch.Generator().manual_seed(seed))


def test_cutmix_puts_a_rectangle_of_another_image_into_each() -> None:
    rectangles = set()
    for seed in range(100):
        x, targets = mixed(seed)
        other = (x != x.new_tensor(range(8)).view(8, 1, 1, 1)).any(dim=1)  # [8, H, W]
        partners = {}
        for number, (image, target, inside) in enumerate(zip(x, targets, other, strict=True)):
            values = set(image.unique().tolist())
            assert len(values) <= 2, "each image is of itself and one other"
            assert target.sum() == pytest.approx(1, abs=1e-6)
            amount = inside.float().mean().item()
            for value in values:
                whole = 1 - amount if value == number else amount
                assert target[int(value)] == pytest.approx(1.0 if len(values) == 1 else whole, abs=1e-6)
            if inside.any():
                rows, columns = (torch.where(inside.any(dim=dim))[0] for dim in (1, 0))
                assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "a rectangle"
                partners[number] = (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1]))
        assert len(set(partners.values())) <= 1, "the same in all of them"
        rectangles |= set(partners.values())
    assert len(rectangles) > 80


def test_the_area_of_cutmix_is_uniform_where_the_edge_cuts_nothing_off() -> None:
    """Its side is √(1 − λ) of the image, λ uniform."""
    sides = []
    for seed in range(500):
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed))
        _, targets = mixed(seed, shape=(1, 64, 64))
        area, row, column = drawn[1:].tolist()
        half = area**0.5 / 2
        if half < row < 1 - half and half < column < 1 - half:
            partner = targets.fill_diagonal_(0).max().item()
            sides.append((partner, area))
    assert len(sides) > 30
    for partner, area in sides:
        assert partner == pytest.approx(area, abs=0.04) or partner == 0  # 0: an image whose partner is itself


def test_a_share_of_the_batches_is_mixed() -> None:
    untouched = sum(torch.equal(mixed(seed, share=0.3)[1], torch.eye(8)) for seed in range(200))
    assert 120 < untouched < 160
    assert all(torch.equal(mixed(seed, share=0.0)[1], torch.eye(8)) for seed in range(20))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for generator, share in zip(generators, (0.0, 1.0), strict=True):
        cut_and_mixed(torch.rand(4, 1, 8, 8), torch.eye(4), share, generator)
    assert torch.equal(*(generator.get_state() for generator in generators))
