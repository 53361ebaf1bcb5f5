"""Every posterior on random data and settings: a distribution at every point, its gradient, and clear refusals."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scorematch.networks import Denoiser, EmbeddedDenoiser, MLPBackbone
from scorematch.posteriors import (
    ClassScorePosterior,
    Ensemble,
    FactorAnalysers,
    GaussianMixture,
    KernelDensity,
    NoiseConditionalClassifier,
    Posterior,
    ScoreNetwork,
)
from scorematch.posteriors.base import PointwisePosterior

from .drawing import DTYPES, LAYOUTS, SIZES, examples, laid_out, misfits

pytestmark = pytest.mark.soak

Arguments = dict[str, Any]
FEATURES = st.sampled_from([(1,), (5,), (2, 2), (1, 3, 3)])
RATIOS = st.integers(-6, 6).map(lambda power: 10.0**power)


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SEEDS = st.integers(0, 2**31)


@st.composite
def frames(draw: Any) -> Arguments:
    """What the data are like: the size of their values, and what noise is to them."""
    size = draw(SIZES)
    return {
        "classes": draw(st.integers(1, 4)),
        "shape": draw(FEATURES),
        "dtype": draw(DTYPES),
        "size": size,
        "sigma": size * draw(st.one_of(st.just(1.0), RATIOS)),
        "offset": size * draw(st.sampled_from([0.0, 0.5, 30.0])),
        "seed": draw(SEEDS),
    }


@st.composite
def points(draw: Any, frame: Arguments, count: int | None = None, known: Tensor | None = None) -> Tensor:
    """Inputs [N, …] like the data, far from them, or some of them."""
    count = draw(st.integers(0, 4)) if count is None else count
    far = draw(st.sampled_from([1.0, 1.0, 0.0, 100.0]))
    x = frame["size"] * far * normal((count, *frame["shape"]), frame["dtype"], draw(SEEDS)) + frame["offset"]
    if known is not None and draw(st.booleans()):
        x = known[torch.arange(count) % len(known)].reshape(x.shape).clone()
    return laid_out(x, draw(st.sampled_from(LAYOUTS)))


@st.composite
def data_sets(draw: Any, frame: Arguments, least: int = 1) -> Arguments:
    """Training data, at least so many samples of each class; some coincide."""
    classes = frame["classes"]
    counts = draw(st.lists(st.integers(least, least + 3), min_size=classes, max_size=classes))
    y = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(frame["seed"]))]
    x = draw(points(frame, len(y)))
    kind = draw(st.sampled_from(["different", "in pairs", "equal"]))
    if kind != "different":
        x = x[torch.arange(len(y)) // 2 if kind == "in pairs" else torch.zeros(len(y), dtype=torch.int64)]
    return {"x": x, "y": y, "num_classes": classes}


@st.composite
def weights_of(draw: Any, means: Tensor) -> Tensor | None:
    if draw(st.booleans()):
        return None
    weights = normal(tuple(means.shape[:2]), means.dtype, draw(SEEDS)).abs() + 0.01
    if means.shape[1] > 1 and draw(st.booleans()):
        weights[:, 0] = 0.0  # a component that does not occur
    return weights * draw(SIZES)


@st.composite
def means_of(draw: Any, frame: Arguments) -> Tensor:
    shape = (frame["classes"], draw(st.integers(1, 3)), math.prod(frame["shape"]))
    means = draw(points({**frame, "shape": shape[1:]}, frame["classes"]))
    return means.contiguous()


@st.composite
def mixtures(draw: Any, frame: Arguments) -> Arguments:
    means = draw(means_of(frame))
    (classes, components, features), dtype = means.shape, means.dtype
    form = draw(st.sampled_from(["isotropic", "diagonal", "full"]))
    if form == "full":
        factor = normal((classes, components, features, features), dtype, draw(SEEDS))
        covariances = factor @ factor.mT + torch.eye(features, dtype=dtype)
    else:
        shape = (classes, components) if form == "isotropic" else (classes, components, features)
        covariances = normal(shape, dtype, draw(SEEDS)).abs() + 0.1
    covariances = covariances * frame["sigma"] ** 2
    return {"means": means, "covariances": covariances, "weights": draw(weights_of(means))}


@st.composite
def analysers(draw: Any, frame: Arguments) -> Arguments:
    means = draw(means_of(frame))
    form = draw(st.sampled_from([means.shape[:2], means.shape]))
    factors = normal((*means.shape, draw(st.integers(1, 3))), means.dtype, draw(SEEDS))
    return {
        "means": means,
        "factors": factors * frame["sigma"] * draw(st.sampled_from([0.0, 1.0, 10.0])),
        "noise": (normal(tuple(form), means.dtype, draw(SEEDS)).abs() + 0.1) * frame["sigma"] ** 2,
        "weights": draw(weights_of(means)),
    }


@st.composite
def kernels(draw: Any, frame: Arguments) -> Arguments:
    return {**draw(data_sets(frame)), "sigma": frame["sigma"]}


class Logits(nn.Module):
    """A classifier of noisy inputs of any size."""

    def __init__(self, features: int, classes: int, size: float) -> None:
        super().__init__()
        self.inner, self.outer, self.size = nn.Linear(features, 8), nn.Linear(8, classes), size

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        logits: Tensor = self.outer((self.inner(x.flatten(1) / self.size) + (sigma[:, None] / self.size).log()).tanh())
        return logits


@st.composite
def classifiers(draw: Any, frame: Arguments) -> Arguments:
    torch.manual_seed(frame["seed"])
    network = Logits(math.prod(frame["shape"]), frame["classes"], frame["size"])
    return {
        "network": network.to(frame["dtype"]),
        "num_classes": frame["classes"],
        "sigma": frame["sigma"],
        "temperature": draw(st.sampled_from([0.01, 1.0, 20.0])),
    }


@st.composite
def score_networks(draw: Any, frame: Arguments) -> Arguments:
    """The scores are those of one evaluation for all classes, or of one for each."""
    frame["classes"] = classes = max(frame["classes"], 2)
    torch.manual_seed(frame["seed"])
    features, embeds = math.prod(frame["shape"]), draw(st.booleans())
    outputs = features if embeds else (classes + 1) * features
    backbone = MLPBackbone(frame["shape"], outputs, width=8, depth=1, conditions=classes if embeds else 0)
    kind = EmbeddedDenoiser if embeds else Denoiser
    denoiser = kind(backbone, num_classes=classes, sigma_data=frame["size"], center=frame["offset"])
    linear, centering = draw(st.booleans()), draw(st.sampled_from(["posterior", "network"]))
    top = embeds and centering == "posterior"
    return {
        "denoiser": denoiser.to(frame["dtype"]),
        "sigma": frame["sigma"],
        "anchor": KernelDensity(**draw(kernels(frame))) if draw(st.booleans()) else None,
        "smoothing": draw(st.sampled_from([1e-3, 0.1, 0.9])),
        "centering": centering,
        "nodes": 1 if linear else draw(st.integers(1, 3)),
        "linear": linear,
        "top_k": draw(st.integers(1, classes)) if top and draw(st.booleans()) else None,
    }


@st.composite
def members(draw: Any, frame: Arguments) -> Arguments:
    frame["classes"] = max(frame["classes"], 2)
    names = st.sampled_from([name for name in KINDS if name != "ensemble"])
    made = []
    for name in draw(st.lists(names, min_size=1, max_size=3)):
        arguments = draw(KINDS[name][1](frame))
        made.append(KINDS[name][0](**{**arguments, **({"centering": "posterior"} if "centering" in arguments else {})}))
    return {"members": made}


KINDS: dict[str, tuple[Callable[..., Posterior], Callable[[Arguments], st.SearchStrategy[Arguments]]]] = {
    "mixture": (GaussianMixture, mixtures),
    "analysers": (FactorAnalysers, analysers),
    "kernels": (KernelDensity, kernels),
    "classifier": (NoiseConditionalClassifier, classifiers),
    "score network": (ScoreNetwork, score_networks),
    "ensemble": (Ensemble, members),
}


@st.composite
def posteriors(draw: Any, name: str) -> tuple[Arguments, Arguments]:
    """The arguments of a posterior, and a path with what is asked there."""
    frame = draw(frames())
    arguments = draw(KINDS[name][1](frame))
    known = arguments.get("x", arguments["means"].flatten(0, 1) if "means" in arguments else None)
    x = draw(points(frame, known=known))
    y: Tensor = torch.arange(len(x)) % frame["classes"]
    if draw(st.booleans()):
        y = 0.9 * nn.functional.one_hot(y, frame["classes"]).to(x.dtype) + 0.1 / frame["classes"]
    return arguments, {
        "x": x,
        "y": y,
        "moved": x + draw(st.sampled_from([0.0, 0.1, 3.0])) * frame["sigma"] * normal(tuple(x.shape), x.dtype, 1),
        "weights": normal((len(x), frame["classes"]), x.dtype, 2),
        "grad": torch.zeros_like(x),
    }


def is_distribution(log_p: Tensor, x: Tensor, classes: int) -> None:
    rounding = 1e-5 if x.dtype == torch.float32 else 1e-12
    assert log_p.shape == (len(x), classes)
    assert log_p.dtype == x.dtype
    assert not bool(log_p.isnan().any())
    assert bool((log_p <= rounding).all())
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones_like(x.flatten(1)[:, 0]), rtol=0, atol=10 * rounding)


def walked(posterior: Posterior, asked: Arguments) -> list[Tensor]:
    """log p at both points of the path, and the gradients there."""
    trace = posterior.trace(asked["x"], asked["y"])
    found = [trace.log_p, trace.pull_back(asked["weights"], asked["grad"])]
    trace.move(asked["moved"])
    return [*found, trace.log_p, trace.pull_back(asked["weights"], asked["grad"])]


@pytest.mark.parametrize("name", KINDS)
def test_posteriors_are_distributions_everywhere(name: str) -> None:
    @examples(quick=20, soak=1000)
    @given(posteriors(name))
    def check(drawn: tuple[Arguments, Arguments]) -> None:
        arguments, asked = drawn
        before, state = copy.deepcopy(drawn), torch.random.get_rng_state()
        posterior = KINDS[name][0](**arguments)
        x, classes = asked["x"], posterior.num_classes
        found = walked(posterior, asked)
        for log_p, gradient in (found[:2], found[2:]):
            is_distribution(log_p, x, classes)
            assert not log_p.requires_grad
            assert gradient.shape == x.shape
            assert gradient.dtype == x.dtype
            assert bool(gradient.isfinite().all())
        clean = posterior.clean_log_prob(x, asked["y"])
        assert torch.equal(clean, found[0])
        assert all(torch.equal(a, b) for a, b in zip(found, walked(posterior, asked), strict=True))
        if isinstance(posterior, PointwisePosterior):
            point = x.detach().clone().requires_grad_()
            log_p = posterior.log_prob(point)
            assert torch.equal(log_p.detach(), found[0])
            (gradient,) = torch.autograd.grad(log_p, point, asked["weights"])
            torch.testing.assert_close(gradient, found[1], rtol=1e-4, atol=1e-5 * largest(found[1]))
        assert torch.equal(torch.random.get_rng_state(), state)
        for given_, kept in zip((arguments, asked), before, strict=True):
            for key, value in given_.items():
                assert not isinstance(value, Tensor) or torch.equal(value, kept[key])

        # Another one gives the same after it has loaded the state.
        other = copy.deepcopy(posterior)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(posterior.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(found, walked(other, asked), strict=True))

    check()


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


@pytest.mark.parametrize("name", KINDS)
def test_samples_are_asked_each_by_itself(name: str) -> None:
    """A batch gives what its samples give, and float64 what float32 gives, up to the rounding of the exponents."""

    @examples(quick=10, soak=500)
    @given(posteriors(name))
    def check(drawn: tuple[Arguments, Arguments]) -> None:
        arguments, asked = drawn
        posterior = KINDS[name][0](**arguments)
        asked["y"] = torch.arange(len(asked["x"])) % posterior.num_classes
        whole = walked(posterior, asked)
        size = max([1.0, *(largest(log_p[log_p.isfinite()]) for log_p in whole[::2])])
        coarse = torch.finfo(asked["x"].dtype).eps * 1e3 * exponents(posterior, asked)
        for sample in range(len(asked["x"])):
            one = walked(posterior, {key: value[sample : sample + 1] for key, value in asked.items()})
            for log_p, expected in zip(one[::2], whole[::2], strict=True):
                torch.testing.assert_close(log_p, expected[sample : sample + 1], rtol=0, atol=coarse * size)
        wide = copy.deepcopy(posterior).double()
        precise = walked(wide, {k: v.double() if v.is_floating_point() else v for k, v in asked.items()})
        for log_p in precise[::2]:
            is_distribution(log_p, asked["x"].double(), posterior.num_classes)
        narrow = {k: v.float() if v.is_floating_point() else v for k, v in asked.items()}
        for log_p in walked(copy.deepcopy(posterior).float(), narrow)[::2]:
            is_distribution(log_p, narrow["x"], posterior.num_classes)

    check()


def exponents(posterior: Posterior, asked: Arguments) -> float:
    """How large the numbers are of which log p is the difference: squared distances in units of the noise."""
    sizes = [1.0]
    for module in posterior.modules():
        for x in (asked["x"], asked["moved"]):
            if isinstance(module, KernelDensity):
                sizes.append((largest(x) + largest(module.points)) ** 2 / module.sigma**2 * x[:1].numel())
            if isinstance(module, GaussianMixture):
                inverse = torch.linalg.matrix_norm(module._precision_factor.double(), 2).max()
                sizes.append(float((largest(x) + largest(module.means)) * inverse) ** 2 * x[:1].numel())
            if isinstance(module, FactorAnalysers):
                sizes.append((largest(x) + largest(module.means)) ** 2 / float(module.noise.min()) * x[:1].numel())
            if isinstance(module, ScoreNetwork):
                sizes.append(largest(x) * largest(module.scores(x)) * x[:1].numel())
    return max(sizes)


def closed_form(posterior: Posterior, x: Tensor) -> Tensor:
    """log p(y|x), written for automatic differentiation."""
    flat = x.flatten(1)
    if isinstance(posterior, KernelDensity):
        squared = (flat[:, None] - posterior.points).square().sum(2) / (2 * posterior.sigma**2)
        parts = (-squared).split(posterior.class_sizes.tolist(), 1)
        return torch.stack([part.logsumexp(1) for part in parts], 1).log_softmax(1)
    if isinstance(posterior, FactorAnalysers):
        noise = posterior.noise if posterior.noise.dim() == 3 else posterior.noise[..., None].expand_as(posterior.means)
        covariances = posterior.factors @ posterior.factors.mT + torch.diag_embed(noise)
    else:
        assert isinstance(posterior, GaussianMixture)
        covariances = posterior.covariances
    component = torch.distributions.MultivariateNormal(posterior.means, covariances, validate_args=False)
    return (component.log_prob(flat[:, None, None]) + posterior.log_weights).logsumexp(2).log_softmax(1)


@pytest.mark.parametrize("name", ["mixture", "analysers", "kernels"])
def test_values_and_gradients_are_those_of_the_density(name: str) -> None:
    """In float64, where points are not so far away that the exponents take all digits."""

    @examples(quick=20, soak=1000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        frame = data.draw(frames())
        frame |= {"dtype": torch.float64, "sigma": frame["size"], "offset": 0.0}
        posterior = KINDS[name][0](**data.draw(KINDS[name][1](frame)))
        assert isinstance(posterior, ClassScorePosterior)
        x = frame["size"] * normal((3, *frame["shape"]), torch.float64, frame["seed"])
        x.requires_grad_()
        expected = closed_form(posterior, x)
        found = posterior.log_prob(x)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7 * exponents(posterior, {"x": x, "moved": x}))
        weights = normal(tuple(expected.shape), torch.float64, 3)
        gradients = [torch.autograd.grad(log_p, x, weights)[0] for log_p in (found, expected)]
        atol = 1e-7 * max(largest(gradients[1]), largest(posterior.log_prob_and_scores(x)[1]))
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=atol)

    check()


@pytest.mark.parametrize("name", ["mixture", "analysers"])
def test_mixtures_are_sampled_and_smoothed(name: str) -> None:
    @examples(quick=15, soak=500)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        frame = data.draw(frames())
        mixture: Any = KINDS[name][0](**data.draw(KINDS[name][1](frame)))
        shape: Arguments = {"shape": frame["shape"]} if name == "analysers" else {}
        count, seed, state = data.draw(st.integers(1, 5)), data.draw(SEEDS), torch.random.get_rng_state()
        x, y = mixture.sample(count, torch.Generator().manual_seed(seed), **shape)
        again, labels = mixture.sample(count, torch.Generator().manual_seed(seed), **shape)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
        assert x.shape == (count, *(frame["shape"] if shape else (math.prod(frame["shape"]),)))
        assert x.dtype == frame["dtype"]
        assert y.dtype == torch.int64
        assert bool(x.isfinite().all() & ((y >= 0) & (y < frame["classes"])).all())
        smoothed = mixture.smoothed(frame["sigma"])
        is_distribution(smoothed.log_prob(x), x, frame["classes"])
        joint = smoothed.log_joint(x)
        assert joint.shape == (count, frame["classes"])
        assert bool(joint.isfinite().all())

    check()


@st.composite
def fits(draw: Any) -> Arguments:
    frame = draw(frames())
    frame |= {"shape": draw(st.sampled_from([(5,), (2, 2), (1, 3, 3)])), "classes": draw(st.integers(1, 3))}
    components = draw(st.integers(1, 3))
    return {
        **draw(data_sets(frame, components + 1)),
        "components": components,
        "rank": draw(st.integers(1, 3)),
        "iterations": draw(st.integers(0, 3)),
        "noise": draw(st.sampled_from(["isotropic", "diagonal"])),
        "floor": 1e-4 * frame["size"] ** 2,
        "generator": torch.Generator().manual_seed(draw(SEEDS)),
    }


def test_factor_analysers_fit_any_data() -> None:
    @examples(quick=15, soak=500)
    @given(fits())
    def check(arguments: Arguments) -> None:
        x, drawn, state = arguments["x"], arguments["generator"].get_state(), torch.random.get_rng_state()
        kept = x.clone()
        fitted = FactorAnalysers.fit(**arguments)
        assert torch.equal(x, kept)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert fitted.means.dtype == x.dtype
        assert all(bool((~value.isnan()).all()) for value in fitted.state_dict().values())
        assert bool((fitted.noise >= arguments["floor"] * (1 - 1e-6)).all())
        is_distribution(fitted.log_prob(x), x, arguments["num_classes"])
        arguments["generator"].set_state(drawn)
        assert torch.equal(FactorAnalysers.fit(**arguments).factors, fitted.factors)

    check()


# What torch calls the inputs of a network; other points may be allowed, for which the weights of the others don't fit.
POINTS = ("x ", "x,", "mat1", "device", "c10::Half", "log_p")
ALIASES = {"x": POINTS, "moved": POINTS, "y": ("y ", "labels"), "means": ("means", "[L, K")}


def named(changed: str, error: Exception) -> bool:
    return any(word in str(error) for word in ALIASES.get(changed, (changed,)))


def has_values(value: Any) -> bool:
    """Whether there is nothing in an argument that makes a result NaN."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        return True
    return bool(value.to_dense().isfinite().all())


@pytest.mark.parametrize("name", KINDS)
def test_posteriors_refuse_by_name(name: str) -> None:
    @examples(quick=30, soak=1000)
    @given(posteriors(name), st.data())
    def check(drawn: tuple[Arguments, Arguments], data: st.DataObject) -> None:
        arguments, asked = drawn
        changed = data.draw(st.sampled_from(sorted(arguments)))
        arguments = {**arguments, changed: data.draw(misfits(arguments[changed]))}
        try:
            posterior = KINDS[name][0](**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            assert named(changed, error), f"{name}, {changed}: {error}"  # noqa: PT017
            return
        if posterior.num_classes == asked["weights"].shape[1]:
            assert not any(bool(found.isnan().any()) for found in walked(posterior, asked))

    check()


@pytest.mark.parametrize("name", KINDS)
def test_what_a_posterior_is_asked_is_refused_by_name(name: str) -> None:
    @examples(quick=30, soak=1000)
    @given(posteriors(name), st.data())
    def check(drawn: tuple[Arguments, Arguments], data: st.DataObject) -> None:
        arguments, asked = drawn
        posterior = KINDS[name][0](**arguments)
        changed = data.draw(st.sampled_from(sorted(asked)))
        asked = {**asked, changed: data.draw(misfits(asked[changed]))}
        try:
            found = walked(posterior, asked)
        except (ValueError, TypeError, RuntimeError) as error:
            assert named(changed, error), f"{name}, {changed}: {error}"  # noqa: PT017
        else:
            assert not all(map(has_values, asked.values())) or not any(bool(f.isnan().any()) for f in found)

    check()


@pytest.mark.parametrize("name", ["smoothed", "sample", "fit"])
def test_what_mixtures_do_is_refused_by_name(name: str) -> None:
    @examples(quick=30, soak=1000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        frame = data.draw(frames())
        kind = data.draw(st.sampled_from(["mixture", "analysers"]))
        mixture: Any = KINDS[kind][0](**data.draw(KINDS[kind][1](frame)))
        call = {"smoothed": mixture.smoothed, "sample": mixture.sample, "fit": FactorAnalysers.fit}[name]
        arguments: Arguments = {"sigma": frame["sigma"]}
        if name == "sample":
            arguments = {"count": 3, "generator": torch.Generator()}
            arguments |= {"shape": frame["shape"]} if kind == "analysers" else {}
        if name == "fit":
            arguments = data.draw(fits())
        changed = data.draw(st.sampled_from(sorted(arguments)))
        arguments = {**arguments, changed: data.draw(misfits(arguments[changed]))}
        try:
            call(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            assert named(changed, error), f"{name}, {changed}: {error}"  # noqa: PT017

    check()
