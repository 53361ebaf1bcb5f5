"""Score matching: how a network learns ∇ₓ log p(x). The losses are in ``losses``, trainings in ``fit``."""

from .fit import (
    Batch,
    ClassificationLoss,
    DenoisingLoss,
    DistillationLoss,
    Fit,
    Fitting,
    MatchingLoss,
    fit_classifier,
    fit_denoiser,
)
from .losses import denoising, denoising_likelihood, distillation, finite_difference, sliced

__all__ = [
    "Batch",
    "ClassificationLoss",
    "DenoisingLoss",
    "DistillationLoss",
    "Fit",
    "Fitting",
    "MatchingLoss",
    "denoising",
    "denoising_likelihood",
    "distillation",
    "finite_difference",
    "fit_classifier",
    "fit_denoiser",
    "sliced",
]
