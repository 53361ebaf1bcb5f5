"""Self-consistent robust training: kernels, data posteriors, attacks and objectives (SCORE, Pang et al., ICML 2022)."""

from . import _extension as _extension
from . import attacks, audit, bounds, divergences, matching, networks, objectives, posteriors, sampling, smoothing
from .attacks import PGD, AutoAttack
from .free import FreeAttack
from .normalised import Normalised
from .ops import divergence, logit_divergence, pgd_step, project, random_start, score_line_integral, score_step
from .self_consistency import Consistency, consistency
from .threat_model import Perturbations, ThreatModel
from .weight_perturbation import WeightPerturbation

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "AutoAttack",
    "Consistency",
    "FreeAttack",
    "Normalised",
    "Perturbations",
    "ThreatModel",
    "WeightPerturbation",
    "__version__",
    "attacks",
    "audit",
    "bounds",
    "consistency",
    "divergence",
    "divergences",
    "logit_divergence",
    "matching",
    "networks",
    "objectives",
    "pgd_step",
    "posteriors",
    "project",
    "random_start",
    "sampling",
    "score_line_integral",
    "score_step",
    "smoothing",
]
