"""The objectives: Eq. (33) against automatic differentiation, clipping, batch-norm modes, and what they call."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from library_models import UNBOUNDED, climbed, log_posterior, mixture, plain_divergence, small_cnn, smooth_mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scorematch import FreeAttack, ThreatModel, audit, consistency, objectives
from scorematch.divergences import KINDS, clip_bound
from scorematch.objectives import score_direct
from scorematch.objectives.moving_target import DirectAscent, MovingTarget, direct_weights
from scorematch.ops.score_step import score_step
from scorematch.posteriors import ClassScorePosterior, GaussianMixture, KernelDensity, Trace
from scorematch.posteriors.base import PointwisePosterior, check_values


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_direct_score_equals_automatic_differentiation(kind: str) -> None:
    """Eq. (33): through the closed-form mixture, to 1e-6 in float64."""
    oracle, model = mixture(4, 2, 6), smooth_mlp(6, 4)
    x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = plain_divergence(log_posterior(oracle, x).exp(), model(x).softmax(1), kind)
    (expected,) = torch.autograd.grad(value.sum(), x)
    ascent = DirectAscent(model, MovingTarget(oracle.trace(x, torch.zeros(32))), kind)
    torch.testing.assert_close(ascent.gradient(x), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["kl", "se"])
def test_direct_attack_follows_automatic_differentiation(norm: str, kind: str) -> None:
    """The whole attack, and the gradient of the loss in the parameters, against a plain loop."""
    oracle, model = mixture(4, 2, 6), smooth_mlp(6, 4)
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threat_model = ThreatModel(norm, 0.5, 0.1, **UNBOUNDED)
    outcome = objectives.score_direct(
        model,
        x,
        torch.zeros(16, dtype=torch.int64),
        threat_model=threat_model,
        posterior=oracle,
        steps=7,
        divergence=kind,
        generator=torch.Generator().manual_seed(1),
    )

    def value(x_adv: torch.Tensor) -> torch.Tensor:
        return plain_divergence(log_posterior(oracle, x_adv).exp(), model(x_adv).softmax(1), kind)

    x_adv = climbed(value, x, threat_model.random_start(x, torch.Generator().manual_seed(1)), threat_model, 7)
    torch.testing.assert_close(outcome.x_adv, x_adv, rtol=1e-6, atol=1e-6)
    expected = plain_divergence(log_posterior(oracle, x_adv).exp().detach(), model(x_adv).softmax(1), kind)
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-6, atol=1e-8)
    parameters = list(model.parameters())
    found = torch.autograd.grad(outcome.loss.mean(), parameters)
    for a, b in zip(found, torch.autograd.grad(expected.mean(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class WithField(ClassScorePosterior):
    """Another posterior with a class-independent field added to its scores."""

    def __init__(self, inner: GaussianMixture, scale: float) -> None:
        super().__init__()
        self.inner, self.scale, self.num_classes = inner, scale, inner.num_classes

    def log_prob_and_scores(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p, scores = self.inner.log_prob_and_scores(x)
        return log_p, scores + self.scale * (3 * x).sin()[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [-7.0, 0.5, 100.0])
def test_class_independent_field_changes_nothing(kind: str, scale: float) -> None:
    oracle, model = mixture(4, 2, 6), smooth_mlp(6, 4)
    x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(32)
    plain = DirectAscent(model, MovingTarget(oracle.trace(x, y)), kind).gradient(x)
    shifted = DirectAscent(model, MovingTarget(WithField(oracle, scale).trace(x, y)), kind).gradient(x)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-10)
    log_p = WithField(oracle, scale)(x.requires_grad_())
    (gradient,) = torch.autograd.grad(log_p[:, 0].sum(), x)
    (expected,) = torch.autograd.grad(oracle(x)[:, 0].sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_literal_weights_are_those_of_eq_33() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
    log_p, log_q = other.log_softmax(1), logits.log_softmax(1)
    literal, grad_logits = direct_weights(logits, log_p, "kl", literal=True)
    torch.testing.assert_close(literal, log_p.exp() * (log_p - log_q))
    torch.testing.assert_close(grad_logits, log_q.exp() - log_p.exp())
    projected, _ = direct_weights(logits, log_p, "kl")
    torch.testing.assert_close(projected, literal - log_p.exp() * literal.sum(1, keepdim=True))


def test_minimum_of_direct_score_is_the_posterior_itself() -> None:
    """Self-consistency: with q = p the loss and its gradient are zero wherever the attack goes."""
    oracle = mixture(4, 2, 6)
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = oracle(x).argmax(1)
    threat_model = ThreatModel("l2", 0.5, **UNBOUNDED)
    direct = objectives.score_direct(oracle, x, y, threat_model=threat_model, posterior=oracle)
    surrogate = objectives.pgd_at(oracle, x, oracle(x).exp(), threat_model=threat_model)
    assert direct.loss.abs().max() < 1e-12
    assert surrogate.loss.mean() > 0.01  # R_Madry of the truth is not zero


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pgd_at", "trades", "score_direct"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_raises_the_loss(kind: str, name: str, norm: str) -> None:
    model = small_cnn().eval()
    x, y = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
    extra = {"posterior": KernelDensity(x, y, num_classes=10, sigma=2.0)} if name == "score_direct" else {}
    threat_model = ThreatModel(norm, 0.1 if norm == "linf" else 0.6)
    losses = [
        objectives.OBJECTIVES[name](
            model,
            x,
            y,
            threat_model=threat_model,
            divergence=kind,
            steps=steps,
            generator=torch.Generator().manual_seed(0),
            **extra,
        ).loss.mean()
        for steps in (1, 10)
    ]
    assert losses[1] > losses[0]


def test_standard_is_cross_entropy() -> None:
    model, x, y = small_cnn(), torch.rand(8, 1, 8, 8), torch.arange(8)
    torch.testing.assert_close(objectives.standard(model, x, y).loss, cross_entropy(model(x), y, reduction="none"))


def test_accuracy_counts_what_is_right() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.1, 3.0], [5.0, 1.0, 1.0], [0.0, 4.0, 1.0]])
    assert objectives.accuracy(logits, torch.tensor([1, 2, 0, 2])) == 0.75
    soft = torch.tensor([[0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    assert objectives.accuracy(logits, soft) == 0.5


def test_trades_is_its_two_terms() -> None:
    model, x, y = small_cnn(), torch.rand(8, 1, 8, 8), torch.arange(8)
    outcome = objectives.trades(model, x, y, threat_model=ThreatModel("linf", 0.1), beta=3.0, divergence="se")
    clean, adversarial = model(x).softmax(1), model(outcome.x_adv).softmax(1)
    one_hot = torch.nn.functional.one_hot(y, 10)
    expected = (clean - one_hot).square().sum(1) + 3.0 * (adversarial - clean).square().sum(1)
    torch.testing.assert_close(outcome.loss, expected)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(outcome.loss.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["total", "robust", "threshold"])
@pytest.mark.parametrize("kind", ["se", "kl"])
def test_clipping_forms(form: str, kind: str) -> None:
    model, x, y = small_cnn(), torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    common = {"threat_model": ThreatModel("linf", 0.1), "divergence": kind, "attack_mode": "eval"}
    bound = 0.4 if form == "threshold" else clip_bound(kind, 0.4, 10)

    def run(name: str, **settings: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return objectives.OBJECTIVES[name](model, x, y, generator=generator, **common, **settings).loss

    posterior = KernelDensity(x, y, num_classes=10, sigma=0.3)
    for name, extra in (("pgd_at", {}), ("score_direct", {"posterior": posterior})):
        whole, clipped = run(name, **extra), run(name, clip=0.4, clip_form=form, **extra)
        assert not torch.equal(clipped, whole)
        torch.testing.assert_close(clipped, (whole - bound).relu())
        assert torch.equal(run(name, clip=0.0, clip_form=form, **extra), whole)

    beta = 2.0
    natural = objectives.standard(model, x, y, divergence=kind).loss
    total = run("trades", beta=beta)
    robust = (total - natural) / beta
    expected = (total - bound).relu() if form == "total" else natural + beta * (robust - bound).relu()
    torch.testing.assert_close(run("trades", beta=beta, clip=0.4, clip_form=form), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "score_direct"])
@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_batch_norm_mode_during_the_attack(name: str, mode: str) -> None:
    model = small_cnn(batch_norm=True).train()
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    extra = {}
    if name == "score_direct":
        extra["posterior"] = KernelDensity(x, y, num_classes=10, sigma=1.0)
    steps = 3
    objectives.OBJECTIVES[name](
        model, x, y, threat_model=ThreatModel("linf", 0.1), steps=steps, attack_mode=mode, **extra
    ).loss.mean().backward()
    outer = 2 if name == "trades" else 1
    in_attack = {"train": steps + (name == "trades"), "eval": 0, "frozen": 0}[mode]
    assert int(model[1].num_batches_tracked) == outer + in_attack
    assert model.training
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["pgd_at", "trades", "score_direct"])
def test_attack_leaves_no_gradient_of_its_own(name: str) -> None:
    """The gradient in the parameters after backward is that of the loss alone."""
    model = small_cnn()
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    extra = {"posterior": KernelDensity(x, y, num_classes=10, sigma=1.0)} if name == "score_direct" else {}
    outcome = objectives.OBJECTIVES[name](model, x, y, threat_model=ThreatModel("linf", 0.1), **extra)
    assert all(p.grad is None for p in model.parameters())
    assert not outcome.x_adv.requires_grad
    assert outcome.loss.shape == (16,)
    assert not any(metric.requires_grad or metric.dim() for metric in outcome.metrics.values())


class Flat(PointwisePosterior):
    """A posterior that does not depend on x: its data gradient is zero."""

    def __init__(self, log_p: torch.Tensor) -> None:
        super().__init__()
        self.log_p, self.num_classes = log_p, log_p.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_p.expand(len(x), -1) + 0.0 * x.flatten(1).sum(1, keepdim=True)

    _trace_at = KernelDensity._trace_at

    def log_prob_and_scores(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(x).detach(), torch.zeros(len(x), self.num_classes, *x.shape[1:])


def test_metrics_measure_the_data_gradient() -> None:
    model, x, y = small_cnn(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    common = {"threat_model": ThreatModel("linf", 0.1), "generator": torch.Generator().manual_seed(0)}
    flat = objectives.score_direct(model, x, y, posterior=Flat(torch.full((1, 10), 0.1).log()), **common)
    assert flat.metrics["zero_gradient_share"] < 0.1
    assert flat.metrics["data_gradient_ratio"] == 0.0
    assert flat.metrics["sign_change_share"] == 0.0
    steep = objectives.score_direct(model, x, y, posterior=KernelDensity(x, y, num_classes=10, sigma=1.0), **common)
    assert steep.metrics["data_gradient_ratio"] > 1.0
    assert 0.1 < steep.metrics["sign_change_share"] < 0.9


def test_metrics_count_the_gradients_that_are_zero() -> None:
    class Half(nn.Module):
        """Looks at the left half of an image alone."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 5.0 * x[..., :4].flatten(1)[:, :10]

    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    posterior = Flat(torch.arange(1.0, 11.0).log_softmax(0)[None])
    for name, extra in (("pgd_at", {}), ("trades", {}), ("score_direct", {"posterior": posterior})):
        found = objectives.OBJECTIVES[name](Half(), x, y, threat_model=ThreatModel("linf", 0.1), **extra)
        assert found.metrics["zero_gradient_share"] == pytest.approx(1 - 10 / 64)


def test_defaults_by_name() -> None:
    assert [objectives.default_of(name, "attack_mode") for name in ("pgd_at", "trades")] == ["train", "eval"]
    assert objectives.default_of("standard", "start") is None
    for name in ("pgd_at", "trades", "score_direct"):
        assert objectives.default_of(name, "steps") == 10


def test_the_start_of_trades_is_as_published() -> None:
    x = torch.full((8, 1, 8, 8), 0.5)
    found = objectives.first_iterate(
        x, ThreatModel("linf", 0.1), start="gaussian", generator=torch.Generator().manual_seed(3)
    )
    noise = torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, x + 0.001 * noise, rtol=0, atol=0)


def test_nan_logits_give_a_nan_loss() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :10] * torch.nan

    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    threat_model = ThreatModel("linf", 0.1)
    posterior = KernelDensity(torch.rand(10, 1, 8, 8), torch.arange(10), num_classes=10, sigma=1.0)
    for name, extra in (("standard", {}), ("pgd_at", {"clip": 0.4}), ("trades", {}), ("score_direct", {})):
        settings = {} if name == "standard" else {"threat_model": threat_model, **extra}
        if name == "score_direct":
            settings["posterior"] = posterior
        assert objectives.OBJECTIVES[name](Broken(), x, y, **settings).loss.isnan().all()


STEP = {
    "aten::sign",
    "aten::clamp",
    "aten::clip",
    "aten::clamp_min",
    "aten::clamp_max",
    "aten::minimum",
    "aten::maximum",
}
DIVERGENCE = {"aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax", "aten::cross_entropy_loss"}


@pytest.mark.parametrize("name", ["standard", "pgd_at", "trades", "score_direct"])
def test_a_training_step_runs_on_our_kernels(name: str) -> None:
    """One step calls the compiled operators, and no eager step or divergence."""
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))  # ReLU is a clamp
    settings: dict = {} if name == "standard" else {"threat_model": ThreatModel("linf", 0.1), "steps": 3}
    if name == "score_direct":
        settings["posterior"] = mixture_of_images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.profiler.profile() as profile:
        objectives.OBJECTIVES[name](model, x, y, **settings).loss.mean().backward()
        optimizer.step()
    called = {event.key for event in profile.key_averages()}
    counts = {event.key: event.count for event in profile.key_averages()}
    expected = {
        "standard": {"scorematch::divergence": 1},
        "pgd_at": {"scorematch::divergence": 4, "scorematch::pgd_step": 3},
        "trades": {"scorematch::divergence": 1, "scorematch::logit_divergence": 4, "scorematch::pgd_step": 4},
        "score_direct": {"scorematch::logit_divergence": 4, "scorematch::pgd_step": 3, "scorematch::score_step": 3},
    }[name]
    for operator, count in expected.items():
        found = sum(n for key, n in counts.items() if key.startswith(operator) and "backward" not in key)
        assert found == count, f"{operator}: {found} calls, expected {count}; {sorted(called)}"
    assert not called & DIVERGENCE
    # The share of changed signs is a metric: two signs a step, and nothing that clips.
    assert not called & (STEP - ({"aten::sign"} if name == "score_direct" else set()))


def mixture_of_images() -> ClassScorePosterior:
    class Linear(ClassScorePosterior):
        """Values and scores without any softmax of its own, so that the profile shows the objective alone."""

        num_classes = 10

        def log_prob_and_scores(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            log_p = torch.full((len(x), 10), -math.log(10.0))
            return log_p, torch.ones(len(x), 10, *x.shape[1:])

    return Linear()


def test_score_step_is_what_the_posterior_pulls_back_with() -> None:
    oracle, x = mixture(4, 2, 6), torch.randn(8, 6, dtype=torch.float64)
    log_p, scores = oracle.log_prob_and_scores(x)
    weights, grad = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    centred = weights - log_p.exp() * weights.sum(1, keepdim=True)
    expected = score_step(centred, scores, grad)
    torch.testing.assert_close(oracle.trace(x, torch.zeros(8)).pull_back(weights, grad), expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("standard", {"divergence": "hellinger"}, "divergence must be one of kl"),
        ("pgd_at", {"divergence": "hellinger"}, "divergence must be one of kl"),
        ("pgd_at", {"clip": 1.5}, r"clip must lie in \[0, 1\), got 1.5"),
        ("pgd_at", {"clip": -0.5}, r"clip must lie in \[0, 1\), got -0.5"),
        ("pgd_at", {"clip_form": "both"}, "clip_form must be one of total, robust, threshold, got 'both'"),
        ("pgd_at", {"clip_form": "threshold", "clip": -1.0}, "clip must not be negative"),
        ("pgd_at", {"attack_mode": "test"}, "attack_mode must be one of eval, train, frozen, got 'test'"),
        ("pgd_at", {"start": "corner"}, "start must be one of uniform, gaussian, or a tensor like x, got 'corner'"),
        ("pgd_at", {"start": torch.zeros(4, 64)}, r"start must be \[4, 1, 8, 8\] on cpu for x .* got \[4, 64\] on cpu"),
        ("pgd_at", {"start": torch.zeros(4, 1, 8, 8).double()}, "start must be torch.float32 as x, got torch.float64"),
        ("trades", {"beta": -1.0}, "beta must not be negative, got -1.0"),
        ("trades", {"beta": math.nan}, "beta must not be negative, got nan"),
    ],
)
def test_bad_input(name: str, settings: dict, message: str) -> None:
    model, x, y = small_cnn(), torch.rand(4, 1, 8, 8), torch.arange(4)
    if name != "standard":
        settings = {"threat_model": ThreatModel("linf", 0.1), **settings}
    with pytest.raises((TypeError, ValueError), match=message):
        objectives.OBJECTIVES[name](model, x, y, **settings)
    assert all(p.requires_grad for p in model.parameters())


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1), x


@pytest.mark.parametrize("name", ["standard", "gaussian", "pgd_at", "trades", "score_direct"])
def test_models_and_posteriors_that_cannot_be_used_are_named(name: str) -> None:
    x, y, network = torch.rand(12, 1, 8, 8), torch.arange(12) % 10, small_cnn()
    ball = {"threat_model": ThreatModel("linf", 0.1)}
    settings: dict = {"standard": {}, "gaussian": {"sigma": 0.1}}.get(name, ball)
    if name == "score_direct":
        settings = {**ball, "posterior": KernelDensity(x, y, num_classes=10, sigma=1.0)}
    objective = objectives.OBJECTIVES[name]
    with pytest.raises(TypeError, match="model must be a Module, got function"):
        objective(lambda x: network(x.clamp(0, 1)), x, y, **settings)
    with pytest.raises(ValueError, match=r"the model must return a tensor of logits \[N, L\], got tuple"):
        objective(Pair(), x, y, **settings)
    if name in ("trades", "score_direct"):
        for posterior, kind in ((network, "Sequential"), (KernelDensity, "ABCMeta"), (3, "int")):
            with pytest.raises(TypeError, match=f"posterior must be a posterior.*, got {kind}"):
                objective(network, x, y, **{**settings, "posterior": posterior})
        other = KernelDensity(x, y % 5, num_classes=5, sigma=1.0)
        with pytest.raises(ValueError, match=r"posterior must give log p .* got torch.float32 \[12, 5\] for logits"):
            objective(network, x, y, **{**settings, "posterior": other})


@pytest.mark.parametrize("name", ["standard", "gaussian", "pgd_at", "trades", "score_direct", "free"])
def test_probabilities_in_the_place_of_logits_are_told_once(name: str) -> None:
    x, y, ball = torch.rand(20, 1, 8, 8), torch.arange(20) % 10, ThreatModel("linf", 0.1)
    posterior = KernelDensity(x, y, num_classes=10, sigma=1.0)
    settings: dict = {"standard": {}, "gaussian": {"sigma": 0.1}}.get(name, {"threat_model": ball, "steps": 1})
    settings |= {"posterior": posterior} if name == "score_direct" else {}
    objective = FreeAttack(ball).step if name == "free" else partial(objectives.OBJECTIVES[name], **settings)
    model = nn.Sequential(small_cnn(), nn.Softmax(1))
    objective(model, x[:0], y[:0])  # says nothing yet
    with pytest.warns(UserWarning, match="seems to return probabilities: objectives need logits") as told:
        objective(model, x, y)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, x, y)
        objective(nn.Sequential(small_cnn(), nn.LogSoftmax(1)), x, y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 10]), r"y must lie in \[0, 10\), got values in \[0, 10\]"),
        (torch.tensor([0, 1, 2, -1]), r"y must lie in \[0, 10\), got values in \[-1, 2\]"),
        (torch.ones(4, 7) / 7, r"y must be labels \[N\] or probabilities \[4, 10\], got \[4, 7\]"),
    ],
)
def test_direct_score_refuses_labels_that_its_posterior_does_not_read(y: torch.Tensor, message: str) -> None:
    x, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    posterior = KernelDensity(x, labels, num_classes=10, sigma=1.0)
    with pytest.raises(ValueError, match=message):
        score_direct(small_cnn(), x[:4], y, threat_model=ThreatModel("linf", 0.1), posterior=posterior, steps=1)


@pytest.mark.parametrize("name", ["standard", "gaussian", "pgd_at", "trades", "score_direct"])
def test_the_whole_step_may_run_under_autocast(name: str) -> None:
    model, x, y = small_cnn(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    attacked = {"threat_model": ThreatModel("linf", 0.1), "start": x}
    moving = {**attacked, "posterior": KernelDensity(x, y, num_classes=10, sigma=1.0)}
    noisy = {"sigma": 0.1, "gamma": 0.5, "noise": torch.randn_like(x)}
    settings: dict = {"standard": {}, "gaussian": noisy, "pgd_at": attacked}.get(name, moving)
    still = {"steps": 0} if "threat_model" in settings else {}
    expected = objectives.OBJECTIVES[name](model, x, y, **settings, **still).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = objectives.OBJECTIVES[name](model, x, y, **settings, **still).loss
        objectives.OBJECTIVES[name](model, x, y, **settings).loss.mean().backward()  # with a search
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)


def test_free_training_may_run_under_autocast() -> None:
    model, x, y = small_cnn(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    free = FreeAttack(ThreatModel("linf", 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = free.step(model, x, y).loss
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert free.perturbation is not None
    assert free.perturbation.abs().max() > 0


def test_a_posterior_is_read_outside_of_autocast() -> None:
    """In half precision its log-densities would be far from the truth."""
    oracle, x, y = mixture(10, 2, 64).float(), torch.rand(16, 64), torch.arange(16) % 10
    model, ball = nn.Linear(64, 10), ThreatModel("linf", 0.1)
    expected = objectives.soft_targets(oracle, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(oracle(x).exp(), expected)
        assert torch.equal(oracle.trace(x, y).log_p.exp(), expected)
        assert torch.equal(objectives.soft_targets(oracle, x, y), expected)
        found = objectives.score_direct(model, x, y, threat_model=ball, posterior=oracle, steps=0, start=x)
    divergence = (expected * (expected.log() - model(x).log_softmax(1))).sum(1)
    torch.testing.assert_close(found.loss, divergence, rtol=0.02, atol=0.02)


class Stating(PointwisePosterior):
    """A posterior that states what ``values`` makes of its logits."""

    num_classes = 4

    def __init__(self, values: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x[:, :4])

    def _trace_at(self, x: Tensor) -> Trace:
        return _Stated(self, x)


class _Stated(Trace):
    def __init__(self, posterior: Stating, x: Tensor) -> None:
        self.posterior = posterior
        self.move(x)

    def move(self, x: Tensor) -> None:
        self.x, self.log_p = x, self.posterior(x)

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    ("values", "given"),
    [(lambda z: z.softmax(1), "5.1"), (lambda z: z + 10, r"[0-9.]+e\+05"), (lambda z: z.log_softmax(0), "[0-9.]+")],
    ids=["probabilities", "logits", "over samples"],
)
def test_a_posterior_that_states_no_log_probabilities(values: Callable[[Tensor], Tensor], given: str) -> None:
    x, y, ball = torch.rand(8, 6), torch.zeros(8, dtype=torch.int64), ThreatModel("linf", 0.1)
    posterior, model = Stating(values), torch.nn.Linear(6, 4)
    uses: list[Callable[[], object]] = [
        lambda: objectives.score_direct(model, x, y, threat_model=ball, posterior=posterior),
        lambda: objectives.trades(model, x, y, threat_model=ball, posterior=posterior),
        lambda: objectives.soft_targets(posterior, x, y),
        lambda: consistency(model, posterior, x, y, ball),
        lambda: audit.log_likelihood(posterior, x, y, noise=0.1),
        lambda: audit.kl_error(posterior, posterior, x, y),
        lambda: audit.robust_accuracy(posterior, x, y, ball),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=rf"posterior must give log p.*, got a sum of {given}.*log_softmax"):
            use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 100, 1000])
def test_log_probabilities_of_half_precision_sum_to_one_but_for_rounding(dtype: torch.dtype, classes: int) -> None:
    """The sum of 100 classes that are alike is 1.011 in bfloat16; in float32 that would be no rounding."""
    logits = 1e-3 * torch.randn(32, classes, generator=torch.Generator().manual_seed(0))
    rounded = logits.log_softmax(1).to(dtype)
    check_values(rounded)
    with pytest.raises(ValueError, match="got a sum of"):
        check_values(rounded.exp())
    with pytest.raises(ValueError, match="got a sum of"):
        check_values(rounded - 0.125)
    if (classes, dtype) == (100, torch.bfloat16):
        with pytest.raises(ValueError, match=r"got a sum of 1\.01"):
            check_values(rounded.float())


def test_values_that_are_nan_or_on_a_device_are_not_refused() -> None:
    """NaN is told by what meets it; a look at a device would wait, which meta, without values, cannot even do."""
    x, y = torch.rand(8, 6), torch.zeros(8, dtype=torch.int64)
    assert objectives.soft_targets(Stating(lambda z: torch.full_like(z, math.nan)), x, y).isnan().all()
    assert objectives.soft_targets(Stating(lambda z: z), x.to("meta"), y.to("meta")).is_meta
