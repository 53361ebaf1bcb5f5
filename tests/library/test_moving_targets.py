"""Forms between the surrogates and direct SCORE: targets that follow x' in part, and attacks without data gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_models import UNBOUNDED, climbed, log_posterior, mixture, plain_divergence, small_cnn, smooth_mlp
from torch import Tensor

from scorematch import ThreatModel, objectives
from scorematch.divergences import KINDS
from scorematch.networks import Denoiser, MLPBackbone
from scorematch.objectives import soft_targets
from scorematch.objectives.moving_target import DirectAscent, MovingTarget
from scorematch.posteriors import ClassScorePosterior, KernelDensity, ScoreNetwork

ORACLE, MODEL = mixture(4, 2, 6), smooth_mlp(6, 4)
X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4
MOVED = X + 0.4 * torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
L2 = ThreatModel("l2", 0.5, 0.1, **UNBOUNDED)


def mixed(x_adv: Tensor, share: float) -> Tensor:
    """p(·|x)^(1−m) p(·|x')^m, normalised, multiplied out in probabilities."""
    product = log_posterior(ORACLE, X).exp() ** (1 - share) * log_posterior(ORACLE, x_adv).exp() ** share
    return product / product.sum(1, keepdim=True)


def transported(x_adv: Tensor, share: float) -> Tensor:
    """q(x) (p(·|x') / p(·|x))^κ, normalised, multiplied out in probabilities."""
    ratio = log_posterior(ORACLE, x_adv).exp() / log_posterior(ORACLE, X).exp()
    product = MODEL(X).softmax(1) * ratio**share
    return product / product.sum(1, keepdim=True)


FORMS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "mixed": ("score_direct", {"target_mix": 0.4}, lambda x: mixed(x, 0.4)),
    "without data gradient": ("score_direct", {"data_gradient": "none"}, lambda x: mixed(x, 1.0).detach()),
    "mixed, without data gradient": (
        "score_direct",
        {"target_mix": 0.4, "data_gradient": "none"},
        lambda x: mixed(x, 0.4).detach(),
    ),
    "transported": ("trades", {"transport": 0.7}, lambda x: transported(x, 0.7)),
    "transported in full": ("trades", {}, lambda x: transported(x, 1.0)),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["kl", "se", "js"])
@pytest.mark.parametrize("form", FORMS)
def test_attack_and_loss_follow_automatic_differentiation(form: str, kind: str, norm: str) -> None:
    name, options, target = FORMS[form]
    threat_model = ThreatModel(norm, 0.5, 0.1, **UNBOUNDED)
    start = threat_model.random_start(X, torch.Generator().manual_seed(1))
    outcome = objectives.OBJECTIVES[name](
        MODEL, X, Y, threat_model=threat_model, posterior=ORACLE, steps=7, divergence=kind, start=start, **options
    )
    x_adv = climbed(lambda x: plain_divergence(target(x), MODEL(x).softmax(1), kind), X, start, threat_model, 7)
    torch.testing.assert_close(outcome.x_adv, x_adv, rtol=1e-6, atol=1e-6)
    expected = plain_divergence(target(x_adv), MODEL(x_adv).softmax(1), kind)
    if name == "trades":
        one_hot = torch.nn.functional.one_hot(Y, 4).double()
        clean = MODEL(X).softmax(1)
        natural = plain_divergence(one_hot.clamp(min=1e-300), clean, kind)
        expected = natural + 6.0 * expected
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-6, atol=1e-8)
    parameters = list(MODEL.parameters())
    found = torch.autograd.grad(outcome.loss.mean(), parameters)
    for a, b in zip(found, torch.autograd.grad(expected.mean(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("base", ["posterior", "model"])
def test_ascent_equals_automatic_differentiation(base: str, share: float, kind: str) -> None:
    """Away from the clean point, for every divergence."""
    trace = ORACLE.trace(X, Y)
    logits = trace.log_p if base == "posterior" else MODEL(X).detach()
    ascent = DirectAscent(MODEL, MovingTarget(trace, logits, share), kind)
    x = MOVED.clone().requires_grad_()
    target = mixed(x, share) if base == "posterior" else transported(x, share)
    (expected,) = torch.autograd.grad(plain_divergence(target, MODEL(x).softmax(1), kind).sum(), x)
    torch.testing.assert_close(ascent.gradient(MOVED), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_metrics_of_an_ascent_are_what_they_are_called() -> None:
    """The sum of norms by the sum of norms, and shares of components, over the steps."""
    ascent = DirectAscent(MODEL, MovingTarget(ORACLE.trace(X, Y)), "kl")
    data_norm, model_norm, changes = 0.0, 0.0, []
    for point in (MOVED, X + 0.5):
        total = ascent.gradient(point)
        x = point.clone().requires_grad_()
        target = log_posterior(ORACLE, point).exp()
        (alone,) = torch.autograd.grad(plain_divergence(target, MODEL(x).softmax(1), "kl").sum(), x)
        data_norm += float((total - alone).norm(dim=1).sum())
        model_norm += float(alone.norm(dim=1).sum())
        changes.append((total.sign() != alone.sign()).float().mean())
    assert 0.05 < float(sum(changes)) / 2 < 0.95
    metrics = ascent.metrics()
    assert float(metrics["data_gradient_ratio"]) == pytest.approx(data_norm / model_norm, rel=1e-6)
    assert float(metrics["sign_change_share"]) == pytest.approx(float(sum(changes)) / 2, rel=1e-6)


def found(name: str, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    outcome = objectives.OBJECTIVES[name](MODEL, X, Y, threat_model=L2, generator=generator, **options)
    return outcome.loss.detach(), outcome.x_adv, outcome.metrics


def test_a_target_that_stays_is_that_of_a_surrogate_with_soft_targets() -> None:
    loss, x_adv, metrics = found("score_direct", posterior=ORACLE, target_mix=0.0)
    soft = soft_targets(ORACLE, X, Y)
    torch.testing.assert_close(soft, log_posterior(ORACLE, X).exp())
    outcome = objectives.pgd_at(MODEL, X, soft, threat_model=L2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x_adv, outcome.x_adv, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, outcome.loss, rtol=0, atol=1e-12)
    assert metrics["data_gradient_ratio"] == 0.0
    assert metrics["sign_change_share"] == 0.0


def test_a_target_that_follows_entirely_is_that_of_direct_score() -> None:
    whole = found("score_direct", posterior=ORACLE)
    torch.testing.assert_close(found("score_direct", posterior=ORACLE, target_mix=1.0), whole, rtol=0, atol=0)
    near = found("score_direct", posterior=ORACLE, target_mix=1.0 - 1e-9)
    torch.testing.assert_close(near, whole, rtol=1e-5, atol=1e-6)


def test_trades_whose_target_is_not_moved_is_trades() -> None:
    loss, x_adv, metrics = found("trades", posterior=ORACLE, transport=0.0)
    expected, point, _ = found("trades")
    assert torch.equal(x_adv, point)
    assert torch.equal(loss, expected)
    assert metrics["data_gradient_ratio"] == 0.0
    assert found("trades", posterior=ORACLE)[2]["data_gradient_ratio"] > 0.1


def test_without_data_gradient_the_target_follows_all_the_same() -> None:
    loss, x_adv, metrics = found("score_direct", posterior=ORACLE, data_gradient="none")
    target, q = log_posterior(ORACLE, x_adv).exp(), MODEL(x_adv).softmax(1)
    torch.testing.assert_close(loss, plain_divergence(target, q, "kl"))
    assert metrics["data_gradient_ratio"] == 0.0
    assert metrics["sign_change_share"] == 0.0
    assert not torch.equal(x_adv, found("score_direct", posterior=ORACLE)[1])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_noise_has_the_norm_of_the_data_gradient_and_a_direction_of_its_own(share: float) -> None:
    noise = objectives.noise_directions(X, 2, torch.Generator().manual_seed(2))
    assert noise.shape == (2, *X.shape)

    def direction(**options: Any) -> tuple[Tensor, Tensor]:
        trace = ORACLE.trace(X, Y)
        ascent = DirectAscent(MODEL, MovingTarget(trace, trace.log_p, share), "kl", **options)
        return ascent.gradient(MOVED), ascent.gradient(X)

    plain, scores, noisy = direction(scores=False), direction(), direction(noise=[noise])
    for step in range(2):
        data, control = scores[step] - plain[step], noisy[step] - plain[step]
        torch.testing.assert_close(control.norm(dim=1), data.norm(dim=1))
        assert (data.norm(dim=1) > 1e-3).all()
        cosine = torch.cosine_similarity(control, noise[step])
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_noise_comes_from_the_generator_after_the_start_or_is_given() -> None:
    whole = found("score_direct", posterior=ORACLE, data_gradient="noise", steps=3)
    generator = torch.Generator().manual_seed(0)
    start = L2.random_start(X, generator)
    noise = objectives.noise_directions(X, 3, generator)
    given = found("score_direct", posterior=ORACLE, data_gradient=noise, start=start, steps=3)
    torch.testing.assert_close(given, whole, rtol=0, atol=0)
    other = found("score_direct", posterior=ORACLE, data_gradient=noise.flip(0), start=start, steps=3)
    assert not torch.equal(other[1], given[1])
    # at the first step, where scores and noise are at the same point, they measure alike
    one = [found("score_direct", posterior=ORACLE, data_gradient=kind, steps=1)[2] for kind in ("noise", "scores")]
    torch.testing.assert_close(one[0]["data_gradient_ratio"], one[1]["data_gradient_ratio"])
    assert one[0]["sign_change_share"] != one[1]["sign_change_share"]


def test_noise_of_an_attack_of_one_step() -> None:
    assert objectives.noise_directions(X, 10, attack="n_fgsm").shape == (1, *X.shape)
    model, x, y = small_cnn(), torch.rand(8, 1, 8, 8), torch.arange(8)
    posterior = KernelDensity(torch.rand(10, 1, 8, 8), torch.arange(10), num_classes=10, sigma=1.0)
    threat_model = ThreatModel("linf", 0.1)
    outcome = objectives.score_direct(
        model, x, y, threat_model=threat_model, posterior=posterior, attack="fgsm_rs", data_gradient="noise"
    )
    assert outcome.metrics["data_gradient_ratio"] > 0.0


class Extreme(ClassScorePosterior):
    """Far tails: a class that is never there, one that comes out of nothing, one that goes, and one of −100,000."""

    num_classes = 5

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        right = x[:, 0] > 0.5
        log_p = x.new_full((len(x), 5), -math.inf)
        log_p[:, 1] = torch.where(right, -1.0, -math.inf)
        log_p[:, 2] = torch.where(right, -math.inf, -1.0)
        log_p[:, 3] = torch.where(right, -1e5, -0.5)
        log_p[:, 4] = -3.0
        return log_p.log_softmax(1), torch.ones(len(x), 5, *x.shape[1:])


@pytest.mark.parametrize("kind", ["kl", "se", "js"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trades", {}),
        ("trades", {"transport": 3.0}),
        ("score_direct", {"target_mix": 0.5}),
        ("score_direct", {"target_mix": 0.0}),
    ],
)
def test_tails_of_the_posterior_give_no_nan(name: str, options: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    x = torch.rand(32, 3)
    outcome = objectives.OBJECTIVES[name](
        model, x, torch.zeros(32, dtype=torch.int64), threat_model=ThreatModel("linf", 0.4), divergence=kind,
        posterior=Extreme(), start="uniform", **options,
    )  # fmt: skip
    assert ((outcome.x_adv[:, 0] > 0.5) != (x[:, 0] > 0.5)).any(), "some cross into the other half"
    gradients = torch.autograd.grad(outcome.loss.sum(), list(model.parameters()))
    for value in (outcome.loss, outcome.x_adv, *gradients, *outcome.metrics.values()):
        assert value.isfinite().all()


def score_network(**options: Any) -> ScoreNetwork:
    torch.manual_seed(0)
    backbone = MLPBackbone((6,), 5 * 6, width=16, depth=1)
    denoiser = Denoiser(backbone, num_classes=4, sigma_data=1.0, center=0.0).double()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return ScoreNetwork(denoiser, sigma=0.5, **options)


def test_the_anchor_of_a_path_cancels_in_trades() -> None:
    """And so does the way in which the unconditional score is removed."""
    options: dict[str, Any] = {"threat_model": L2, "start": L2.random_start(X, torch.Generator().manual_seed(1))}
    one = objectives.trades(MODEL, X, Y, posterior=score_network(), **options)
    assert one.metrics["data_gradient_ratio"] > 0.01
    for other in (score_network(smoothing=0.5), score_network(anchor=ORACLE), score_network(centering="network")):
        again = objectives.trades(MODEL, X, Y, posterior=other, **options)
        torch.testing.assert_close(again.x_adv, one.x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(again.loss, one.loss, rtol=0, atol=1e-9)


def test_literal_scores_go_with_a_target_that_follows_in_full() -> None:
    literal = score_network(centering="network")
    whole = found("score_direct", posterior=literal, target_mix=1.0)
    assert whole[2]["data_gradient_ratio"] > 0.01
    torch.testing.assert_close(found("score_direct", posterior=literal), whole, rtol=0, atol=0)


def test_noise_of_ones_own_in_a_single_step() -> None:
    noise = objectives.noise_directions(X, 10, torch.Generator().manual_seed(2), "n_fgsm")
    assert noise.shape == (1, *X.shape)
    found("score_direct", posterior=ORACLE, attack="n_fgsm", data_gradient=noise)
    with pytest.raises(ValueError, match=r"data_gradient must be \[1, 16, 6\] on cpu for x .* got \[2, 16, 6\]"):
        found("score_direct", posterior=ORACLE, attack="n_fgsm", data_gradient=noise.expand(2, -1, -1))


@pytest.mark.parametrize("given", ["labels", "probabilities"])
def test_soft_targets_of_a_score_network_are_its_anchor(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y = Y if given == "labels" else torch.nn.functional.one_hot(Y, 4).double()
    monkeypatch.setattr(ScoreNetwork, "scores", None)  # not asked
    smoothed = soft_targets(score_network(smoothing=0.3), X, y)
    expected = torch.full((16, 4), 0.1, dtype=torch.float64)
    expected[torch.arange(16), Y] = 0.7
    torch.testing.assert_close(smoothed, expected)
    anchored = soft_targets(score_network(anchor=ORACLE), X.clone().requires_grad_(), y)
    torch.testing.assert_close(anchored, log_posterior(ORACLE, X).exp())
    assert not anchored.requires_grad


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("score_direct", {"target_mix": 1.5}, r"target_mix must lie in \[0, 1\], got 1.5"),
        ("score_direct", {"target_mix": -0.5}, r"target_mix must lie in \[0, 1\], got -0.5"),
        ("score_direct", {"target_mix": math.nan}, r"target_mix must lie in \[0, 1\], got nan"),
        (
            "score_direct",
            {"target_mix": 0.5, "posterior": score_network(centering="network")},
            "target_mix must be 1 for a posterior with centering 'network', got 0.5",
        ),
        (
            "score_direct",
            {"data_gradient": "random"},
            r"data_gradient must be one of scores, none, noise, or a tensor \[steps, N, …\], got 'random'",
        ),
        (
            "score_direct",
            {"data_gradient": torch.zeros(4, 16, 6).double()},
            r"data_gradient must be \[10, 16, 6\] on cpu for x \[16, 6\], got \[4, 16, 6\] on cpu",
        ),
        (
            "score_direct",
            {"data_gradient": torch.zeros(10, 16, 6)},
            "data_gradient must be torch.float64 as x, got torch.float32",
        ),
        ("trades", {"transport": -1.0}, "transport must be finite and not negative, got -1.0"),
        ("trades", {"transport": math.inf}, "transport must be finite and not negative, got inf"),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        objectives.OBJECTIVES[name](MODEL, X, Y, **{"threat_model": L2, "posterior": ORACLE, **options})
