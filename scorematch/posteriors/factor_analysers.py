"""Mixtures of factor analysers: Gaussians of low rank plus noise, in closed form at the dimension of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import check_count, check_length, check_shape, check_single
from ..modes import outside_modes
from .base import (
    ClassScorePosterior,
    check_deviation,
    check_parameters,
    check_point,
    class_sizes,
    log_shares,
    owned,
)

NOISES = ("isotropic", "diagonal")


class FactorAnalysers(ClassScorePosterior):
    """p(x, y) = Σ_k weight[y, k] · N(x; mean[y, k], F[y, k] F[y, k]ᵀ + diag(noise[y, k])).

    A component varies freely along R directions and is independent noise elsewhere; with isotropic noise it is
    probabilistic PCA. What costs D² numbers in :class:`GaussianMixture` costs D R here. By the Woodbury identity

        (F Fᵀ + Ψ)⁻¹ = Ψ⁻¹ − B Bᵀ,  B = Ψ⁻¹ F C⁻ᵀ [D, R],  C Cᵀ = I + Fᵀ Ψ⁻¹ F,

    and log det(F Fᵀ + Ψ) = log det Ψ + 2 log det C: a query is the product of x with all L K (R + 1) rows Bᵀ and
    Ψ⁻¹ mean, and the scores are one product back.

    Known data at the dimension of images come from this class (:meth:`sample`), and so does an estimate of a posterior
    from a training set (:meth:`fit`).

    Args:
        means: [L, K, D] component means of each class.
        factors: [L, K, D, R] factor loadings F.
        noise: [L, K] (isotropic) or [L, K, D] (diagonal) variances of the noise, > 0.
        weights: [L, K] joint probabilities of class and component, non-negative; normalised here. None: all equal.

    Raises:
        ValueError: shapes do not fit, or a value is outside its range.
    """

    means: Tensor
    factors: Tensor
    noise: Tensor
    log_weights: Tensor
    _centre: Tensor
    _rows: Tensor
    _offsets: Tensor
    _log_normaliser: Tensor

    def __init__(self, means: Tensor, factors: Tensor, noise: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        check_parameters(means, factors=factors, noise=noise)
        classes, components, dimension = means.shape
        if factors.dim() != 4 or factors.shape[:3] != means.shape:
            raise ValueError(f"factors must be [L, K, D, R] with means {list(means.shape)}, got {list(factors.shape)}")
        if list(noise.shape) not in ([classes, components], [classes, components, dimension]):
            raise ValueError(
                f"noise must be [L, K] or [L, K, D] with means {list(means.shape)}, got {list(noise.shape)}"
            )
        if not (noise > 0).all():
            raise ValueError(f"noise must be positive variances, got {float(noise.min()):g}")
        log_weights = log_shares(weights, means)
        means, factors, noise = owned(means), owned(factors), owned(noise)
        self.num_classes = classes
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)
        self.register_buffer("noise", noise)
        self.register_buffer("log_weights", log_weights)

        # In float64, as all of log p(x, y, k): it is the difference of large numbers.
        precision, wide, centre = self._precision, factors.double(), means.mean((0, 1))
        whitened = precision[..., None] * wide  # Ψ⁻¹ F [L, K, D, R]
        identity = torch.eye(factors.shape[-1], dtype=torch.float64, device=factors.device)
        cholesky = torch.linalg.cholesky(identity + wide.mT @ whitened)
        projection = torch.linalg.solve_triangular(cholesky, whitened.mT, upper=False)  # Bᵀ [L, K, R, D]
        centred = means.double() - centre.double()
        log_det = -precision.log().expand_as(centred).sum(-1) + 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        rows = torch.cat([projection, (precision * centred)[..., None, :]], -2)
        # x and the means relative to one centre: their squares would otherwise be larger than what they differ by.
        self.register_buffer("_centre", centre)
        self.register_buffer("_rows", rows)
        self.register_buffer("_offsets", (projection @ centred[..., None]).squeeze(-1))
        self.register_buffer(
            "_log_normaliser",
            -0.5 * (log_det + (precision * centred.square()).sum(-1) + dimension * math.log(2 * math.pi)),
        )

    @property
    def _precision(self) -> Tensor:
        """Ψ⁻¹ in float64: [L, K, 1] where the noise is isotropic, [L, K, D] where it is diagonal."""
        return (self.noise if self.noise.dim() == 3 else self.noise[..., None]).double().reciprocal()

    def smoothed(self, sigma: float) -> FactorAnalysers:
        """The mixture p_σ: this one convolved with N(0, σ² I)."""
        check_deviation(sigma, self.means, zero=True)
        return FactorAnalysers(self.means, self.factors, self.noise + sigma**2, self.log_weights.exp())

    def log_joint_components(self, x: Tensor) -> Tensor:
        """log p(x, y, k) [N, L, K] in nats, float64, for x [N, …] with D features."""
        return self._project(self._features(x))[0]

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) [N, L] in nats, float64, for x [N, …] with D features; differentiable."""
        return self.log_joint_components(x).logsumexp(-1)

    def log_prob_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = self._features(x)
            components, coordinates = self._project(features)
            features, coordinates = features.to(x.dtype), coordinates.to(x.dtype)
            # What is below the rounding of a sum counts as 0: products of denormal numbers are twenty times slower.
            share = components.softmax(-1).to(x.dtype)
            share = torch.nn.functional.threshold(share, torch.finfo(x.dtype).eps ** 2, 0.0)
            # s_y = Σ_k r_k (B Bᵀ (x − mean) + Ψ⁻¹ mean − Ψ⁻¹ x), all relative to the centre.
            pull = torch.einsum("nlk,lkd->nld", share, self._precision.to(x.dtype))  # [N, L, 1 or D]
            # Written in place, since the kernels that follow take [N, L, D] contiguous.
            scores = features.new_empty(len(x), *self.means.shape[::2])
            torch.mul(features[:, None], -pull, out=scores)
            along_rows = share[..., None] * torch.cat([coordinates, torch.ones_like(coordinates[..., :1])], -1)
            scores.transpose(0, 1).baddbmm_(along_rows.flatten(2).transpose(0, 1), self._rows.flatten(1, 2).to(x.dtype))
            log_p = components.logsumexp(-1).log_softmax(-1).to(x.dtype)
        return log_p, scores.reshape(len(x), self.num_classes, *x.shape[1:])

    def sample(
        self, count: int, generator: torch.Generator | None = None, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``count`` pairs.

        Args:
            count: N, at least 1.
            generator: source of randomness on the device of the mixture.
            shape: that of one sample, of D features; None is (D,).

        Returns:
            x [N, *shape] and labels int64 [N], in random order.

        Raises:
            TypeError, ValueError: ``count`` is not what is said above, or the shape does not have D features.
        """
        check_count("count", count)
        components, dimension, rank = self.factors.shape[1:]
        shape = (dimension,) if shape is None else shape
        check_shape("shape", shape)
        if math.prod(shape) != dimension:
            raise ValueError(f"shape {list(shape)} has {math.prod(shape)} features, the mixture {dimension}")
        index = torch.multinomial(self.log_weights.exp().flatten(), count, replacement=True, generator=generator)
        hidden = self.means.new_empty(count, rank).normal_(generator=generator)
        x = self.means.new_empty(count, dimension).normal_(generator=generator)
        for component in index.unique().tolist():
            y, k = divmod(component, components)
            chosen = index == component
            x[chosen] = x[chosen] * self.noise[y, k].sqrt() + hidden[chosen] @ self.factors[y, k].T + self.means[y, k]
        return x.reshape(count, *shape), index // components

    @classmethod
    @outside_modes
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        num_classes: int,
        components: int,
        rank: int,
        iterations: int = 20,
        noise: str = "isotropic",
        floor: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> FactorAnalysers:
        """Maximum likelihood by expectation maximisation, each class by itself.

        Started by k-means. The iterations are those of Ghahramani and Hinton (1996, mixtures of factor analysers;
        with isotropic noise the model is that of Tipping and Bishop, 1999) with the distribution of the hidden factors
        as an additional parameter (PX-EM; Liu, Rubin and Wu, 1998), which is as monotone and much faster. Under maximum
        likelihood alone, a component may shrink to a few samples without limit. ``floor`` sets a limit, and it helps to
        take few components.

        Args:
            x: [N, …] training inputs, float.
            y: int64 [N] labels in [0, num_classes); every class needs more samples than ``components``.
            num_classes: L.
            components: K in each class, at least 1.
            rank: R of each component, between 1 and D − 1.
            iterations: of expectation maximisation, at least 0; 0 is the start.
            noise: ``"isotropic"`` or ``"diagonal"``.
            floor: smallest variance of the noise, in input units squared; > 0.
            generator: randomness of the start, on the device of x.

        Returns:
            The mixture, in the dtype of x; classes weigh as often as they occur.

        Raises:
            ValueError: an argument is outside its range.
        """
        counts = class_sizes(x, y, num_classes)
        check_single(x, "x")
        if len(x) == 0:
            raise ValueError("x has no samples")
        dimension = x[0].numel()
        check_count("components", components)
        check_count("rank", rank)
        if rank >= dimension:
            raise ValueError(f"rank must lie between 1 and D - 1 = {dimension - 1}, got {rank}")
        check_count("iterations", iterations, least=0)
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        check_length("floor", floor)
        if not (counts > components).all():
            label = int((counts <= components).nonzero()[0])
            raise ValueError(f"class {label} has {int(counts[label])} samples, too few for {components} components")
        classes, x = [], x.detach()
        for label in range(num_classes):
            points = x[y == label].flatten(1)
            centre = points.mean(0)
            points -= centre
            current = _start(points, components, rank, noise, floor, generator)
            for _ in range(iterations):
                current = _iteration(current, points, floor)
            classes.append(
                (current.means[0] + centre, current.factors[0], current.noise[0], current.log_weights[0].exp())
            )
        means, factors, variances, weights = (torch.stack(values) for values in zip(*classes, strict=True))
        return cls(means, factors, variances, weights * counts[:, None])

    def _features(self, x: Tensor) -> Tensor:
        """[N, D] in float64, relative to the centre."""
        check_point(x, self.means, any_dtype=False)
        return x.flatten(1).double() - self._centre

    def _project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x, y, k) [N, L, K] and Bᵀ (x − mean) [N, L, K, R] for x [N, D] relative to the centre, all float64."""
        products = (features @ self._rows.double().flatten(0, 2).T).unflatten(1, self._rows.shape[:3])
        coordinates = products[..., :-1] - self._offsets
        squares, precision = features.square(), self._precision
        if self.noise.dim() == 2:
            squares = squares.sum(1, keepdim=True)
        lengths = (squares @ precision.flatten(0, 1).T).unflatten(1, precision.shape[:2])
        exponents = products[..., -1] - 0.5 * (lengths - coordinates.square().sum(-1))
        return self.log_weights + self._log_normaliser + exponents, coordinates


def _start(
    points: Tensor, components: int, rank: int, noise: str, floor: float, generator: torch.Generator | None
) -> FactorAnalysers:
    """One class, centred at 0, by k-means; the factors are directions to random samples.

    Args:
        points: [N, D].
    """
    means = _k_means(points, components, generator)
    nearest = torch.cdist(points, means).argmin(1)
    deviations = points - means[nearest]
    variance = deviations.square().mean(0).clamp(min=floor)
    if noise == "isotropic":
        variance = variance.mean()
    drawn = torch.randint(len(points), (components, rank), generator=generator, device=points.device)
    factors = (deviations[drawn] / rank**0.5).mT
    weights = torch.bincount(nearest, minlength=components).clamp(min=1).to(points.dtype)
    return FactorAnalysers(means[None], factors[None], variance.expand(1, components, *variance.shape), weights[None])


def _k_means(points: Tensor, count: int, generator: torch.Generator | None, iterations: int = 10) -> Tensor:
    """``count`` centres [K, D] of points [N, D]: drawn by the squared distance (Arthur and Vassilvitskii, 2007)."""
    drawn = torch.randint(len(points), (1,), generator=generator, device=points.device)
    centres = points[drawn]
    for _ in range(count - 1):
        squared = torch.cdist(points, centres).square().amin(1)
        # Points that all coincide with a centre leave nothing to draw from: any will do.
        squared = squared if squared.sum() > 0 else torch.ones_like(squared)
        centres = torch.cat([centres, points[torch.multinomial(squared, 1, generator=generator)]])
    for _ in range(iterations):
        members = torch.nn.functional.one_hot(torch.cdist(points, centres).argmin(1), count).to(points.dtype)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), centres)
    return centres


def _iteration(current: FactorAnalysers, points: Tensor, floor: float) -> FactorAnalysers:
    """One iteration of PX-EM on one class, points [N, D].

    With the distribution of the hidden factors free, they may be taken in any coordinates: those of ``_project``, in
    which their posterior is N(Bᵀ(x − mean), I). Regression of x on them gives the factors; what it leaves is the noise.
    """
    components, coordinates = (part[:, 0] for part in current._project(current._features(points)))  # [N, K], [N, K, R]
    share, coordinates = components.softmax(-1).to(points.dtype), coordinates.to(points.dtype)
    size = share.sum(0).clamp(min=torch.finfo(share.dtype).tiny)[:, None]  # [K, 1]
    mean = share.T @ points / size
    variance = share.T @ points.square() / size - mean.square()
    weighted = share[..., None] * coordinates
    middle = weighted.sum(0) / size  # [K, R]
    identity = torch.eye(coordinates.shape[-1], dtype=points.dtype, device=points.device)
    hidden = torch.einsum("nkr,nks->krs", weighted, coordinates) / size[..., None] + identity
    hidden = hidden - middle[:, :, None] * middle[:, None, :]
    mixed = (weighted.flatten(1).T @ points).unflatten(0, middle.shape) / size[..., None]
    mixed = mixed - middle[..., None] * mean[:, None, :]  # [K, R, D]
    factors = torch.linalg.solve_triangular(torch.linalg.cholesky(hidden), mixed, upper=False)
    noise = variance - factors.square().sum(1)
    if current.noise.dim() == 2:
        noise = noise.mean(1)
    return FactorAnalysers(mean[None], factors.mT[None], noise.clamp(min=floor)[None], size.T)
