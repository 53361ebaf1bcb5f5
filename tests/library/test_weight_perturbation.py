"""Adversarial weight perturbation against its definition in float64, and what it must leave alone."""

import contextlib
import copy

import pytest
import torch
from library_models import small_cnn, smooth_mlp
from torch import nn
from torch.nn.functional import cross_entropy

from scorematch import ThreatModel, WeightPerturbation, objectives
from scorematch.posteriors import KernelDensity

GAMMA = 0.05


def samples(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(size) % 10


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_step_and_gradient_against_their_definition() -> None:
    model = smooth_mlp(12, 4)
    x = torch.rand(32, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 4
    moved = copy.deepcopy(model)
    weights = [p for p in moved.parameters() if p.dim() == 2]
    gradients = torch.autograd.grad(cross_entropy(moved(x), y), weights)
    with torch.no_grad():
        for w, g in zip(weights, gradients, strict=True):
            w += GAMMA * w.square().sum().sqrt() * g / g.square().sum().sqrt()
    expected = torch.autograd.grad(cross_entropy(moved(x), y), list(moved.parameters()))

    before = state(model)
    with WeightPerturbation(model, GAMMA) as perturbation:
        perturbation.perturb(lambda: cross_entropy(model(x), y))
        for found, value in zip(model.parameters(), moved.parameters(), strict=True):
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)
        assert all(p.grad is None for p in model.parameters())
        cross_entropy(model(x), y).backward()
    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert cross_entropy(moved(x), y).detach() > cross_entropy(model(x), y).detach()


@pytest.mark.parametrize("name", ["pgd_at", "trades", "score_direct"])
def test_objectives_take_their_loss_at_perturbed_weights(name: str) -> None:
    """The attack sees the clean weights; the loss, with its clipping, those one step up its own gradient."""
    x, y = samples()
    model = small_cnn()
    extra: dict = {"posterior": KernelDensity(x, y, num_classes=10, sigma=1.0)} if name == "score_direct" else {}
    extra |= {"threat_model": ThreatModel("linf", 0.1), "steps": 3, "divergence": "se", "clip": 0.3}

    def run(**weights: object) -> objectives.Outcome:
        return objectives.OBJECTIVES[name](model, x, y, generator=torch.Generator().manual_seed(1), **extra, **weights)

    def plain_loss(x_adv: torch.Tensor) -> torch.Tensor:
        clean, adversarial = model(x).softmax(1), model(x_adv).softmax(1)
        one_hot = nn.functional.one_hot(y, 10)
        if name == "pgd_at":
            total = (adversarial - one_hot).square().sum(1)
        elif name == "trades":
            total = (clean - one_hot).square().sum(1) + 6.0 * (adversarial - clean).square().sum(1)
        else:
            total = (adversarial - extra["posterior"](x_adv).exp()).square().sum(1)
        return (total - 0.1).relu()  # the bound of c = .3 is .1

    clean = run()
    with WeightPerturbation(model, GAMMA) as weights:
        outcome = run(weights=weights)
        gradients = torch.autograd.grad(outcome.loss.mean(), list(model.parameters()))
    assert torch.equal(outcome.x_adv, clean.x_adv)
    assert outcome.loss.detach().mean() > clean.loss.detach().mean()

    movable = [p for p in model.parameters() if p.dim() > 1]
    up = torch.autograd.grad(plain_loss(clean.x_adv).mean(), movable)
    with torch.no_grad():
        for p, g in zip(movable, up, strict=True):
            p += GAMMA * p.norm() * g / g.norm()
    expected = plain_loss(clean.x_adv)
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-4, atol=1e-5)
    for found, value in zip(gradients, torch.autograd.grad(expected.mean(), list(model.parameters())), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)


def test_autocast_sees_the_weights_move() -> None:
    """Its cache holds the weights in half precision, first those of the attack."""
    x, y = samples()
    model = small_cnn()

    def run(cached: bool) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            with WeightPerturbation(model, 0.3) as weights:
                outcome = objectives.pgd_at(
                    model, x, y, threat_model=ThreatModel("linf", 0.1), steps=2, weights=weights, generator=generator
                )
            return outcome.loss.detach(), model(x).detach()

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_counts_the_training_pass_alone(training: bool) -> None:
    x, y = samples()
    model, plain = small_cnn(batch_norm=True).train(training), small_cnn(batch_norm=True).train(training)
    modes = [module.training for module in model.modules()]
    with WeightPerturbation(model, GAMMA) as weights:
        objectives.pgd_at(
            model, x, y, threat_model=ThreatModel("linf", 0.1), attack_mode="eval", weights=weights
        ).loss.mean().backward()
    with torch.no_grad():
        plain(x)
    assert int(model[1].num_batches_tracked) == int(plain[1].num_batches_tracked) == int(training)
    assert model[1].track_running_stats
    assert modes == [module.training for module in model.modules()]


def test_only_what_should_move_moves() -> None:
    """Not biases, not norms, not frozen parameters, not those without influence; nothing along a zero gradient."""
    model = small_cnn(batch_norm=True)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    model[0].weight.requires_grad_(False)
    before = state(model)
    x, y = samples()
    with WeightPerturbation(model, GAMMA) as weights:
        weights.perturb(lambda: cross_entropy(model(x), y))
        changed = [name for name, value in state(model).items() if not torch.equal(value, before[name])]
    assert changed == ["4.weight"]
    with WeightPerturbation(model, GAMMA) as weights:
        weights.perturb(lambda: 0.0 * cross_entropy(model(x), y))
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_weights_come_back_bit_for_bit_after_an_error_and_a_nan() -> None:
    x, y = samples()
    for factor in (1.0, float("nan")):
        model = small_cnn()
        before = state(model)
        with contextlib.suppress(KeyboardInterrupt), WeightPerturbation(model, GAMMA) as weights:
            weights.perturb(lambda model=model, factor=factor: factor * cross_entropy(model(x), y))
            assert not torch.equal(model[0].weight, before["0.weight"])
            raise KeyboardInterrupt
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert model[0].weight.requires_grad


def test_two_halves_summed_perturb_as_the_whole_batch() -> None:
    """What ``reduce`` is for: the gradients of two processes, added up."""
    x, y = samples()
    whole, halves = small_cnn(), small_cnn()
    rest = torch.autograd.grad(
        cross_entropy(halves(x[8:]), y[8:], reduction="sum"), [p for p in halves.parameters() if p.dim() > 1]
    )

    def add_other_process(gradients: list[torch.Tensor]) -> None:
        for gradient, more in zip(gradients, rest, strict=True):
            gradient += more

    with WeightPerturbation(whole, GAMMA) as a, WeightPerturbation(halves, GAMMA, reduce=add_other_process) as b:
        a.perturb(lambda: cross_entropy(whole(x), y))
        b.perturb(lambda: cross_entropy(halves(x[:8]), y[:8], reduction="sum"))
        for found, value in zip(halves.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, value)
        assert not torch.equal(whole[0].weight, small_cnn()[0].weight)


def test_misuse_is_named() -> None:
    model = small_cnn()
    x, y = samples()
    with pytest.raises(ValueError, match=r"gamma must be positive and finite, got 0\.0"):
        WeightPerturbation(model, 0.0)
    with pytest.raises(TypeError, match="model must be a Module, got function"):
        WeightPerturbation(samples)
    outside = WeightPerturbation(model)
    with pytest.raises(RuntimeError, match="inside `with WeightPerturbation"):
        outside.perturb(lambda: cross_entropy(model(x), y))
    with outside as weights:
        weights.perturb(lambda: cross_entropy(model(x), y))
        with pytest.raises(RuntimeError, match="called twice in one `with` block"):
            weights.perturb(lambda: cross_entropy(model(x), y))
    with outside as weights, pytest.raises(ValueError, match="the loss depends on none of its weights"):
        weights.perturb(lambda: cross_entropy(small_cnn()(x), y))
    with outside as weights:  # and again
        weights.perturb(lambda: cross_entropy(model(x), y))
