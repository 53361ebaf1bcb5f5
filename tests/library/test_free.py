"""Free adversarial training against Alg. 1 in a plain loop, and its exact resumption."""

import copy
import math

import pytest
import torch
from library_models import small_cnn, smooth_mlp
from torch import Tensor, nn

from scorematch import FreeAttack, ThreatModel

EPS, RATE = 0.1, 0.05


def batch(size: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 12, dtype=dtype, generator=generator), torch.randint(4, (size,), generator=generator)


def train(model: nn.Module, free: FreeAttack, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    points = []
    for x, y in batches:
        for _ in range(free.replays):
            outcome = free.step(model, x, y)
            optimizer.zero_grad()
            outcome.loss.mean().backward()
            optimizer.step()
            points.append(outcome.x_adv)
    return points


def algorithm_1(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], replays: int, kind: str, norm: str
) -> tuple[list[Tensor], Tensor]:
    """Weights by hand, the perturbation by its definition; returns the points of the loss and the last perturbation."""
    delta = torch.zeros_like(batches[0][0])
    points = []
    for x, y in batches:
        for _ in range(replays):
            point = (x + delta[: len(x)]).clamp(0, 1).requires_grad_()
            points.append(point.detach())
            q, one_hot = model(point).softmax(1), nn.functional.one_hot(y, 4)
            loss = -(one_hot * q.log()).sum(1) if kind == "kl" else (q - one_hot).square().sum(1)
            parameters = list(model.parameters())
            *gradients, of_input = torch.autograd.grad(loss.mean(), [*parameters, point])
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= RATE * g
                if norm == "linf":
                    moved = (delta[: len(x)] + EPS * of_input.sign()).clamp(-EPS, EPS)
                else:
                    moved = delta[: len(x)] + EPS * of_input / of_input.norm(dim=1, keepdim=True)
                    moved = moved * (EPS / moved.norm(dim=1, keepdim=True)).clamp(max=1.0)
                delta = torch.cat([moved, delta[len(x) :]])
    return points, delta


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["kl", "se"])
def test_against_algorithm_1(kind: str, norm: str) -> None:
    """Three minibatches, the last one smaller: same points, weights and perturbation as the plain loop."""
    batches = [batch(8, 0), batch(8, 1), batch(5, 2), batch(8, 3)]
    model = smooth_mlp(12, 4)
    expected_model = copy.deepcopy(model)
    free = FreeAttack(ThreatModel(norm, EPS), replays=3, divergence=kind)
    points = train(model, free, batches)
    expected, delta = algorithm_1(expected_model, batches, 3, kind, norm)
    assert float((points[3] - batches[1][0]).abs().max()) > 0  # carried over to the second minibatch
    for found, value in zip(points, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(free.perturbation, delta, rtol=1e-9, atol=1e-12)
    for found, value in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


def test_one_forward_pass_a_replay() -> None:
    model = small_cnn(batch_norm=True).train()
    free = FreeAttack(ThreatModel("linf", EPS), replays=4)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    for _ in range(free.replays):
        free.step(model, x, y).loss.mean().backward()
    assert int(model[1].num_batches_tracked) == 4
    assert free.perturbation is not None
    torch.testing.assert_close(free.perturbation.abs().max(), torch.tensor(EPS))


def test_resumes_bit_for_bit_between_two_replays() -> None:
    model = smooth_mlp(12, 4)
    free = FreeAttack(ThreatModel("linf", EPS), replays=3)
    train(model, free, [batch(8, 0)])
    free.replays = 1
    train(model, free, [batch(8, 1)])
    resumed, other = FreeAttack(ThreatModel("linf", EPS), replays=2), copy.deepcopy(model)
    resumed.load_state_dict(copy.deepcopy(free.state_dict()))
    free.replays = 2
    rest = [batch(8, 1)]
    assert all(torch.equal(a, b) for a, b in zip(train(model, free, rest), train(other, resumed, rest), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    fresh = FreeAttack(ThreatModel("linf", EPS))
    assert fresh.state_dict() == {"perturbation": None}
    resumed.load_state_dict(fresh.state_dict())
    assert resumed.perturbation is None


def test_a_larger_batch_starts_with_zeros_at_its_new_positions() -> None:
    model, free = smooth_mlp(12, 4), FreeAttack(ThreatModel("linf", EPS), replays=1)
    train(model, free, [batch(3, 0)])
    x, y = batch(5, 1)
    points = train(model, free, [(x, y)])[0]
    torch.testing.assert_close(points[3:], x[3:])
    assert bool(((points[:3] - x[:3]).abs() > 0).any(1).all())


def test_bad_arguments_are_named() -> None:
    threat_model = ThreatModel("linf", EPS)
    with pytest.raises(ValueError, match="replays must be at least 1, got 0"):
        FreeAttack(threat_model, replays=0)
    with pytest.raises(TypeError, match=r"replays must be a whole number, got 2\.5"):
        FreeAttack(threat_model, replays=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel, got float"):
        FreeAttack(0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_size must be positive and finite, or None for eps, got -1"):
        FreeAttack(threat_model, step_size=-1.0)
    with pytest.raises(ValueError, match="step_size must not be larger than the box is wide, got 2; for 8-bit pixels"):
        FreeAttack(ThreatModel("linf", 8 / 255), step_size=2)
    free = FreeAttack(threat_model)
    free.step(smooth_mlp(12, 4), *batch(3, 0))
    with pytest.raises(ValueError, match=r"x has samples of shape \[6\], the perturbation \[12\]"):
        free.step(smooth_mlp(6, 4), torch.rand(3, 6, dtype=torch.float64), torch.arange(3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_does_not_stay(norm: str, broken: float) -> None:
    model, free = smooth_mlp(12, 4), FreeAttack(ThreatModel(norm, EPS))
    x, y = batch(6, 0)
    (free.step(model, x, y).loss.sum() * broken).backward()
    assert free.perturbation is not None
    assert free.perturbation.isfinite().all()
    assert free.step(model, x, y).loss.isfinite().all()
