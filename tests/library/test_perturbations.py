"""A B(x) of one's own in attacks and objectives: the L1 ball of examples/l1_ball.py."""

from collections.abc import Callable

import pytest
import torch
from library_models import mixture, small_cnn, smooth_mlp
from torch import Tensor

import scorematch as sm
from examples.l1_ball import L1Ball

BALL = L1Ball(eps=1.5, step_size=0.5)
SLACK = 1e-5


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(count, 1, 8, 8), torch.arange(count) % 10


def distances(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).abs().sum(1)


def test_the_example_has_what_is_asked_for() -> None:
    assert isinstance(BALL, sm.Perturbations)
    assert isinstance(sm.ThreatModel("linf", 0.1), sm.Perturbations)
    assert not isinstance(object(), sm.Perturbations)


def test_the_projection_is_the_nearest_point() -> None:
    """By the condition of a projection onto a convex set."""
    torch.manual_seed(1)
    ball = L1Ball(eps=1.0, step_size=1.0, lower=-100.0, upper=100.0)
    x0, x = torch.randn(50, 4, dtype=torch.float64), 3 * torch.randn(50, 4, dtype=torch.float64)
    found = ball.project(x, x0)
    assert (distances(found, x0) <= 1.0 + SLACK).all()
    for corner in (*torch.eye(4, dtype=torch.float64), *-torch.eye(4, dtype=torch.float64)):
        # ⟨x − found, v − found⟩ ≤ 0 for all corners v says that found is the projection onto their hull.
        assert (((x - found) * (x0 + corner - found)).sum(1) <= 1e-9).all()
    inside = x0 + 0.2 * torch.rand(50, 4, dtype=torch.float64)
    torch.testing.assert_close(ball.project(inside, x0), inside)


def test_random_starts_fill_the_ball() -> None:
    x = torch.zeros(4000, 3, dtype=torch.float64)
    start = L1Ball(eps=2.0, step_size=1.0, lower=-5.0, upper=5.0).random_start(x, torch.Generator().manual_seed(0))
    radii = distances(start, x)
    assert (radii <= 2.0).all()
    assert float((radii < 2.0 * 0.5 ** (1 / 3)).double().mean()) == pytest.approx(0.5, abs=0.03)  # half of the volume
    assert start.mean(0).abs().max() < 0.05


def test_pgd_finds_worse_points_inside_the_ball() -> None:
    x, y = images()
    model = small_cnn().eval()
    y = model(x).argmax(1)
    x_adv = sm.PGD(BALL, steps=20, restarts=2)(model, x, y, generator=torch.Generator().manual_seed(0))
    assert (distances(x_adv, x) <= BALL.eps + SLACK).all()
    assert 0.0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1.0
    before, after = (torch.nn.functional.cross_entropy(model(at), y) for at in (x, x_adv))
    assert after > before + 0.01


def test_the_surrogates_train_in_the_ball() -> None:
    x, y = images()
    model = small_cnn()
    for objective in (sm.objectives.pgd_at, sm.objectives.trades):
        for start in ("uniform", "gaussian"):
            outcome = objective(model, x, y, threat_model=BALL, steps=5, start=start)
            assert (distances(outcome.x_adv, x) <= BALL.eps + SLACK).all()
            model.zero_grad()
            outcome.loss.mean().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())


def test_direct_score_in_the_ball_climbs() -> None:
    """max D(p(x') ‖ q(x')) over another B(x), with the data gradient: more than at clean points."""
    truth, model = mixture(3, 2, 5), smooth_mlp(5, 3)
    x, y = truth.sample(64, torch.Generator().manual_seed(0))
    ball = L1Ball(eps=1.0, step_size=0.2, share=0.2, lower=-torch.inf, upper=torch.inf)
    outcome = sm.objectives.score_direct(model, x, y, threat_model=ball, posterior=truth, steps=20)
    clean = sm.logit_divergence(model(x), truth(x), kind="kl")
    assert (distances(outcome.x_adv, x) <= 1.0 + SLACK).all()
    assert outcome.loss.mean().item() > 1.2 * clean.mean().item()
    torch.testing.assert_close(outcome.loss, sm.logit_divergence(model(outcome.x_adv), truth(outcome.x_adv), kind="kl"))


def test_a_single_step_needs_a_ball_with_eps() -> None:
    x, y = images()
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel for attack 'fgsm_rs', got L1Ball"):
        sm.objectives.pgd_at(small_cnn(), x, y, threat_model=BALL, attack="fgsm_rs")


def test_where_a_ball_is_needed_another_one_is_named() -> None:
    x, y = images()
    truth = sm.posteriors.KernelDensity(x, y, num_classes=10, sigma=1.0)
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel, got L1Ball"):
        sm.consistency(small_cnn(), truth, x, y, BALL)
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel, got L1Ball"):
        sm.bounds.robust_errors(small_cnn(), truth, x, y, BALL, divergences="l1")


@pytest.mark.parametrize("attack", [sm.attacks.APGD, sm.attacks.FAB, sm.attacks.Square, sm.FreeAttack])
def test_attacks_made_for_balls_refuse_another_one_at_once(attack: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel, got L1Ball"):
        attack(BALL)


@pytest.mark.parametrize("name", ["random_start", "step", "project", "check_radius", "lower", "upper"])
def test_what_a_ball_lacks_is_named(name: str) -> None:
    x, y = images()
    has = {part: getattr(BALL, part) for part in ("random_start", "step", "project", "check_radius", "lower", "upper")}
    lacking = type("Lacking", (), {part: value for part, value in has.items() if part != name})()
    for use in (sm.PGD, lambda ball: sm.objectives.pgd_at(small_cnn(), x, y, threat_model=ball)):
        with pytest.raises(TypeError, match=rf"got Lacking, which lacks {name}$"):
            use(lacking)
    with pytest.raises(TypeError, match="got the class L1Ball itself"):
        sm.PGD(L1Ball)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("altered", "error", "told"),
    [
        (lambda moved: None, TypeError, "must be a tensor, got NoneType"),
        (lambda moved: moved.double(), TypeError, "must be torch.float32 as x, got torch.float64"),
        (lambda moved: moved.flatten(1), ValueError, r"must be \[12, 1, 8, 8\] .* got \[12, 64\]"),
    ],
    ids=["none", "dtype", "shape"],
)
def test_a_step_that_returns_no_points_is_named(
    altered: Callable[[Tensor], object], error: type[Exception], told: str
) -> None:
    class Odd(L1Ball):
        def step(self, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
            return altered(super().step(x, grad, x0))  # type: ignore[return-value]

    (x, _), model, ball = images(), small_cnn(), Odd(eps=1.5, step_size=0.5)
    y = model(x).argmax(1)
    truth = sm.posteriors.KernelDensity(x, torch.arange(12) % 10, num_classes=10, sigma=1.0)
    uses: list[Callable[[], object]] = [
        lambda: sm.PGD(ball, steps=2, random_start=False)(model, x, y),
        lambda: sm.objectives.pgd_at(model, x, y, threat_model=ball, steps=2),
        lambda: sm.objectives.score_direct(model, x, y, threat_model=ball, posterior=truth, steps=2),
        lambda: sm.audit.robust_accuracy(truth, x, y, ball, steps=2),
    ]
    for use in uses:
        with pytest.raises(error, match="what threat_model.step returns " + told):
            use()
