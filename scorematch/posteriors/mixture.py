"""Mixtures of Gaussians, in closed form: the oracle of the toy problems."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..inputs import check_count
from .base import ClassScorePosterior, check_deviation, check_parameters, check_point, log_shares, owned


class GaussianMixture(ClassScorePosterior):
    """p(x, y) = Σ_k weight[y, k] · N(x; mean[y, k], covariance[y, k]), for x of any dimension.

    Args:
        means: [L, K, D] component means of each class.
        covariances: [L, K] variances (isotropic), [L, K, D] (diagonal) or [L, K, D, D] (full), positive definite.
        weights: [L, K] joint probabilities of class and component, non-negative; normalised here. None: all equal.

    Raises:
        ValueError: shapes do not fit, or a covariance is not positive definite.
    """

    means: Tensor
    log_weights: Tensor
    covariances: Tensor
    _precision_factor: Tensor
    _log_normaliser: Tensor

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        check_parameters(means, covariances=covariances)
        means, covariances = owned(means), owned(covariances)
        classes, _, dimension = means.shape
        log_weights = log_shares(weights, means)
        full = _full_covariances(means, covariances)
        factor, failed = torch.linalg.cholesky_ex(full)
        if failed.any():
            label, component = failed.nonzero()[0].tolist()
            raise ValueError(f"covariances must be positive definite, component {component} of class {label} is not")
        identity = torch.eye(dimension, dtype=means.dtype, device=means.device)
        self.num_classes = classes
        self.register_buffer("means", means)
        self.register_buffer("covariances", full)
        self.register_buffer("log_weights", log_weights)
        self.register_buffer(
            "_precision_factor", torch.linalg.solve_triangular(factor, identity.expand_as(full), upper=False)
        )
        self.register_buffer(
            "_log_normaliser",
            -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * dimension * math.log(2 * math.pi),
        )

    def smoothed(self, sigma: float) -> GaussianMixture:
        """The mixture p_σ: this one convolved with N(0, σ² I)."""
        check_deviation(sigma, self.means, zero=True)
        identity = torch.eye(self.means.shape[-1], dtype=self.means.dtype, device=self.means.device)
        return GaussianMixture(self.means, self.covariances + sigma**2 * identity, self.log_weights.exp())

    def log_joint_components(self, x: Tensor) -> Tensor:
        """log p(x, y, k) [N, L, K] for x [N, …] with D features."""
        difference = self._difference(x)
        whitened = torch.einsum("lkij,nlkj->nlki", self._precision_factor, difference)
        return self.log_weights + self._log_normaliser - 0.5 * whitened.square().sum(-1)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) [N, L] in nats for x [N, …] with D features."""
        return self.log_joint_components(x).logsumexp(-1)

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            components = self.log_joint_components(x)
            responsibility = components.softmax(-1)
            precision = self._precision_factor.mT @ self._precision_factor
            pull = -torch.einsum("lkij,nlkj->nlki", precision, self._difference(x))
            scores = (responsibility[..., None] * pull).sum(2)
            log_p = components.logsumexp(-1).log_softmax(-1)
        return log_p, scores.reshape(len(x), self.num_classes, *x.shape[1:])

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``count`` pairs, at least 1: x [count, D] and labels int64 [count].

        Raises:
            TypeError, ValueError: ``count`` is not what is said above.
        """
        check_count("count", count)
        weights = self.log_weights.exp().flatten()
        index = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn(
            count, self.means.shape[-1], 1, dtype=self.means.dtype, device=self.means.device, generator=generator
        )
        factor = torch.linalg.cholesky(self.covariances).flatten(0, 1)
        x = self.means.flatten(0, 1)[index] + (factor[index] @ noise).squeeze(-1)
        return x, index // self.means.shape[1]

    def _difference(self, x: Tensor) -> Tensor:
        check_point(x, self.means, any_dtype=False)
        return x.flatten(1)[:, None, None, :] - self.means


def _full_covariances(means: Tensor, covariances: Tensor) -> Tensor:
    """[L, K, D, D] from any of the accepted forms."""
    classes, components, dimension = means.shape
    shape = list(covariances.shape)
    if shape == [classes, components]:
        return covariances[..., None, None] * torch.eye(dimension, dtype=means.dtype, device=means.device)
    if shape == [classes, components, dimension]:
        return torch.diag_embed(covariances)
    if shape == [classes, components, dimension, dimension]:
        return covariances
    raise ValueError(
        f"covariances must be [L, K], [L, K, D] or [L, K, D, D] with L, K, D = {classes}, {components}, {dimension}, "
        f"got {shape}"
    )
