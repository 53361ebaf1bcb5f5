"""Images whose p_d(y|x) is known: drawn from mixtures of factor analysers that were fitted to real ones.

On CIFAR-10 nobody knows how far a classifier is from p_d(y|x'), or how often a perturbation changes the true label.
Here both can be computed in closed form, at the same dimension. Every class is a
:class:`~scorematch.posteriors.FactorAnalysers`. It stays one when Gaussian noise of standard deviation σ is added, and
the noise makes the classes overlap as much as one likes. Pixels are not clipped, since that would end the closed form:
threat models need ``lower=-inf`` and ``upper=inf``.

    analysers = fitted(DataSettings("cifar10", root=FOLDER), Path("analysers.pt"))
    p_d = analysers.smoothed(noise_for(analysers, bayes_error=0.1))
    data = drawn(p_d, (50_000, 1_000, 10_000), shape=(3, 32, 32), seed=0)
    print(difficulty(p_d, shape=(3, 32, 32), eps=(0.5, 1.0), seed=0))
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorematch import ThreatModel
from scorematch.attacks.pgd import ascend
from scorematch.bounds import estimate
from scorematch.posteriors import FactorAnalysers
from training import data
from training.data import Data, DataSettings
from training.engine import checkpoint
from training.settings.errors import InputError

PARAMETERS = ("means", "factors", "noise", "log_weights")


def fitted(
    settings: DataSettings,
    path: Path,
    *,
    components: int = 4,
    rank: int = 16,
    iterations: int = 20,
    noise: str = "isotropic",
    seed: int = 0,
) -> FactorAnalysers:
    """The factor analysers of a data set's training images, read from ``path``, or fitted and written there.

    Args:
        settings: the data set. It is not needed once the file is there.
        path: the file; 8 MB on CIFAR-10 with the defaults.
        components, rank, iterations, noise: as in :meth:`FactorAnalysers.fit`.
        seed: of the start of the fit.

    Raises:
        InputError: the data set is missing, or the file holds something else or was fitted with other settings.
    """
    about: dict[str, Any] = {
        "data": settings.name,
        "limit": settings.limit,
        "validation_size": settings.validation_size,
    }
    about |= {"components": components, "rank": rank, "iterations": iterations, "noise": noise, "seed": seed}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images = data.load(settings)
        fit = FactorAnalysers.fit(
            images.x_train,
            images.y_train,
            num_classes=images.num_classes,
            components=components,
            rank=rank,
            iterations=iterations,
            noise=noise,
            generator=torch.Generator().manual_seed(seed),
        )
        parameters = {name: getattr(fit, name) for name in PARAMETERS}
        checkpoint.save(path, epoch=iterations, settings={"factor_analysers": about}, network=parameters)
    state = checkpoint.load(path)
    saved = state["settings"].get("factor_analysers")
    if saved is None:
        raise InputError(f"{path}: holds no factor analysers, expected a file of training.data.known_images.fitted")
    changed = [f"{name} {saved[name]}, now {value}" for name, value in about.items() if saved[name] != value]
    if changed:
        raise InputError(f"{path}: was fitted with {'; '.join(changed)}; give another file, or delete this one")
    means, factors, variances, log_weights = (state["network"][name] for name in PARAMETERS)
    return FactorAnalysers(means, factors, variances, log_weights.exp())


def drawn(
    p_d: FactorAnalysers, sizes: tuple[int, int, int], *, shape: Sequence[int], seed: int = 0, soft: bool = False
) -> Data:
    """A data set of independent draws.

    Args:
        p_d: what is drawn from.
        sizes: of the training, the validation and the test split. Each has random numbers of its own: the test split is
            the same whatever the size of the others.
        shape: that of one input, such as (3, 32, 32).
        seed: of the draws.
        soft: whether the targets of training are p_d(y|x) instead of the labels drawn.

    Raises:
        InputError: a split is too small, as :func:`training.data.checked` says.
    """
    parts: dict[str, Any] = {}
    for offset, (name, size) in enumerate(zip(("train", "validation", "test"), sizes, strict=True)):
        x, y = p_d.sample(size, torch.Generator().manual_seed(3 * seed + offset), shape)
        parts |= {f"x_{name}": x, f"y_{name}": y}
    if soft:
        parts["p_train"] = probabilities(p_d, parts["x_train"])
    result = Data("known-images", p_d.num_classes, **parts, lower=-math.inf, upper=math.inf, p_d=p_d)
    return data.checked(result, "known_images.drawn")


def probabilities(p_d: FactorAnalysers, x: Tensor, batch: int = 1000) -> Tensor:
    """p_d(y|x) [N, L] of x [N, …], in its dtype."""
    with torch.no_grad():
        return torch.cat([p_d.log_joint(part).softmax(1).to(x.dtype) for part in x.split(batch)])


def noise_for(analysers: FactorAnalysers, bayes_error: float, *, count: int = 4000, seed: int = 0) -> float:
    """The σ at which the Bayes error of ``analysers.smoothed(σ)`` is ``bayes_error``, a share.

    Found by bisection on the same random numbers, to 1 % of σ. The Bayes error there is a mean over ``count`` draws.

    Raises:
        ValueError: no σ between .001 and 100 makes the Bayes error so small or so large.
    """

    def error(log_sigma: float) -> float:
        smoothed = analysers.smoothed(math.exp(log_sigma))
        x, _ = smoothed.sample(count, torch.Generator().manual_seed(seed))
        return float(1 - probabilities(smoothed, x).amax(1).mean())

    low, high = math.log(1e-3), math.log(1e2)
    if not error(low) < bayes_error < error(high):
        raise ValueError(f"bayes_error must lie between {error(low):.3g} and {error(high):.3g}, got {bayes_error}")
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) < bayes_error else (low, middle)
    return math.exp((low + high) / 2)


def difficulty(
    p_d: FactorAnalysers,
    *,
    shape: Sequence[int],
    eps: Sequence[float] = (),
    norm: str = "l2",
    count: int = 1000,
    steps: int = 20,
    seed: int = 0,
    batch: int = 250,
) -> dict[str, Any]:
    """How hard the problem is, in itself and under perturbations, each number with a 95 % interval over the draws.

    Args:
        p_d: the problem.
        shape: that of one input.
        eps: radii of B(x), in input units.
        norm: ``"l2"`` or ``"linf"``.
        count: points drawn from p_d.
        steps: of the ascents in B(x), see :func:`in_ball`.
        seed: of the draws and of the ascents.
        batch: points at a time.

    Returns:
        ``bayes_error``, E[1 − max_y p_d(y|x)], a share; ``entropy``, H(Y|X) in nats; and ``balls``, for each eps a dict
        with ``eps``, ``c_kl``, the constant C^KL of Eq. (39) in nats, and ``flips``, the share of points in whose ball
        arg max_y p_d(y|x') changes. Both are what ascents found: lower bounds. Each is a dict of ``mean``, ``low`` and
        ``high``.
    """
    generator = torch.Generator().manual_seed(seed)
    x, _ = p_d.sample(count, generator, shape)
    p = probabilities(p_d, x).double()
    result: dict[str, Any] = {
        "bayes_error": estimate(1 - p.amax(1))._asdict(),
        "entropy": estimate(torch.special.entr(p).sum(1))._asdict(),
        "balls": [],
    }
    for radius in eps:
        threat_model = ThreatModel(norm, radius, lower=-math.inf, upper=math.inf)
        parts = [in_ball(p_d, part, threat_model, steps=steps, generator=generator) for part in x.split(batch)]
        divergences, flipped = (torch.cat(values) for values in zip(*parts, strict=True))
        found = {"c_kl": estimate(divergences), "flips": estimate(flipped)}
        result["balls"].append({"eps": radius, **{name: value._asdict() for name, value in found.items()}})
    return result


def in_ball(
    p_d: FactorAnalysers,
    x: Tensor,
    threat_model: ThreatModel,
    *,
    steps: int,
    targets: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """How much the posterior itself changes in B(x).

    For each of the ``targets`` most probable classes after the first, two ascents of ``steps`` steps are made. One
    raises the log-odds of that class against the first, from a random start. The other goes on from there and raises
    the divergence, which has no direction at x, where it is smallest. Every iterate is judged.

    Args:
        p_d: the posterior.
        x: [N, …].
        threat_model: B(x) and the step size.
        steps: of each ascent, at least 1.
        targets: other classes to ascend towards; at most L − 1 are.
        generator: randomness of the starts.

    Returns:
        The largest KL(p_d(·|x) ‖ p_d(·|x')) found, in nats, and whether arg max_y p_d(y|x') was found to change,
        both [N].
    """
    log_p = p_d.log_joint(x).log_softmax(1).to(x.dtype)
    p, ranked = log_p.exp(), log_p.argsort(1, descending=True)
    largest, flipped = x.new_zeros(len(x)), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    trace = p_d.trace(x, ranked[:, 0])

    def follow(weights: Tensor, start: Tensor | None) -> Tensor:
        """Ascend Σ_y weights_y log p(y|x')."""

        def gradient(x_adv: Tensor) -> Tensor:
            judge(x_adv)
            return trace.pull_back(weights, torch.zeros_like(x))

        return ascend(x, gradient, threat_model, steps=steps, start=start, generator=generator)

    def judge(x_adv: Tensor) -> None:
        trace.move(x_adv)
        torch.maximum(largest, (p * (log_p - trace.log_p)).sum(1), out=largest)
        flipped.logical_or_(trace.log_p.argmax(1) != ranked[:, 0])

    one_hot = torch.eye(p_d.num_classes, dtype=x.dtype, device=x.device)[ranked]  # [N, L, L], most probable first
    for rank in range(1, min(targets, p_d.num_classes - 1) + 1):
        moved = follow(one_hot[:, rank] - one_hot[:, 0], None)
        judge(follow(-p, moved))
    return largest, flipped
