"""The theorems of the paper, evaluated: both sides of each, for any model where p_d is known.

``errors`` has the robust errors and the constant C^D, ``inequalities`` Theorems 1 to 3 and Corollary 1, ``alignment``
Theorems 4 and 5, ``zero_one`` the criteria of section 5.1. Models and posteriors are evaluated outside of autocast.

    errors = bounds.robust_errors(model, p_d, x, y, threat_model, divergences=("l1", "kl"))
    lower, upper = bounds.theorem_1(errors["l1"])
    print(lower.left_mean, "<=", lower.right_mean, "<=", upper.right_mean)
    print(bounds.corollary_1(errors["l1"], errors["kl"]).slack)
"""

from .alignment import SmoothDensity, Theorem4, Theorem5, theorem_4, theorem_5
from .errors import DataConstant, RobustErrors, data_constant, robust_errors
from .estimates import Estimate, estimate
from .inequalities import Inequality, Theorem1, Theorem3, corollary_1, theorem_1, theorem_2, theorem_3
from .zero_one import ZeroOneErrors, zero_one_errors

__all__ = [
    "DataConstant",
    "Estimate",
    "Inequality",
    "RobustErrors",
    "SmoothDensity",
    "Theorem1",
    "Theorem3",
    "Theorem4",
    "Theorem5",
    "ZeroOneErrors",
    "corollary_1",
    "data_constant",
    "estimate",
    "robust_errors",
    "theorem_1",
    "theorem_2",
    "theorem_3",
    "theorem_4",
    "theorem_5",
    "zero_one_errors",
]
