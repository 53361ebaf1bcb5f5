"""Denoisers of every backbone, and sampling with the exact denoiser of a known distribution."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.networks import ConvBackbone, Denoiser, EmbeddedDenoiser, MLPBackbone, UNetBackbone
from scorematch.sampling import annealed_langevin, heun, noise_levels


def denoisers() -> dict[str, tuple[Denoiser, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "mlp": (Denoiser(MLPBackbone((2, 3), 4 * 6), num_classes=3, sigma_data=0.5, center=0.3), (2, 3)),
        "conv": (
            Denoiser(ConvBackbone(2, 4 * 2, width=16, depth=2), num_classes=3, sigma_data=0.5, center=0.3),
            (2, 8, 8),
        ),
        "unet": (
            Denoiser(UNetBackbone(2, 4 * 2, width=8, multipliers=(1, 2)), num_classes=3, sigma_data=0.5, center=0.3),
            (2, 8, 8),
        ),
    }


@pytest.mark.parametrize("name", ["mlp", "conv", "unet"])
def test_heads_scores_and_labels_agree(name: str) -> None:
    denoiser, shape = denoisers()[name]
    denoiser.eval()
    x, sigma = torch.randn(5, *shape), torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0])
    heads = denoiser.denoise_all(x, sigma)
    assert heads.shape == (5, 4, *shape)
    labels = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(denoiser(x, sigma, labels), heads[torch.arange(5), labels])
    torch.testing.assert_close(denoiser(x, sigma), heads[:, -1])
    # Tweedie's formula: the score is (D − x) / σ².
    expected = (heads - x[:, None]) / sigma.square().reshape(-1, 1, *[1] * len(shape))
    torch.testing.assert_close(denoiser.all_scores(x, sigma), expected, rtol=1e-3, atol=1e-3)
    scores = denoiser.class_scores(x, sigma)
    torch.testing.assert_close(scores, expected[:, :3], rtol=1e-3, atol=1e-3)
    assert scores.is_contiguous()
    torch.testing.assert_close(denoiser.score(x, sigma, labels), denoiser.all_scores(x, sigma)[torch.arange(5), labels])
    torch.testing.assert_close(denoiser.score(x, 0.5), denoiser.all_scores(x, torch.full((5,), 0.5))[:, -1])


def embedded(kind: str, told: int = 2, chunk: int = 7) -> tuple[EmbeddedDenoiser, tuple[int, ...]]:
    """One that is told of augmentation, too."""
    torch.manual_seed(0)
    conditions = 3 + told
    backbones = {
        "mlp": lambda: MLPBackbone((2, 4, 4), 32, width=16, conditions=conditions),
        "conv": lambda: ConvBackbone(2, 2, width=16, depth=2, patch=2, conditions=conditions),
        "unet": lambda: UNetBackbone(2, 2, width=8, multipliers=(1, 2), conditions=conditions),
    }
    common = {"num_classes": 3, "sigma_data": 0.5, "center": 0.3, "augmentations": told, "chunk": chunk}
    return EmbeddedDenoiser(backbones[kind](), **common).eval(), (2, 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mlp", "conv", "unet"])
def test_an_embedded_denoiser_answers_for_each_class(kind: str) -> None:
    denoiser, shape = embedded(kind)
    x, sigma, labels = torch.randn(5, *shape), torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0]), torch.tensor([0, 1, 2, 0, 1])
    heads = denoiser.denoise_all(x, sigma)
    assert heads.shape == (5, 4, *shape)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(denoiser(x, sigma, labels), heads[torch.arange(5), labels], **tolerance)
    torch.testing.assert_close(denoiser(x, sigma), heads[:, -1], **tolerance)
    pair = denoiser.denoise_pair(x, sigma, labels)
    torch.testing.assert_close(pair, torch.stack([heads[torch.arange(5), labels], heads[:, -1]], 1), **tolerance)
    expected = (heads - x[:, None]) / sigma.square().reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(denoiser.all_scores(x, sigma), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(denoiser.class_scores(x, sigma), expected[:, :3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        denoiser.score(x, sigma, labels), expected[torch.arange(5), labels], rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(heads[:, 0], heads[:, 1])


@pytest.mark.parametrize("kind", ["mlp", "conv", "unet"])
def test_zero_conditions_are_none(kind: str) -> None:
    """Of augmentation: at inference nobody says that nothing was done."""
    denoiser, shape = embedded(kind)
    x, labels, zero = torch.randn(3, *shape), torch.tensor([0, 1, 2]), torch.zeros(3, 2)
    pair = denoiser.denoise_pair(x, 0.5, labels)
    torch.testing.assert_close(denoiser.denoise_pair(x, 0.5, labels, zero), pair)
    assert not torch.allclose(denoiser.denoise_pair(x, 0.5, labels, zero + 1), pair)
    torch.testing.assert_close(
        denoiser.denoise_all(x, 0.5, zero + 1)[:, -1], denoiser.denoise_pair(x, 0.5, labels, zero + 1)[:, 1]
    )


def test_a_backbone_is_told_the_class_and_the_augmentation() -> None:
    """One-hot, nothing for the unconditional head; a network that was saved takes it so."""
    denoiser, shape = embedded("mlp")
    told: list[Tensor] = []
    denoiser.backbone.register_forward_pre_hook(lambda module, inputs: told.append(inputs[2]))
    x, labels, moved = torch.randn(3, *shape), torch.tensor([2, 0, 1]), torch.randn(3, 2)
    classes, none = torch.eye(3)[labels], torch.zeros(3, 3)
    denoiser(x, 0.5, labels)
    denoiser(x, 0.5)
    denoiser.denoise_pair(x, 0.5, labels, moved)
    assert torch.equal(told[0], torch.cat([classes, 0 * moved], 1))
    assert torch.equal(told[1], torch.cat([none, 0 * moved], 1))
    assert torch.equal(told[2], torch.cat([torch.cat([classes, none]), torch.cat([moved, moved])], 1))


def test_scores_of_some_classes_alone() -> None:
    denoiser, shape = embedded("conv")
    x, classes = torch.randn(4, *shape), torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1]])
    every, some = denoiser.all_scores(x, 0.4), denoiser.class_scores(x, 0.4, classes)
    for sample, asked in enumerate(classes.tolist()):
        for label in range(3):
            wanted = every[sample, label if label in asked else -1]
            torch.testing.assert_close(some[sample, label], wanted, rtol=1e-4, atol=1e-4)


def test_another_backbone_shares_all_else() -> None:
    denoiser, shape = denoisers()["conv"]
    other = denoiser.with_backbone(nn.Sequential(denoiser.backbone))
    assert other.center is denoiser.center
    assert isinstance(denoiser.backbone, ConvBackbone), "the denoiser itself is as it was"
    denoiser.center.fill_(0.7)
    other.backbone = denoiser.backbone
    x = torch.randn(2, *shape)
    assert torch.equal(other(x, 0.3), denoiser(x, 0.3))


def test_patches_keep_the_pixels_in_their_places() -> None:
    """With one output channel for each pixel of a patch, a pixel is changed by those around it alone."""
    torch.manual_seed(0)
    backbone = ConvBackbone(1, 1, width=16, depth=1, patch=2)
    assert backbone(torch.zeros(2, 1, 16, 12), torch.zeros(2)).shape == (2, 1, 16, 12)
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(backbone(x, torch.zeros(1))[0, 0, 5, 40], x)
    # GroupNorm sees the whole image, faintly
    row, column = divmod(int(gradient.abs().argmax()), 64)
    assert abs(row - 5) <= 2
    assert abs(column - 40) <= 2


def test_a_convolution_is_told_where_a_pixel_is() -> None:
    """Its row and its column; and every other block looks twice as far."""
    backbone, seen = ConvBackbone(1, 1, width=16, depth=4), []
    backbone.inlet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone(torch.randn(2, 1, 3, 5), torch.zeros(2))
    rows, columns = seen[0][1, 1:]
    torch.testing.assert_close(rows, torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 5))
    torch.testing.assert_close(columns, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).expand(3, 5))
    assert [block.second[-1].dilation for block in backbone.blocks] == [(1, 1), (2, 2), (1, 1), (2, 2)]


class Stored:
    """The function that the weights of a network stand for, in plain PyTorch."""

    def __init__(self, backbone: nn.Module) -> None:
        self.values = backbone.state_dict()

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.values[f"{name}.weight"], self.values[f"{name}.bias"]

    def embedded(self, noise: Tensor, conditions: Tensor | None) -> Tensor:
        """Sines and cosines of eight octaves."""
        phase = noise[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
        result = F.linear(torch.cat([noise[:, None], phase.sin(), phase.cos()], 1), *self.of("noise.linear"))
        return result if conditions is None else result + conditions @ self.values["noise.conditions.weight"].T

    def mlp(self, x: Tensor, noise: Tensor, conditions: Tensor | None = None, depth: int = 2) -> Tensor:
        def normed(h: Tensor, name: str) -> Tensor:
            return F.layer_norm(h, h.shape[1:], *self.of(name))

        h = F.linear(x.reshape(len(x), -1), *self.of("inlet")) + self.embedded(noise, conditions)
        for block in range(depth):
            inner = F.silu(F.linear(normed(h, f"blocks.{block}.0"), *self.of(f"blocks.{block}.1")))
            h = h + F.linear(inner, *self.of(f"blocks.{block}.4"))
        return F.linear(F.silu(normed(h, "outlet.0")), *self.of("outlet.2"))

    def conv(
        self, x: Tensor, noise: Tensor, conditions: Tensor | None = None, depth: int = 3, patch: int = 1
    ) -> Tensor:
        def active(h: Tensor, name: str) -> Tensor:
            return F.silu(F.group_norm(h, 8, *self.of(name)))

        count, channels, height, width = x.shape
        rows, columns = height // patch, width // patch
        x = x.reshape(count, channels, rows, patch, columns, patch).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"))
        h = F.conv2d(torch.cat([x, place.repeat(count, 1, 1, 1)], 1), *self.of("inlet"), padding=1)
        for block in range(depth):
            far = 2 if block % 2 else 1
            inner = F.conv2d(active(h, f"blocks.{block}.first.0"), *self.of(f"blocks.{block}.first.2"), padding=1)
            inner = inner + self.embedded(noise, conditions)[:, :, None, None]
            inner = active(inner, f"blocks.{block}.second.0")
            h = h + F.conv2d(inner, *self.of(f"blocks.{block}.second.3"), padding=far, dilation=far)
        h = active(h, "outlet.0")
        if self.values["last.weight"].dim() == 2:
            return F.linear(h.flatten(2).mean(2), *self.of("last"))
        h = F.conv2d(h, *self.of("last")).reshape(count, -1, patch, patch, rows, columns)
        return h.permute(0, 1, 4, 2, 5, 3).reshape(count, -1, height, width)


@pytest.mark.parametrize("conditions", [0, 3])
def test_a_network_that_was_saved_is_the_same_function(conditions: int) -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(4, 2, 6, 8), torch.randn(4)
    told = (torch.randn(4, conditions),) if conditions else ()
    mlp = MLPBackbone((2, 6, 8), 5, width=16, depth=2, conditions=conditions)
    torch.testing.assert_close(mlp(x, noise, *told), Stored(mlp).mlp(x, noise, *told), rtol=1e-4, atol=1e-5)
    for more in ({}, {"patch": 2}, {"pooled": True}):
        conv = ConvBackbone(2, 5, width=16, depth=3, conditions=conditions, **more)  # type: ignore[arg-type]
        expected = Stored(conv).conv(x, noise, *told, patch=conv.patch)
        assert expected.shape == ((4, 5) if "pooled" in more else (4, 5, 6, 8))
        torch.testing.assert_close(conv(x, noise, *told), expected, rtol=1e-4, atol=1e-5)


def test_networks_that_were_saved_have_the_sizes_of_today() -> None:
    """Those that nobody gave: a state of other sizes could not be read."""
    mlp, conv, unet = MLPBackbone((7,), 5), ConvBackbone(3, 5), UNetBackbone(3, 5)
    assert mlp.inlet.weight.shape == (256, 7)
    assert conv.inlet.weight.shape == (64, 3 + 2, 3, 3)
    assert (len(mlp.blocks), len(conv.blocks)) == (3, 4)
    assert conv.last.weight.shape == (5, 64, 1, 1)
    assert [stage[0].block1.proj.weight.shape[0] for stage in unet.unet.downs] == [64, 64, 128]
    assert unet.unet.mid_block1.block1.proj.weight.shape[0] == 256


def test_the_u_net_is_told_of_noise_as_of_a_time_step() -> None:
    """ln(σ)/4 within ±2 as 0 to 1000; and what it is told besides is added to its embedding of that time."""
    torch.manual_seed(0)
    x, noise, told = torch.randn(3, 2, 8, 8), torch.tensor([-2.0, 0.0, 2.0]), torch.randn(3, 4)
    images, pooled, conditioned = (
        UNetBackbone(2, 5, width=8, multipliers=(1, 2), pooled=pooled, conditions=conditions).eval()
        for pooled, conditions in ((False, 0), (True, 0), (False, 4))
    )
    pooled.load_state_dict(images.state_dict())
    time = torch.tensor([0.0, 500.0, 1000.0])
    torch.testing.assert_close(images(x, noise), images.unet(x, time))
    torch.testing.assert_close(pooled(x, noise), images.unet(x, time).flatten(2).mean(2))
    outputs: list[Tensor] = []
    conditioned.unet.time_mlp.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for more in ((), (told,), (0 * told,)):
        conditioned(x, noise, *more)
    plain, moved, still = outputs
    torch.testing.assert_close(plain, conditioned.unet.time_mlp.embedding(time))
    torch.testing.assert_close(moved - plain, told @ conditioned.unet.time_mlp.conditions.weight.T)
    torch.testing.assert_close(still, plain)


def test_preconditioning_is_that_of_karras() -> None:
    """Table 1: c_in = 1 / √(σ² + σ_data²) and c_noise = ln(σ) / 4. A network that was saved is read with both."""
    denoiser, shape = denoisers()["mlp"]
    seen = []
    denoiser.backbone = nn.Module()
    denoiser.backbone.forward = lambda *inputs: seen.extend(inputs) or torch.zeros(2, 24)  # type: ignore[method-assign]
    x, sigma = torch.randn(2, *shape), torch.tensor([0.2, 3.0])
    denoiser(x, sigma)
    torch.testing.assert_close(seen[0], (x - 0.3) / (sigma.square() + 0.25).sqrt()[:, None, None])
    torch.testing.assert_close(seen[1], sigma.log() / 4)


def test_preconditioning_keeps_the_limits() -> None:
    """As σ → 0 the denoiser returns its input; as σ → ∞ it forgets it (up to the backbone's output)."""
    denoiser, shape = denoisers()["mlp"]
    x = torch.randn(4, *shape)
    torch.testing.assert_close(denoiser(x, 1e-4), x, rtol=0, atol=1e-3)
    denoiser.backbone = nn.Module()
    denoiser.backbone.forward = lambda x, noise: torch.zeros(len(x), 24)  # type: ignore[method-assign]
    torch.testing.assert_close(denoiser(x, 1e4), torch.full_like(x, 0.3), rtol=0, atol=1e-3)


class ExactDenoiser(Denoiser):
    """Class y is N(m_y, s²): D = (s² x + σ² m_y) / (s² + σ²). The unconditional head is not used."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), num_classes=2, sigma_data=2.0)
        self.means, self.deviation = torch.tensor([-2.0, 3.0]), 0.5

    def denoise_all(
        self, x: torch.Tensor, sigma: torch.Tensor | float, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        del conditions
        variance = torch.as_tensor(sigma).square().reshape(-1, 1, 1)
        means = torch.cat([self.means, torch.zeros(1)])[:, None]
        return (self.deviation**2 * x[:, None] + variance * means) / (self.deviation**2 + variance)

    def all_scores(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        variance = torch.as_tensor(sigma).square().reshape(-1, 1, 1)
        return (self.denoise_all(x, sigma) - x[:, None]) / variance


@pytest.mark.parametrize("method", ["langevin", "heun"])
def test_samples_have_the_right_mean_and_spread(method: str) -> None:
    labels = torch.arange(4000) % 2
    generator = torch.Generator().manual_seed(0)
    if method == "langevin":
        # α = step_ratio σ² is a fixed share of the variance only while σ is above the spread of the data.
        x = annealed_langevin(
            ExactDenoiser(),
            (4000, 1),
            sigmas=noise_levels(10.0, 0.1, 20),
            class_labels=labels,
            steps_per_level=40,
            generator=generator,
        )
    else:
        x = heun(
            ExactDenoiser(), (4000, 1), sigmas=noise_levels(80.0, 0.01, 80), class_labels=labels, generator=generator
        )
    for label, mean in enumerate((-2.0, 3.0)):
        chosen = x[labels == label]
        assert float(chosen.mean()) == pytest.approx(mean, abs=0.05)
        assert float(chosen.std()) == pytest.approx(0.5, rel=0.1)


def test_noise_levels_fall_geometrically() -> None:
    levels = noise_levels(10.0, 0.1, 5)
    assert levels[0] == pytest.approx(10.0)
    assert levels[-1] == pytest.approx(0.1)
    assert all(a / b == pytest.approx(math.sqrt(10)) for a, b in pairwise(levels))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: noise_levels(0.1, 1.0, 5), "0 < sigma_min ≤ sigma_max is needed"),
        (lambda: noise_levels(1.0, 0.1, 0), "count must be at least 1, got 0"),
        (lambda: noise_levels(math.inf, 0.1, 3), "both finite, got 0.1 and inf"),
        (lambda: noise_levels(1.0, math.nan, 3), "both finite, got nan and 1.0"),
        (lambda: noise_levels(1.0, 0.1, 2.5), "count must be a whole number, got 2.5"),
        (lambda: Denoiser(nn.Identity(), num_classes=1, sigma_data=1.0), "num_classes must be at least 2, got 1"),
        (
            lambda: Denoiser(nn.Identity(), num_classes=2, sigma_data=0.0),
            "sigma_data must be finite and positive, got 0.0",
        ),
        (
            lambda: EmbeddedDenoiser(nn.Identity(), num_classes=2, sigma_data=1.0, augmentations=-1),
            "augmentations must be at least 0, got -1",
        ),
        (lambda: EmbeddedDenoiser(nn.Identity(), num_classes=2, sigma_data=1.0, chunk=0), "chunk must be at least 1"),
        (lambda: ConvBackbone(1, 1, width=8), "width must be a multiple of 8 and at least 16, got 8"),
        (lambda: ConvBackbone(1, 1, width=20), "width must be a multiple of 8 and at least 16, got 20"),
        (lambda: UNetBackbone(1, 1, multipliers=()), r"multipliers must be .* each at least 1, got \(\)"),
        (lambda: UNetBackbone(1, 1, multipliers=(1, 0)), r"multipliers must be .* each at least 1, got \(1, 0\)"),
        (lambda: MLPBackbone((3,), 1, conditions=-1), "conditions must be at least 0, got -1"),
    ],
)
def test_bad_input(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((TypeError, ValueError), match=message):
        build()


@pytest.mark.parametrize("sampler", [annealed_langevin, heun])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": []}, r"sigmas must be one or more levels that fall, positive and finite, got \[\]"),
        ({"sigmas": [0.1, 1.0]}, r"sigmas must be .* that fall, .* got \[0.1, 1.0\]"),
        ({"sigmas": [1.0, 0.0]}, r"sigmas must be .* positive and finite, got \[1.0, 0.0\]"),
        ({"sigmas": [math.inf, 1.0]}, "sigmas must be .* positive and finite"),
        ({"sigmas": [math.nan]}, "sigmas must be .* positive and finite"),
        ({"class_labels": torch.zeros(4)}, r"class_labels must be int64 \[N\], got torch.float32 \[4\]"),
        ({"class_labels": torch.zeros(3).long()}, r"class_labels must be \[N\] for samples \[4, 1\], got \[3\]"),
        ({"class_labels": torch.tensor([0, 1, 2, 0])}, r"class_labels must lie in \[0, 2\), got values in \[0, 2\]"),
        ({"class_labels": torch.tensor([0, 1, -1, 0])}, r"class_labels must lie in \[0, 2\), got values in \[-1, 1\]"),
    ],
)
def test_bad_input_of_the_samplers(sampler, options: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((TypeError, ValueError), match=message):
        sampler(ExactDenoiser(), (4, 1), **{"sigmas": [1.0, 0.1], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_level": 0}, "steps_per_level must be at least 1, got 0"),
        ({"step_ratio": 0.0}, r"step_ratio must lie in \(0, 1\), got 0.0"),
        ({"step_ratio": 1.0}, r"step_ratio must lie in \(0, 1\), got 1.0"),
    ],
)
def test_bad_steps_of_langevin_dynamics(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annealed_langevin(ExactDenoiser(), (4, 1), sigmas=[1.0, 0.1], **options)


@pytest.mark.parametrize("count", [0, 2])
def test_conditions_that_a_network_was_not_made_for(count: int) -> None:
    network = MLPBackbone((4,), 3, width=8, depth=1, conditions=count)
    with pytest.raises(ValueError, match=rf"conditions must be \[N, K\] = \[5, {count}\], got \[5, 3\]"):
        network(torch.zeros(5, 4), torch.zeros(5), torch.zeros(5, 3))


def test_a_denoiser_owns_its_centre() -> None:
    center = torch.full((6,), 0.5, requires_grad=True)
    denoisers = [Denoiser(MLPBackbone((6,), 24, width=4), num_classes=3, sigma_data=1.0, center=center) for _ in "ab"]
    state = {**denoisers[0].state_dict(), "center": torch.zeros(6)}
    denoisers[0].load_state_dict(state)
    assert center.tolist() == denoisers[1].center.tolist() == [0.5] * 6
    assert not denoisers[1].center.requires_grad
    # One number, expanded, is one place in memory: nothing could be loaded into it.
    expanded = Denoiser(
        MLPBackbone((6,), 24, width=4), num_classes=3, sigma_data=1.0, center=torch.tensor(0.5).expand(6)
    )
    expanded.load_state_dict(state)


def test_a_backbone_of_too_few_heads() -> None:
    x = torch.zeros(5, 3, 4, 4)
    denoiser = Denoiser(MLPBackbone((3, 4, 4), 2 * 48, width=4, depth=1), num_classes=2, sigma_data=1.0)
    told = r"backbone must give \[5, 9, 4, 4\] with num_classes \+ 1 = 3 heads for x \[5, 3, 4, 4\], .*, got \[5, 96\]"
    for call in (denoiser, denoiser.class_scores, denoiser.denoise_all):
        with pytest.raises(ValueError, match=told):
            call(x, 0.5)
    with pytest.raises(TypeError, match=r"backbone must give a tensor \[5, 9, 4, 4\], got tuple"):
        denoiser.with_backbone(lambda x, noise: (x, noise))(x, 0.5)  # type: ignore[arg-type]


def test_a_backbone_of_one_class_gives_what_it_takes() -> None:
    x = torch.zeros(5, 3, 4, 4)
    backbone = MLPBackbone((3, 4, 4), 3 * 48, width=4, depth=1, conditions=2)
    denoiser = EmbeddedDenoiser(backbone, num_classes=2, sigma_data=1.0)
    for call in (denoiser, denoiser.class_scores):
        with pytest.raises(ValueError, match=r"backbone must give \[\d+, 3, 4, 4\] for x .*, got \[\d+, 144\]"):
            call(x, 0.5)


def test_the_state_of_a_denoiser_has_the_scale_of_its_data() -> None:
    def denoiser(sigma_data: float) -> Denoiser:
        torch.manual_seed(0)
        return Denoiser(MLPBackbone((6,), 24, width=4), num_classes=3, sigma_data=sigma_data)

    trained, x = denoiser(0.3), torch.ones(2, 6)
    state = trained.bfloat16().state_dict()
    again = denoiser(1.0)
    again.load_state_dict(state)
    assert type(again.sigma_data) is float
    assert again.sigma_data == 0.3, "exact, whatever the dtype of the weights"
    assert torch.equal(again.bfloat16().class_scores(x.bfloat16(), 0.5), trained.class_scores(x.bfloat16(), 0.5))
    before = denoiser(1.0)
    before.load_state_dict({name: value for name, value in state.items() if name != "_extra_state"})
    assert before.sigma_data == 1.0
