"""AutoAttack on a model as RobustBench has them: a module that takes pixels in [0, 1] and normalises them itself.

    python -m examples.attack_pretrained

With RobustBench installed, ``load_model("Pang2022Robustness_WRN28_10", dataset="cifar10", threat_model="Linf")`` gives
such a model, and ``load_cifar10`` the images. This example needs no download: it trains a small wide residual network
of the same family on the digits, for a few seconds, and writes and reads its weights as RobustBench would.
"""

import tempfile
from pathlib import Path

import torch

import scorematch as sm
from training import models
from training.data import DataSettings, load
from training.models import loading
from training.models.cifar import set_momentum

EPS = 8 / 255


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    data = load(DataSettings("digits"))
    model = models.build("wrn-10-1-silu", data.input_shape, data.num_classes)
    set_momentum(model, 0.2)  # of batch norm; the published 0.01 needs a longer training than this
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(3):
        for batch in torch.randperm(len(data.x_train)).split(50):
            outcome = sm.objectives.standard(model, data.x_train[batch], data.y_train[batch])
            optimizer.zero_grad()
            outcome.loss.mean().backward()
            optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        loading.export(model, weights)  # a bare state dict
        model = loading.load(weights, model="wrn-10-1-silu", data=data)  # in eval mode

    x, y = data.x_test[:30], data.y_test[:30]
    adversary = sm.AutoAttack(model, norm="Linf", eps=EPS, seed=0, version="fast")  # the default is "standard"
    x_adv = adversary.run_standard_evaluation(x, y)
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    low, high = adversary.report["robust_interval"]
    print(f"95 % interval of the robust accuracy: {low:.1%} to {high:.1%}")
    return adversary.report["clean_accuracy"], adversary.report["robust_accuracy"]


if __name__ == "__main__":
    main()
