"""How p_d is estimated from the training data, each setting chosen by held-out evidence.

No estimator sees the truth or a student. Networks stop by their held-out loss; the noise level σ at which they are read
is the candidate whose posterior gives held-out labels the highest likelihood at x + noise as long as the attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from scorematch import audit, sampling
from scorematch.augmentation import NonLeaking
from scorematch.matching import Fit, HeldOut, JointEnergy, fit_classifier, fit_denoiser, fit_temperature
from scorematch.networks import Denoiser
from scorematch.posteriors import (
    FactorAnalysers,
    KernelDensity,
    NoiseConditionalClassifier,
    Posterior,
    ScoreNetwork,
)
from scorematch.posteriors.base import PointwisePosterior
from training.engine.posteriors import ScaledClassifier, mean_of
from training.experiments.problems import FOLDS, Task

# Of trainings, in units of the problem's scale. Samples are drawn from the highest, which outweighs the data's spread.
LOWEST_NOISE, HIGHEST_NOISE = 0.05, 3.0


@dataclass(frozen=True)
class Estimated:
    """A posterior with what its settings rest on."""

    posterior: Posterior
    settings: dict[str, Any]  # σ and whatever else was chosen
    evidence: dict[str, float]  # candidate → mean held-out log-likelihood, in nats


@dataclass(frozen=True)
class Grid:
    """What is tried; noise levels are in units of the problem's scale."""

    sigmas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    kernel_sigmas: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
    steps: int = 6000  # at most; trainings stop by held-out loss
    steps_to_the_last: int = 3000  # of the score network that does not
    interval: int = 50
    patience: int = 10
    held_out: int = 4000  # points of a fold on which losses and evidence are computed, at most
    energy_weight: float = 100.0
    batch_size: int = 128
    lr: float = 1e-3
    selection_sigma: float = 0.5  # noise level at which held-out loss decides
    kernels: int = 2000  # training points under a kernel density, at most
    components: tuple[int, ...] = (1, 2, 3, 4, 6)  # of the factor analysers
    ranks: tuple[int, ...] = (1, 4)
    drawn: int = 5000  # samples of the score network under a kernel density
    augment: float = 0.3  # of a regular score network: probability of each transformation of a training image


# Of images: the loss of a gradient is a mean over features, and 3,072 of them have many more than 16 to share it.
IMAGES = Grid(energy_weight=1000.0, interval=100, patience=6, components=(1, 2), ranks=(2, 4))
# A few steps of everything, to see that it runs: the numbers mean nothing.
QUICK = Grid(steps=20, steps_to_the_last=20, interval=10, drawn=200, components=(1, 2), ranks=(1,), batch_size=32)


@dataclass
class Bench:
    """The estimators of one problem; networks that several of them share are trained once."""

    problem: Task
    seed: int
    grid: Grid = field(default_factory=Grid)
    folds: int = FOLDS  # into which the training points are cut; each network goes without one
    _networks: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    _drawn: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _estimated: dict[str, Estimated] = field(default_factory=dict)

    @property
    def sigmas(self) -> list[float]:
        """Noise levels at which networks may be read, in input units."""
        return [self.problem.scale * sigma for sigma in self.grid.sigmas]

    @property
    def kernel_sigmas(self) -> list[float]:
        return [self.problem.scale * sigma for sigma in self.grid.kernel_sigmas]

    def estimated(self, name: str) -> Estimated:
        """The posterior of this name, one of :data:`ESTIMATORS`."""
        if name not in self._estimated:
            self._estimated[name] = ESTIMATORS[name](self)
        return self._estimated[name]

    def network(self, kind: str, fold: int) -> nn.Module:
        """A classifier, joint energy or denoiser, fitted with one fold held out.

        ``denoiser_last`` is the denoiser after all steps on all of the data, unwatched; ``denoiser_regular`` has
        augmented images, of which it is told, and more dropout.
        """
        if (kind, fold) not in self._networks:
            self._networks[kind, fold] = self._train(kind, fold)
        return self._networks[kind, fold]

    def _train(self, kind: str, fold: int) -> nn.Module:
        problem, grid = self.problem, self.grid
        torch.manual_seed(1000 * self.seed + fold)
        generator = Generator().manual_seed(1000 * self.seed + fold)
        x, y, *_ = problem.fold(fold, self.folds)
        x_held, y_held = self.held_out(fold)
        scale = problem.scale
        watched = HeldOut(x_held, y_held, scale * grid.selection_sigma, grid.interval, grid.patience)
        fit = Fit(
            steps=grid.steps,
            batch_size=grid.batch_size,
            lr=grid.lr,
            schedule="constant",
            sigma_min=scale * LOWEST_NOISE,
            sigma_max=scale * HIGHEST_NOISE,
            half_life=20_000,
        )
        sigma_data = float((problem.x - problem.x.mean(0)).square().mean().sqrt())
        center = problem.x.mean(0)
        if kind.startswith("denoiser"):
            augment = None
            if kind == "denoiser_regular":
                assert problem.told_backbone is not None
                backbone = problem.told_backbone(problem.num_classes + 1, NonLeaking.conditions)
                augment = NonLeaking(grid.augment)
            else:
                backbone = problem.backbone(problem.num_classes + 1, False)
            denoiser = Denoiser(backbone, num_classes=problem.num_classes, sigma_data=sigma_data, center=center)
            if kind == "denoiser_last":
                long = Fit(
                    steps=grid.steps_to_the_last,
                    batch_size=grid.batch_size,
                    lr=grid.lr,
                    sigma_min=0.05,
                    sigma_max=HIGHEST_NOISE,
                )
                return fit_denoiser(denoiser, problem.x, problem.y, long, generator=generator)
            return fit_denoiser(denoiser, x, y, fit, generator=generator, augment=augment, held_out=watched)
        network = ScaledClassifier(problem.backbone(problem.num_classes, True), center, sigma_data)
        energy = JointEnergy(grid.energy_weight, center, sigma_data) if kind == "energy" else None
        return fit_classifier(network, x, y, fit, generator=generator, energy=energy, held_out=watched)

    def drawn(self, fold: int) -> tuple[Tensor, Tensor]:
        """Samples of the score network of this fold, and the labels that it was given."""
        if fold not in self._drawn:
            denoiser, problem = self.network("denoiser", fold), self.problem
            assert isinstance(denoiser, Denoiser)
            labels = _labels_like(problem.y, self.grid.drawn)
            x = sampling.heun(
                denoiser,
                (len(labels), *problem.x.shape[1:]),
                class_labels=labels,
                generator=Generator().manual_seed(self.seed),
                sigmas=sampling.noise_levels(problem.scale * HIGHEST_NOISE, problem.scale * LOWEST_NOISE, 20),
            )
            ball = problem.threat_model
            self._drawn[fold] = x.clamp(ball.lower, ball.upper), labels
        return self._drawn[fold]

    def chosen(
        self, candidates: Mapping[str, Callable[[int], Posterior]], folds: range
    ) -> tuple[str, dict[str, float]]:
        """The candidate with the highest held-out likelihood, each member judged on the fold that it has not seen."""
        evidence = {}
        for name, build in candidates.items():
            values = [self.evidence(build(fold), fold) for fold in folds]
            evidence[name] = torch.cat(values).mean().item()
        return max(evidence, key=evidence.__getitem__), evidence

    def held_out(self, fold: int) -> tuple[Tensor, Tensor]:
        """Points that the networks of this fold have not seen."""
        _, _, x, y = self.problem.fold(fold, self.folds)
        return x[: self.grid.held_out], y[: self.grid.held_out]

    def evidence(self, posterior: Posterior, fold: int) -> Tensor:
        x, y = self.held_out(fold)
        return audit.log_likelihood(posterior, x, y, noise=self.problem.reach)


def _pointwise(bench: Bench, kind: str, folds: range) -> Estimated:
    """A noise-conditional classifier or joint energy: σ by evidence, then the temperature."""
    classes = bench.problem.num_classes

    def at(sigma: float) -> Callable[[int], Posterior]:
        return lambda fold: NoiseConditionalClassifier(bench.network(kind, fold), num_classes=classes, sigma=sigma)

    name, evidence = bench.chosen({str(sigma): at(sigma) for sigma in bench.sigmas}, folds)
    members: list[Posterior] = []
    temperatures = []
    for fold in folds:
        plain = at(float(name))(fold)
        assert isinstance(plain, PointwisePosterior)
        x, y = bench.held_out(fold)
        temperature = fit_temperature(plain.log_prob, x, y, noise=bench.problem.reach)
        members.append(
            NoiseConditionalClassifier(
                bench.network(kind, fold), num_classes=classes, sigma=float(name), temperature=temperature
            )
        )
        temperatures.append(temperature)
    settings = {"sigma": float(name), "temperature": temperatures}
    return Estimated(mean_of(members), settings, evidence)


def _score(
    bench: Bench, folds: range, kind: str = "denoiser", centering: str = "posterior", anchor: str = "classifier"
) -> Estimated:
    """A score network along the path, anchored at a network of the same σ."""

    def at(sigma: float) -> Callable[[int], Posterior]:
        def build(fold: int) -> Posterior:
            denoiser = bench.network(kind, fold)
            assert isinstance(denoiser, Denoiser)
            values = NoiseConditionalClassifier(
                bench.network(anchor, fold), num_classes=bench.problem.num_classes, sigma=sigma
            )
            return ScoreNetwork(denoiser, sigma=sigma, anchor=values, centering=centering)

        return build

    name, evidence = bench.chosen({str(sigma): at(sigma) for sigma in bench.sigmas}, folds)
    members = [at(float(name))(fold) for fold in folds]
    return Estimated(mean_of(members), {"sigma": float(name), "anchor": anchor}, evidence)


def _kernel_density(bench: Bench, drawn: bool) -> Estimated:
    """Of the training points, or of samples that the score network of the fold draws."""
    problem = bench.problem

    def points(fold: int | None) -> tuple[Tensor, Tensor]:
        if drawn:
            return bench.drawn(fold or 0)
        x, y = (problem.x, problem.y) if fold is None else problem.fold(fold, bench.folds)[:2]
        return x[: bench.grid.kernels], y[: bench.grid.kernels]

    def at(sigma: float) -> Callable[[int | None], Posterior]:
        return lambda fold: KernelDensity(*points(fold), num_classes=problem.num_classes, sigma=sigma)

    folds = ONE if drawn else ALL
    name, evidence = bench.chosen({str(sigma): at(sigma) for sigma in bench.kernel_sigmas}, folds)
    return Estimated(at(float(name))(0 if drawn else None), {"sigma": float(name)}, evidence)


def _labels_like(y: Tensor, count: int) -> Tensor:
    """``count`` labels in the proportions of y."""
    return y[torch.arange(count) % len(y)]


def _factor_analysers(bench: Bench) -> Estimated:
    """A mixture for each class, fitted by expectation maximisation; how many components, and of what rank, by evidence.

    On mixtures of Gaussians it has the same form as the truth, which on real data is not known.
    """
    problem = bench.problem

    def fitted(components: int, rank: int) -> Callable[[int | None], Posterior]:
        def build(fold: int | None) -> Posterior:
            x, y = (problem.x, problem.y) if fold is None else problem.fold(fold, bench.folds)[:2]
            return FactorAnalysers.fit(
                x,
                y,
                num_classes=problem.num_classes,
                components=components,
                rank=rank,
                generator=Generator().manual_seed(bench.seed),
            )

        return build

    # In few dimensions, or of few points, not every form can be fitted.
    smallest = int(problem.fold(0, bench.folds)[1].bincount(minlength=problem.num_classes).min())
    components = [number for number in bench.grid.components if number < smallest]
    ranks = [rank for rank in bench.grid.ranks if rank < problem.x[0].numel()]
    tried = {f"{c} components of rank {r}": fitted(c, r) for c in components for r in ranks}
    name, evidence = bench.chosen(tried, range(1))
    return Estimated(tried[name](None), {"form": name}, evidence)


ONE, ALL = range(1), range(FOLDS)

ESTIMATORS: dict[str, Callable[[Bench], Estimated]] = {
    "classifier": lambda bench: _pointwise(bench, "classifier", ONE),
    "classifier_ensemble": lambda bench: _pointwise(bench, "classifier", ALL),
    "score": lambda bench: _score(bench, ONE),
    "score_ensemble": lambda bench: _score(bench, ALL),
    "score_last": lambda bench: _score(bench, ONE, kind="denoiser_last"),
    "score_literal": lambda bench: _score(bench, ONE, centering="network"),
    "score_regular": lambda bench: _score(bench, ONE, kind="denoiser_regular"),
    "energy": lambda bench: _pointwise(bench, "energy", ONE),
    "energy_ensemble": lambda bench: _pointwise(bench, "energy", ALL),
    "kernel_density": lambda bench: _kernel_density(bench, drawn=False),
    "kernel_density_drawn": lambda bench: _kernel_density(bench, drawn=True),
    "factor_analysers": _factor_analysers,
}
OF_IMAGES = ("score_regular",)  # for images alone
# Evidence is comparable where every training point was held out once: one of these is chosen by it.
CROSS_FITTED = ("classifier_ensemble", "score_ensemble", "energy_ensemble", "kernel_density")
