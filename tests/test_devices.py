"""What a GPU computes is what the CPU computes: objectives, attacks, posteriors, networks and whole runs on a device.

The reference is the CPU in float64. Without a GPU the same tests run with the CPU as the device, in double precision
against itself and from end to end.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scorematch import PGD, AutoAttack, ThreatModel, _extension, objectives
from scorematch.folding import Folding
from scorematch.networks import Denoiser, MLPBackbone
from scorematch.posteriors import GaussianMixture, KernelDensity, NoiseConditionalClassifier, Posterior, ScoreNetwork
from training import models, run
from training.settings.errors import run_program

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and _extension.has_cuda_kernels else [])
CLASSES, SHAPE = 4, (1, 8, 8)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(512, CLASSES)
    return nn.Sequential(*layers).double()


def samples(count: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, *SHAPE, dtype=torch.float64), torch.arange(count) % CLASSES


class _NoisyClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) / (1 + sigma[:, None])


def posterior(name: str) -> Posterior:
    torch.manual_seed(2)
    if name == "mixture":
        means = torch.randn(CLASSES, 2, 64, dtype=torch.float64)
        return GaussianMixture(means, torch.eye(64, dtype=torch.float64).expand(CLASSES, 2, 64, 64).clone())
    if name == "kernel density":
        x, y = samples(40)
        return KernelDensity(x, y, num_classes=CLASSES, sigma=0.5)
    if name == "classifier":
        return NoiseConditionalClassifier(_NoisyClassifier().double(), num_classes=CLASSES, sigma=0.3)
    backbone = MLPBackbone(SHAPE, (CLASSES + 1) * 64, width=16, depth=1)
    return ScoreNetwork(Denoiser(backbone, num_classes=CLASSES, sigma_data=0.3, center=0.5).double(), sigma=0.4)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [g.cpu() for g in torch.autograd.grad(loss.sum(), list(model.parameters()))]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("standard", {}),
        ("gaussian", {"sigma": 0.3, "gamma": 0.5, "antithetic": True}),
        ("pgd_at", {"divergence": "se", "clip": 0.1}),
        ("pgd_at", {"attack": "fgsm_rs"}),
        ("trades", {"divergence": "js"}),
        ("trades", {"posterior": "score network", "transport": 0.5}),
        ("score_direct", {"posterior": "kernel density", "target_mix": 0.5}),
        *(("score_direct", {"posterior": p}) for p in ("mixture", "kernel density", "classifier", "score network")),
    ],
)
def test_objectives(objective: str, options: dict[str, Any], norm: str, device: torch.device) -> None:
    x, y = samples()
    threat_model = ThreatModel(norm, 0.1 if norm == "linf" else 0.8)
    start = threat_model.random_start(x, torch.Generator().manual_seed(3))
    found = []
    for place in (torch.device("cpu"), device):
        model = network().to(place)
        arguments = dict(options)
        if "posterior" in arguments:
            arguments["posterior"] = posterior(arguments["posterior"]).double().to(place)
        if objective == "gaussian":
            arguments["noise"] = (start - x).to(place)
        elif objective != "standard":
            arguments |= {"threat_model": threat_model, "start": start.to(place)}
            arguments |= {} if "attack" in arguments else {"steps": 4}
        outcome = objectives.OBJECTIVES[objective](model, x.to(place), y.to(place), **arguments)
        found.append((outcome.loss.detach().cpu(), outcome.x_adv.cpu(), *gradients(model, outcome.loss)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd(norm: str, device: torch.device) -> None:
    x, y = samples(40)
    attack = PGD(ThreatModel(norm, 0.05), steps=10, losses=("ce", "margin"), random_start=False)
    expected = attack(network().eval(), x, y)
    actual = attack(network().eval().to(device), x.to(device), y.to(device))
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.02), ("L2", 0.1)])
@pytest.mark.filterwarnings("ignore:targeted attacks try")
def test_autoattack(norm: str, eps: float, device: torch.device) -> None:
    """Its random numbers are functions of the sample: the same on every device."""
    x, _ = samples(30)
    model = network().eval()
    y = model(x).argmax(1)
    points = []
    for place in ("cpu", device):
        adversary = AutoAttack(model.to(place), norm, eps, seed=0, verbose=False)
        adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 10
        adversary.square.n_queries = 50
        points.append(adversary.run_standard_evaluation(x.to(place), y.to(place)).cpu())
    fooled = [model.cpu()(found).argmax(1) != y for found in points]
    assert 0 < int(fooled[0].sum()) < 30
    assert torch.equal(*fooled)
    torch.testing.assert_close(points[1], points[0], rtol=0, atol=1e-6)  # normal starts are drawn in float32


@pytest.mark.parametrize("name", ["wrn-10-1-silu", "preact-resnet-18", "resnet-18", "preact-resnet-18-plain"])
def test_networks(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = models.build(name, (3, 32, 32), 10).double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x).detach()
    model = model.to(device, memory_format=torch.channels_last)
    images = x.to(device, memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(model(images).cpu(), expected, rtol=1e-9, atol=1e-10)
    with Folding(model).applied():
        torch.testing.assert_close(model(images).cpu(), expected, rtol=1e-8, atol=1e-9)


SWITCHES = {
    "cpu": ["--precision auto", "--precision float32 --channels-last --fold --fused"],
    "cuda": [
        "--precision auto",
        "--precision float32 --graph off",
        "--precision float32 --fold --fused --channels-last",
        "--precision tf32",
        "--precision bfloat16 --compile on",
    ],
}


@pytest.mark.parametrize("objective", ["pgd_at --divergence se", "trades", "score_direct --posterior kernel_density"])
@pytest.mark.parametrize(("kind", "switches"), [(d, s) for d in DEVICES for s in SWITCHES[d]])
def test_runs(objective: str, kind: str, switches: str, tmp_path: Path) -> None:
    """From start to end, with every switch for speed, to a network that has learned."""
    options = f"--objective {objective} --model digits_cnn_bn --epochs 6 --steps 2 --validation-steps 2 --eval-steps 2"
    quick = "--limit 600 --validate-every 3 --eval-restarts 1 --curve-points 2 --autoattack fast --threads 1"
    quick += " --autoattack-samples 8"
    arguments = f"{options} {quick} --device {kind} {switches} --out {tmp_path / 'run'}"
    assert run_program(run.main, arguments.split()) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["clean_acc"] > 80
    assert summary["device"].startswith(kind)
