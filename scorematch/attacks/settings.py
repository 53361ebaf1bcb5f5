"""Settings that are assigned by name: an unknown name is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, Protocol

from torch import Tensor

from ..threat_model import ThreatModel


class Perturber(Protocol):
    """What an attack asks of the ``AutoAttack`` that it belongs to."""

    def perturb(self, attack: Any, x: Tensor, y: Tensor | None) -> Tensor: ...


class AttackSettings:
    """The base of attacks that are dataclasses. Only their fields and ``eps`` can be assigned.

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

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """All parts of an attack of an ``AutoAttack`` on a batch, such as ``adversary.apgd.perturb(x, y)``.

        Model, seed and device are those of the ``AutoAttack``. To run an attack by itself, call it with a model.

        Args:
            x: [N, …] inside the box.
            y: class indices [N]; None is what the model predicts.

        Returns:
            [N, …] on the device of the attack: a misclassified point of B(x), or x where none was found.

        Raises:
            ValueError: the attack belongs to no ``AutoAttack``, or x and y do not fit.
        """
        owner = vars(self).get("_owner")
        if owner is None:
            raise ValueError(
                f"this {type(self).__name__} belongs to no AutoAttack; call it with a model: attack(model, x, y)"
            )
        return owner.perturb(self, x, y)

    def belong_to(self, owner: Perturber) -> None:
        """Take model, seed and device from ``owner`` in :meth:`perturb`."""
        object.__setattr__(self, "_owner", owner)

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
