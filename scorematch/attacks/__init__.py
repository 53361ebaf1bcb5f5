"""Attacks: the search for adversarial examples x' in B(x)."""

from .apgd import APGD
from .autoattack import AutoAttack
from .classifier import Classifier
from .curve import AccuracyCurve
from .evaluation_state import EvaluationState
from .fab import FAB
from .inspection import AutoAttackWarning
from .parts import Attack, Batch
from .pgd import PGD, ascend
from .single_step import single_step
from .square import Square

__all__ = [
    "APGD",
    "FAB",
    "PGD",
    "AccuracyCurve",
    "Attack",
    "AutoAttack",
    "AutoAttackWarning",
    "Batch",
    "Classifier",
    "EvaluationState",
    "Square",
    "ascend",
    "single_step",
]
