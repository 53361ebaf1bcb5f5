"""PGD finds what it should, stays where it may, and leaves the model as it was."""

import copy
import warnings

import pytest
import torch
from library_models import small_cnn
from torch import nn

from scorematch import PGD, AutoAttack, ThreatModel, objectives
from scorematch.attacks import FAB, AutoAttackWarning
from scorematch.attacks.losses import margin_loss
from scorematch.attacks.pgd import LOSSES, misclassified
from scorematch.model_state import borrowed
from scorematch.objectives import pgd_at
from scorematch.posteriors import KernelDensity
from scorematch.threat_model import DUAL_ORDERS, NORMS


class Linear(nn.Module):
    """Two classes with margin w·x + b: PGD must reach the closed-form worst case."""

    def __init__(self, weight: torch.Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        margin = x.flatten(1) @ self.weight + self.bias
        return torch.stack([margin, -margin], 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "se", "js"])
def test_linear_model_is_attacked_exactly(norm: str, loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, generator=generator)
    x = 0.3 + 0.4 * torch.rand(200, 3, 2, 2, generator=generator)
    model = Linear(weight, -float((x.flatten(1) @ weight).mean()) + 0.6)
    y = torch.zeros(200, dtype=torch.int64)
    dual = weight.norm(p=DUAL_ORDERS[norm])
    margin = x.flatten(1) @ weight + model.bias
    threat_model = ThreatModel(
        norm, {"linf": 0.1, "l2": 0.25, "l1": 0.3}[norm]
    )  # small enough for the box not to matter
    robust = margin - threat_model.eps * dual > 1e-4
    attackable = margin - threat_model.eps * dual < -1e-4
    x_adv = PGD(threat_model, steps=40, losses=(loss,))(model, x, y, generator)
    wrong = misclassified(model(x_adv), y)
    assert 20 < int(robust.sum()) < 180
    assert not wrong[robust].any()
    assert wrong[attackable].all()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_found(batch_norm: bool, training: bool) -> None:
    model = small_cnn(batch_norm=batch_norm).train(training)
    model[0].bias.requires_grad_(False)
    model[-1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PGD(ThreatModel("linf", 0.1), steps=3)(model, torch.rand(8, 1, 8, 8), torch.arange(8))
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()][:3] == [True, False, True]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_model_is_restored_after_an_error() -> None:
    model = small_cnn().train()
    with pytest.raises(RuntimeError, match="channels"):
        PGD(ThreatModel("linf", 0.1), steps=3)(model, torch.rand(8, 3, 8, 8), torch.arange(8))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_batch_norm_mode_of_the_attack(mode: str) -> None:
    model = small_cnn(batch_norm=True).train()
    x = torch.rand(16, 1, 8, 8)
    norm = model[1]
    before = norm.running_mean.clone()
    with borrowed(model, mode), torch.no_grad():
        batch_output = norm(model[0](x))
    uses_batch_statistics = batch_output.mean((0, 2, 3)).abs().max() < 1e-5
    assert uses_batch_statistics == (mode != "eval")
    assert torch.equal(norm.running_mean, before) == (mode != "train")
    assert int(norm.num_batches_tracked) == (mode == "train")
    assert norm.training
    assert norm.track_running_stats


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_a_batch_norm_in_eval_mode_stays_in_it(mode: str) -> None:
    model = small_cnn(batch_norm=True).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with borrowed(model, mode), torch.no_grad():
        assert not model[1].training
        assert model.training == (mode != "eval")
        model(torch.rand(16, 1, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_a_model_in_eval_mode_stays_in_it(mode: str) -> None:
    """Such as for the adversarial loss on held-out data, which must not move the running statistics."""
    model = small_cnn(batch_norm=True).eval()
    state = copy.deepcopy(model.state_dict())
    pgd_at(
        model, torch.rand(16, 1, 8, 8), torch.arange(16) % 10, threat_model=ThreatModel("linf", 0.1), attack_mode=mode
    )
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_restarts_and_losses_only_add() -> None:
    model = small_cnn()
    x = torch.rand(256, 1, 8, 8)
    y = model(x).argmax(1)
    threat_model = ThreatModel("linf", 0.06)

    def accuracy(**settings: object) -> float:
        x_adv = PGD(threat_model, steps=3, **settings)(model, x, y, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        return float((~misclassified(model(x_adv), y)).float().mean())

    once, twice = accuracy(), accuracy(restarts=4)
    both = accuracy(restarts=4, losses=("ce", "margin"))
    assert 0.0 < once < 1.0
    assert both <= twice <= once


def test_result_does_not_depend_on_the_company_of_a_sample() -> None:
    model = small_cnn()
    x = torch.rand(32, 1, 8, 8)
    y = model(x).argmax(1)
    threat_model = ThreatModel("linf", 0.05)
    attack = PGD(threat_model, steps=5, random_start=False, losses=("ce", "margin"))
    together = attack(model, x, y)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_nan_logits_count_as_misclassified() -> None:
    logits = torch.tensor([[2.0, 1.0], [torch.nan, 1.0], [2.0, torch.nan], [1.0, 1.0]])
    assert misclassified(logits, torch.zeros(4, dtype=torch.int64)).tolist() == [False, True, True, True]


def test_margin_loss() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin_loss(logits, torch.tensor([0, 0])).tolist() == [-1.0, 5.0]


def test_empty_batch() -> None:
    x = torch.empty(0, 1, 8, 8)
    assert PGD(ThreatModel("l2", 0.1))(small_cnn(), x, torch.empty(0, dtype=torch.int64)).shape == x.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"losses": ("dlr",)}, f"losses must be among {', '.join(LOSSES)}, got 'dlr'"),
        ({"losses": ()}, "losses is empty"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(ThreatModel("linf", 0.1), **settings)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.full((2, 1, 8, 8), 1.5), torch.zeros(2, dtype=torch.int64), r"x must lie in the box \[0.0, 1.0\]"),
        (torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2, dtype=torch.int64), "x must lie in the box"),
        (torch.rand(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), r"x must be \[N, …\] and y \[N\]"),
        (torch.rand(2, 1, 8, 8), torch.tensor([1, 10]), r"y must lie in \[0, 10\), got values in \[1, 10\]"),
        (torch.rand(2, 1, 8, 8), torch.tensor([-1, 3]), r"y must lie in \[0, 10\), got values in \[-1, 3\]"),
    ],
)
def test_bad_batches(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(ThreatModel("linf", 0.1))(small_cnn(), x, y)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be callable, got str"):
        PGD(ThreatModel("linf", 0.1))("resnet-18", torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))


def test_probabilities_in_the_place_of_logits_are_told() -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    attack = PGD(ThreatModel("linf", 0.1), steps=2)
    with pytest.warns(AutoAttackWarning, match="seems to return probabilities: attacks need logits") as told:
        attack(nn.Sequential(small_cnn(), nn.Softmax(1)), x, y)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(nn.Sequential(small_cnn(), nn.LogSoftmax(1)), x, y)


def test_attacks_within_no_grad() -> None:
    """Evaluation code is often under no_grad as a whole: the attack is the same there, and leaves the mode alone."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
    attack = PGD(ThreatModel("linf", 0.1), steps=4, restarts=2, losses=("ce", "margin"))
    expected = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("made_within", [False, True])
@pytest.mark.parametrize("called_within", [False, True])
def test_attacks_within_inference_mode(made_within: bool, called_within: bool) -> None:
    """Tensors that are made in inference mode take no gradients; attacks go on with copies of them, outside of it."""
    model, ball = small_cnn().eval(), ThreatModel("linf", 0.1)
    x = torch.rand(6, 1, 8, 8)
    y = model(x).argmax(1)
    adversary = AutoAttack(model, eps=0.1, seed=0, version="custom", attacks_to_run=["apgd-ce", "fab"], verbose=False)
    adversary.apgd.n_iter = adversary.fab.n_iter = 3
    calls = (
        adversary.run_standard_evaluation,
        lambda x, y: adversary.accuracy_curve(x, y, radii=[0.1]).adversarial,
        lambda x, y: adversary.apgd.perturb(x),
        lambda x, y: torch.tensor(adversary.clean_accuracy(x, y)),
        lambda x, y: adversary.apgd(model, x, y),
        lambda x, y: PGD(ball, steps=3, random_start=False)(model, x, y),
    )
    with torch.inference_mode(made_within):
        own_x, own_y = x.clone(), y.clone()
    for call in calls:
        expected = call(x, y)
        with torch.inference_mode(called_within):
            assert torch.equal(call(own_x, own_y), expected)
            assert torch.is_inference_mode_enabled() == called_within


class Blind(nn.Module):
    """A model from whose logits no graph leads to x."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(64, 10), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.how != "no_grad"):
            return self.linear(x.detach().flatten(1))


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_model_without_a_graph_is_told_so(how: str) -> None:
    model, x, ball = Blind(how).eval(), torch.rand(4, 1, 8, 8), ThreatModel("linf", 0.1)
    y = model(x).argmax(1)
    posterior = KernelDensity(x, torch.arange(4) % 2, num_classes=2, sigma=1.0)
    two = Blind(how)
    two.linear = nn.Linear(64, 2)
    calls = [
        lambda: PGD(ball, steps=2)(model, x, y),
        lambda: AutoAttack(model, eps=0.1, verbose=False).run_standard_evaluation(x, y),
        lambda: FAB(ball, targeted=False)(model, x, y),
        lambda: objectives.pgd_at(model, x, y, threat_model=ball, steps=2),
        lambda: objectives.score_direct(two, x, y % 2, threat_model=ball, posterior=posterior, steps=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the model must be differentiable in x, but no graph leads"):
            call()
