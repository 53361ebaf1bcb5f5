"""Which model and data a state belongs to: a digest of tensors, and what the model computes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model_state import plain
from .classifier import Classifier
from .parts import Attack
from .precision import full_precision

ANOTHER = "give another file, or delete this one to begin anew"  # where a state file does not fit
PROBES = 100  # samples whose clean logits are kept, spread evenly over the data set
PROBE_BATCH = 8  # the same in every run, so that the batch size of an evaluation changes nothing
PASSES = 5  # over which a randomised model shows how far its logits spread
# Relative to the largest logit. Networks of 18 to 28 layers in other batches or in float64 differ by at most 1e-6 from
# float32, under autocast by 8e-3 (bfloat16) and 1.5e-3 (float16).
ROUNDING, HALF_ROUNDING = 1e-3, 3e-2
SPREADS = 3.0  # times the largest difference seen between passes is still the same randomised model
JUMPS = 0.1  # share of the samples at which rounding may turn a decision within the model, such as a quantisation


@dataclass(frozen=True)
class Fingerprint:
    """What a model computes at some clean samples.

    Attributes:
        logits: [K, L].
        spread: largest difference between passes, relative to the largest logit: 0 unless the model is randomised.
    """

    logits: Tensor
    spread: float

    @classmethod
    def take(cls, model: Any, x: Tensor, device: torch.device) -> Fingerprint:
        """Of a model in eval mode at samples of x [N, …]."""
        logits = clean_logits(model, x, device)
        again = torch.stack([_differences(clean_logits(model, x, device), logits) for _ in range(PASSES - 1)])
        return cls(logits, float(again.where(again.isfinite(), 0.0).max()))

    def strangers(self, logits: Tensor) -> int:
        """At how many of the samples other clean logits [K, L] are more than rounding and randomness away."""
        if logits.shape != self.logits.shape:
            return len(self.logits)
        rounding = HALF_ROUNDING if _in_half_precision(self.logits) or _in_half_precision(logits) else ROUNDING
        return int((_differences(logits, self.logits) > max(rounding, SPREADS * self.spread)).sum())

    def fits(self, logits: Tensor) -> bool:
        """Whether clean logits [K, L] are of the same model."""
        return self.strangers(logits) <= JUMPS * len(self.logits)


def check_model(path: Path, fingerprint: Fingerprint | None, model: Any, x: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the model in eval mode has the fingerprint in the file ``path``."""
    assert fingerprint is not None, "a state in a file has one"
    logits = clean_logits(model, x, device)
    if not fingerprint.fits(logits):
        raise ValueError(
            f"state_path: {path} is of another model: at {fingerprint.strangers(logits)} of {len(logits)} samples its "
            f"clean logits are others; {ANOTHER}"
        )


def identity_of(model: Any, x: Tensor, y: Tensor, attacks: Sequence[Attack]) -> dict[str, Any]:
    """What a state file must be of to go on with it, by the name that an error gives it."""
    settings = []
    for attack in attacks:
        options = {k: _named(v) for k, v in vars(attack).items() if k != "threat_model" and k[0] != "_"}
        settings.append(f"{attack.name} {options | {'eps': attack.threat_model.eps}}")
    return {"model": digest_of_tensors(model), "data set": digest(x, y), "list of attacks": settings}


def _named(value: Any) -> Any:
    """A setting as it reads in every process: plain values as they are, tensors and arrays by a digest, functions and
    other objects by their names; containers entry by entry."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {_named(key): _named(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = [_named(entry) for entry in value]
        return entries if isinstance(value, (list, tuple)) else sorted(entries, key=repr)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return digest(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def clean_logits(model: Any, x: Tensor, device: torch.device) -> Tensor:
    """Logits [K, L] at K = min(N, 100) samples of x [N, …], on the CPU."""
    count = min(len(x), PROBES)
    samples = torch.arange(count, device="cpu") * len(x) // count
    classifier = Classifier(model)
    with full_precision(device):
        return torch.cat([classifier.logits(x[some].to(device)).cpu() for some in samples.split(PROBE_BATCH)])


def _differences(logits: Tensor, saved: Tensor) -> Tensor:
    """Of each sample the largest difference, relative to its largest logit, or to that of the median sample, [K].

    Infinite where one has a NaN or an infinite logit and the other has not.
    """
    finite = saved.isfinite()
    alike = torch.where(finite, logits.isfinite(), (logits == saved) | (logits.isnan() & saved.isnan())).all(1)
    size = saved.where(finite, 0.0).abs().amax(1)
    size = torch.maximum(size, size.median()).clamp_min(torch.finfo(saved.dtype).tiny)
    difference = (logits - saved).where(finite, 0.0).abs().amax(1)
    return torch.where(alike, difference / size, torch.inf)


def _in_half_precision(logits: Tensor) -> bool:
    """Whether bfloat16 or float16 holds all logits exactly: the last layer computes in it, whatever is returned."""
    known = logits[logits.isfinite()]
    return any(bool((known.to(dtype).to(known.dtype) == known).all()) for dtype in (torch.bfloat16, torch.float16))


def digest_of_tensors(model: Any) -> str:
    """Of a module a short hash of its parameters and buffers; any other callable is known by its logits alone."""
    if not isinstance(model, nn.Module):
        return "callable"
    return digest(*(value for value in model.state_dict().values() if isinstance(value, Tensor)))


def digest(*tensors: Tensor) -> str:
    """A short hash of the values of tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        data = plain(tensor.detach().cpu()).contiguous().flatten().view(torch.uint8)
        total.update(data.numpy().data)
    return total.hexdigest()[:16]


def checksum(value: Any) -> str:
    """A hash of nested dictionaries, sequences, tensors and plain values."""
    total = hashlib.sha256()

    def feed(value: Any) -> None:
        total.update(type(value).__name__.encode())
        if isinstance(value, Tensor):
            total.update(digest(value).encode())
        elif isinstance(value, dict):
            total.update(str(len(value)).encode())
            for key in sorted(value):
                feed(key)
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            total.update(str(len(value)).encode())
            for one in value:
                feed(one)
        else:
            total.update(repr(value).encode())

    feed(value)
    return total.hexdigest()
