"""Estimates of the data posterior p_d(y|x') and of its gradient."""

from .base import ClassScorePosterior, Posterior, Trace
from .classifier import NoiseConditionalClassifier
from .ensemble import Ensemble
from .factor_analysers import FactorAnalysers
from .kernel_density import KernelDensity
from .mixture import GaussianMixture
from .score_network import ScoreNetwork

__all__ = [
    "ClassScorePosterior",
    "Ensemble",
    "FactorAnalysers",
    "GaussianMixture",
    "KernelDensity",
    "NoiseConditionalClassifier",
    "Posterior",
    "ScoreNetwork",
    "Trace",
]
