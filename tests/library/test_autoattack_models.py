"""What models may return to attacks: NaN, infinite logits, other precisions; compiled and scripted modules."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, EPS, alone, attack, data, verdict
from torch import Tensor, nn

from scorematch import PGD, AutoAttack, ThreatModel
from scorematch.attacks import APGD, FAB, AutoAttackWarning, Square
from scorematch.threat_model import ORDERS

NORMS = ["Linf", "L2", "L1"]


class Spoiled(torch.autograd.Function):
    """The identity, whose gradient is NaN in the first pixel."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, :, 0, 0] = math.nan
        return gradient


def evaluated(adversary: AutoAttack, x: Tensor, y: Tensor, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        return adversary.run_standard_evaluation(x, y, **options)


def inside(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> bool:
    offset = (x_adv - x).flatten(1)
    length = offset.norm(dim=1, p=ORDERS[norm.lower()])
    return bool((length <= eps + 1e-6).all()) and bool(((x_adv >= 0) & (x_adv <= 1)).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t"])
def test_gradients_of_nan_leave_their_pixels_alone(name: str, norm: str) -> None:
    model, x, y = data()

    def spoiled(images: Tensor) -> Tensor:
        return model(Spoiled.apply(images))

    adversary = alone(spoiled, name, norm)
    with pytest.warns(AutoAttackWarning, match="gradients are not finite for 40 of 40 points"):
        x_adv = adversary.run_standard_evaluation(x, y)
    stands = verdict(model, x_adv, y)
    clean = alone(model, name, norm)
    clean.run_standard_evaluation(x, y)
    assert inside(x_adv, x, norm, EPS[norm])
    assert clean.report["robust_accuracy"] < adversary.report["clean_accuracy"]
    assert adversary.report["robust_accuracy"] == stands.double().mean().item()
    assert adversary.report["robust_accuracy"] <= clean.report["robust_accuracy"] + 0.1, "63 pixels of 64 are left"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "se"])
def test_pgd_leaves_pixels_of_nan_gradients_alone(loss: str, norm: str) -> None:
    model, x, y = data()
    threat_model = ThreatModel(norm.lower(), EPS[norm])
    wrapped = nn.Sequential(_Spoils(), model)
    x_adv = PGD(threat_model, steps=10, losses=(loss,))(wrapped, x, y, torch.Generator().manual_seed(0))
    assert inside(x_adv, x, norm, EPS[norm])
    fallen = ~verdict(model, x_adv, y)
    assert 2 < fallen.sum() < COUNT


class _Spoils(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Spoiled.apply(x)


def excluding(model: nn.Module, how: str):
    """A model that excludes its last class at every point."""

    def masked(images: Tensor) -> Tensor:
        logits = model(images)
        if how == "mask":
            return logits.masked_fill(torch.arange(10) == 9, -math.inf)
        shares = logits.softmax(1)
        return torch.cat([shares[:, :9], shares[:, 9:] * 0], 1).log()  # its gradient there is NaN

    return masked


@pytest.mark.parametrize("how", ["mask", "logarithm of 0"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_infinite_logits_do_not_end_an_evaluation(version: str, norm: str, how: str) -> None:
    model, x, _ = data()
    masked = excluding(model, how)
    y = masked(x).argmax(1)
    adversary = attack(masked, norm, version=version)
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
    adversary.apgd.eot_iter = 1
    x_adv = evaluated(adversary, x, y)
    assert inside(x_adv, x, norm, EPS[norm])
    stands = masked(x_adv).argmax(1) == y
    assert adversary.report["robust_accuracy"] == stands.double().mean().item()
    if how == "mask":
        assert not stands.all()
    assert adversary.report["nan_samples"] == {"clean": [], "attacked": []}


class Blind(nn.Module):
    """NaN at images whose first pixel is above a limit."""

    def __init__(self, model: nn.Module, limit: float = 0.9, column: int | slice = 3) -> None:
        super().__init__()
        self.model, self.limit, self.column = model, limit, column

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x).clone()
        logits[x[:, 0, 0, 0] > self.limit, self.column] = math.nan
        return logits


def test_the_first_class_is_none_of_nan() -> None:
    x, y = torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    adversary = alone(lambda points: 1e3 * torch.eye(3)[0] + points.flatten(1)[:, :3], "apgd-ce")
    adversary.run_standard_evaluation(x, y)
    assert adversary.report["robust_accuracy"] == 1.0
    assert adversary.report["nan_samples"] == {"clean": [], "attacked": []}


@pytest.mark.parametrize("column", [3, slice(None)])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_counts_as_misclassified_and_is_listed(norm: str, column) -> None:
    model, x, y = data()
    x[:, 0, 0, 0] = 0.5
    x[5:8, 0, 0, 0] = 0.95  # NaN when clean
    x[20:23, 0, 0, 0] = 0.9  # NaN after a small step
    y = model(x).argmax(1)
    blind = Blind(model, column=column)
    adversary = attack(blind, norm)
    with pytest.warns(AutoAttackWarning, match=r"the model returns NaN for 3 clean samples \(5, 6, 7\)"):
        x_adv, labels = adversary.run_standard_evaluation(x, y, return_labels=True)
    report = adversary.report
    assert report["clean_accuracy"] == (COUNT - 3) / COUNT
    nan = blind(x_adv).isnan().any(1)
    assert report["nan_samples"]["clean"] == [5, 6, 7]
    assert report["nan_samples"]["attacked"] == [n for n in nan.nonzero().flatten().tolist() if n not in (5, 6, 7)]
    assert (labels[nan] == -1).all()
    assert torch.equal(labels[~nan], blind(x_adv)[~nan].argmax(1))
    assert report["robust_accuracy"] == (labels == y).double().mean().item()
    assert torch.equal(x_adv[5:8], x[5:8])
    assert adversary.clean_accuracy(x, y) == report["clean_accuracy"]


@pytest.mark.parametrize("norm", NORMS)
def test_every_attack_finds_points_of_nan(norm: str) -> None:
    """A model that returns NaN beyond its decision boundary."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.stack([0 * x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], 1)
            return logits.masked_fill((x[:, 0, 0, :1] > 0.5), math.nan)

    x = torch.full((4, 1, 8, 8), 0.5 - 1e-4)
    y = torch.zeros(4, dtype=torch.int64)
    threat_model = ThreatModel(norm.lower(), 0.3)
    attacks = {"apgd": APGD(threat_model), "square": Square(threat_model)}
    attacks |= {"fab": FAB(threat_model, targeted=False), "fab-t": FAB(threat_model)}
    attacks["pgd"] = PGD(threat_model)
    for name, run in attacks.items():
        x_adv = run(Corner(), x, y)
        assert Corner()(x_adv).isnan().any(1).all(), name
        assert inside(x_adv, x, norm, 0.3), name


def test_pgd_and_autoattack_agree_on_nan() -> None:
    model, x, _ = data()
    y = model(x).argmax(1)
    blind = Blind(model, limit=0.5)
    nan = blind(x).isnan().any(1)
    assert 0 < nan.sum() < COUNT
    tiny = 1e-6
    by_pgd = PGD(ThreatModel("linf", tiny), steps=2)(blind, x, y)
    by_autoattack = evaluated(alone(blind, "apgd-ce", eps=tiny), x, y)
    for points in (by_pgd, by_autoattack):
        assert torch.equal(points[nan], x[nan]), "misclassified from the start: not attacked"
    assert alone(blind, "apgd-ce").clean_accuracy(x, y) == (~nan).double().mean().item()


def test_a_model_that_turns_to_nan_is_no_success(tmp_path: Path) -> None:
    """NaN at points that it classified before: the model has changed, and the attack found nothing."""
    model, x, y = data()
    calls = 0

    def failing(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(images) * (math.nan if calls > 60 else 1.0)

    with pytest.raises(
        ValueError, match=r"the model returned NaN for (\d+) of \1 clean samples that it classified before"
    ):
        evaluated(attack(failing), x, y, state_path=tmp_path / "state.pt")


def test_samples_of_nan_survive_a_resume(tmp_path: Path) -> None:
    model, x, y = data()
    blind = Blind(model)
    first, again = (alone(blind, "apgd-ce") for _ in range(2))
    expected = evaluated(first, x, y, state_path=tmp_path / "state.pt")
    assert first.report["nan_samples"]["clean"]
    assert torch.equal(evaluated(again, x, y, state_path=tmp_path / "state.pt"), expected)
    assert again.report["nan_samples"] == first.report["nan_samples"]
    with pytest.raises(ValueError, match="is of another model"):
        evaluated(alone(Blind(model, limit=0.5), "apgd-ce"), x, y, state_path=tmp_path / "state.pt")


def single(batch_norm: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, _ = data(batch_norm=batch_norm)
    model, x = model.float(), x.float()
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("kind", ["script", "freeze", "trace"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_scripted_models(kind: str, batch_norm: bool) -> None:
    model, x, y = single(batch_norm)
    scripted = torch.jit.trace(model, x[:2]) if kind == "trace" else torch.jit.script(model)
    if kind == "freeze":
        scripted = torch.jit.freeze(scripted)
    adversary, plain = attack(scripted), attack(model)
    evaluated(adversary, x, y)
    evaluated(plain, x, y)
    assert 0 < adversary.report["robust_accuracy"] < 1
    assert abs(adversary.report["robust_accuracy"] - plain.report["robust_accuracy"]) <= 0.03
    x_adv = PGD(ThreatModel("linf", 0.03), steps=5)(scripted, x, y)
    assert not verdict(model, x_adv, y).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_scripted_model_is_left_as_found(training: bool) -> None:
    model, x, y = single(batch_norm=True)
    scripted = torch.jit.script(model).train(training)
    evaluated(alone(scripted, "apgd-ce"), x, y)
    assert scripted.training == training
    assert all(p.requires_grad and p.grad is None for p in scripted.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_logits_of_other_precisions(dtype: torch.dtype, version: str) -> None:
    model, x, y = single()

    class Cast(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images).to(dtype)

    cast = Cast()
    y = cast(x).argmax(1)
    adversary = attack(cast, version=version)
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
    x_adv = evaluated(adversary, x, y)
    fallen = cast(x_adv).argmax(1) != y
    assert 0 < fallen.sum() < COUNT
    assert adversary.report["robust_accuracy"] == 1 - fallen.double().mean().item()
    x_adv = PGD(ThreatModel("linf", 0.03), steps=5, losses=("ce", "margin"))(cast, x, y)
    assert (cast(x_adv).argmax(1) != y).any()


def test_logits_that_are_no_floats() -> None:
    model, x, y = single()
    with pytest.raises(ValueError, match=r"the model must return floating-point logits, got torch.int64"):
        attack(lambda images: (100 * model(images)).long()).run_standard_evaluation(x, y)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_untargeted_fab_holds_few_gradients_at_once(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same points, bit for bit, whether all classes' gradients are held or one at a time."""
    model, x, y = data()
    run = FAB(ThreatModel(norm, EPS[norm.capitalize()]), targeted=False, n_iter=20)
    expected = run(model, x, y)
    assert not torch.equal(expected, x)
    monkeypatch.setattr("scorematch.attacks.fab.HELD", 1)
    assert torch.equal(run(model, x, y), expected)
    monkeypatch.setattr("scorematch.attacks.fab.HELD", 3 * x.numel())
    assert torch.equal(run(model, x, y), expected)


def test_memory_of_untargeted_fab_does_not_grow_with_the_classes() -> None:
    """Gradients of 1,000 classes: at most a bounded number of them exist at the same time."""
    sizes: list[int] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * 7 * 7, 1000)).eval()
    x = torch.rand(2, 3, 56, 56)
    y = model(x).argmax(1)
    with Watched():
        FAB(ThreatModel("linf", 1e-3), targeted=False, n_iter=1)(model, x, y)
    assert max(sizes) <= 1 << 24
    assert max(sizes) < 1000 * x.numel()


class InPlace(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.sub_(0.05).mul_(1.1))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: model.forward])
def test_a_model_that_works_in_place_is_refused_and_writes_to_no_sample(wrap) -> None:
    model, x, y = data()
    expected, in_place = x.clone(), wrap(InPlace(model).eval())
    adversary = alone(in_place, "square")
    calls = [
        lambda: adversary.run_standard_evaluation(x, y),
        lambda: adversary.accuracy_curve(x, y, radii=[0.1]),
        lambda: adversary.square.perturb(x, y),
        lambda: adversary.square.perturb(x),
    ]
    if isinstance(in_place, nn.Module):
        calls += [
            lambda: adversary.square(in_place, x, y),
            lambda: PGD(adversary.threat_model)(in_place, x, y),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=r"the model, a \w+, changes its input in place"):
            call()
        assert torch.equal(x, expected)
    clean = adversary.clean_accuracy(x, y)
    assert clean == (InPlace(model)(x.clone()).argmax(1) == y).double().mean().item()
    assert torch.equal(x, expected)


def test_perturb_leaves_samples_of_nan_that_have_no_label() -> None:
    model, x, _ = data()

    def blind(images: Tensor) -> Tensor:
        return model(images).where((images != x[3]).flatten(1).any(1)[:, None], math.nan)

    adversary = attack(blind)
    found = adversary.apgd.perturb(x)
    assert torch.equal(found[3], x[3])
    assert not torch.equal(found, x)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 1e-5), ("L2", 1e-4), ("L1", 1e-4)])
@pytest.mark.parametrize("name", ["apgd-ce", "square"])
@pytest.mark.filterwarnings("ignore::scorematch.attacks.AutoAttackWarning")
def test_a_radius_close_to_the_rounding_of_pixels(norm: str, eps: float, name: str) -> None:
    """A pixel near 1 is rounded by 3e-8; so may be a point at the very edge of the ball."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double()

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x.double())

    x = torch.rand(64, 3, 16, 16).double()
    for _ in range(5):  # close to the boundary
        x.requires_grad_()
        best = linear(x).topk(2, 1).values
        gap = best[:, 0] - best[:, 1]
        (slope,) = torch.autograd.grad(gap.sum(), x)
        length = slope.abs().flatten(1).sum(1) if norm == "Linf" else slope.square().flatten(1).sum(1)
        way = slope.sign() if norm == "Linf" else slope
        x = (x - 0.9999 * (gap / length)[:, None, None, None] * way).detach().clamp(0, 1)
    x = x.float()
    adversary = alone(Wide().eval(), name, norm, eps=eps)
    adversary.run_standard_evaluation(x, linear(x.double()).argmax(1))
    assert adversary.report["robust_accuracy"] < 1


class Holding(nn.Module):
    """A network that holds a tensor of an unusual kind."""

    def __init__(self, model: nn.Module, held: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize(
    "held",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.quint8),
        torch.ones(3, dtype=torch.complex64).conj(),
    ],
    ids=["sparse", "csr", "quantised", "conjugate"],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_buffers_of_any_kind(held: Tensor, tmp_path: Path) -> None:
    model, x, y = data()
    expected = alone(model, "apgd-ce").run_standard_evaluation(x, y)
    for _ in range(2):  # made, and read again
        found = alone(Holding(model, held), "apgd-ce").run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
        assert torch.equal(found, expected)


def test_a_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model.eval()
    x = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    adversary = alone(model, "square")
    adversary.run_standard_evaluation(x, y)
    assert adversary.report["complete"]
    assert all(parameter.requires_grad for parameter in model.parameters())
