"""The problems of the experiments: their data, and what is known of p_d."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from scorematch import ThreatModel
from scorematch.networks import MLPBackbone
from scorematch.posteriors import FactorAnalysers, GaussianMixture
from training import data, models
from training.data import DataSettings, known_images

FOLDS = 4  # a posterior is fitted on three and picks its weights on the fourth


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data to learn from, and the networks that fit them."""

    name: str
    x: Tensor  # [N, …] training inputs
    y: Tensor  # int64 [N] their labels
    x_test: Tensor  # for the final measurement
    y_test: Tensor
    x_choice: Tensor  # by which weights are chosen
    y_choice: Tensor
    threat_model: ThreatModel
    student: Callable[[], nn.Module]  # a fresh classifier
    backbone: Callable[[int, bool], nn.Module]  # of (outputs, whether for a classifier), for estimates of p_d
    num_classes: int
    # Of (outputs, conditions): for a score network that is told how its images are augmented, where they are images.
    told_backbone: Callable[[int, int], nn.Module] | None = None
    scale: float = 1.0  # of the data, in which noise levels are counted; 1 for unit Gaussians

    @property
    def reach(self) -> float:
        """Noise as long as the attack, eps / √features for L2: a standard deviation in input units."""
        features = self.x[0].numel()
        return self.threat_model.eps / math.sqrt(features) if self.threat_model.norm == "l2" else self.threat_model.eps

    def fold(self, index: int, folds: int = FOLDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, y to fit on and x, y held out; the points of a sample are in no order, so every fourth is a fold."""
        held = torch.arange(len(self.x)) % folds == index
        return self.x[~held], self.y[~held], self.x[held], self.y[held]


@dataclass(frozen=True, kw_only=True)
class Problem(Task):
    """A task whose p_d is known. Test and choice are fresh samples; the oracle chooses the weights of surrogates."""

    oracle: GaussianMixture | FactorAnalysers  # p_d, in closed form


class Perceptron(nn.Sequential):
    """Two hidden layers of ReLU."""

    def __init__(self, features: int, classes: int, width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )


QUICK = {"test": 200, "choice": 50}  # points of a run that only has to run
CLASSES, COMPONENTS = 3, 3
SEPARATION = 3.2  # of component means: N(0, SEPARATION² / d) in each of d coordinates, so about as far apart in any d


def gaussian_mixture(dimension: int, count: int, seed: int, *, test: int = 4000, choice: int = 1000) -> Problem:
    """Three classes of three unit Gaussians each, L2 eps 1, no box.

    The means differ from seed to seed, so intervals over seeds include the choice of the problem.
    """
    random = Generator().manual_seed(100_003 * dimension + seed)
    means = SEPARATION / math.sqrt(dimension) * torch.randn(CLASSES, COMPONENTS, dimension, generator=random)
    oracle = GaussianMixture(means, torch.ones(CLASSES, COMPONENTS))
    x, y = oracle.sample(count, random)
    x_test, y_test = oracle.sample(test, random)
    x_choice, y_choice = oracle.sample(choice, random)
    return Problem(
        name=f"mixture-d{dimension}-n{count}-seed{seed}",
        oracle=oracle,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        x_choice=x_choice,
        y_choice=y_choice,
        threat_model=ThreatModel("l2", eps=1.0, step_size=0.25, lower=-math.inf, upper=math.inf),
        student=lambda: Perceptron(dimension, CLASSES, 128),
        backbone=lambda outputs, pooled: MLPBackbone(
            (dimension,), outputs if pooled else outputs * dimension, width=128, depth=2
        ),
        num_classes=CLASSES,
    )


DIGITS_ERROR = 0.1  # Bayes error of the known digits
DIGITS_EPS = 0.25  # in whose L2 ball the most likely class of p_d changes for a fifth of the points


def known_digits(count: int, seed: int, *, test: int = 4000, choice: int = 1000) -> Problem:
    """Draws from factor analysers that were fitted to the 8×8 digits, with noise to a Bayes error of 10 %; no box.

    p_d is the same for every seed; what is drawn differs.
    """
    digits = data.load(DataSettings("digits"))
    analysers = FactorAnalysers.fit(
        digits.x_train,
        digits.y_train,
        num_classes=digits.num_classes,
        components=2,
        rank=6,
        generator=Generator().manual_seed(0),
    )
    noise = known_images.noise_for(analysers, DIGITS_ERROR)
    oracle = analysers.smoothed(noise)
    drawn = known_images.drawn(oracle, (count, choice, test), shape=(64,), seed=seed)
    return Problem(
        name=f"digits-n{count}-seed{seed}",
        oracle=oracle,
        **_splits(drawn),
        threat_model=ThreatModel("l2", eps=DIGITS_EPS, step_size=DIGITS_EPS / 4, lower=-math.inf, upper=math.inf),
        student=lambda: Perceptron(64, digits.num_classes, 128),
        backbone=lambda outputs, pooled: MLPBackbone((64,), outputs if pooled else outputs * 64, width=128, depth=2),
        num_classes=digits.num_classes,
        scale=noise,
    )


def _splits(drawn: data.Data) -> dict[str, Any]:
    """The splits of a data set as a task names them; validation is what weights are chosen by."""
    names = {"": "train", "_test": "test", "_choice": "validation"}
    return {f"{kind}{name}": getattr(drawn, f"{kind}_{split}") for name, split in names.items() for kind in "xy"}


IMAGE_FEATURES = 3 * 32 * 32
IMAGES_ERROR = 0.1  # Bayes error of the known images
IMAGES_EPS = 0.5  # of the usual L2 threat model on CIFAR-10
DIRECTIONS = 128  # principal components that networks see of an image


class InComponents(nn.Module):
    """A network that sees principal components of x instead of x itself; the directions are fixed.

    Components come at the scale of the data as a whole, so that a network finds them as it would find x.

    Args:
        network: maps (components [N, K], …) to [N, outputs], or with ``heads`` to [N, heads · K].
        directions: [D, K], orthonormal.
        scales: [K] standard deviations of the components, relative to that of a feature of x.
        center: subtracted from x.
        heads: of an answer in the space of x, which is carried back to it, [N, heads · D]; None is any other answer.
    """

    directions: Tensor
    scales: Tensor
    center: Tensor

    def __init__(
        self, network: nn.Module, directions: Tensor, scales: Tensor, center: Tensor, heads: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.heads = heads
        self.register_buffer("directions", directions)
        self.register_buffer("scales", scales)
        self.register_buffer("center", center)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        answer: Tensor = self.network(((x - self.center) @ self.directions) / self.scales, *others)
        if self.heads is None:
            return answer
        return ((answer.unflatten(1, (self.heads, -1)) * self.scales) @ self.directions.T).flatten(1)


def principal_components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading ``count`` directions [D, K] of x [M, D] and their relative scales [K], see :class:`InComponents`."""
    centred = x - x.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(x))  # rising
    return directions[:, -count:].contiguous(), (variances[-count:] / variances.mean()).sqrt()


def image_analysers(root: Path | None, cache: Path) -> FactorAnalysers:
    """The factor analysers of the training images of CIFAR-10, one of rank 4 for each class, from ``cache`` if there.

    With more, or of higher rank, 50,000 images are too few to learn them from: see the page of results.
    """
    return known_images.fitted(DataSettings("cifar10", root=root), cache, components=1, rank=4)


def known_cifar(analysers: FactorAnalysers, count: int, seed: int, *, test: int = 1000, choice: int = 300) -> Problem:
    """Draws from factor analysers of the classes of CIFAR-10, with noise to a Bayes error of 10 %; no box.

    p_d is the same for every seed; what is drawn differs. All networks see principal components of the training data.
    p_d knows more: the noise differs a little between the classes, and shows in the length of what is left of x.
    """
    oracle = analysers.smoothed(known_images.noise_for(analysers, IMAGES_ERROR))
    return _of_analysers("images", oracle, count, seed, test, choice, DIRECTIONS)


def known_features(
    analysers: FactorAnalysers, count: int, seed: int, *, test: int = 4000, choice: int = 1000
) -> Problem:
    """Such images by the features on which p_d depends, so that networks can represent it.

    The noise of the analysers is made the same for all classes, see :func:`features_of`.
    """
    noise = analysers.noise.mean().expand_as(analysers.noise)
    alike = FactorAnalysers(analysers.means, analysers.factors, noise, analysers.log_weights.exp())
    oracle = features_of(alike.smoothed(known_images.noise_for(alike, IMAGES_ERROR)))[0]
    return _of_analysers("features", oracle, count, seed, test, choice, oracle.means.shape[-1])


def features_of(analysers: FactorAnalysers) -> tuple[FactorAnalysers, Tensor]:
    """The analysers in an orthonormal basis [D, K'] of what p(y|x) depends on, K' = L K (1 + R), and that basis.

    Where all classes have the same isotropic noise, log p(x, y) of one class differs from that of another through the
    projection of x on the means and factors alone. There p(y|x) is the same function, and so is the L2 ball: the part
    of a perturbation outside the basis has no effect.

    Raises:
        ValueError: the noise is not the same for all.
    """
    if not torch.equal(analysers.noise, analysers.noise.flatten()[0].expand_as(analysers.noise)):
        raise ValueError("analysers must have the same isotropic noise in all classes and components")
    span = torch.cat([analysers.means.flatten(0, 1), analysers.factors.mT.flatten(0, 2)])
    basis = torch.linalg.qr(span.T.double())[0].to(span.dtype)
    means, factors = analysers.means @ basis, (analysers.factors.mT @ basis).mT
    return FactorAnalysers(means, factors, analysers.noise, analysers.log_weights.exp()), basis


def _of_analysers(
    name: str, oracle: FactorAnalysers, count: int, seed: int, test: int, choice: int, components: int
) -> Problem:
    """Draws from the oracle, L2 eps of the images; networks see so many principal components of the training data."""
    features = oracle.means.shape[-1]
    drawn = known_images.drawn(oracle, (count, choice, test), shape=(features,), seed=seed)
    classes, x = oracle.num_classes, drawn.x_train
    # 10,000 images give the leading components as well as all do.
    directions, scales = principal_components(x[:10_000], components)

    def student() -> nn.Module:
        return InComponents(Perceptron(components, classes, 256), directions, scales, x.mean(0))

    def backbone(outputs: int, pooled: bool) -> nn.Module:
        values = outputs if pooled else outputs * components
        network = MLPBackbone((components,), values, width=256, depth=2)
        return InComponents(network, directions, scales, torch.zeros(()), None if pooled else outputs)

    return Problem(
        name=f"{name}-n{count}-seed{seed}",
        oracle=oracle,
        **_splits(drawn),
        threat_model=ThreatModel("l2", eps=IMAGES_EPS, step_size=IMAGES_EPS / 4, lower=-math.inf, upper=math.inf),
        student=student,
        backbone=backbone,
        num_classes=classes,
        scale=float(oracle.noise.flatten()[0].sqrt()),
    )


REAL_FOLDS = 5  # of all 1,797 digits, so that every one of them is tested on once
REAL_CHOICE = 240  # images of the others by which weights are chosen


def real_digits(fold: int, eps: float) -> Task:
    """The 8×8 digits of scikit-learn: 359 or 360 to test, 240 to choose weights, about 1,200 to train on. Linf, [0, 1].

    The images are in the same random order for every fold and seed; a fold is every fifth of them.
    """
    digits = data.load(DataSettings("digits"))
    parts = ("train", "validation", "test")
    x = torch.cat([getattr(digits, f"x_{part}") for part in parts])
    y = torch.cat([getattr(digits, f"y_{part}") for part in parts])
    order = torch.randperm(len(x), generator=Generator().manual_seed(0))
    tested = torch.arange(len(x)) % REAL_FOLDS == fold
    test, rest = order[tested], order[~tested]
    choice, train = rest[:REAL_CHOICE], rest[REAL_CHOICE:]
    shape = tuple(x.shape[1:])
    return Task(
        name=f"real-digits-fold{fold}",
        x=x[train],
        y=y[train],
        x_test=x[test],
        y_test=y[test],
        x_choice=x[choice],
        y_choice=y[choice],
        threat_model=ThreatModel("linf", eps=eps, step_size=eps / 4),
        student=lambda: models.build("digits_cnn", shape, digits.num_classes),
        backbone=lambda outputs, pooled: MLPBackbone(
            shape, outputs if pooled else outputs * math.prod(shape), width=256, depth=2, dropout=0.1
        ),
        told_backbone=lambda outputs, conditions: MLPBackbone(
            shape, outputs * math.prod(shape), width=256, depth=2, dropout=0.3, conditions=conditions
        ),
        num_classes=digits.num_classes,
        scale=0.5,
    )
