"""The checks for masked gradients: each passes and fails where it should; a model that rounds its input is caught."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scorematch import PGD, ThreatModel
from training import data
from training.measures import obfuscation

LINF = ThreatModel("linf", 0.1)


class Rounded(nn.Module):
    """The classifier of rounded pixels: the same accuracy, no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 16).round() / 16)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier of the digits, adversarially trained for a second, and test samples."""
    loaded = data.load(data.DataSettings("digits"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attack = PGD(LINF, steps=2, restarts=1, losses=("ce",))
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        for index in torch.randperm(len(loaded.x_train), generator=generator).split(128):
            x, y = loaded.x_train[index], loaded.y_train[index]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(attack(model, x, y, generator=generator)), y).backward()
            optimizer.step()
    return model.eval(), loaded.x_test[:60], loaded.y_test[:60]


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in results["checks"]}


def test_an_honest_model_passes(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    results = obfuscation.audit(model, x, y, LINF, steps=20, restarts=2, other=Rounded(model), batch=25)
    accuracies = [point["acc"] for point in results["curve"]]
    assert [point["eps"] for point in results["curve"]] == sorted({0.0, 0.1, *obfuscation.LINF_RADII})
    assert accuracies[0] == results["clean_acc"] > 80
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == 0.0
    assert 20 < results["pgd_acc"] < results["clean_acc"]
    assert all(low <= point["acc"] <= high for point in results["curve"] for low, high in [point["interval"]])
    assert set(statuses(results).values()) == {"pass"}
    assert "no sign of masked gradients" in obfuscation.table(results)
    json.dumps(results, allow_nan=False)


def test_each_check_has_an_attack_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the steps; four times the restarts, which are new; one step of length eps from clean x."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(8, 1, 2, 2)
    asked: dict[str, Any] = {}

    def pgd(self: Any, standing: Tensor, name: str, attack: Any, purpose: int = 0, source: Any = None) -> Tensor:
        asked[name] = (attack, purpose, int(standing.sum()))
        return mask(5, 8)

    monkeypatch.setattr(obfuscation._Attacks, "pgd", pgd)
    monkeypatch.setattr(obfuscation, "QUERIES", 1)
    obfuscation.audit(model, x, model(x).argmax(1), LINF, steps=3, restarts=2, other=model)
    names = ("pgd, eps 0.1", "pgd, 30 steps", "pgd, 8 restarts", "transfer", "one step")
    attacks, purposes, standing = zip(*(asked[name] for name in names), strict=True)
    counts = [(attack.steps, attack.restarts, attack.random_start) for attack in attacks]
    assert counts == [(3, 2, True), (30, 2, True), (3, 8, True), (3, 2, True), (1, 1, False)]
    assert attacks[-1].threat_model.step_length == LINF.eps
    assert purposes[2] != purposes[0], "the same random starts would find nothing more"
    assert standing == (8, 5, 5, 8, 8), "longer searches are of what PGD leaves, all others of what is right"


def test_a_model_that_rounds_its_input_is_caught(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    results = obfuscation.audit(Rounded(model), x, y, LINF, steps=5, restarts=1, other=model)
    status = statuses(results)
    assert results["pgd_acc"] > 60, "gradients alone find little"
    for name in (
        "queries find nothing that gradients miss",
        "no accuracy at the largest eps",
        "attacks on another model are weaker",
        "random points are weaker than PGD",
    ):
        assert status[name] == "FAIL", name
    assert "gradients may be masked: no accuracy at the largest eps" in obfuscation.table(results)


def test_without_a_second_model_transfer_is_not_run() -> None:
    found = dict.fromkeys(("steps", "restarts", "random", "square", "single"), mask(50))
    *_, last = obfuscation.checks({0.0: 90.0, 0.1: 50.0, 1.0: 0.0}, mask(50), found, steps=40, restarts=5)
    assert (last["status"], last["value"], last["text"]) == ("not run", None, "no --transfer-from")


def judged(curve: tuple[float, float, float], transfer: bool = True) -> dict[str, Any]:
    """Results of a model without a sign of masked gradients."""
    base = mask(int(curve[1]))
    found = {"steps": base, "restarts": base, "random": mask(80), "square": base, "single": mask(60)}
    found |= {"transfer": mask(70)} if transfer else {}
    accuracies = dict(zip((0.0, 0.1, 1.0), curve, strict=True))
    rows = obfuscation.checks(accuracies, base, found, steps=40, restarts=5)
    points = [{"eps": eps, "acc": acc, "interval": [acc, acc]} for eps, acc in accuracies.items()]
    return {"clean_acc": curve[0], "pgd_acc": curve[1], "curve": points, "checks": rows}


def test_the_verdict_says_how_much_it_rests_on() -> None:
    def last(results: dict[str, Any]) -> str:
        return obfuscation.table(results).splitlines()[-1]

    assert last(judged((90, 50, 0))) == "no sign of masked gradients in the 8 checks that ran"
    assert last(judged((90, 50, 0), transfer=False)) == "no sign of masked gradients in the 7 checks that ran"
    assert last(judged((90, 0, 0))) == "nothing to judge: no sample is classified correctly under PGD"
    assert last(judged((0, 0, 0))) == "nothing to judge: no sample is classified correctly"
    assert last(judged((90, 0, 10))).startswith("gradients may be masked: no accuracy at the largest eps")


@pytest.mark.parametrize("source", ["--run", "--checkpoint", "--model-from"])
def test_a_model_does_not_attack_itself_by_transfer(call: Any, tmp_path: Path, source: str) -> None:
    options = (
        "--objective standard --eps 0.1 --epochs 1 --limit 100 --steps 1 --validation-steps 1 "
        "--eval-steps 1 --eval-restarts 1 --curve-points 0 --autoattack none --threads 1 --out here"
    )
    assert call("run", *options.split()).status == 0
    given = [source, "here" if source == "--run" else "here/best.pt"]
    given += ["--data", "digits", "--eps", "0.1"] if source == "--model-from" else []
    attack = ["--attack", "obfuscation", "--steps", "1", "--restarts", "1", "--limit", "2"]
    ending = call("evaluate", *given, *attack, "--transfer-from", tmp_path / "here" / "best.pt")
    assert (ending.status, ending.out) == (2, ""), ending
    assert "here/best.pt is the classifier that is judged, expected another one" in ending.err


def mask(standing: int, count: int = 100) -> Tensor:
    return torch.arange(count) < standing


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"curve": [90, 50, 1]}, "no accuracy at the largest eps"),
        ({"curve": [40, 50, 0]}, "accuracy falls with eps"),
        ({"steps": 48}, None),
        ({"steps": 47}, "PGD has converged"),
        ({"restarts": 48}, None),
        ({"restarts": 47}, "restarts suffice"),
        ({"random": 50}, None),
        ({"random": 49}, "random points are weaker than PGD"),
        ({"square": 49}, "queries find nothing that gradients miss"),
        ({"single": 49}, "one step is weaker than many"),
        ({"transfer": 49}, "attacks on another model are weaker"),
    ],
)
def test_each_check_fails_by_itself(changes: dict[str, Any], failed: str | None) -> None:
    """PGD leaves 50 of 100 samples."""
    curve = dict(zip((0.0, 0.1, 1.0), changes.get("curve", (90, 50, 0)), strict=True))
    found = {"steps": 50, "restarts": 50, "random": 80, "square": 50, "single": 60, "transfer": 70, **changes}
    found.pop("curve", None)
    masks = {name: mask(count) for name, count in found.items()}
    rows = obfuscation.checks(curve, mask(50), masks, steps=40, restarts=5)
    assert [row["name"] for row in rows if row["status"] == "FAIL"] == ([failed] if failed else [])
    assert len(rows) == 8


def test_the_largest_change_is_named_with_the_radius_that_it_ends_at() -> None:
    found = dict.fromkeys(("steps", "restarts", "random", "square", "single"), mask(50))
    curve = {0.0: 90.0, 0.1: 50.0, 0.2: 53.0, 0.4: 0.0}
    row = obfuscation.checks(curve, mask(50), found, steps=40, restarts=5)[1]
    assert (row["value"], row["text"]) == (3.0, "largest change +3.0 points, up to eps 0.2")


def test_square_may_fool_two_samples_in_a_thousand() -> None:
    """0.2 points, as AutoAttack has it."""
    found = {name: mask(500, 1000) for name in ("steps", "restarts", "random", "single")}
    for standing, status in ((498, "pass"), (497, "FAIL")):
        rows = obfuscation.checks(
            {0.0: 90.0, 0.1: 50.0, 1.0: 0.0},
            mask(500, 1000),
            {**found, "square": mask(standing, 1000)},
            steps=40,
            restarts=5,
        )
        assert {row["name"]: row["status"] for row in rows}["queries find nothing that gradients miss"] == status


def test_radii_reach_across_the_box_and_hold_eps_once() -> None:
    linf = obfuscation.radii(ThreatModel("linf", 8 / 255), 3072)
    assert linf == sorted(obfuscation.LINF_RADII)
    assert obfuscation.radii(ThreatModel("linf", 0.15), 64) == sorted([0.15, *obfuscation.LINF_RADII])
    assert obfuscation.radii(ThreatModel("linf", 0.031372549), 3072)[2] == 0.031372549
    l2 = obfuscation.radii(ThreatModel("l2", 0.5), 3072)
    assert l2 == sorted(set(l2))
    assert 0.5 in l2
    assert l2[-1] == pytest.approx(math.sqrt(3072))
    assert obfuscation.radii(ThreatModel("l2", 0.5), 64) == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 2.0, 4.0, 8.0]
    assert obfuscation.radii(ThreatModel("l1", 12.0), 3072)[-1] == pytest.approx(3072)
    assert obfuscation.radii(ThreatModel("l2", 20.0), 64) == [5.0, 8.0, 20.0]


def test_the_program_writes_plot_and_numbers(call: Any, tmp_path: Path) -> None:
    options = (
        "--objective standard --eps 0.1 --norm l2 --epochs 1 --limit 200 --steps 1 --validation-steps 1 "
        "--eval-steps 1 --eval-restarts 1 --curve-points 0 --autoattack none --threads 1 --out here"
    )
    assert call("run", *options.split()).status == 0
    attack = ["--attack", "obfuscation", "--steps", "2", "--restarts", "1", "--limit", "12", "--threads", "1"]
    files = ["--plot", "figures/accuracy.png", "--out", "report.json"]
    ending = call("evaluate", "--run", "here", *attack, *files, "--transfer-from", "here/checkpoint.pt")
    assert ending.status == 0, ending
    assert (tmp_path / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "report.json").read_text())
    assert (results["steps"], results["restarts"], results["samples"]) == (2, 1, 12)
    assert [check["name"] for check in results["checks"] if check["status"] == "not run"] == []
    assert results["curve"][-1]["eps"] == pytest.approx(8.0)
    for check in results["checks"]:
        assert check["text"] in ending.out
