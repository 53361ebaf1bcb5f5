"""Settings of a data posterior, with what was tuned for each data set."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

POSTERIORS = ("score_network", "joint_energies", "kernel_density", "noise_conditional_classifier", "oracle")

# How a score network is read. It may change after the training, which everything else in the settings belongs to.
READING = ("sigma", "anchor", "smoothing", "centering", "nodes", "linear", "top_k")

FITTED = ("score_network", "joint_energies", "noise_conditional_classifier")  # those whose networks are trained


@dataclass(frozen=True)
class PosteriorSettings:
    """How p_d(y|x') is estimated. None takes the value that was tuned for the data set on validation data."""

    name: tyro.conf.Suppress[str] = "score_network"  # what --posterior says
    sigma: float | None = None  # noise level of p_σ, a standard deviation in input units
    # score_network: what says log p(y|x) at the clean point
    anchor: Literal["label", "classifier", "kernel_density"] | None = None
    smoothing: float | None = None  # score_network: probability that a label anchor spreads over the other classes
    centering: Literal["posterior", "network"] = "posterior"  # score_network: how the unconditional score is removed
    nodes: int = 1  # score_network: trapezoid segments of the path integral in each step
    linear: bool = False  # score_network: read the scores at the clean point alone, once for a whole attack
    top_k: int | None = None  # score_network with embedding: number of most probable classes whose scores are evaluated
    network: Literal["mlp", "conv", "unet"] | None = None  # backbone of the score network and of the classifier
    width: int | None = None  # hidden features or channels of that backbone
    depth: int | None = None  # residual blocks of that backbone (mlp and conv)
    patch: int = 1  # conv: rows and columns of a patch, whose pixels become channels; 2 works at half the resolution
    multipliers: tuple[int, ...] = (1, 2, 4)  # unet: channels at each resolution, as multiples of the width
    dropout: float = 0.0  # probability of dropping a hidden feature while training
    # score network: all classes from one evaluation, one head each; or told the class, one evaluation each
    classes: Literal["heads", "embedding"] = "heads"
    teacher: Path | None = None  # posterior.pt with a score network that this one imitates, instead of the data
    steps: int | None = None  # optimiser steps of its training
    batch_size: int | None = None  # clean samples a step of its training
    lr: float | None = None  # peak learning rate of its training
    warm_up: float = 0.05  # share of the steps in which the learning rate rises to its peak
    schedule: Literal["cosine", "constant"] = "cosine"  # whether it falls afterwards
    noise: Literal["log_uniform", "log_normal"] = "log_uniform"  # how ln σ is drawn in its training
    sigma_min: float | None = None  # smallest noise level, in input units: of a log_uniform training, and of sampling
    sigma_max: float | None = None  # largest noise level, likewise
    noise_mean: float = -1.2 - math.log(2)  # log_normal: mean of ln σ, σ in input units
    noise_deviation: float = 1.2  # log_normal: standard deviation of ln σ
    averaging: float = 0.998  # decay of the average of its weights, from a quarter of the steps on; 0 turns it off
    # in the place of averaging: samples after which the share of a step has halved, at most 5 % of those seen; 0 is off
    half_life: float = 0.0
    weight_decay: float = 0.0  # of its training
    # which weights its training ends with: those with the lowest held-out loss at sigma, or the last ones
    weights: Literal["best", "last"] = "best"
    mirror: bool | None = None  # mirror half of the training images, left to right
    # probability of each geometric transformation of a training image that the network is told of; 0 turns them off
    augment: float = 0.0
    likelihood_weight: float = 0.0  # classifier: weight of denoising likelihood score matching; 0 turns it off
    # classifier: train it as a joint energy, with this weight of conditional denoising score matching; 0 turns it off.
    # None is 100 for joint_energies, and 0 for the others
    energy_weight: float | None = None
    # classifier: divide its logits by the temperature that makes held-out labels most likely
    temperature: bool = True
    # cross-fitting: number of folds. For each a posterior is fitted without it, and the fold picks its weights; the
    # mean of all is used. 1 turns it off; None is 4 for joint_energies, and 1 for the others
    folds: int | None = None
    max_points: int | None = None  # kernel_density: training points kept (a random subset); None keeps all

    def __post_init__(self) -> None:
        if self.name not in POSTERIORS:
            raise ValueError(f"posterior: unknown name {self.name!r}, allowed: {', '.join(POSTERIORS)}")
        for field in ("sigma", "lr", "sigma_min", "sigma_max"):
            value = getattr(self, field)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{field}: {value!r} is out of range, allowed: a finite number above 0")
        for field in ("nodes", "width", "depth", "steps", "batch_size", "max_points", "top_k", "patch", "folds"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {value!r} is out of range, allowed: at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers: {self.multipliers!r} is out of range, allowed: one or more numbers from 1")
        for field in ("dropout", "warm_up", "averaging"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(
                    f"{field}: {getattr(self, field)!r} is out of range, allowed: 0 up to, not including, 1"
                )
        for field in ("half_life", "weight_decay"):
            if not 0.0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}: {getattr(self, field)!r} is out of range, allowed: at least 0")
        if not 0.0 <= self.augment <= 1.0:
            raise ValueError(f"augment: {self.augment!r} is out of range, allowed: 0 to 1")
        if not math.isfinite(self.noise_mean) or not 0.0 < self.noise_deviation < math.inf:
            given = f"{self.noise_mean!r} and {self.noise_deviation!r} are"
            raise ValueError(f"noise_mean, noise_deviation: {given} out of range, allowed: finite, the second above 0")
        if self.top_k is not None and self.classes != "embedding":
            raise ValueError(f"top_k: {self.top_k} with classes {self.classes!r}, allowed: with embedding")
        if self.top_k not in (None, 1) and self.anchor == "label":
            raise ValueError(f"top_k: {self.top_k} with anchor 'label', to which other classes are alike, allowed: 1")
        if self.linear and self.nodes > 1:
            raise ValueError(f"nodes: {self.nodes} with linear, which reads the scores once, allowed: 1")
        if self.smoothing is not None and not 0.0 < self.smoothing < 1.0:
            raise ValueError(f"smoothing: {self.smoothing!r} is out of range, allowed: between 0 and 1, exclusive")
        for field in ("likelihood_weight", "energy_weight"):
            value = getattr(self, field)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"{field}: {value!r} is out of range, allowed: at least 0")
        energies = self.name == "joint_energies"
        if energies and self.energy_weight == 0:
            raise ValueError(f"energy_weight: {self.energy_weight!r} with joint_energies, allowed: above 0")
        if self.likelihood_weight and (self.energy_weight or energies):
            other = "joint_energies" if energies else f"energy_weight {self.energy_weight!r}"
            raise ValueError(f"likelihood_weight: {self.likelihood_weight!r} with {other}, allowed: 0, or without")
        folds = self.number_of_folds
        if folds > 1 and self.name not in FITTED:
            raise ValueError(f"folds: {folds!r} with {self.name}, allowed: with {', '.join(FITTED)}")
        if folds > 1 and self.centering == "network":
            raise ValueError(f"folds: {folds!r} with centering 'network', allowed: with 'posterior'")
        if folds > 1 and self.teacher is not None:
            raise ValueError(f"teacher: {self.teacher} with {folds} folds, all of which it has seen, allowed: 1 fold")

    @property
    def number_of_folds(self) -> int:
        return self.folds if self.folds is not None else OF_POSTERIOR.get(self.name, COMMON).get("folds", 1)

    def resolved(self, data_name: str) -> PosteriorSettings:
        """The same with every None that the data set has a tuned value for replaced by that value."""
        of_data = TUNED.get(data_name, {})
        tuned = {**COMMON, **OF_POSTERIOR.get(self.name, {}), **of_data.get("any", {}), **of_data.get(self.name, {})}
        missing = {field: value for field, value in tuned.items() if getattr(self, field) is None}
        return dataclasses.replace(self, **missing)


COMMON: dict[str, Any] = {
    "sigma": 0.3,
    "anchor": "label",
    "smoothing": 0.1,
    "network": "unet",
    "width": 64,
    "depth": 4,
    "steps": 20_000,
    "batch_size": 128,
    "lr": 1e-3,
    "sigma_min": 0.05,
    "sigma_max": 1.0,
    "mirror": False,
    "energy_weight": 0.0,
    "folds": 1,
}

# What was best where p_d is known: docs/direct-score.md.
OF_POSTERIOR: dict[str, dict[str, Any]] = {"joint_energies": {"energy_weight": 100.0, "folds": 4}}

# Not tuned. A range of noise wide enough for sampling, so that one network serves the posterior and training.generate.
CIFAR: dict[str, dict[str, Any]] = {
    "any": {"sigma": 0.1, "width": 64, "steps": 50_000, "lr": 5e-4, "sigma_min": 0.01, "sigma_max": 10.0},
    "score_network": {"anchor": "classifier"},
}

MIRRORED: dict[str, dict[str, Any]] = {**CIFAR, "any": {**CIFAR["any"], "mirror": True}}

# Tuned on validation data, but for CIFAR and SVHN; docs/results.md says how.
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": MIRRORED,
    "cifar100": MIRRORED,
    "svhn": CIFAR,
    "digits": {
        "any": {"network": "mlp", "width": 256, "depth": 3, "steps": 2000, "batch_size": 64, "lr": 2e-3},
        "score_network": {"sigma": 0.4, "anchor": "kernel_density"},
        "kernel_density": {"sigma": 0.4},
        "noise_conditional_classifier": {"sigma": 0.2},
        "joint_energies": {"sigma": 0.2},
    },
    "toy": {
        "any": {
            "sigma": 0.15,
            "anchor": "classifier",
            "network": "mlp",
            "width": 64,
            "depth": 2,
            "steps": 2000,
            "batch_size": 1024,
            "lr": 1e-2,
            "sigma_min": 0.08,
            "sigma_max": 1.0,
        },
        "kernel_density": {"max_points": 2000},
    },
}
