"""The compiled operators. Each has a file with its wrapper, its fake kernel, its gradient and its equation.

Schemas are in `csrc/registration.cpp`, kernels in `csrc/cpu` and `csrc/cuda`, and the same functions in plain PyTorch
in `scorematch.reference`.
"""

from .apgd_step import apgd_step
from .divergence import DIVERGENCES, divergence
from .fab_step import fab_step
from .keyed_uniform import keyed_uniform
from .l1_step import l1_project, l1_step
from .logit_divergence import logit_divergence
from .pgd_step import pgd_step, project
from .random_start import random_start
from .score_line_integral import score_line_integral
from .score_step import score_step
from .square import square_l2, square_linf

__all__ = [
    "DIVERGENCES",
    "apgd_step",
    "divergence",
    "fab_step",
    "keyed_uniform",
    "l1_project",
    "l1_step",
    "logit_divergence",
    "pgd_step",
    "project",
    "random_start",
    "score_line_integral",
    "score_step",
    "square_l2",
    "square_linf",
]
