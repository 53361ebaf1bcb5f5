"""How good an estimated posterior is, measured before a model is trained with it.

``oracle`` compares with p_d where it is known. ``evidence`` needs held-out data alone. ``robustness`` attacks the
posterior itself. Posteriors and models are evaluated outside of autocast.
"""

from .evidence import (
    Agreement,
    Calibration,
    agreement,
    calibration,
    centre,
    closed_loop,
    energy_identity,
    log_likelihood,
    martingale,
    matching_error,
    reliability,
    spread,
)
from .oracle import GradientError, gradient_error, kl_error, posterior_gradients
from .robustness import attacked_log_likelihood, robust_accuracy

__all__ = [
    "Agreement",
    "Calibration",
    "GradientError",
    "agreement",
    "attacked_log_likelihood",
    "calibration",
    "centre",
    "closed_loop",
    "energy_identity",
    "gradient_error",
    "kl_error",
    "log_likelihood",
    "martingale",
    "matching_error",
    "posterior_gradients",
    "reliability",
    "robust_accuracy",
    "spread",
]
