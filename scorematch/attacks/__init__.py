"""Attacks: where x' is."""

from .pgd import PGD, ascend

__all__ = ["PGD", "ascend"]
