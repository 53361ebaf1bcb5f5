"""A network and data of one's own: trained with PGD-AT and with direct SCORE, then attacked.

    python -m examples.own_model

The data are the drawings of examples/own_data.py. Direct SCORE needs an estimate of the true class probabilities: here
a kernel density of the training images.
"""

import torch
from torch import Tensor, nn

import scorematch as sm
from examples.own_data import shapes

BALL = sm.ThreatModel("linf", eps=0.1)  # each pixel may change by 0.1


def network() -> nn.Module:
    """Any module from inputs to logits will do."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 3)),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, posterior: sm.posteriors.Posterior | None) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(50):
            if posterior is None:
                outcome = sm.objectives.pgd_at(model, x[batch], y[batch], threat_model=BALL, steps=5)
            else:
                outcome = sm.objectives.score_direct(
                    model, x[batch], y[batch], threat_model=BALL, posterior=posterior, steps=5
                )
            optimizer.zero_grad()
            outcome.loss.mean().backward()
            optimizer.step()
    return model.eval()


def main() -> dict[str, tuple[float, float]]:
    data = shapes()
    density = sm.posteriors.KernelDensity(data.x_train, data.y_train, num_classes=3, sigma=0.6)
    found = {}
    for name, posterior in {"PGD-AT": None, "direct SCORE": density}.items():
        model = train(network(), data.x_train, data.y_train, posterior)
        x_adv = sm.PGD(BALL, steps=20, restarts=2, losses=("ce", "margin"))(model, data.x_test, data.y_test)
        clean, robust = ((model(x).argmax(1) == data.y_test).double().mean().item() for x in (data.x_test, x_adv))
        print(f"{name}: {clean:.1%} clean, {robust:.1%} under PGD")
        found[name] = (clean, robust)
    return found


if __name__ == "__main__":
    main()
