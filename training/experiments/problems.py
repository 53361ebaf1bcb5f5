"""What is learned from, and what is known about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from scorematch import ThreatModel
from scorematch.networks import MLPBackbone
from scorematch.posteriors import FactorAnalysers, GaussianMixture
from training import data, known_images
from training.data import DataSettings

FOLDS = 4  # a posterior is fitted on three and picks its weights on the fourth


@dataclass(frozen=True)
class Problem:
    """Data, the truth about them, and the networks that fit them."""

    name: str
    oracle: GaussianMixture | FactorAnalysers  # p_d, in closed form
    x: Tensor  # [N, …] training inputs
    y: Tensor  # int64 [N] their labels
    x_test: Tensor  # a fresh sample, for the final measurement
    y_test: Tensor
    x_choice: Tensor  # another one, by which the oracle picks the weights of surrogates
    y_choice: Tensor
    threat_model: ThreatModel
    student: Callable[[], nn.Module]  # a fresh classifier
    backbone: Callable[[int, bool], nn.Module]  # of (outputs, whether for a classifier), for estimates of p_d
    num_classes: int
    scale: float = 1.0  # of the data, in which noise levels are counted; 1 for unit Gaussians

    @property
    def reach(self) -> float:
        """Noise as long as the attack, eps / √features for L2: a standard deviation in input units."""
        features = self.x[0].numel()
        return self.threat_model.eps / math.sqrt(features) if self.threat_model.norm == "l2" else self.threat_model.eps

    def fold(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, y to fit on and x, y held out; the points of a sample are in no order, so every fourth is a fold."""
        held = torch.arange(len(self.x)) % FOLDS == index
        return self.x[~held], self.y[~held], self.x[held], self.y[held]


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
        x=drawn.x_train,
        y=drawn.y_train,
        x_test=drawn.x_test,
        y_test=drawn.y_test,
        x_choice=drawn.x_validation,
        y_choice=drawn.y_validation,
        threat_model=ThreatModel("l2", eps=DIGITS_EPS, step_size=DIGITS_EPS / 4, lower=-math.inf, upper=math.inf),
        student=lambda: Perceptron(64, digits.num_classes, 128),
        backbone=lambda outputs, pooled: MLPBackbone((64,), outputs if pooled else outputs * 64, width=128, depth=2),
        num_classes=digits.num_classes,
        scale=noise,
    )
