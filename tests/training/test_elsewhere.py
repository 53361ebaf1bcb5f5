"""The programs and AutoAttack on a device that is not the CPU: nothing of theirs is left behind on it.

:mod:`elsewhere` computes that device on the CPU, so the results must be those of the CPU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, ElsewhereGenerator, elsewhere
from torch import Tensor, nn

from scorematch import AutoAttack

SMALL = (
    "--posterior-settings.steps 5 --posterior-settings.batch-size 8 --posterior-settings.width 16 "
    "--posterior-settings.depth 1"
)
DIRECT = f"--objective score_direct {SMALL} --posterior"
RUNS = [
    f"{DIRECT} score_network --awp 0.01 --averaging 0.9",
    f"{DIRECT} joint_energies --posterior-settings.folds 2 --target-mix 0.5 --accumulate 2",
    f"{DIRECT} kernel_density --shift 1 --flip --norm l2 --eps 0.5",
    f"--objective trades --divergence se --posterior noise_conditional_classifier --soft-targets {SMALL}",
    "--objective pgd_at --free-replays 2",
    "--objective trades --cutmix 0.5 --label-smoothing 0.1 --attack-start gaussian",
    "--objective gaussian --sigma 0.1 0.3 --gamma 0.5",
]


def both(call: Any, monkeypatch: pytest.MonkeyPatch, program: str, arguments: str, **names: str) -> None:
    """Call a program on the CPU and elsewhere; each must end well."""
    for device, name in names.items():
        options = arguments.replace("FOLDER", name).split()
        if device == "cpu":
            ending = call(program, *options)
        else:
            with elsewhere(monkeypatch):
                ending = call(program, *options, "--device", DEVICE)
        assert ending.status == 0, ending


@pytest.mark.parametrize("options", RUNS)
def test_a_run_is_that_of_the_cpu(
    options: str, call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = f"{options} {' '.join(tiny)} --precision float32 --out FOLDER"
    both(call, monkeypatch, "run", arguments, cpu="here", lazy="there")
    here, there = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("here", "there"))
    assert there["device"] == str(DEVICE)
    assert there["train_seconds"] > 0
    for key, value in here.items():
        if key.endswith("_acc") or key in ("data_gradient_ratio", "sign_change_share"):
            assert there[key] == pytest.approx(value, abs=1.0), key


def test_score_networks_audits_and_images(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = f"--data digits --limit 100 --samples 10 --judge-epochs 1 --audit {SMALL} --out FOLDER"
    both(call, monkeypatch, "score", options, lazy="there")
    both(call, monkeypatch, "score", f"--data toy --limit 100 {SMALL} --out FOLDER", lazy="toy")
    images = "--run there --count 20 --batch-size 10 --levels 3 --steps-per-level 1 --out FOLDER"
    both(call, monkeypatch, "generate", images, lazy="images.npz")


def test_evaluations(call: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("run", "--objective", "standard", *tiny, "--out", "here").status == 0
    for attack in ("pgd --steps 2", "certify --n0 4 --n 10", "autoattack --version fast --state state.pt"):
        both(call, monkeypatch, "evaluate", f"--run here --limit 4 --attack {attack} --out FOLDER", lazy="found.json")


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L1", 5.0)])
@pytest.mark.filterwarnings("ignore:targeted attacks try")
def test_autoattack_finds_what_it_finds_on_the_cpu(
    norm: str, eps: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, model = (
        torch.rand(8, 1, 8, 8),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 4)).eval(),
    )
    y = model(x).argmax(1)

    def found(x: Tensor, y: Tensor) -> Tensor:
        adversary = AutoAttack(model, norm, eps, seed=0, verbose=False, version="plus")
        for attack in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
            attack.n_iter, attack.n_restarts = 4, 1
        adversary.square.n_queries = 10
        return adversary.run_standard_evaluation(x, y, state_path=tmp_path / f"{x.device.type}.pt").cpu()

    expected = found(x, y)
    with elsewhere(monkeypatch):
        model.to(DEVICE)
        points = found(x.to(DEVICE), y.to(DEVICE))
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-5)
    assert bool((expected != x).any())


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3),
        lambda x: x @ torch.ones(3, 1),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.stack([x[0, 0], torch.ones(())]),
        lambda x: x.add_(torch.ones(2, 3)),
        lambda x: torch.ones(()).add_(x[0, 0]),
        lambda x: torch.ones(3)[x[0].long()],
        lambda x: x.index_put_((torch.tensor([1]),), torch.ones(1, 3)),
        lambda x: torch.rand(2, device=x.device, generator=torch.Generator()),
        lambda x: torch.rand(2, generator=torch.Generator(x.device)),
        lambda x: x.numpy(),
    ],
)
def test_what_would_fail_on_a_gpu_fails(mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch), pytest.raises((RuntimeError, TypeError), match=r"lazy:0|generator on"):
        mixed(torch.zeros(2, 3, device=DEVICE))


def test_what_works_on_a_gpu_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch):
        x = torch.arange(6.0, device=DEVICE).reshape(2, 3).requires_grad_()
        assert isinstance(x.detach(), Elsewhere)
        assert (x * torch.tensor(2.0)).sum().item() == 30.0
        assert x[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]
        (gradient,) = torch.autograd.grad(x.square().sum(), x)
        assert gradient.device == DEVICE
        assert gradient.cpu().tolist() == (2 * x).tolist()
        assert not isinstance(x.cpu(), Elsewhere)
        assert isinstance(torch.Generator(DEVICE).manual_seed(0), ElsewhereGenerator)
        layer = nn.Linear(3, 2).to(DEVICE)
        layer(x).sum().backward()
        assert {p.device for p in layer.parameters()} == {p.grad.device for p in layer.parameters()} == {DEVICE}
