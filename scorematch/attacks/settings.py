"""Settings that are assigned by name: a name that means nothing is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any

from ..threat_model import ThreatModel


class AttackSettings:
    """The base of attacks that are dataclasses: their fields, and ``eps``, can be assigned and nothing else.

    Values are checked by the attack's ``check``, before it runs.
    """

    threat_model: ThreatModel
    images_only = False

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_unknown(self, name, [*(field.name for field in fields(self)), "eps"])  # type: ignore[arg-type]
        super().__setattr__(name, value)

    @property
    def eps(self) -> float:
        """Radius of the threat model; assigning it changes this attack alone."""
        return self.threat_model.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.threat_model = self.threat_model.replace(eps=value)

    def check_counts(self, *names: str) -> None:
        """Raise ValueError unless the settings of these names are whole numbers of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check_share(self, name: str) -> None:
        """Raise ValueError unless the setting of this name lies in [0, 1]."""
        if not 0 <= getattr(self, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


def refuse_unknown(owner: object, name: str, allowed: Sequence[str]) -> None:
    """Raise AttributeError unless ``name`` is among those allowed."""
    if name not in allowed:
        raise AttributeError(f"{type(owner).__name__} has no setting {name!r}; it has {', '.join(allowed)}")
