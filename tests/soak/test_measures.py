"""Audits, bounds, self-consistency and smoothing on random problems: their inequalities hold, and nothing is NaN."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import scorematch as sm
from scorematch import audit, bounds, smoothing

from .drawing import examples, misfits

pytestmark = pytest.mark.soak

CLASSES = 3
METRICS = ("l2", "l1", "linf", "js_distance")
Arguments = dict[str, Any]
Posterior = sm.posteriors.Posterior


@st.composite
def posteriors(draw: Any, shape: tuple[int, ...]) -> Posterior:
    """In closed form: as sharp or as flat as can be, with centres that may coincide."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    sigma = draw(st.sampled_from([1e-3, 0.05, 0.3, 30.0]))
    points = torch.rand(6, *shape).round() if draw(st.booleans()) else torch.rand(6, *shape)
    return sm.posteriors.KernelDensity(points, torch.arange(6) % CLASSES, num_classes=CLASSES, sigma=sigma)


@st.composite
def problems(draw: Any) -> Arguments:
    shape = draw(st.sampled_from([(3,), (1, 2, 2)]))
    count = draw(st.integers(2, 5))
    posterior = draw(posteriors(shape))
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 6), nn.Tanh(), nn.Linear(6, CLASSES))
    with torch.no_grad():
        model[-1].weight *= 10.0 ** draw(st.integers(-3, 3))  # type: ignore[operator]
    eps = draw(st.sampled_from([1e-6, 0.01, 0.3]))
    x = torch.rand(count, *shape)
    if draw(st.booleans()):
        x = x.round()  # corners of the box
    return {
        "model": model.eval(),
        "posterior": posterior,
        "x": x,
        "y": torch.arange(count) % CLASSES,
        "threat_model": sm.ThreatModel(draw(st.sampled_from(["linf", "l2", "l1"])), eps),
    }


def searched(drawn: Arguments) -> Arguments:
    return {**drawn, "steps": 3, "restarts": 1, "generator": torch.Generator().manual_seed(0)}


def far(x: Tensor, others: Tensor, threat_model: sm.ThreatModel) -> Tensor:
    return (x - others).flatten(1).norm(dim=1, p={"linf": math.inf, "l2": 2, "l1": 1}[threat_model.norm])


@examples(quick=15, soak=300)
@given(problems(), st.sampled_from(sm.divergences.KINDS))
def test_consistency_finds_no_less_than_it_starts_from(drawn: Arguments, kind: str) -> None:
    found = sm.consistency(**searched(drawn), divergence=kind)
    x, threat_model = drawn["x"], drawn["threat_model"]
    assert bool((found.r_score >= found.divergence).all())
    assert bool((found.divergence >= -1e-6).all())
    assert bool(found.r_score.isfinite().all())
    assert bool((far(found.x_score, x, threat_model) <= threat_model.eps * (1 + 1e-5) + 1e-6).all())
    with torch.no_grad():
        there = sm.logit_divergence(
            drawn["model"](found.x_score), drawn["posterior"].log_prob(found.x_score), kind=kind
        )
    torch.testing.assert_close(there, found.r_score, rtol=1e-3, atol=1e-4)


@examples(quick=15, soak=300)
@given(problems(), st.sampled_from([1.0, 3.5]), st.booleans())
def test_theorems_hold_at_the_points_of_a_search(drawn: Arguments, beta: float, weighted: bool) -> None:
    errors = bounds.robust_errors(**searched(drawn), divergences=[*METRICS, "kl"])
    weights = torch.rand(len(drawn["x"])) if weighted else None
    sides = [bounds.corollary_1(errors["l1"], errors["kl"], weights=weights)]
    for name in METRICS:
        sides += [*bounds.theorem_1(errors[name], weights=weights), *bounds.theorem_3(errors[name], beta=beta)]
        sides.append(bounds.theorem_2(errors[name], weights=weights))
    zero_one = bounds.zero_one_errors(**searched(drawn))
    sides += [*bounds.theorem_1(zero_one.errors(), weights=weights)]
    for side in sides:
        assert bool((side.left <= side.right * (1 + 1e-4) + 2e-3).all()), side
        assert side.slack.mean >= -2e-3
        assert all(math.isfinite(value) for value in (*side.left_mean, *side.right_mean, *side.slack))
    constant = bounds.data_constant(
        **{name: value for name, value in searched(drawn).items() if name != "model"}, divergence="l1", weights=weights
    )
    assert bool((constant.values >= 0).all())
    assert constant.mean.low <= constant.mean.mean <= constant.mean.high
    assert bool((zero_one.madry >= zero_one.standard).all())
    assert bool((zero_one.score >= zero_one.preserving).all())


@examples(quick=10, soak=300)
@given(problems())
def test_theorems_of_small_balls_and_of_noise_are_finite(drawn: Arguments) -> None:
    middle = {**drawn, "x": 0.4 + 0.2 * drawn["x"]}
    found = bounds.theorem_4(**searched(middle))
    assert bool((found.increase >= 0).all())
    assert all(bool(values.isfinite().all()) for values in found[:4] if isinstance(values, Tensor))
    x, y = drawn["x"].flatten(1).double(), drawn["y"]
    density = sm.posteriors.GaussianMixture(
        torch.rand(CLASSES, 2, x.shape[1]).double(), 0.3 * torch.ones(CLASSES, 2).double()
    )
    model = drawn["model"].double()
    noise = bounds.theorem_5(model, density, x, y, sigma=0.2, repeats=2, generator=torch.Generator().manual_seed(0))
    assert all(math.isfinite(value) for estimate in noise[3:] for value in estimate)


@examples(quick=15, soak=300)
@given(problems(), st.sampled_from([0.0, 1e-4, 0.1, 3.0]))
def test_audits_are_in_their_ranges(drawn: Arguments, noise: float) -> None:
    posterior, x, y = drawn["posterior"], drawn["x"], drawn["y"]
    assert bool((audit.log_likelihood(posterior, x, y, noise=noise, repeats=2) <= 1e-6).all())
    sigma = max(noise, 1e-4)
    matching = audit.matching_error(posterior, torch.zeros_like, x, y, sigma=sigma, repeats=1)
    assert bool((matching >= 0).all() and matching.isfinite().all())
    found = audit.calibration(posterior, x, y, noise=noise, bins=4)
    assert all(0 <= value <= 1 + 1e-6 for value in found)
    assert audit.spread([posterior, posterior], x, y) == (0.0, pytest.approx(0.0, abs=1e-6))
    assert audit.gradient_error(posterior, posterior, x, y).relative == 0.0
    assert bool((audit.kl_error(posterior, posterior, x, y, x.flip(0)) == 0).all())
    loop = audit.closed_loop(posterior, x, y, length=sigma)
    assert bool((loop >= 0).all() and (loop <= 1e-3 * (1 + posterior.log_prob(x).abs().amax(1))).all())
    assert audit.centre(posterior, x, y) >= 0
    assert all(math.isfinite(value) for value in audit.martingale(posterior, posterior, x, y, sigmas=(0.0, sigma)))
    assert all(math.isfinite(v) for v in audit.energy_identity(lambda _: posterior, x, y, sigma=sigma, repeats=1))
    log_p = posterior.log_prob(x)
    agreement = audit.agreement(log_p, log_p.exp())
    assert agreement.kl == pytest.approx(0, abs=1e-5)
    assert -1 <= agreement.entropy_rank <= 1 + 1e-9
    clean, robust = audit.robust_accuracy(posterior, x, y, drawn["threat_model"], steps=2)
    assert 0 <= robust <= clean <= 1
    lowest = audit.attacked_log_likelihood(posterior, x, y, drawn["threat_model"], steps=2)
    assert bool((lowest <= log_p.gather(1, y[:, None])[:, 0] + 1e-9).all())


@examples(quick=10, soak=300)
@given(problems(), st.sampled_from([1e-3, 0.2, 10.0]), st.integers(1, 60), st.sampled_from([0.001, 0.3]))
def test_smoothing_keeps_its_promises(drawn: Arguments, sigma: float, n: int, alpha: float) -> None:
    smooth = smoothing.SmoothedClassifier(drawn["model"], num_classes=CLASSES, sigma=sigma, batch=50)
    x, seeds = drawn["x"], smoothing.noise_seeds(len(drawn["x"]), torch.Generator().manual_seed(1))
    n += smoothing.least_votes(alpha)
    certified = smooth.certify(x, n0=5, n=n, alpha=alpha, seeds=seeds)
    assert bool(((certified.radius > 0) == (certified.classes >= 0)).all())
    assert bool(((certified.p_lower >= 0) & (certified.p_lower < 1)).all())
    assert bool((certified.radius <= sigma * 5).all())
    again = smooth.certify(x[1:], n0=5, n=n, alpha=alpha, seeds=seeds[1:])
    torch.testing.assert_close(again.p_lower, certified.p_lower[1:])
    mean = smooth.probabilities(x, n=n, seeds=seeds)
    torch.testing.assert_close(mean.sum(1), torch.ones(len(x), dtype=torch.float64))
    assert bool((smooth.predict(x, n=n, alpha=alpha, seeds=seeds) < CLASSES).all())
    curve = smoothing.certified_accuracy(certified, drawn["y"], [0.0, 0.1, 1.0])
    assert all(a.accuracy >= b.accuracy for a, b in itertools.pairwise(curve))
    assert all(0 <= point.low <= point.accuracy <= point.high <= 1 for point in curve)


def _closed(drawn: Arguments, *names: str, **more: Any) -> Arguments:
    return {**{name: drawn[name] for name in names}, **more}


SEARCH = {"steps": 2, "restarts": 1}
EVERYTHING = ("model", "posterior", "x", "y", "threat_model")
POINTS = ("posterior", "x", "y")
REFUSALS: dict[str, tuple[Callable, Callable[[Arguments], Arguments]]] = {
    "consistency": (sm.consistency, lambda d: _closed(d, *EVERYTHING, divergence="kl", **SEARCH)),
    "robust_errors": (bounds.robust_errors, lambda d: _closed(d, *EVERYTHING, divergences="l2", **SEARCH)),
    "zero_one_errors": (bounds.zero_one_errors, lambda d: _closed(d, *EVERYTHING, **SEARCH)),
    "data_constant": (bounds.data_constant, lambda d: _closed(d, *EVERYTHING[1:], divergence="l2", **SEARCH)),
    "theorem_4": (
        bounds.theorem_4,
        lambda d: _closed({**d, "x": 0.4 + 0.2 * d["x"]}, *EVERYTHING, **SEARCH),
    ),
    "log_likelihood": (audit.log_likelihood, lambda d: _closed(d, *POINTS, noise=0.1, repeats=1, seed=3)),
    "matching_error": (
        audit.matching_error,
        lambda d: _closed(d, *POINTS, unconditional=torch.zeros_like, sigma=0.1, repeats=1, seed=3),
    ),
    "calibration": (audit.calibration, lambda d: _closed(d, *POINTS, noise=0.1, bins=5, seed=3)),
    "spread": (audit.spread, lambda d: _closed(d, "x", "y", posteriors=[d["posterior"]] * 2)),
    "closed_loop": (audit.closed_loop, lambda d: _closed(d, *POINTS, length=0.1, seed=3)),
    "martingale": (
        audit.martingale,
        lambda d: _closed(d, "x", "y", finer=d["posterior"], coarser=d["posterior"], sigmas=(0.1, 0.2), seed=3),
    ),
    "centre": (audit.centre, lambda d: _closed(d, *POINTS)),
    "energy_identity": (
        audit.energy_identity,
        lambda d: _closed(d, "x", "y", at=lambda _: d["posterior"], sigma=0.1, step=0.05, repeats=1, seed=3),
    ),
    "agreement": (
        audit.agreement,
        lambda d: {"log_p": d["posterior"].log_prob(d["x"]), "people": torch.full((len(d["x"]), CLASSES), 1 / 3)},
    ),
    "reliability": (
        audit.reliability,
        lambda d: {"log_p": d["posterior"].log_prob(d["x"]), "y": d["y"].clone(), "bins": 5},
    ),
    "gradient_error": (audit.gradient_error, lambda d: _closed(d, *POINTS, oracle=d["posterior"])),
    "kl_error": (audit.kl_error, lambda d: _closed(d, *POINTS, oracle=d["posterior"], moved=d["x"].flip(0))),
    "posterior_gradients": (audit.posterior_gradients, lambda d: _closed(d, *POINTS)),
    "attacked_log_likelihood": (
        audit.attacked_log_likelihood,
        lambda d: _closed(d, *EVERYTHING[1:], **SEARCH),
    ),
    "robust_accuracy": (audit.robust_accuracy, lambda d: _closed(d, *EVERYTHING[1:], **SEARCH)),
    "estimate": (bounds.estimate, lambda d: {"values": d["x"].flatten(), "weights": d["x"].flatten()}),
    "smoothed": (
        lambda num_classes, sigma, batch, **rest: smoothing.SmoothedClassifier(
            rest.pop("model"), num_classes=num_classes, sigma=sigma, batch=batch
        ).certify(**rest),
        lambda d: _closed(
            d, "model", "x", num_classes=CLASSES, sigma=0.2, batch=20, n0=2, n=4, alpha=0.1, seeds=d["y"].clone()
        ),
    ),
    "lower_bound": (smoothing.lower_bound, lambda d: {"hits": d["y"], "count": 5, "alpha": 0.1}),
    "noise_seeds": (smoothing.noise_seeds, lambda d: {"count": 2}),
    "certified_accuracy": (
        lambda y, radii: smoothing.certified_accuracy(
            smoothing.Certificates(torch.zeros(4).long(), torch.ones(4), torch.ones(4)), y, radii
        ),
        lambda d: {"y": torch.arange(4), "radii": [0.0, 1.0]},
    ),
}


def values_in(result: Any) -> list[Tensor]:
    """All numbers of a result."""
    if isinstance(result, Tensor):
        return [result.detach().flatten().double()] if result.is_floating_point() else []
    if isinstance(result, float):
        return [torch.tensor([result], dtype=torch.float64)]
    if isinstance(result, dict):
        result = list(result.values())
    return [values for part in result for values in values_in(part)] if isinstance(result, (tuple, list)) else []


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    function, arguments_of = REFUSALS[name]

    @examples(quick=15, soak=300)
    @given(problems(), st.data())
    def check(drawn: Arguments, data: st.DataObject) -> None:
        arguments = arguments_of(drawn)
        changed = data.draw(st.sampled_from(sorted(arguments)))
        arguments = {**arguments, changed: data.draw(misfits(arguments[changed]))}
        try:
            result = function(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            assert changed in str(error), f"{name}, {changed}: {type(error).__name__} {error}"  # noqa: PT017
        else:
            assert not any(bool(values.isnan().any()) for values in values_in(result)), f"{name}, {changed}: NaN"

    check()


def test_every_function_is_here() -> None:
    """But for the theorems, which take the errors of another function, and the classes of results."""
    functions = {
        name
        for module in (audit, bounds)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name)) and not name.startswith(("theorem", "corollary"))
    }
    assert functions <= set(REFUSALS)
