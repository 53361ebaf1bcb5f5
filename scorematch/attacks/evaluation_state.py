"""How far an evaluation has come, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .accounting import Cost
from .identity import ANOTHER, Fingerprint, checksum
from .parts import Search

FORMATS = "scorematch AutoAttack "
FORMAT = f"{FORMATS}5"
EARLIER = -2  # fallen_by of a sample whose misclassified point was found in an evaluation at a smaller radius
VECTORS = ("robust", "clean", "finished", "labels", "fallen_by", "nearest", "beyond_labels")  # of one value a sample


@dataclass
class EvaluationState:
    """Verdicts so far. Samples are numbered as in the data set.

    Attributes:
        settings: what is evaluated: hashes of the model's tensors and of the data, threat model, attacks, seed.
        robust: bool [N], whether a sample is robust so far.
        clean: bool [N], whether it is classified correctly before any attack.
        finished: int64 [N], how many stages each sample has behind it. A stage is some parts of one attack.
        adversarial: [N, …], the misclassified point of each sample that was fooled, the original of every other.
        labels: int64 [N], the class predicted there; -1 where a logit is NaN.
        fallen_by: int64 [N], the stage that fooled a sample; -1 if it is robust or was misclassified without an attack,
            -2 if its point is known from an evaluation at a smaller radius.
        nearest: float64 [N], distance of the nearest misclassified point that was found: 0 for a sample that is
            misclassified without an attack, ∞ where there is none, above the radius where it does not count.
        beyond: [N, …], those points whose distance is above the radius; any values elsewhere.
        beyond_labels: int64 [N], the classes predicted there.
        costs: of each attack.
        fingerprint: what the model computes at some clean samples; None where no file is kept.
        searches: samples of batches whose runs are not through, and how far they have come, by the number of the batch.
    """

    settings: dict[str, Any]
    robust: Tensor
    clean: Tensor
    finished: Tensor
    adversarial: Tensor
    labels: Tensor
    fallen_by: Tensor
    nearest: Tensor
    beyond: Tensor
    beyond_labels: Tensor
    fingerprint: Fingerprint | None = None
    costs: dict[str, Cost] = field(default_factory=dict)
    searches: dict[int, tuple[Tensor, Search]] = field(default_factory=dict)

    @classmethod
    def new(cls, settings: dict[str, Any], x: Tensor, y: Tensor) -> EvaluationState:
        """Before the first pass over the samples of x [N, …] with labels y int64 [N]."""
        count = len(x)
        return cls(
            settings=settings,
            robust=torch.ones(count, dtype=torch.bool, device="cpu"),
            clean=torch.ones(count, dtype=torch.bool, device="cpu"),
            finished=torch.full((count,), -1, device="cpu"),
            adversarial=x.clone(),
            labels=y.clone(),
            fallen_by=torch.full((count,), -1, device="cpu"),
            nearest=torch.full((count,), torch.inf, dtype=torch.float64, device="cpu"),
            beyond=torch.empty_like(x),  # where nothing is written it takes no memory
            beyond_labels=y.clone(),
        )

    def at_larger_radius(self, eps: float) -> EvaluationState:
        """The state before the first attack at a larger radius.

        Samples that were fooled stay so. Points that were found beyond the smaller radius count if they are within the
        larger one. The two states share tensors.
        """
        reached = self.robust & (self.nearest <= eps)
        robust = self.robust & ~reached
        adversarial, labels = self.adversarial.clone(), self.labels.clone()
        adversarial[reached], labels[reached] = self.beyond[reached], self.beyond_labels[reached]
        return replace(
            self,
            robust=robust,
            finished=torch.zeros_like(self.finished),
            adversarial=adversarial,
            labels=labels,
            fallen_by=torch.full_like(self.fallen_by, -1).masked_fill(self.clean & ~robust, EARLIER),
            costs={},
            searches={},
        )

    @property
    def has_fallen(self) -> Tensor:
        """Whether an attack has fooled the model near a sample, bool [N]."""
        return self.fallen_by != -1

    @property
    def is_beyond(self) -> Tensor:
        """For which robust samples a misclassified point beyond the radius is known, bool [N]."""
        return self.robust & self.nearest.isfinite()

    def save(self, path: Path) -> None:
        """Write the state so that an interruption leaves the old file or the new one.

        It has a fingerprint by then: a file without one could not be checked against a model.
        """
        assert self.fingerprint is not None, "taken before the first file is written"
        content = {
            "format": FORMAT,
            "settings": self.settings,
            **{name: getattr(self, name) for name in VECTORS},
            "adversarial": self.adversarial[self.has_fallen],
            "beyond": self.beyond[self.is_beyond],
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "fingerprint": asdict(self.fingerprint),
            "search": None,
        }
        if self.searches:
            content["search"] = _joined(list(self.searches.values()))
        content["checksum"] = checksum(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        try:
            with open(beside, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def from_disk(cls, path: str | Path) -> EvaluationState:
        """The verdicts in a file, for reading. To go on with an evaluation, pass ``state_path`` to it instead.

        The file has no clean samples, so ``adversarial`` is NaN for every sample that no attack has fooled.

        Raises:
            ValueError: the file is damaged or holds no state.
        """
        content = _read(Path(path))
        points = content["adversarial"]
        return cls._of(content, points.new_full((len(content["robust"]), *points.shape[1:]), torch.nan))

    @property
    def robust_flags(self) -> Tensor | None:
        """Which samples are robust so far, bool [N]; None before all were classified."""
        return None if bool((self.finished < 0).any()) else self.robust

    @property
    def clean_accuracy(self) -> float:
        return self.clean.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        return self.robust.double().mean().item()

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any], x: Tensor) -> EvaluationState:
        """The state in a file, if it belongs to the same evaluation.

        Args:
            settings: what is to be evaluated now; the seed may be left out.
            x: [N, …] the data set.

        Raises:
            ValueError: the file is damaged, holds no state, or belongs to another data set or setting.
        """
        content = _read(path)
        for name, value in settings.items():
            if content["settings"].get(name) != value:
                raise ValueError(
                    f"state_path: {path} is of another {name}: {content['settings'].get(name)}, now {value}; {ANOTHER}"
                )
        return cls._of(content, x.clone())

    @classmethod
    def _of(cls, content: dict[str, Any], clean: Tensor) -> EvaluationState:
        """What a file holds, with ``clean`` [N, …] for the samples that no attack has fooled."""
        beyond = torch.empty_like(clean)
        clean[content["fallen_by"] != -1] = content["adversarial"].to(clean)
        beyond[content["robust"] & content["nearest"].isfinite()] = content["beyond"].to(clean)
        return cls(
            settings=content["settings"],
            adversarial=clean,
            beyond=beyond,
            fingerprint=Fingerprint(**content["fingerprint"]),
            costs={name: Cost(**cost) for name, cost in content["costs"].items()},
            searches=dict(enumerate(_parted(content["search"]))) if content["search"] is not None else {},
            **{name: content[name] for name in VECTORS},
        )


def _joined(searches: list[tuple[Tensor, Search]]) -> dict[str, Tensor]:
    """How far each sample has come: what a file holds does not depend on how the samples were dealt out."""
    return {
        "samples": torch.cat([samples for samples, _ in searches]),
        "queries": torch.cat([torch.full_like(samples, search.queries) for samples, search in searches]),
        "best": torch.cat([search.best.cpu() for _, search in searches]),
        "margin": torch.cat([search.margin.cpu() for _, search in searches]),
        "asked": torch.cat([search.asked.cpu() for _, search in searches]),
    }


def _parted(content: dict[str, Tensor]) -> list[tuple[Tensor, Search]]:
    """Samples that have come equally far, together."""
    parts = []
    for queries in content["queries"].unique().tolist():
        rows = (content["queries"] == queries).nonzero().squeeze(1)
        search = Search(queries, *(content[name][rows] for name in ("best", "margin", "asked")))
        parts.append((content["samples"][rows], search))
    return parts


def _read(path: Path) -> dict[str, Any]:
    """What :meth:`EvaluationState.save` wrote, to the last bit.

    Raises:
        ValueError: the file holds anything else.
    """
    unreadable = f"state_path: {path} is not a readable state of an evaluation"
    try:
        with open(path, "rb") as file:
            # Anything else torch would take for its format before 1.6, a pickle, which may ask for any memory.
            if file.read(4) != b"PK\3\4":
                raise ValueError("it does not begin as files of torch.save do")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they happen to stand for
        raise ValueError(f"{unreadable} ({type(error).__name__}: {error})") from None
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name.startswith(FORMATS):
        raise ValueError(f"state_path: {path} is not a state of an evaluation by scorematch.AutoAttack")
    if name != FORMAT:
        raise ValueError(f"state_path: {path} was written by another version of scorematch: {name!r}, not {FORMAT!r}")
    kept = content.pop("checksum", None)
    try:
        found = checksum(content)
    except Exception:  # of values that no state holds
        found = None
    if kept is None or found != kept:
        raise ValueError(f"{unreadable} (it is damaged: its contents do not fit their checksum)")
    return content
