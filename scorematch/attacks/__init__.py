"""Attacks: where x' is."""

from .apgd import APGD
from .autoattack import AutoAttack
from .fab import FAB
from .inspection import AutoAttackWarning
from .pgd import PGD, ascend
from .square import Square

__all__ = ["APGD", "FAB", "PGD", "AutoAttack", "AutoAttackWarning", "Square", "ascend"]
