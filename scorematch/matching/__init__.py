"""Score matching: how a network learns ∇ₓ log p(x). The losses are in ``losses``, trainings in ``fit``."""

from .fit import (
    Batch,
    ClassificationLoss,
    DenoisingLoss,
    DistillationLoss,
    Fit,
    Fitting,
    JointEnergy,
    MatchingLoss,
    fit_classifier,
    fit_denoiser,
)
from .held_out import BestWeights, HeldOut, fit_temperature, losses_by_level
from .losses import denoising, denoising_likelihood, distillation, finite_difference, joint_energy, sliced

__all__ = [
    "Batch",
    "BestWeights",
    "ClassificationLoss",
    "DenoisingLoss",
    "DistillationLoss",
    "Fit",
    "Fitting",
    "HeldOut",
    "JointEnergy",
    "MatchingLoss",
    "denoising",
    "denoising_likelihood",
    "distillation",
    "finite_difference",
    "fit_classifier",
    "fit_denoiser",
    "fit_temperature",
    "joint_energy",
    "losses_by_level",
    "sliced",
]
