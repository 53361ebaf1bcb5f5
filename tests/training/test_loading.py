"""Weights from files of several origins, and what is told where they do not fit."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training import models
from training.data import STATISTICS
from training.engine import checkpoint
from training.models.cifar import IMAGE_SHAPE
from training.models.loading import export, load
from training.settings.errors import InputError

Weights = dict[str, Tensor]


def network(name: str = "wrn-10-1-silu", num_classes: int = 10, data: str | None = None) -> nn.Module:
    torch.manual_seed(7)
    data = data or ("cifar100" if num_classes == 100 else "cifar10")
    model = models.build(name, IMAGE_SHAPE, num_classes, STATISTICS[data])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model.eval()


def prefixed(weights: Weights, prefix: str) -> Weights:
    return OrderedDict((prefix + key, value) for key, value in weights.items())


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_same(one: nn.Module, other: nn.Module) -> None:
    x = torch.rand(2, *IMAGE_SHAPE)
    assert not one.training
    torch.testing.assert_close(one(x), other(x), rtol=0, atol=0)


def run_state(path: Path, trained: nn.Module, **settings: object) -> Path:
    checkpoint.save(path, epoch=1, settings=settings, network=trained.state_dict())
    return path


@pytest.mark.parametrize(
    "name",
    ["wrn-10-1", "wrn-16-2-silu", "preact-resnet-18", "preact-resnet-18-silu", "resnet-18", "preact-resnet-18-plain"],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": prefixed(weights, "module.model."), "epoch": 3},
        lambda weights: {"model_state_dict": prefixed(weights, "module.0.")},
    ],
    ids=["bare", "state_dict", "model_state_dict"],
)
def test_a_state_dict(tmp_path: Path, name: str, wrap: Any) -> None:
    expected = network(name)
    path = saved(tmp_path / "weights.pt", wrap(expected.state_dict()))
    assert_same(load(path, model=name), expected)


def test_averaged_weights_go_before_raw_ones(tmp_path: Path) -> None:
    averaged, raw = network(), network()
    nn.init.zeros_(raw.logits.weight)  # type: ignore[arg-type]
    content = {
        "unaveraged_model_state_dict": prefixed(raw.state_dict(), "module.0."),
        "model_state_dict": prefixed(averaged.state_dict(), "module.0."),
    }
    assert_same(load(saved(tmp_path / "score.pt", content), model="wrn-10-1-silu"), averaged)


def test_architectures_without_a_choice_need_no_name(tmp_path: Path) -> None:
    for name in ("resnet-18", "preact-resnet-18-plain"):
        expected = network(name)
        assert_same(load(saved(tmp_path / f"{name}.pt", expected.state_dict())), expected)


@pytest.mark.parametrize(("name", "family"), [("wrn-22-1", "wrn-22-1"), ("preact-resnet-18-silu", "preact-resnet-18")])
def test_the_activation_must_be_named(tmp_path: Path, name: str, family: str) -> None:
    path = saved(tmp_path / "weights.pt", network(name).state_dict())
    with pytest.raises(InputError, match=rf"ReLU from SiLU.*: {family}, or {family}-silu"):
        load(path)


def test_depth_and_width_are_checked_against_the_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pt", network("wrn-10-2").state_dict())
    with pytest.raises(InputError, match=r"'wrn-16-2' given, but .* of wrn-10-2, allowed: wrn-10-2, wrn-10-2-silu"):
        load(path, model="wrn-16-2")


def test_classes_are_inferred_and_checked(tmp_path: Path) -> None:
    expected = network("wrn-10-1", 100)
    path = saved(tmp_path / "weights.pt", expected.state_dict())
    with pytest.raises(InputError, match=r"wrn-10-1 with 100 classes, expected 10"):
        load(path, model="wrn-10-1")
    assert_same(load(path, model="wrn-10-1", data="cifar100"), expected)
    assert_same(load(path, model="wrn-10-1", num_classes=100), expected)


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    weights = network("wrn-10-1").state_dict()
    del weights["layer.2.block.0.conv_1.weight"]
    weights["sigma"] = torch.ones(3)
    with pytest.raises(InputError, match=r"missing layer\.2\.block\.0\.conv_1\.weight; unexpected sigma$"):
        load(saved(tmp_path / "weights.pt", weights), model="wrn-10-1")


def test_another_shape_is_named(tmp_path: Path) -> None:
    weights = network("wrn-10-1").state_dict()
    weights["init_conv.weight"] = torch.zeros(16, 1, 3, 3)
    with pytest.raises(InputError, match=r"init_conv\.weight has shape \[16, 1, 3, 3\], expected \[16, 3, 3, 3\]"):
        load(saved(tmp_path / "weights.pt", weights), model="wrn-10-1")


def test_a_checkpoint_of_a_run_knows_its_model_and_its_data(tmp_path: Path) -> None:
    expected = network()
    path = run_state(tmp_path / "best.pt", expected, model="wrn-10-1-silu", data="cifar10")
    assert_same(load(path), expected)
    assert_same(load(path, model="wrn-10-1-silu"), expected)
    with pytest.raises(InputError, match=r"'wrn-10-1' given, but .* is a checkpoint of 'wrn-10-1-silu'"):
        load(path, model="wrn-10-1")
    with pytest.raises(InputError, match=r"trained on cifar10, expected .* 100 classes of inputs \[3, 32, 32\]"):
        load(path, data="cifar100")

    digits = models.build("digits_cnn", (1, 8, 8), 10)
    path = run_state(tmp_path / "digits.pt", digits, model="digits_cnn", data="digits")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load(path)(x), digits(x))
    with pytest.raises(InputError, match=r"trained on digits, expected .*\[3, 32, 32\]"):
        load(path, data="cifar10")


def test_a_checkpoint_of_a_posterior_is_refused(tmp_path: Path) -> None:
    path = run_state(tmp_path / "posterior.pt", nn.Linear(2, 2), name="score_network")
    with pytest.raises(InputError, match="holds no classifier"):
        load(path)


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_load.py").write_text(
        "from torch import nn\n"
        "def plain():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
        "def sized(num_classes, *, input_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * 1024, num_classes)).train()\n"
        "def nothing():\n"
        "    return 5\n"
        "def of_file(path, num_classes):\n"
        "    return nn.Linear(64, num_classes)\n"
        "def failing():\n"
        "    raise RuntimeError('boom')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x = torch.rand(2, *IMAGE_SHAPE)
    assert load("mine_to_load:plain")(x).shape == (2, 10)
    sized = load("mine_to_load:sized", data="cifar100")
    assert sized(x).shape == (2, 100)
    assert not sized.training
    with pytest.raises(InputError, match="returned int, it must return"):
        load("mine_to_load:nothing")
    how = r"is called with those of the arguments input_shape and num_classes that it names, .*argument: 'path'"
    with pytest.raises(InputError, match=rf"^model_from: 'mine_to_load:of_file' {how}"):
        load("mine_to_load:of_file")
    told = r"failed \(RuntimeError: boom, in .*mine_to_load.py:\d+\)"
    with pytest.raises(InputError, match=rf"^model_from: mine_to_load:failing\(\) {told}"):
        load("mine_to_load:failing")
    with pytest.raises(InputError, match="cannot be imported"):
        load("mine_to_load:absent")


class Code:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (Code(), "cannot be read as weights"),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "args": {"lr": 1.0}}, "holds epoch, args, expected tensors"),
        ({"state_dict": {}}, "expected tensors"),
        ({"weight": torch.ones(2, 2)}, "of no architecture known here"),
    ],
    ids=["code", "list", "no weights", "empty", "unknown keys"],
)
def test_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told):
        load(saved(tmp_path / "file.pt", content))
    assert not Path("ran").exists()


def test_a_file_that_is_not_there_and_one_that_is_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pt is not a file"):
        load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load(tmp_path / "text.pt")


def test_export_is_a_bare_state_dict_that_loads_again(tmp_path: Path) -> None:
    expected = network()
    export(expected, tmp_path / "exported.pt")
    content = torch.load(tmp_path / "exported.pt", weights_only=True)
    assert list(content) == list(expected.state_dict())
    assert_same(load(tmp_path / "exported.pt", model="wrn-10-1-silu"), expected)


@pytest.mark.parametrize(("data", "classes"), [("cifar10", 10), ("cifar100", 100), ("svhn", 10)])
def test_published_weights_are_normalised_as_their_data_set(data: str, classes: int, tmp_path: Path) -> None:
    """The published layout holds no statistics: the network that trained there used those of its data."""
    published = network("wrn-10-1-silu", classes, data)
    path = saved(tmp_path / "weights.pt", {"model_state_dict": prefixed(published.state_dict(), "module.0.")})
    assert_same(load(path, model="wrn-10-1-silu", data=data), published)


@pytest.mark.parametrize("statistics", [((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), None])
def test_a_checkpoint_keeps_its_statistics(statistics: Any, tmp_path: Path) -> None:
    trained = models.build("wrn-10-1", IMAGE_SHAPE, 10, statistics).eval()
    path, settings = tmp_path / "best.pt", {"model": "wrn-10-1", "data": "svhn"}
    checkpoint.save(path, epoch=1, settings=settings, network=trained.state_dict(), statistics=statistics)
    assert_same(load(path), trained)


@pytest.mark.parametrize(("data", "classes"), [("svhn", 10), ("cifar100", 100)])
def test_checkpoints_from_before_statistics_were_saved_keep_what_they_were_trained_with(
    data: str, classes: int, tmp_path: Path
) -> None:
    trained = network("wrn-10-1", classes)
    assert_same(load(run_state(tmp_path / "best.pt", trained, model="wrn-10-1", data=data)), trained)
