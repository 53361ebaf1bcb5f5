"""Scores learned on the toy beside the true ones."""

import torch
from torch import Tensor

from scorematch.networks import Denoiser
from training.data import toy


def relative_errors(denoiser: Denoiser, reach: float = 4.0) -> list[dict[str, float]]:
    """Relative mean squared error of the learned ∇ log p(y|x) to the oracle's ∇ log p_d(y|x) on |x| < reach.

    The learned scores are centred by the estimator's own posterior, never the oracle's: log p_σ(y|x) is integrated from
    the learned scores themselves, up to one constant for each class, which the class frequencies of the data fix. Means
    are over p_d(x, y), and over x uniformly with p_d(y|x).
    """
    device = denoiser.center.device
    x = torch.linspace(-reach, reach, 801, device=device)[:, None]
    oracle = toy.oracle().to(device)
    log_p, scores = oracle.log_prob_and_scores(x)
    p = log_p.exp()
    truth = scores[..., 0] - (p * scores[..., 0]).sum(1, keepdim=True)
    density = oracle.log_joint(x).logsumexp(1).exp()[:, None]
    rows = []
    for sigma in (0.1, 0.15, 0.2):
        learned_p, learned = own_posterior(denoiser, x, sigma)
        centred = learned - (learned_p * learned).sum(1, keepdim=True)
        row = {"sigma": sigma}
        for name, weight in (("data_weighted", p * density), ("uniform", p)):
            error = (weight * (centred - truth).square()).sum() / (weight * truth.square()).sum()
            row[f"relative_error_{name}"] = error.item()
        rows.append(row)
    return rows


@torch.no_grad()
def own_posterior(denoiser: Denoiser, x: Tensor, sigma: float, reach: float = 14.0) -> tuple[Tensor, Tensor]:
    """p_σ(y|x) [G, L] that the class scores of a one-dimensional denoiser themselves imply, and these scores [G, L].

    log p(x|y) is the cumulative integral of the score, normalised on [−reach, reach]; the priors are those of the toy.
    """
    grid = torch.linspace(-reach, reach, 5601, device=x.device)[:, None]
    scores = denoiser.class_scores(grid, sigma)[..., 0].double()
    log_density = torch.cumulative_trapezoid(scores, grid.double(), dim=0)
    log_density = torch.cat([torch.zeros_like(log_density[:1]), log_density])
    log_density = log_density - torch.logsumexp(log_density, 0, keepdim=True)
    log_joint = log_density + torch.tensor(toy.PRIORS, dtype=torch.float64, device=x.device).log()
    index = torch.searchsorted(grid[:, 0], x[:, 0]).clamp(max=len(grid) - 1)
    return log_joint.softmax(1)[index].float(), denoiser.class_scores(x, sigma)[..., 0]
