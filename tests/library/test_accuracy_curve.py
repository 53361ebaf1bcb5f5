"""Robust accuracy at several radii: at each at least what an evaluation of its own finds, for less work."""

import json
import math
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, alone, attack, data, verdict
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from scorematch import AutoAttack, ThreatModel
from scorematch.attacks import APGD, FAB
from scorematch.attacks.curve import AccuracyCurve
from scorematch.intervals import wilson
from scorematch.threat_model import ORDERS

RADII = {"Linf": (0.01, 0.03, 0.02), "L2": (0.1, 0.2, 0.3), "L1": (0.5, 1.0, 1.5)}


def lengths(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1, p=ORDERS[norm.lower()])


@cache
def whole(norm: str) -> AccuracyCurve:
    """Of the standard version, of all samples at once by one worker."""
    model, x, y = data()
    return attack(model, norm, workers=1).accuracy_curve(x, y, radii=RADII[norm], bs=COUNT)


def direct(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, **options
) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """Of an evaluation at each radius by itself: which samples are robust, and their nearest misclassified points."""
    stands, nearest = {}, {}
    for radius in sorted(RADII[norm]):
        adversary = attack(model, norm, eps=radius, **options)
        adversary.run_standard_evaluation(x, y)
        stands[radius] = torch.tensor(adversary.report["robust"])
        found = adversary.report["nearest"]
        nearest[radius] = torch.tensor([math.inf if d is None else d for d in found], dtype=torch.float64)
    return stands, nearest


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_a_curve_is_what_evaluations_find_together(norm: str, version: str) -> None:
    model, x, y = data()
    stands, nearest = direct(model, x, y, norm, version=version)
    adversary = attack(model, norm, version=version)
    curve = adversary.accuracy_curve(x, y, radii=RADII[norm], bs=16)
    assert curve.radii == tuple(sorted(RADII[norm]))
    fell = torch.full((COUNT,), math.inf, dtype=torch.float64)
    known = fell.clone()
    for radius in curve.radii:
        attacked = fell.isinf() & (known > radius)
        known = torch.where(attacked, torch.minimum(known, nearest[radius]), known)
        fell = fell.where(~(fell.isinf() & (~stands[radius] | (known <= radius))), radius)
    torch.testing.assert_close(curve.nearest, torch.minimum(known, fell), rtol=0, atol=1e-9)
    for radius in curve.radii:
        assert curve.accuracy_at(radius) <= stands[radius].double().mean().item()
        assert not (curve.nearest[~stands[radius]] > radius).any(), "what falls alone falls here"
    assert curve.clean_accuracy == (COUNT - 2) / COUNT
    accuracies = [curve.clean_accuracy, *curve.robust_accuracy.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[1] > accuracies[-1] > 0, "the test needs samples that fall on the way"


@pytest.mark.parametrize("norm", list(RADII))
def test_every_verdict_has_its_point(norm: str) -> None:
    model, x, y = data()
    curve = whole(norm)
    with pytest.raises(ValueError, match=rf"radius must lie in \[0, {max(RADII[norm]):g}\], the largest attacked"):
        curve.accuracy_at(2 * max(RADII[norm]))
    within = curve.nearest <= curve.radii[-1]
    assert torch.equal(verdict(model, curve.adversarial, y), ~within)
    assert torch.equal(curve.adversarial[~within], x[~within])
    torch.testing.assert_close(lengths(curve.adversarial, x, norm)[within], curve.nearest[within], rtol=0, atol=1e-9)
    assert curve.adversarial.min() >= 0
    assert curve.adversarial.max() <= 1


class Counting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.samples = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.model(x)


def test_a_curve_costs_less_than_its_evaluations() -> None:
    model, x, y = data()
    counting = Counting(model)
    direct(counting, x, y, "Linf")
    apart, counting.samples = counting.samples, 0
    curve = attack(counting).accuracy_curve(x, y, radii=RADII["Linf"])
    assert counting.samples < 0.85 * apart
    assert ["fab-t" in report["attacks"] for report in curve.reports] == [True, False, False]


def test_fab_walks_the_same_way_at_every_radius() -> None:
    """What it finds at the smallest radius says whether a sample falls at a larger one, without a pass."""
    model, x, y = data()
    for name in ("fab", "fab-t"):
        curve = alone(model, name).accuracy_curve(x, y, radii=[0.001, 0.02, 0.03])
        assert curve.robust_accuracy[0.001] > curve.robust_accuracy[0.02] > curve.robust_accuracy[0.03]
        assert [list(report["attacks"]) for report in curve.reports] == [[name], [], []]
        for radius in (0.02, 0.03):
            adversary = alone(model, name, eps=radius)
            adversary.run_standard_evaluation(x, y)
            assert adversary.report["robust_accuracy"] == curve.robust_accuracy[radius]
            assert curve.reports[1]["fallen_by"].count("smaller radius") > 0


def test_the_report_tells_minimal_norms() -> None:
    model, x, y = data()
    adversary = attack(model)
    x_adv = adversary.run_standard_evaluation(x, y)
    report = adversary.report
    nearest = torch.tensor([math.inf if d is None else d for d in report["nearest"]], dtype=torch.float64)
    stands = torch.tensor(report["robust"])
    assert (nearest[:2] == 0).all(), "wrong from the start"
    torch.testing.assert_close(nearest[~stands], lengths(x_adv, x, "Linf")[~stands], rtol=0, atol=1e-12)
    beyond = stands & nearest.isfinite()
    assert beyond.sum() > 3
    assert (nearest[beyond] > adversary.eps).all()
    points = FAB(ThreatModel("linf", 1.0), n_iter=10)(model, x, y)  # the first that it meets
    assert (lengths(points, x, "Linf")[beyond] >= nearest[beyond] - 1e-9).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_and_workers_do_not_matter(workers: int) -> None:
    model, x, y = data()
    small = attack(model, workers=workers).accuracy_curve(x, y, radii=RADII["Linf"], bs=7)
    torch.testing.assert_close(small.nearest, whole("Linf").nearest, rtol=0, atol=1e-9)
    torch.testing.assert_close(small.adversarial, whole("Linf").adversarial, rtol=0, atol=1e-9)


class Killed(BaseException):
    pass


class Killer(Counting):
    """Dies after so many samples."""

    limit = math.inf

    def forward(self, x: Tensor) -> Tensor:
        if self.samples > self.limit:
            raise Killed
        return super().forward(x)


def test_an_interrupted_curve_goes_on(tmp_path: Path) -> None:
    model, x, y = data()
    killer, path = Killer(model), tmp_path / "state.pt"
    expected = attack(killer).accuracy_curve(x, y, radii=RADII["Linf"])
    need, kills = killer.samples, 0
    while True:
        killer.samples, killer.limit = 0, need // 4
        try:
            actual = attack(killer, save_every=0).accuracy_curve(x, y, radii=RADII["Linf"], state_path=path)
            break
        except Killed:
            kills += 1
            assert kills < 30
    assert kills > 2
    assert torch.equal(actual.nearest, expected.nearest)
    assert torch.equal(actual.adversarial, expected.adversarial)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [f"state.pt.eps{radius}" for radius in sorted(RADII["Linf"])]

    killer.samples, killer.limit = 0, math.inf
    longer = attack(killer).accuracy_curve(x, y, radii=[*RADII["Linf"], 0.04], state_path=path)
    assert longer.robust_accuracy[0.04] < longer.robust_accuracy[0.03]
    assert (longer.nearest <= actual.nearest).all()
    assert killer.samples < need, "what was evaluated is not attacked again"
    with pytest.raises(ValueError, match=r"is of another smaller radii: \[0.01\], now \[0.01, 0.015\]"):
        attack(model).accuracy_curve(x, y, radii=[0.01, 0.015, 0.02], state_path=path)


def test_a_budget_is_for_all_radii() -> None:
    model, x, y = data()
    curve = attack(model, budget=1e-6).accuracy_curve(x, y, radii=[0.01, 0.03])
    assert curve.complete == {0.01: False, 0.03: False}
    assert len(curve.reports) == 1
    assert curve.robust_accuracy == {0.01: curve.clean_accuracy, 0.03: curve.clean_accuracy}
    assert "| 0.03 | at most 95.00 |" in curve.table()


def test_tables_and_json() -> None:
    model, x, y = data()
    adversary = attack(model, version="fast")
    curve = adversary.accuracy_curve(x, y, radii=[0.03, 0.01])
    lines = curve.table().splitlines()
    assert lines[0] == "| linf eps | accuracy, % | 95 % interval | forward passes | backward passes | seconds |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0", "| 0.01", "| 0.03"]
    assert f"{100 * curve.robust_accuracy[0.01]:.2f}" in lines[3]
    for report, line in zip(curve.reports, lines[3:], strict=True):
        passes = [sum(one[kind] for one in report["attacks"].values()) for kind in ("forwards", "backwards")]
        assert line.split(" | ")[3:5] == [f"{count:,}" for count in passes]
    assert curve.table("latex").startswith(r"\begin{tabular}{lrrrrr}")
    with pytest.raises(ValueError, match="form must be markdown or latex, got 'html'"):
        curve.table("html")
    told = json.loads(json.dumps(curve.as_dict()))
    assert told["robust_accuracy"] == list(curve.robust_accuracy.values())
    assert told["nearest"].count(None) == int(curve.nearest.isinf().sum())
    assert set(adversary.report) == {"0.01", "0.03"}
    low, high = curve.intervals[0.03]
    assert low < curve.robust_accuracy[0.03] < high
    with pytest.raises(ValueError, match=r"radius must lie in \[0, 0.03\], the largest attacked, got 0.04"):
        curve.accuracy_at(0.04)
    with pytest.raises(ValueError, match=r"radius must lie in \[0, 0.03\], the largest attacked, got -0.5"):
        curve.accuracy_at(-0.5)
    for radius, interval in curve.intervals.items():
        assert interval == wilson(round(COUNT * curve.robust_accuracy[radius]), COUNT)


def test_a_table_says_which_radius_is_not_complete() -> None:
    report = {"complete": True, "attacks": {"apgd-ce": {"forwards": 7, "backwards": 5, "seconds": 1.0}}}
    curve = AccuracyCurve("linf", (0.1, 0.2), torch.tensor([0.0, math.inf]), torch.zeros(2, 1), (report,))
    lines = curve.table().splitlines()[2:]
    assert ["at most" in line for line in lines] == [False, False, True]
    assert [line.split(" | ")[3:5] for line in lines[1:]] == [["7", "5"], ["0", "0"]]


def test_points_that_rounding_puts_beyond_the_radius_count() -> None:
    curve = AccuracyCurve("linf", (0.1,), torch.tensor([0.0, 0.1, math.inf]), torch.zeros(3, 2), ())
    assert curve.robust_accuracy == {0.1: 1 / 3}
    model, x, y = data()
    model, x = model.float(), x.float()
    adversary = alone(model, "apgd-ce")
    curve = adversary.accuracy_curve(x, y, radii=[0.03])
    assert curve.robust_accuracy[0.03] == adversary.report["0.03"]["robust_accuracy"] < 1


def test_radii_may_be_a_tensor_but_are_several() -> None:
    model, x, y = data()
    radii = torch.tensor([0.01, 0.03], dtype=torch.float64)
    assert attack(model).accuracy_curve(x, y, radii=radii).radii == (0.01, 0.03)
    with pytest.raises(TypeError, match=r"radii must be a list of numbers, got 0\.01"):
        attack(model).accuracy_curve(x, y, radii=0.01)


@pytest.mark.parametrize("radii", [[], [0.0], [-0.1, 0.1], [math.inf], [math.nan], ["0.1"], [True]])
def test_radii_that_are_none_are_refused(radii: list) -> None:
    model, x, y = data()
    with pytest.raises(ValueError, match="radii must be positive and finite numbers, at least one, got"):
        attack(model).accuracy_curve(x, y, radii=radii)


def test_attacks_whose_radius_cannot_be_changed_are_refused() -> None:
    model, x, y = data()
    adversary = attack(model)
    adversary.fab.eps = 0.01
    with pytest.raises(
        ValueError, match=r"fab-t.eps is 0.01: a curve sets the radius of every attack, leave it at 0.03"
    ):
        adversary.accuracy_curve(x, y, radii=[0.01, 0.02])

    class Own:
        name, images_only, n_restarts, threat_model = "own", False, 1, ThreatModel("linf", 0.03)

        def check(self) -> None: ...
        def parts(self, num_classes: int) -> int: ...
        def cost(self) -> tuple[int, int]: ...
        def run_part(self, classifier, batch): ...

    adversary = AutoAttack(model, eps=0.03, version="custom", attacks_to_run=[Own()])
    with pytest.raises(ValueError, match="own is not an attack of scorematch, so its radius cannot be changed"):
        adversary.accuracy_curve(x, y, radii=[0.01])
    with pytest.raises(ValueError, match="eps must not be larger than the box"):
        attack(model).accuracy_curve(x, y, radii=[0.01, 2.0])


def test_a_loss_of_ones_own_makes_a_curve() -> None:
    model, x, y = data()

    def gap(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.logsumexp(1) - logits.gather(1, labels[:, None]).squeeze(1)

    own = APGD(ThreatModel("linf", 0.03), loss=gap, n_iter=10)
    adversary = AutoAttack(model, eps=0.03, seed=0, version="custom", attacks_to_run=[own], verbose=False)
    accuracies = list(adversary.accuracy_curve(x, y, radii=[0.01, 0.03]).robust_accuracy.values())
    assert accuracies[0] > accuracies[1] > 0


def _curve_of_a_share(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model, x, y = data()
    adversary = attack(model, share_samples=True)
    curve = adversary.accuracy_curve(x, y, radii=RADII["Linf"], bs=8, state_path=Path(folder) / "state.pt")
    torch.save((curve.nearest, curve.adversarial), f"{folder}/result{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_curve_of_one(processes: ForkServerContext, tmp_path: Path) -> None:
    expected = whole("Linf")
    start_processes(_curve_of_a_share, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    for rank in range(2):
        nearest, adversarial = torch.load(tmp_path / f"result{rank}.pt")
        torch.testing.assert_close(nearest, expected.nearest, rtol=0, atol=1e-9)
        torch.testing.assert_close(adversarial, expected.adversarial, rtol=0, atol=1e-9)


def test_a_search_in_low_precision_loses_no_success_at_a_larger_radius() -> None:
    """What FAB finds nearest lies so close to the boundary that the check in full precision may not confirm it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x, radii = torch.rand(64, 1, 8, 8), (0.001, 0.05)
    y = model(x).argmax(1)

    def fab(eps: float) -> AutoAttack:
        adversary = alone(model, "fab-t", eps=eps, search_dtype=torch.bfloat16)
        adversary.fab.n_iter = 20
        return adversary

    adversary = fab(radii[1])
    adversary.run_standard_evaluation(x, y)
    robust = torch.tensor(adversary.report["robust"])
    curve = fab(radii[1]).accuracy_curve(x, y, radii=radii)
    assert not (~robust & (curve.nearest > radii[1])).any()
