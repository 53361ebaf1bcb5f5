"""The classifiers for images: the keys of published weights, initialisation, normalisation, names."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scorematch.attacks.workers import can_be_shared
from scorematch.folding import Folding
from training import models
from training.data import STATISTICS
from training.engine import checkpoint
from training.models import loading
from training.models.cifar import IMAGE_SHAPE
from training.settings.errors import InputError

SMALL = [
    "wrn-10-1",
    "wrn-10-2-silu",
    "preact-resnet-18",
    "preact-resnet-18-silu",
    "preact-resnet-18-plain",
    "resnet-18",
]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def build(name: str, num_classes: int = 10, data: str = "cifar10") -> nn.Module:
    return models.build(name, IMAGE_SHAPE, num_classes, STATISTICS[data])


def on_meta(name: str) -> nn.Module:
    """Keys and shapes without memory."""
    with torch.device("meta"):
        return build(name)


def norm(name: str) -> list[str]:
    return [f"{name}.{entry}" for entry in BATCH_NORM]


@pytest.mark.parametrize(
    ("name", "entries", "millions"),
    [
        ("wrn-28-10", 155, 36.5),
        ("wrn-70-16-silu", 407, 266.8),
        ("preact-resnet-18", 107, 12.55),
        ("resnet-18", 122, 11.17),
    ],
)
def test_entries_and_parameters_of_published_weights(name: str, entries: int, millions: float) -> None:
    model = on_meta(name)
    assert len(model.state_dict()) == entries
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("wrn-10-1", 3),
        ("wrn-28-10-silu", 13),
        ("preact-resnet-18", 8),
        ("preact-resnet-18-plain", 8),
        ("resnet-18", 20),
    ],
)
def test_batch_norm_behind_a_convolution_folds(name: str, pairs: int) -> None:
    assert len(Folding(on_meta(name)).pairs) == pairs


@pytest.mark.parametrize("name", ["wrn-10-1", "preact-resnet-18", "resnet-18"])
def test_folded_networks_return_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    model, x = build(name).double(), torch.rand(4, *IMAGE_SHAPE, dtype=torch.float64)
    with torch.no_grad():
        model.train()(x)  # statistics other than 0 and 1
        expected = model.eval()(x)
        with Folding(model).applied():
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_keys_of_the_wide_resnet() -> None:
    expected = ["init_conv.weight"]
    for group in range(3):
        for block in range(2):
            prefix = f"layer.{group}.block.{block}"
            expected += [*norm(f"{prefix}.batchnorm_0"), f"{prefix}.conv_0.weight"]
            expected += [*norm(f"{prefix}.batchnorm_1"), f"{prefix}.conv_1.weight"]
            expected += [f"{prefix}.shortcut.weight"] if block == 0 else []
    expected += [*norm("batchnorm"), "logits.weight", "logits.bias"]
    assert list(on_meta("wrn-16-2").state_dict()) == expected


def test_keys_of_the_preact_resnet() -> None:
    expected = ["conv_2d.weight"]
    for group in range(4):
        for block in range(2):
            prefix = f"layer_{group}.{block}"
            expected += [*norm(f"{prefix}.batchnorm_0"), f"{prefix}.conv_2d_1.weight"]
            expected += [*norm(f"{prefix}.batchnorm_1"), f"{prefix}.conv_2d_2.weight"]
            expected += [f"{prefix}.shortcut.weight"] if block == 0 and group else []
    expected += [*norm("batchnorm"), "logits.weight", "logits.bias"]
    model = on_meta("preact-resnet-18")
    assert list(model.state_dict()) == expected
    assert model.state_dict()["layer_1.0.shortcut.weight"].shape == (128, 64, 3, 3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("num_classes", [10, 100])
def test_logits(name: str, num_classes: int) -> None:
    model = build(name, num_classes).eval()
    logits = model(torch.rand(2, *IMAGE_SHAPE))
    assert logits.shape == (2, num_classes)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("name", "momentum"), [("wrn-10-1", 0.01), ("preact-resnet-18", 0.01), ("resnet-18", 0.1)])
def test_momentum_of_batch_norm(name: str, momentum: float) -> None:
    found = {module.momentum for module in build(name).modules() if isinstance(module, nn.BatchNorm2d)}
    assert found == {momentum}


@pytest.mark.parametrize("name", ["wrn-10-2", "preact-resnet-18-silu"])
def test_convolutions_start_from_a_normal_distribution_of_variance_2_over_k2_outputs(name: str) -> None:
    torch.manual_seed(0)
    for module in build(name).modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            weight = module.weight.detach()
            k = module.kernel_size[0]
            allowed = 5 / weight.numel() ** 0.5  # five standard errors
            assert weight.var() == pytest.approx(2 / (k * k * module.out_channels), rel=allowed * 2**0.5)
            assert abs(weight.mean()) < allowed * weight.std()


@pytest.mark.parametrize(
    ("data", "mean_and_deviation"),
    [
        ("cifar10", ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))),
        ("cifar100", ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
        ("svhn", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    ],
)
@pytest.mark.parametrize("name", ["wrn-10-1", "preact-resnet-18", "preact-resnet-18-plain"])
def test_pixels_are_normalised_as_published_and_the_statistics_are_no_weights(
    name: str, data: str, mean_and_deviation: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    model = build(name, 100 if data == "cifar100" else 10, data).eval()
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    seen = []
    stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.rand(2, *IMAGE_SHAPE)
    model(x)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_and_deviation)
    torch.testing.assert_close(seen[0], (x - mean) / std)
    assert not {"mean", "std"} & set(model.state_dict())


def test_resnet_takes_raw_pixels() -> None:
    model = build("resnet-18").eval()
    seen = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.rand(1, *IMAGE_SHAPE)
    model(x)
    assert torch.equal(seen[0], x)


def test_a_convolution_of_stride_2_pads_right_and_bottom_only_but_odd_sizes_evenly() -> None:
    convolution = build("wrn-10-1").layer[1].block[0].conv_0
    assert convolution.stride == (2, 2)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        even = convolution(torch.ones(1, 16, 4, 4))[0, 0] / 16
        odd = convolution(torch.ones(1, 16, 3, 4))[0, 0] / 16
    assert even.tolist() == [[9.0, 6.0], [6.0, 4.0]]
    assert odd.tolist() == [[6.0, 4.0], [6.0, 4.0]]


def test_the_shortcut_takes_the_activated_input_the_identity_the_raw_one() -> None:
    """With convolutions of the residual at zero a block is its shortcut."""
    first, second = build("wrn-16-2").eval().layer[0].block
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        first.conv_1.weight.zero_()
        second.conv_1.weight.zero_()
        activated = first.batchnorm_0(x).relu()
        torch.testing.assert_close(first(x), first.shortcut(activated))
        wide = torch.randn(1, 32, 8, 8)
        torch.testing.assert_close(second(wide), wide)


@pytest.mark.parametrize(
    ("relu", "silu"), [("wrn-10-1", "wrn-10-1-silu"), ("preact-resnet-18", "preact-resnet-18-silu")]
)
def test_names_decide_the_activation(relu: str, silu: str) -> None:
    def activations(name: str) -> set[type]:
        return {type(module) for module in build(name).modules() if isinstance(module, nn.ReLU | nn.SiLU)}

    assert activations(relu) == {nn.ReLU}
    assert activations(silu) == {nn.SiLU}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 28, 28), (3, 64, 64), (3, 96, 96), (3, 33, 47), (1, 8, 8)])
def test_images_of_any_size_and_number_of_channels(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    statistics = ((0.4,) * shape[0], (0.2,) * shape[0])
    model = models.build(name, shape, 7, statistics)
    x = torch.rand(2, *shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any(dim=1).all(), "every pixel counts, those at the edges too"
    for other in ((2, shape[0], 30, 30), shape):
        channels, height, width = shape
        with pytest.raises(ValueError, match=rf"expected \[N, {channels}, {height}, {width}\]"):
            model(torch.rand(other))


@pytest.mark.parametrize(("name", "pairs"), [("wrn-10-1", 3), ("preact-resnet-18", 8), ("resnet-18", 20)])
def test_folding_at_another_size(name: str, pairs: int) -> None:
    torch.manual_seed(0)
    model = models.build(name, (3, 27, 30), 10).double()
    folding, x = Folding(model), torch.rand(4, 3, 27, 30, dtype=torch.float64)
    assert len(folding.pairs) == pairs
    with torch.no_grad():
        model.train()(x)
        expected = model.eval()(x)
        with folding.applied():
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_the_size_of_the_images_is_no_weight() -> None:
    """What was trained at one size loads at another."""
    weights = models.build("wrn-10-1", (3, 64, 64), 10).state_dict()
    models.build("wrn-10-1", (3, 28, 28), 10).load_state_dict(weights)


@pytest.mark.parametrize("name", SMALL)
def test_other_inputs_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"model: {name} takes images \[C, H, W\] of any size, .*shape \[5\]"):
        models.build(name, (5,), 10)
    model = build(name)
    for shape in ((2, 3, 64, 64), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \[N, 3, 32, 32\]"):
            model(torch.rand(shape))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wrn-12-2", "depth 12, allowed: 6 n"),
        ("wrn-4-2", "depth 4, allowed: 6 n"),
        ("wrn-10-0", "width 0"),
        ("wrn-28-10-gelu", r"allowed: .*wrn-D-W\[-silu\] with D = 6 n \+ 4, timm:NAME, module:function"),
        ("preact-resnet-50", r"allowed: .*preact-resnet-18-silu"),
        ("timm:resnet180", r"'timm:resnet180' is unknown, allowed: .*timm:resnet18, .*timm.list_models"),
        ("timm:inception_v3", r"timm:inception_v3 cannot be built for \[3, 32, 32\] inputs"),
    ],
)
def test_unknown_names_list_what_is_allowed(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        build(name)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("num_classes", "too many positional arguments"),
        ("", "too many positional arguments"),
        ("input_shape, num_classes, width", "missing a required argument: 'width'"),
    ],
)
def test_functions_that_cannot_be_called(
    arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_to_build.py").write_text(f"def network({arguments}):\n    raise NotImplementedError\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_build", raising=False)
    how = "is called with two arguments, input_shape and num_classes, which it does not allow"
    with pytest.raises(InputError, match=rf"^model: 'mine_to_build:network' {how} \({told}\)$"):
        models.build("mine_to_build:network", (1, 8, 8), 10)


def test_names_of_the_arguments_of_a_function_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_any_names.py").write_text(
        "from torch import nn\n"
        "def network(shape, count, *, width=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], count))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.build("mine_of_any_names:network", (1, 8, 8), 10)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("name", "patches"), [("timm:test_resnet", None), ("timm:test_vit", 4)])
def test_networks_of_timm(name: str, patches: int | None) -> None:
    model = build(name, num_classes=7)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    if patches is not None:
        assert model.patch_embed.num_patches == patches, "built for images of 32 × 32, in patches of 16 × 16"


@pytest.fixture
def weights_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Trained weights of timm's test_resnet as timm would find them in its cache, for 1,000 classes."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    create = timm.create_model

    def from_file(name: str, pretrained: bool, **options: object) -> nn.Module:
        overlay = {"file": str(tmp_path / "weights.pth")} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", from_file)
    return weights


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 96, 96), (1, 28, 28)])
def test_trained_weights_of_timm(shape: tuple[int, ...], weights_at_hand: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = models.build("timm:test_resnet", shape, 7, pretrained=True)
    expected = weights_at_hand["layer2.0.conv1.weight"]
    assert torch.equal(model.network.layer2[0].conv1.weight, expected)
    x = torch.rand(2, *shape)
    assert model(x).shape == (2, 7), "the last layer is a new one"
    assert not {"mean", "std"} & set(model.state_dict())

    seen = []
    model.network.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.eval()(x)
    of_weights = pytest.importorskip("timm").get_pretrained_cfg("test_resnet")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (of_weights.mean, of_weights.std))
    assert mean.min() > 0
    if shape[0] == 1:
        mean, std = mean.mean(), std.mean()
    torch.testing.assert_close(seen[0], (x - mean) / std)

    without = models.build("timm:test_resnet", shape, 7, pretrained=True, weights=False)
    assert not torch.equal(without.network.layer2[0].conv1.weight, expected)
    without.load_state_dict(model.state_dict())
    assert torch.equal(without.eval()(x), model(x))


def test_a_run_from_trained_weights(
    weights_at_hand: dict[str, torch.Tensor], call: Callable[..., Any], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--objective", "pgd_at", "--model", "timm:test_resnet", "--pretrained", "--lr", "1e-6", *tiny]
    ending = call("run", *options, "--out", "run")
    assert ending.status == 0, ending
    saved = checkpoint.load(Path("run/best.pt"))["network"]
    trained = saved["network.layer2.0.conv1.weight"]
    torch.testing.assert_close(trained, weights_at_hand["layer2.0.conv1.weight"], rtol=0, atol=1e-3)

    def offline(*args: object, **options: object) -> None:
        assert not options["pretrained"], "nothing is fetched once there is a checkpoint"
        return create(*args, **options)

    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    Path("run/summary.json").unlink()
    assert call("run", "--resume", "run").status == 0
    assert call("evaluate", "--run", "run", "--attack", "clean").status == 0
    loading.load(Path("run/best.pt"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm:test_resnet", r"weights of timm:test_resnet are not at hand \(OSError: no route\); .*timm's cache"),
        ("timm:resnet18d_none", "is unknown"),
        ("wrn-10-1", "pretrained: True with model wrn-10-1, allowed: with timm:NAME"),
        ("timm:vit_base_patch16_18x2_224", r"timm has no weights for timm:vit_base.*, allowed: .*timm.list_pretrained"),
    ],
)
def test_trained_weights_that_are_not_there(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def offline(*args: object, **options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=told) as caught:
        models.build(name, IMAGE_SHAPE, 10, pretrained=True)
    assert "\n" not in str(caught.value)


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="model: timm:resnet18 needs timm, which is not installed: pip install timm"):
        build("timm:resnet18")


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-1-silu"])
def test_gradients_reach_every_parameter_and_the_input(name: str) -> None:
    model: Callable[..., torch.Tensor] = build(name)
    x = torch.rand(4, *IMAGE_SHAPE, requires_grad=True)
    model(x).logsumexp(1).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SMALL)
def test_threads_may_share_a_network(name: str) -> None:
    assert can_be_shared(build(name).eval(), torch.rand(2, *IMAGE_SHAPE))


OWN_NETWORKS = """
from torch import nn

class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)), x

def lazy(shape, classes):
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, classes))
    network[2].eval()
    return network

def pair(shape, classes):
    return Pair(64, classes)

def seven(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def for_colours(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, classes))

def soft(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Softmax(1))

def failing(shape, classes):
    raise OSError("the disk\\nis gone")

def wide(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
"""


@pytest.fixture
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_try.py").write_text(OWN_NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_try", raising=False)


def test_lazy_layers_have_their_sizes(own_networks: None) -> None:
    network = models.build("mine_to_try:lazy", (1, 8, 8), 10)
    assert network[1].weight.shape == (5, 64)
    assert int(network[2].num_batches_tracked) == 0
    assert [module.training for module in network] == [True, True, False, True]
    network.load_state_dict(models.build("mine_to_try:lazy", (1, 8, 8), 10).state_dict())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pair", "gives tuple for inputs [2, 1, 8, 8], it must give logits [2, 10]"),
        ("seven", "gives [2, 7] for inputs [2, 1, 8, 8], it must give logits [2, 10]"),
        ("soft", "gives probabilities, it must give logits: leave its softmax out"),
        ("for_colours", "takes no float32 inputs [2, 1, 8, 8] (mat1 and mat2 shapes cannot be multiplied"),
        ("wide", "takes no float32 inputs [2, 1, 8, 8] (mat1 and mat2 must have the same dtype"),
    ],
)
def test_networks_that_are_no_classifiers_of_the_data(name: str, told: str, own_networks: None) -> None:
    with pytest.raises(InputError, match="^" + re.escape(f"model: mine_to_try:{name} {told}")):
        models.build(f"mine_to_try:{name}", (1, 8, 8), 10)


def test_functions_that_fail(own_networks: None) -> None:
    told = r"failed \(OSError: the disk is gone, in .*mine_to_try.py:\d+\)$"
    with pytest.raises(InputError, match=rf"^model: mine_to_try:failing\(\) {told}"):
        models.build("mine_to_try:failing", (1, 8, 8), 10)


def test_images_without_a_channel_get_a_hint() -> None:
    with pytest.raises(InputError, match=r"inputs of shape \[8, 8\]; grey images have a channel, \[1, 8, 8\]"):
        models.build("toy_mlp", (8, 8), 10)
