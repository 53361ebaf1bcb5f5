"""Score matching, sampling, networks and augmentation on random data and settings: finite, repeated, refused."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scorematch import matching, sampling
from scorematch.augmentation import NonLeaking, mirror
from scorematch.matching import Fit, HeldOut, JointEnergy
from scorematch.networks import ConvBackbone, Denoiser, EmbeddedDenoiser, MLPBackbone, UNetBackbone

from .drawing import DTYPES, LAYOUTS, SIZES, examples, laid_out, misfits
from .test_posteriors import SEEDS, Arguments, Logits, has_values, normal

pytestmark = pytest.mark.soak

RATIOS = st.integers(-3, 3).map(lambda power: 10.0**power)
MODERATE = st.integers(-6, 6).map(lambda power: 10.0**power)  # of which float32 has the fourth powers, as losses ask
IMAGES = [(1, 4, 4), (2, 8, 4)]
BACKBONES = ["mlp", "conv", "unet"]


@st.composite
def backbones(draw: Any, kind: str, shape: tuple[int, ...], outputs: int, conditions: int = 0) -> Arguments:
    """What a backbone is made with; outputs counts channels, but features of an MLP."""
    arguments: Arguments = {"outputs": outputs, "width": 8, "dropout": draw(st.sampled_from([0.0, 0.5]))}
    arguments["conditions"] = conditions
    if kind == "mlp":
        return {**arguments, "shape": shape, "depth": draw(st.integers(0, 2))}
    arguments["channels"] = shape[0]
    if kind == "conv":
        return {**arguments, "width": 16, "depth": draw(st.integers(0, 2)), "patch": draw(st.sampled_from([1, 2]))}
    return {**arguments, "multipliers": draw(st.sampled_from([(1,), (1, 2)]))}


MADE: dict[str, Callable[..., nn.Module]] = {"mlp": MLPBackbone, "conv": ConvBackbone, "unet": UNetBackbone}


@st.composite
def denoisers(
    draw: Any, kind: str | None = None, sizes: st.SearchStrategy[float] = SIZES
) -> tuple[Denoiser, Arguments]:
    """A denoiser in eval mode, and a batch of which it is asked."""
    kind = draw(st.sampled_from(["mlp", "conv"])) if kind is None else kind
    shape = draw(st.sampled_from([(1,), (5,), *IMAGES] if kind == "mlp" else IMAGES))
    classes, embeds, told = draw(st.integers(2, 4)), draw(st.booleans()), draw(st.sampled_from([0, 0, 3]))
    outputs = (1 if embeds else classes + 1) * (math.prod(shape) if kind == "mlp" else shape[0])
    size, dtype, seed = draw(sizes), draw(DTYPES), draw(SEEDS)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    backbone = MADE[kind](**draw(backbones(kind, shape, outputs, told + (classes if embeds else 0))))
    torch.random.set_rng_state(state)
    center: Any = draw(st.sampled_from([0.0, size]))
    if draw(st.booleans()):
        center = torch.full(shape, center)
    settings: Arguments = {"num_classes": classes, "sigma_data": size, "center": center}
    denoiser = (
        EmbeddedDenoiser(backbone, **settings, augmentations=told, chunk=draw(st.sampled_from([1, 5, 512])))
        if embeds
        else Denoiser(backbone, **settings)
    )
    count = draw(st.integers(0 if kind == "mlp" else 1, 4))
    x = size * normal((count, *shape), dtype, draw(SEEDS)) + draw(st.sampled_from([0.0, size]))
    return denoiser.to(dtype).eval(), {
        "x": laid_out(x, draw(st.sampled_from(LAYOUTS))),
        "y": torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed)),
        "sigma": size * draw(RATIOS) * (0.1 + normal((count,), dtype, draw(SEEDS)).abs()),
        "noise": normal((count, *shape), dtype, draw(SEEDS)),
        "conditions": normal((count, told), dtype, 1) if told else None,
    }


def close(a: Tensor, b: Tensor, scale: Tensor | float = 0.0) -> None:
    """Equal up to the rounding of numbers as large as these, and as scale."""
    largest = max(float(t.detach().abs().max()) if t.numel() else 0.0 for t in (b, torch.as_tensor(scale)))
    torch.testing.assert_close(a, b, rtol=0, atol=(1e-3 if a.dtype == torch.float32 else 1e-8) * largest)


@pytest.mark.parametrize("kind", BACKBONES)
def test_denoisers_say_the_same_in_every_way(kind: str) -> None:
    @examples(quick=6 if kind == "unet" else 15, soak=200 if kind == "unet" else 1000)
    @given(denoisers(kind))
    def check(drawn: tuple[Denoiser, Arguments]) -> None:
        denoiser, batch = drawn
        x, y, sigma, kept = batch["x"], batch["y"], batch["sigma"], batch["x"].clone()
        rows, classes = torch.arange(len(x)), denoiser.num_classes
        state = torch.random.get_rng_state()
        with torch.no_grad():
            heads, scores = denoiser.denoise_all(x, sigma), denoiser.all_scores(x, sigma)
            assert heads.shape == scores.shape == (len(x), classes + 1, *x.shape[1:])
            assert heads.dtype == scores.dtype == x.dtype
            assert bool(heads.isfinite().all() & scores.isfinite().all())
            close(denoiser(x, sigma, y), heads[rows, y])
            close(denoiser(x, sigma), heads[:, -1])
            close(denoiser.score(x, sigma, y), scores[rows, y], scores)
            close(denoiser.score(x, sigma), scores[:, -1], scores)
            close(denoiser.class_scores(x, sigma), scores[:, :-1], scores)
            pair = denoiser.denoise_pair(x, sigma, y)
            close(pair, torch.stack([heads[rows, y], heads[:, -1]], 1))
            level = sigma.reshape(-1, 1, *[1] * (x.dim() - 1))
            close(x[:, None] + level.square() * scores, heads, x[:, None] + heads)  # Tweedie's formula
            for row in range(len(x)):
                one = denoiser.denoise_all(x[row : row + 1], float(sigma[row]))
                close(one, heads[row : row + 1], heads)
            told = denoiser.denoise_pair(x, sigma, y, batch["conditions"])
            assert told.shape == pair.shape
            other = copy.deepcopy(denoiser)
            for tensor in other.state_dict().values():
                tensor.zero_()
            other.load_state_dict(denoiser.state_dict())
            assert torch.equal(other.denoise_all(x, sigma), heads)
        assert torch.equal(x, kept)
        assert torch.equal(torch.random.get_rng_state(), state)

    check()


def network_of(batch: Arguments, classes: int) -> nn.Module:
    x = batch["x"]
    size = max(float(x.abs().max()), float(batch["sigma"].max())) if x.numel() else 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Logits(x.shape[1:].numel(), classes, max(size, 1e-12)).to(x.dtype)


@st.composite
def losses(draw: Any, name: str) -> tuple[Callable[..., Any], Arguments]:
    """A loss with its arguments."""
    denoiser, batch = draw(denoisers(sizes=MODERATE))
    x = batch["x"]
    if name == "denoising":
        return matching.denoising, {"denoiser": denoiser, **batch}
    if name == "distillation":
        teacher = copy.deepcopy(denoiser)
        del batch["y"]
        batch["conditions"] = batch["conditions"] if isinstance(denoiser, EmbeddedDenoiser) else None
        return matching.distillation, {"student": denoiser, "teacher": teacher, **batch}
    if name in ("sliced", "finite_difference"):
        arguments = {"score": lambda z: (z * denoiser.sigma_data).sin() - z, "x": x, "projection": batch["noise"]}
        more = {"step": draw(SIZES)} if name == "finite_difference" else {}
        return getattr(matching, name), {**arguments, **more}
    batch = {key: batch[key] for key in ("y", "sigma", "noise")} | {"x_noisy": x}
    classifier = network_of({**batch, "x": x}, denoiser.num_classes)
    if name == "joint_energy":
        more = {"center": draw(st.sampled_from([0.0, x[:1].detach().clone()])), "sigma_data": denoiser.sigma_data}
        if isinstance(more["center"], Tensor) and not len(x):
            more["center"] = 0.0
        return matching.joint_energy, {"classifier": classifier, **batch, **more}
    unconditional = batch["noise"] / denoiser.sigma_data
    return matching.denoising_likelihood, {"classifier": classifier, "unconditional": unconditional, **batch}


LOSSES = ("denoising", "distillation", "sliced", "finite_difference", "denoising_likelihood", "joint_energy")


def value(found: Any) -> Tensor:
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_and_of_each_sample(name: str) -> None:
    @examples(quick=15, soak=1000)
    @given(losses(name))
    def check(drawn: tuple[Callable[..., Any], Arguments]) -> None:
        function, arguments = drawn
        x = arguments["x_noisy" if "x_noisy" in arguments else "x"]
        kept, state = (
            copy.deepcopy({k: v for k, v in arguments.items() if isinstance(v, Tensor)}),
            torch.get_rng_state(),
        )
        loss = value(function(**arguments))
        assert loss.shape == (len(x),)
        assert loss.dtype == x.dtype
        assert bool(loss.isfinite().all())
        if name not in ("sliced", "finite_difference"):
            assert bool((loss >= 0).all())
        assert all(torch.equal(arguments[key], tensor) for key, tensor in kept.items())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(value(function(**arguments)), loss)
        for row in range(len(x)):
            sliced = {k: v[row : row + 1] if k in kept and k != "center" else v for k, v in arguments.items()}
            close(value(function(**sliced)), loss[row : row + 1], loss)
        network = next((v for v in arguments.values() if isinstance(v, nn.Module)), None)
        if network is not None:
            loss.sum().backward()
            assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)

    check()


# What torch calls the inputs of networks; labels and logits are told apart by the network alone.
ALIASES = {
    "x": ("x ", " x", "mat1", "device"),
    "x_noisy": (" x", "x_noisy", "mat1", "device"),
    "y": ("y ",),
    "conditions": ("conditions", "mat1", "device", "Sizes of tensors", "linear"),
}


def named(changed: str, error: Exception) -> bool:
    return any(word in str(error) for word in ALIASES.get(changed, (changed,)))


def refused_by_name(function: Callable[..., Any], arguments: Arguments, changed: str) -> Any:
    """What the function returns; None where it refuses the argument, and says which."""
    try:
        return function(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        assert named(changed, error), f"{function}, {changed}: {error}"  # noqa: PT017
    return None


@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse_by_name(name: str) -> None:
    @examples(quick=30, soak=1000)
    @given(losses(name), st.data())
    def check(drawn: tuple[Callable[..., Any], Arguments], data: st.DataObject) -> None:
        function, arguments = drawn
        changed = data.draw(st.sampled_from(sorted(set(arguments) - {"score"})))
        arguments = {**arguments, changed: data.draw(misfits(arguments[changed]))}
        found = refused_by_name(function, arguments, changed)
        if found is not None and all(map(has_values, arguments.values())) and not value(found).is_meta:
            assert not bool(value(found).isnan().any())

    check()


@st.composite
def fit_settings(draw: Any) -> Arguments:
    low = draw(SIZES)
    return {
        "steps": draw(st.integers(1, 3)),
        "batch_size": draw(st.integers(1, 5)),
        "lr": 10.0 ** draw(st.integers(-6, -1)),
        "warm_up": draw(st.sampled_from([0.0, 0.05, 0.99])),
        "schedule": draw(st.sampled_from(["cosine", "constant"])),
        "noise": draw(st.sampled_from(["log_uniform", "log_normal"])),
        "sigma_min": low,
        "sigma_max": low * draw(st.sampled_from([1.0, 3.0, 1e6])),
        "noise_mean": draw(st.sampled_from([-2.0, 0.0, 3.0])),
        "noise_deviation": draw(st.sampled_from([0.01, 1.2])),
        "averaging": draw(st.sampled_from([0.0, 0.5, 0.998])),
        "half_life": draw(st.sampled_from([0.0, 1e-3, 10.0, 1e9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "likelihood_weight": draw(st.sampled_from([0.0, 0.0, 1.0])),
    }


@st.composite
def trainings(draw: Any, name: str) -> tuple[Callable[..., Any], Arguments]:
    """Vectors to be fitted, of any size."""
    classes, size = draw(st.integers(2, 3)), draw(RATIOS)
    x = size * normal((draw(st.integers(1, 6)), 3), torch.float32, draw(SEEDS))
    y = torch.arange(len(x)) % classes
    settings = draw(fit_settings())
    settings |= {"sigma_min": size * 0.1, "sigma_max": size * draw(st.sampled_from([0.1, 1.0, 100.0]))}
    settings["noise_mean"] += math.log(size)
    arguments: Arguments = {"x": x, "y": y, "generator": torch.Generator().manual_seed(draw(SEEDS))}
    if draw(st.booleans()):
        patience = draw(st.sampled_from([None, 1]))
        arguments["held_out"] = HeldOut(x, y, size, interval=draw(st.sampled_from([None, 1, 5])), patience=patience)
    torch.manual_seed(draw(SEEDS))
    made = [
        Denoiser(MLPBackbone((3,), 3 * (classes + 1), width=8, depth=1), num_classes=classes, sigma_data=size)
        for _ in range(2)
    ]
    if name == "fit_denoiser":
        arguments |= {"denoiser": made[0], "teacher": made[1] if draw(st.booleans()) else None}
        return matching.fit_denoiser, {**arguments, "fit": Fit(**settings)}
    energy = JointEnergy(draw(st.sampled_from([0.1, 10.0])), 0.0, size) if draw(st.booleans()) else None
    if energy is not None:
        settings["likelihood_weight"] = 0.0
    arguments |= {"network": Logits(3, classes, size), "denoiser": made[0], "energy": energy}
    return matching.fit_classifier, {**arguments, "fit": Fit(**settings)}


@pytest.mark.parametrize("name", ["fit_denoiser", "fit_classifier"])
def test_trainings_are_finite_and_repeat(name: str) -> None:
    @examples(quick=10, soak=500)
    @given(trainings(name))
    def check(drawn: tuple[Callable[..., Any], Arguments]) -> None:
        function, arguments = drawn
        again, seen = copy.deepcopy({k: v for k, v in arguments.items() if k != "generator"}), []
        again["generator"] = torch.Generator()
        again["generator"].set_state(arguments["generator"].get_state())
        kept, state = arguments["x"].clone(), torch.get_rng_state()
        network = function(**arguments, progress=lambda step, loss: seen.append((step, float(loss))))
        assert not network.training
        assert all(bool(value.isfinite().all()) for value in network.state_dict().values())
        assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
        assert len(seen) == arguments["fit"].steps or arguments["held_out"].patience is not None
        assert all(math.isfinite(loss) for _, loss in seen)
        assert torch.equal(arguments["x"], kept)
        assert torch.equal(torch.get_rng_state(), state)
        other = function(**again).state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in network.state_dict().items())

    check()


@pytest.mark.parametrize("name", ["fit_denoiser", "fit_classifier"])
def test_trainings_refuse_by_name(name: str) -> None:
    @examples(quick=30, soak=500)
    @given(trainings(name), st.data())
    def check(drawn: tuple[Callable[..., Any], Arguments], data: st.DataObject) -> None:
        function, arguments = drawn
        arguments = {"augment": None, "progress": None, "held_out": None, **arguments}
        changed = data.draw(st.sampled_from(sorted(arguments)))
        refused_by_name(function, {**arguments, changed: data.draw(misfits(arguments[changed]))}, changed)

    check()


def test_settings_of_a_fit() -> None:
    @examples(quick=60, soak=1000)
    @given(fit_settings(), st.data())
    def check(settings: Arguments, data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            changed = data.draw(st.sampled_from(sorted(settings)))
            fit = refused_by_name(Fit, {**settings, changed: data.draw(misfits(settings[changed]))}, changed)
        else:
            fit = Fit(**settings)
        if fit is None:
            return
        levels = fit.noise_levels(4, torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.float64))
        assert bool((levels.isfinite() & (levels > 0)).all())
        assert all(0 <= fit.lr_factor(step) <= 1 for step in range(fit.steps))
        assert all(0 <= fit.decay(update) <= 1 for update in range(1, 4))

    check()


@st.composite
def measures(draw: Any, name: str) -> tuple[Callable[..., Any], Arguments]:
    denoiser, batch = draw(denoisers("mlp"))
    size, x = denoiser.sigma_data, batch["x"]
    if not len(x):
        x = torch.zeros(1, *x.shape[1:], dtype=x.dtype)
    y = torch.arange(len(x)) % denoiser.num_classes
    network = draw(st.sampled_from([denoiser, network_of({**batch, "x": x[:0]}, denoiser.num_classes)]))
    common = {"x": x, "y": y, "repeats": draw(st.integers(1, 3)), "seed": draw(SEEDS)}
    if name == "HeldOut":
        return HeldOut, {**common, "sigma": size, "interval": draw(st.sampled_from([None, 1])), "patience": None}
    common["chunk"] = draw(st.integers(1, 5))
    if name == "losses_by_level":
        return matching.losses_by_level, {**common, "network": network, "sigmas": (size, 0.1 * size)}
    scale, classes = draw(st.sampled_from([0.0, 1.0, 1e6])), denoiser.num_classes

    def logits(z: Tensor) -> Tensor:
        return scale * (z.flatten(1)[:, :1] / size + torch.arange(classes)).sin()

    return matching.fit_temperature, {**common, "logits": logits, "noise": draw(st.sampled_from([0.0, size]))}


MEASURES = ("HeldOut", "losses_by_level", "fit_temperature")


@pytest.mark.parametrize("name", MEASURES)
def test_measures_on_held_out_points(name: str) -> None:
    @examples(quick=15, soak=500)
    @given(measures(name))
    def check(drawn: tuple[Callable[..., Any], Arguments]) -> None:
        function, arguments = drawn
        kept, state = arguments["x"].clone(), torch.get_rng_state()
        found = function(**arguments)
        if name == "fit_temperature":
            assert 0.05 * (1 - 1e-9) <= found <= 20 * (1 + 1e-9)
        elif name == "losses_by_level":
            assert list(found) == list(arguments["sigmas"])
            assert all(math.isfinite(loss) and loss >= 0 for loss in found.values())
            parts = function(**{**arguments, "chunk": 100})
            assert all(parts[sigma] == pytest.approx(loss, rel=1e-4) for sigma, loss in found.items())
        else:
            network = network_of({"x": arguments["x"], "sigma": torch.ones(1)}, int(arguments["y"].max()) + 1)
            best = matching.BestWeights(found)
            for step in (1, 2):
                best.look(network, step)
            assert best.history == [(1, best.loss), (2, best.loss)]
            assert best.step == 1
            best.restore(network)
        if name != "HeldOut":
            assert function(**arguments) == found
        assert torch.equal(arguments["x"], kept)
        assert torch.equal(torch.get_rng_state(), state)

    check()


@pytest.mark.parametrize("name", MEASURES)
def test_measures_refuse_by_name(name: str) -> None:
    @examples(quick=30, soak=1000)
    @given(measures(name), st.data())
    def check(drawn: tuple[Callable[..., Any], Arguments], data: st.DataObject) -> None:
        function, arguments = drawn
        changed = data.draw(st.sampled_from(sorted(arguments)))
        refused_by_name(function, {**arguments, changed: data.draw(misfits(arguments[changed]))}, changed)

    check()


@st.composite
def samplings(draw: Any, name: str) -> tuple[Callable[..., Any], Arguments]:
    denoiser, batch = draw(denoisers())
    size, count = denoiser.sigma_data, len(batch["x"])
    labels = draw(st.sampled_from([None, batch["y"]]))
    sigmas = sampling.noise_levels(size * draw(st.sampled_from([1.0, 1e3])), size * 0.1, draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    arguments = {"denoiser": denoiser, "shape": tuple(batch["x"].shape), "sigmas": sigmas, "class_labels": labels}
    if name == "annealed_langevin":
        arguments |= {"steps_per_level": draw(st.integers(1, 2)), "step_ratio": draw(st.sampled_from([1e-6, 0.9]))}
    assert count == len(batch["y"])
    return getattr(sampling, name), {**arguments, "generator": generator}


@pytest.mark.parametrize("name", ["annealed_langevin", "heun"])
def test_samples_are_finite_and_repeat(name: str) -> None:
    @examples(quick=10, soak=500)
    @given(samplings(name))
    def check(drawn: tuple[Callable[..., Any], Arguments]) -> None:
        function, arguments = drawn
        before, state = arguments["generator"].get_state(), torch.get_rng_state()
        x = function(**arguments)
        assert x.shape == arguments["shape"]
        assert x.dtype == arguments["denoiser"].center.dtype
        assert bool(x.isfinite().all())
        assert not x.requires_grad
        arguments["generator"].set_state(before)
        assert torch.equal(function(**arguments), x)
        assert torch.equal(torch.get_rng_state(), state)

    check()


@pytest.mark.parametrize("name", ["annealed_langevin", "heun"])
def test_samplers_refuse_by_name(name: str) -> None:
    @examples(quick=30, soak=1000)
    @given(samplings(name), st.data())
    def check(drawn: tuple[Callable[..., Any], Arguments], data: st.DataObject) -> None:
        function, arguments = drawn
        changed = data.draw(st.sampled_from(sorted(arguments)))
        refused_by_name(function, {**arguments, changed: data.draw(misfits(arguments[changed]))}, changed)

    check()


def test_noise_levels_fall() -> None:
    @examples(quick=50, soak=1000)
    @given(SIZES, st.floats(1.0, 1e12), st.integers(1, 20), st.data())
    def check(low: float, ratio: float, count: int, data: st.DataObject) -> None:
        arguments: Arguments = {"sigma_max": low * ratio, "sigma_min": low, "count": count}
        levels = sampling.noise_levels(**arguments)
        assert len(levels) == count
        assert all(later <= sigma for sigma, later in pairwise(levels))
        assert levels[0] == pytest.approx(low * ratio)
        assert levels[-1] == pytest.approx(low if count > 1 else low * ratio)
        changed = data.draw(st.sampled_from(sorted(arguments)))
        refused_by_name(sampling.noise_levels, {**arguments, changed: data.draw(misfits(1.0))}, changed)

    check()


@pytest.mark.parametrize("kind", BACKBONES)
def test_backbones_refuse_by_name(kind: str) -> None:
    @examples(quick=20 if kind == "unet" else 60, soak=200 if kind == "unet" else 1000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from(IMAGES))
        arguments = data.draw(backbones(kind, shape, 3, data.draw(st.sampled_from([0, 2]))))
        if kind != "mlp":
            arguments["pooled"] = data.draw(st.booleans())
        told = arguments["conditions"]
        changed = data.draw(st.sampled_from(sorted(arguments)))
        arguments[changed] = data.draw(st.one_of(st.just(arguments[changed]), misfits(arguments[changed])))
        backbone = refused_by_name(MADE[kind], arguments, changed)
        if backbone is None:
            return
        batch: Arguments = {"x": normal((2, *shape), torch.float32, 0), "noise": torch.zeros(2)}
        if told and changed != "conditions":
            batch["conditions"] = torch.ones(2, told)
        if changed not in ("shape", "channels", "conditions"):
            found = backbone(**batch)
            assert bool(found.isfinite().all())
            assert found.shape[:2] == (2, arguments["outputs"])

    check()


@st.composite
def augmentations(draw: Any) -> tuple[Callable[..., Any], Arguments]:
    probability, mirrored = draw(st.sampled_from([0.0, 0.12, 1.0])), draw(st.booleans())
    shape = (draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = draw(SIZES) * normal(shape, draw(DTYPES), draw(SEEDS))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    augment = draw(st.sampled_from([mirror, NonLeaking(probability, mirrored=mirrored)]))
    return augment, {"x": laid_out(x, draw(st.sampled_from(LAYOUTS))), "generator": generator}


def test_augmentation_of_any_images() -> None:
    @examples(quick=40, soak=1000)
    @given(augmentations(), st.data())
    def check(drawn: tuple[Callable[..., Any], Arguments], data: st.DataObject) -> None:
        augment, arguments = drawn
        x, before, state = arguments["x"], arguments["generator"].get_state(), torch.get_rng_state()
        kept = x.clone()
        found, told = augment(**arguments)
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert bool(found.isfinite().all())
        largest = float(x.abs().max()) if x.numel() else 0.0
        assert bool((found.abs() <= largest * (1 + 1e-5)).all())  # resampled linearly
        if told is not None:
            assert told.shape == (len(x), NonLeaking.conditions)
            assert told.dtype == x.dtype
            untouched = (told == 0).all(1)
            assert torch.equal(found[untouched], x[untouched])
        arguments["generator"].set_state(before)
        assert torch.equal(augment(**arguments)[0], found)
        assert torch.equal(x, kept)
        assert torch.equal(torch.get_rng_state(), state)
        changed = data.draw(st.sampled_from(["x", "generator"]))
        refused_by_name(augment, {**arguments, changed: data.draw(misfits(arguments[changed]))}, changed)
        refused_by_name(NonLeaking, {"probability": data.draw(misfits(0.1))}, "probability")

    check()
