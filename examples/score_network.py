"""A score network: how it is trained, what posterior it gives, and whether that is worth following.

    python -m examples.score_network

The data are drawings of three kinds (examples/own_data.py). The score network learns ∇ log p(x|y) from noisy drawings.
Added up along the path of an attack its scores give log p(y|x'), and direct SCORE may follow them.
"""

import torch

import scorematch as sm
from examples.own_data import shapes

SIGMA = 0.4  # the noise level at which the network is read, in units of pixels
BALL = sm.ThreatModel("linf", eps=0.1)


def main() -> dict[str, float]:
    torch.manual_seed(0)
    data = shapes()
    x, y = data.x_train, data.y_train
    density = sm.posteriors.KernelDensity(x, y, num_classes=3, sigma=SIGMA)

    backbone = sm.networks.MLPBackbone((1, 16, 16), (3 + 1) * 256, width=128, depth=2)  # a head a class, and one more
    denoiser = sm.networks.Denoiser(backbone, num_classes=3, sigma_data=x.std().item(), center=x.mean().item())
    fit = sm.matching.Fit(steps=300, batch_size=64, lr=2e-3, sigma_min=0.1, sigma_max=1.0)
    held_out = sm.matching.HeldOut(data.x_validation, data.y_validation, sigma=SIGMA)  # which picks the weights
    sm.matching.fit_denoiser(denoiser, x, y, fit, generator=torch.Generator().manual_seed(0), held_out=held_out)
    posterior = sm.posteriors.ScoreNetwork(denoiser, sigma=SIGMA, anchor=density)

    held = data.x_validation, data.y_validation
    found = {}
    for name, candidate in {"kernel density": density, "score network": posterior}.items():
        likelihood = sm.audit.log_likelihood(candidate, *held, noise=BALL.eps).mean().item()
        calibration = sm.audit.calibration(candidate, *held, noise=BALL.eps)
        clean, robust = sm.audit.robust_accuracy(candidate, *held, BALL, steps=20)
        print(f"{name}: log-likelihood of held-out labels {likelihood:.3f} nats,")
        print(f"    calibration error {calibration.error:.3f},")
        print(f"    right on {clean:.1%} of clean images and {robust:.1%} under its own attack")
        found[name] = likelihood
    return found


if __name__ == "__main__":
    main()
