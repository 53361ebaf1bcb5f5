"""AutoAttack (Croce & Hein, ICML 2020): a sample counts as robust if four attacks in turn cannot fool the model."""

from __future__ import annotations

import secrets
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..intervals import wilson
from ..model_state import borrowed
from ..threat_model import ThreatModel
from . import inspection
from .apgd import APGD
from .classifier import (
    Classifier,
    cache_chunk,
    channels_last_works,
    folding_that_works,
    full_precision,
    predicted,
)
from .evaluation_state import Cost, EvaluationState
from .fab import FAB, distance
from .identity import Fingerprint, clean_logits, digest, digest_of_tensors
from .inputs import clean_batch
from .inspection import AutoAttackWarning
from .parts import Attack, Search
from .randomness import ATTACK_KEYS, KeyedNoise, Noise, ReferenceNoise
from .settings import refuse_unknown
from .square import Square

NORMS = {"Linf": "linf", "L2": "l2", "linf": "linf", "l2": "l2"}
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
    "custom": (),
}
RNGS = ("keyed", "reference")
FIXED = ("norm", "eps", "threat_model", "version")  # decided when an AutoAttack is made
SETTINGS = (
    *("model", "seed", "verbose", "attacks_to_run", "device", "rng", "search_dtype", "compile", "save_every"),
    *("apgd", "apgd_targeted", "fab", "square"),
)


@dataclass(frozen=True)
class Stage:
    """A pass over the surviving samples: some parts of one attack, on each batch in turn."""

    attack: Attack
    parts: range


class AutoAttack:
    """A drop-in for the official package's class: same signature, same attacks.

    Samples that the model gets wrong at once are not robust. Each attack runs on the samples that still stand, always
    from the original x. A sample falls only if the model, in its own precision and without TF32, misclassifies the
    point that was found. The model is used in eval mode and left as found: mode, gradients, buffers.

    Three things are unlike the official package. Random numbers belong to a sample (``rng="keyed"``), so that verdicts,
    but for rounding, depend neither on ``bs`` nor on the number of devices nor on which other samples survive. A sample
    that has fallen is not attacked further, so the point returned is misclassified but not the one of highest loss.
    And the file at ``state_path`` resumes an interrupted evaluation where it was, with the same verdicts, in the middle
    of an attack too. With these numbers the search, not the check of what it finds, folds batch norm into convolutions,
    but for ``version="rand"`` and ``compile``.

    Under ``torchrun`` (an initialised ``torch.distributed``) every rank attacks its share of the samples and all return
    the same whole result.

    A sample counts as misclassified wherever the model returns NaN among its logits, when clean or under attack, and is
    listed in the report. A gradient that is NaN in some pixel leaves that pixel where it is.

    Args:
        model: maps x [N, …] to logits [N, L] of any floating-point type; a module, scripted ones included, or any
            callable (then its mode is its own affair).
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius, pixels in [0, 1].
        seed: of the random numbers; None draws one.
        verbose: print the accuracy after each attack, and progress where stderr is a terminal.
        attacks_to_run: for ``version="custom"``: names among apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.
        version: ``"standard"`` (apgd-ce, apgd-t, fab-t, square), ``"plus"`` (six attacks, with restarts), ``"rand"``
            (apgd-ce and apgd-dlr with gradients averaged over 20 passes, for randomised models), ``"fast"`` (apgd-ce
            and apgd-t), or ``"custom"``: set ``attacks_to_run``. The attributes of ``apgd``, ``apgd_targeted``, ``fab``
            and ``square`` are those of :class:`APGD`, :class:`FAB`, :class:`Square`, and can be set for any version.
        is_tf_model: not supported, must be False.
        device: where to attack; None is the device of the model, or that of x.
        log_path: a file to which what is printed is appended.
        rng: ``"keyed"``, or ``"reference"``: the official package's stream of numbers, for comparisons with it.
        search_dtype: torch.bfloat16 or torch.float16 search under autocast; a success still counts only if the model
            in its own precision confirms it. What survives is then an upper bound of the robust accuracy.
        compile: search with ``torch.compile(model)``, for a GPU or a wide network; a small one on a CPU gets slower.
        save_every: seconds between two writes of ``state_path``.

    Attributes:
        report: of the last evaluation: ``robust_accuracy``, ``clean_accuracy`` and ``attacks``, for each attack in turn
            the accuracy after it, its 95 % interval (Wilson), its forward and backward passes (one for each sample) and
            its seconds. ``nan_samples`` lists the samples at whose points the model returned NaN: ``clean``, and
            ``attacked`` for those that fell so.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.
        AttributeError: something is assigned that is no setting, or is fixed: ``norm``, ``eps``, ``version``.
    """

    norm: str
    version: str
    threat_model: ThreatModel
    report: dict[str, Any]
    _log_path: str | Path | None

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: str | torch.device | None = None,
        log_path: str | Path | None = None,
        *,
        rng: str = "keyed",
        search_dtype: torch.dtype | None = None,
        compile: bool = False,
        save_every: float = 30.0,
    ) -> None:
        if is_tf_model:
            raise ValueError("is_tf_model: TensorFlow models are not supported, wrap the model in a PyTorch callable")
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if norm not in NORMS:
            raise ValueError(f"norm must be Linf or L2 (L1 is not supported), got {norm!r}")
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
        if attacks_to_run and version != "custom":
            raise ValueError(f'attacks_to_run is for version="custom", got version={version!r}')
        self.__dict__.update(
            norm=norm, version=version, threat_model=ThreatModel(NORMS[norm], eps), report={}, _log_path=log_path
        )
        self.model = model
        self.seed = seed
        self.verbose = verbose
        self.device = device
        self.rng = rng
        self.search_dtype = search_dtype
        self.compile = compile
        self.save_every = save_every
        self.apgd = APGD(self.threat_model)
        self.apgd_targeted = APGD(self.threat_model, loss="dlr-targeted")
        self.fab = FAB(self.threat_model)
        self.square = Square(self.threat_model)
        self.attacks_to_run = list(VERSIONS[version] or attacks_to_run)
        if version == "plus":
            self.apgd.n_restarts = self.fab.n_restarts = 5
        if version == "rand":
            self.apgd.eot_iter = 20
        self._check_settings()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED:
            raise AttributeError(f"{name} is fixed when an AutoAttack is made; make another one")
        refuse_unknown(self, name, SETTINGS)
        object.__setattr__(self, name, value)

    def _check_settings(self) -> None:
        """Raise ValueError or TypeError for what was given or assigned and is outside its range."""
        seed = self.seed
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, or None, got {seed!r}")
        if self.rng not in RNGS:
            raise ValueError(f"rng must be one of {', '.join(RNGS)}, got {self.rng!r}")
        if self.search_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"search_dtype must be None, torch.bfloat16 or torch.float16, got {self.search_dtype}")
        if not self.save_every >= 0:
            raise ValueError(f"save_every must be a number of seconds, at least 0, got {self.save_every}")
        for name, kind in (("apgd", APGD), ("apgd_targeted", APGD), ("fab", FAB), ("square", Square)):
            attack = getattr(self, name)
            if not isinstance(attack, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(attack).__name__}")
            if attack.eps > self.eps:
                raise ValueError(
                    f"{name}.eps is {attack.eps}, but the evaluation is of eps {self.eps}: make an AutoAttack of the "
                    "larger radius"
                )
            ours, own = self.threat_model, attack.threat_model
            if (own.norm, own.lower, own.upper) != (ours.norm, ours.lower, ours.upper):
                raise ValueError(f"{name} is made for another norm or box than the evaluation")

    @property
    def eps(self) -> float:
        return self.threat_model.eps

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Any:
        """Attack every sample until it falls or all attacks are through.

        Args:
            x_orig: [N, …] in [0, 1], float32 or float64; images [N, C, H, W] for Square. What rounding put outside,
                1e-6 at most, is clamped.
            y_orig: class indices [N] or [N, 1], of any integer type.
            bs: samples at a time; decides memory and speed, not the verdicts.
            return_labels: also return the predicted classes.
            state_path: file to resume from if it is there, and to write what was found so far. It must be of the same
                model, by its tensors and by its clean logits but for rounding. Under ``torchrun`` each rank has its
                own, with ``.rank…`` appended.

        Returns:
            The adversarial points [N, …] on the device of x_orig, the original where none was found; with
            ``return_labels`` also the class predicted at each, int64 [N], −1 where the model returned NaN.

        Raises:
            ValueError: x leaves [0, 1], labels and shapes do not fit, the batch is empty, the model returns no logits,
                or NaN for every sample of the first batch or, on the way, for samples that it classified before, or the
                state is damaged or of another evaluation.
        """
        state = self._evaluate(x_orig, y_orig, bs, state_path, self._attacks())
        adversarial = state.adversarial.to(x_orig.device)
        return (adversarial, state.labels.to(y_orig.device)) if return_labels else adversarial

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Every attack by itself on all samples that the model gets right.

        Args, Raises: as for :meth:`run_standard_evaluation`.

        Returns:
            For each attack what :meth:`run_standard_evaluation` returns. ``report`` holds one report for each attack.
        """
        results, reports = {}, {}
        for attack in self._attacks():
            state = self._evaluate(x_orig, y_orig, bs, None, [attack])
            adversarial = state.adversarial.to(x_orig.device)
            results[attack.name] = (adversarial, state.labels.to(y_orig.device)) if return_labels else adversarial
            reports[attack.name] = self.report
        self.__dict__["report"] = reports
        return results

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Share of samples that the model gets right.

        Args, Raises: as for :meth:`run_standard_evaluation`.
        """
        x_orig, y_orig = self._check_input(x_orig, y_orig, bs)
        device = self._device(x_orig)
        with borrowed(self.model, "eval") if isinstance(self.model, nn.Module) else nullcontext():
            classifier = Classifier(self.model)
            pairs = zip(x_orig.split(bs), y_orig.split(bs), strict=True)
            hits = sum(int((classifier.label(x.to(device)) == y.to(device)).sum()) for x, y in pairs)
        return hits / len(x_orig)

    def _attacks(self) -> list[Attack]:
        """The attacks in their order, with the settings that they have now."""
        self._check_settings()
        if not self.attacks_to_run:
            raise ValueError(f"attacks_to_run is empty; choose among {', '.join(ATTACK_KEYS)}")
        known: dict[str, Attack] = {
            "apgd-ce": replace(self.apgd, loss="ce"),
            "apgd-dlr": replace(self.apgd, loss="dlr"),
            "apgd-t": self.apgd_targeted,
            "fab": replace(self.fab, targeted=False),
            "fab-t": replace(self.fab, targeted=True, n_restarts=1),
            "square": self.square,
        }
        for name in self.attacks_to_run:
            if name not in known:
                raise ValueError(f"attacks_to_run: {name!r} is none of {', '.join(known)}")
            known[name].check()
        return [known[name] for name in self.attacks_to_run]

    def _device(self, x: Tensor) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        if isinstance(self.model, nn.Module) and (parameter := next(self.model.parameters(), None)) is not None:
            return parameter.device
        return x.device

    def _evaluate(
        self, x: Tensor, y: Tensor, bs: int, state_path: str | Path | None, attacks: list[Attack]
    ) -> EvaluationState:
        x, y = self._check_input(x, y, bs)
        for attack in attacks:
            if attack.images_only and x.dim() != 4:
                raise ValueError(f"{attack.name} takes images [N, C, H, W], got x_orig of shape {list(x.shape)}")
        evaluation = _Evaluation(self, x, y, bs, state_path, attacks)
        state = evaluation.run()
        self.__dict__["report"] = evaluation.report()
        evaluation.say_result()
        return state

    def _check_input(self, x: Tensor, y: Tensor, bs: int) -> tuple[Tensor, Tensor]:
        """x [N, …] in the box and y int64 [N]."""
        for name, tensor in (("x_orig", x), ("y_orig", y)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x_orig must be float32 or float64 in [0, 1], got {x.dtype}")
        if bs < 1:
            raise ValueError(f"bs must be at least 1, got {bs}")
        if len(x) == 0:
            raise ValueError("x_orig is empty, nothing can be evaluated")
        return clean_batch(x, y, self.threat_model, "y_orig")


class _Evaluation:
    """One evaluation on its way: a data set, a list of stages, and the state."""

    def __init__(
        self,
        settings: AutoAttack,
        x: Tensor,
        y: Tensor,
        bs: int,
        state_path: str | Path | None,
        attacks: list[Attack],
    ) -> None:
        self.settings = settings
        self.model = settings.model
        self.x, self.y, self.bs = x.cpu(), y.cpu(), bs
        self.device = settings._device(x)
        self.attacks = attacks
        self.rank, self.world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.state_path = Path(state_path) if state_path is not None else None
        if self.state_path is not None and self.world > 1:
            self.state_path = self.state_path.with_name(f"{self.state_path.name}.rank{self.rank}of{self.world}")
        self.warnings: list[str] = []
        self.last_save = time.monotonic()
        self.last_tick = time.perf_counter()
        self.progress: tqdm | None = None

    # What is printed

    def say(self, text: str) -> None:
        if self.rank != 0:
            return
        if self.settings.verbose:
            tqdm.write(text, file=sys.stdout)
        if self.settings._log_path is not None:
            with open(self.settings._log_path, "a") as file:
                file.write(text + "\n")

    def warn(self, text: str | None) -> None:
        if text is None:
            return
        self.warnings.append(text)
        self.say(f"warning: {text}")
        warnings.warn(text, AutoAttackWarning, stacklevel=6)

    def say_accuracy(self, index: int) -> None:
        """The accuracy after a stage; on a resume later ones may have lowered it already."""
        name, count = self.stages[index].attack.name, len(self.mine)
        fallen = (self.state.fallen_by >= 0) & (self.state.fallen_by <= index)
        robust = int((self.state.clean & ~fallen)[self.mine].sum())
        low, high = wilson(robust, count)
        where = f" (rank 0's {count} samples)" if self.world > 1 else ""
        self.say(
            f"robust accuracy after {name}: {100 * robust / count:.2f} % "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f}), {self.state.costs[name].seconds:.1f} s{where}"
        )

    # The evaluation

    def run(self) -> EvaluationState:
        with ExitStack() as stack:
            if isinstance(self.model, nn.Module):
                if getattr(self.model, "training", False):  # a frozen script has no mode
                    self.warn("the model is in training mode; it is evaluated in eval mode")
                stack.enter_context(borrowed(self.model, "eval"))
            stack.enter_context(inspection.unchanged_buffers(self.model, self.warn))
            classes = self._inspect()
            self.stages = self._stages(classes)
            self.mine = torch.arange(self.rank, len(self.x), self.world)
            self.state = self._begin()
            try:
                self._attack()
            except BaseException:
                if self.state_path is not None:
                    self.state.save(self.state_path)
                raise
            finally:
                if self.progress is not None:
                    self.progress.close()
        if self.state_path is not None:
            self.state.save(self.state_path)
        self._gather()
        return self.state

    def _stages(self, classes: int) -> list[Stage]:
        """With keyed numbers each part passes over all samples, in full batches; the reference's batches go through
        all parts of an attack, since its stream of numbers does."""
        stages = []
        for attack in self.attacks:
            parts = attack.parts(classes)
            if self.settings.rng == "keyed":
                stages += [Stage(attack, range(part, part + 1)) for part in range(parts)]
            else:
                stages.append(Stage(attack, range(parts)))
        return stages

    def _inspect(self) -> int:
        """Warn of what makes the evaluation doubtful; returns the number of classes."""
        x, y = self.x[: self.bs].to(self.device), self.y[: self.bs].to(self.device)
        classifier = Classifier(self.model)
        logits = classifier.logits(x)
        inspection.no_classifier(logits)
        classes = logits.shape[1]
        low, high = (int(v) for v in torch.aminmax(self.y))
        if low < 0 or high >= classes:
            raise ValueError(
                f"y_orig must lie in 0 … {classes - 1}, as the model has {classes} classes, got {low} … {high}"
            )
        self.warn(inspection.probabilities(logits))
        if self.settings.version != "rand":
            self.warn(inspection.randomised(self.model, x, y))
        self.warn(inspection.dynamic(self.model, x))
        names = [attack.name for attack in self.attacks]
        if any(name != "square" for name in names):
            self.warn(inspection.zero_gradients(classifier, x, y))
            known = predicted(logits) >= 0
            self.warn(inspection.broken_gradients(classifier, x[known], y[known]))
        targets = max((getattr(a, "n_target_classes", 0) for a in self.attacks if a.name.endswith("-t")), default=0)
        self.warn(inspection.few_classes(classes, names, targets))
        return classes

    def _identity(self) -> dict[str, Any]:
        """What a state file must be of to go on with it."""
        settings = self.settings
        attacks = []
        for attack in self.attacks:
            options = {k: v for k, v in asdict(attack).items() if k != "threat_model"}  # type: ignore[call-overload]
            attacks.append(f"{attack.name} {options | {'eps': attack.threat_model.eps}}")
        return {
            "model": digest_of_tensors(self.model),
            "data set": digest(self.x, self.y),
            "norm": settings.threat_model.norm,
            "eps": settings.eps,
            "list of attacks": attacks,
            "rng": settings.rng,
            "batch size": self.bs if settings.rng == "reference" else None,
            "search_dtype": str(settings.search_dtype),
            "compile": settings.compile,
            "share of the samples": f"{self.rank} of {self.world}",
        }

    def _begin(self) -> EvaluationState:
        identity = self._identity()
        if self.state_path is not None and self.state_path.exists():
            if self.settings.seed is not None:
                identity["seed"] = self.settings.seed
            state = EvaluationState.load(self.state_path, identity, self.x)
            self._check_fingerprint(state)
            standing, begun = int(state.robust[self.mine].sum()), int((state.finished[self.mine] > 0).sum())
            self.say(f"resumed from {self.state_path}: {standing} samples stand, {begun} were attacked")
        else:
            seed = self.settings.seed
            if seed is None:
                seed = self._shared(secrets.randbits(31))
            count = len(self.x)
            state = EvaluationState(
                settings={**identity, "seed": seed},
                robust=torch.ones(count, dtype=torch.bool),
                clean=torch.ones(count, dtype=torch.bool),
                finished=torch.full((count,), -1),
                adversarial=self.x.clone(),
                labels=self.y.clone(),
                fallen_by=torch.full((count,), -1),
            )
            if self.state_path is not None:
                state.fingerprint = Fingerprint.take(self.model, self.x, self.device)
                state.save(self.state_path)  # a path that cannot be written shows now
        self.seed = state.settings["seed"]
        attacks = ", ".join(attack.name for attack in self.attacks)
        self.say(
            f"AutoAttack {self.settings.version}: {attacks}; {self.settings.threat_model.norm}, eps "
            f"{self.settings.eps:g}; {len(self.x)} samples; seed {self.seed}, rng {self.settings.rng}"
        )
        return state

    def _check_fingerprint(self, state: EvaluationState) -> None:
        assert state.fingerprint is not None
        logits = clean_logits(self.model, self.x, self.device)
        if not state.fingerprint.fits(logits):
            raise ValueError(
                f"state_path: {self.state_path} is of another model: at {state.fingerprint.strangers(logits)} of "
                f"{len(logits)} samples its clean logits are others"
            )

    def _shared(self, value: int) -> int:
        """The value of rank 0."""
        if self.world > 1:
            values = [value]
            torch.distributed.broadcast_object_list(values, src=0)
            return values[0]
        return value

    def _attack(self) -> None:
        state = self.state
        model = torch.compile(self.model, dynamic=True) if self.settings.compile else self.model
        few = self.x[:2].to(self.device)
        chunk = None if self.settings.compile else cache_chunk(self.model, few)
        channels_last = channels_last_works(self.model, few)
        self.search = Classifier(model, self.settings.search_dtype, self._tick, chunk, channels_last)
        self.verify = Classifier(self.model, None, self._tick, chunk)
        # Rounding decides some steps of an attack: what is compared with the official package computes as it does.
        # A randomised model may take another path than the one that was traced.
        folds = self.settings.rng == "keyed" and self.settings.version != "rand" and not self.settings.compile
        self.folding = folding_that_works(self.model, few) if folds else None
        self._account("clean")
        for samples in self._pending(-1).split(self.bs):
            x, y = self._batch(samples)
            with full_precision():
                logits = self.verify.logits(x)
            labels = predicted(logits)
            state.labels[samples] = labels.cpu()
            state.clean[samples] = state.robust[samples] = (labels == y).cpu()
            state.finished[samples] = 0
            self._save()
        self._account("clean")
        correct, count = int(state.clean[self.mine].sum()), len(self.mine)
        self.say(f"clean accuracy: {100 * correct / count:.2f} %")
        self.warn(inspection.nan_samples(self._nan_samples(self.state.fallen_by < 0), "clean"))

        self.progress = tqdm(
            total=self._passes_left(0),
            unit="pass",
            unit_scale=True,
            smoothing=0.05,
            disable=not (self.settings.verbose and self.rank == 0 and sys.stderr.isatty()),
        )
        for index, stage in enumerate(self.stages):
            name = stage.attack.name
            self._account(name)
            for samples in self._pending(index).split(self.bs):
                self._attack_batch(index, stage, samples)
                self._account(name)
                self._save()
            if index + 1 == len(self.stages) or self.stages[index + 1].attack.name != name:
                self.say_accuracy(index)

    def _attack_batch(self, index: int, stage: Stage, samples: Tensor) -> None:
        state = self.state
        x, y = self._batch(samples)
        found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=self.device)
        noise: Noise | None = ReferenceNoise(self.seed) if self.settings.rng == "reference" else None
        for part in stage.parts:
            rows = (~fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            with self.folding.applied() if self.folding is not None else nullcontext():
                points, wrong = stage.attack.run_part(
                    self.search,
                    x[rows],
                    y[rows],
                    samples.to(self.device)[rows],
                    part,
                    noise or KeyedNoise(self.seed, stage.attack.name, part),
                    self._resumed_search(samples[rows.cpu()]),
                    self._pause(stage.attack.name, samples[rows.cpu()]),
                )
            state.search = None
            with full_precision():
                logits = self.verify.logits(points)
            labels = predicted(logits)
            confirmed = labels != y[rows]
            confirmed &= wrong  # FAB's points beyond eps are misclassified and do not count
            state.costs[stage.attack.name].unverified += int((wrong & ~confirmed).sum())
            self._check_still_classifies(x[rows[confirmed & (labels < 0)]])
            found[rows[confirmed]], fooled[rows[confirmed]] = points[confirmed], True
            fallen = samples[rows[confirmed].cpu()]
            state.labels[fallen] = labels[confirmed].cpu()
        fallen = samples[fooled.cpu()]
        state.robust[fallen] = False
        state.fallen_by[fallen] = index
        state.adversarial[fallen] = found[fooled].cpu()
        state.finished[samples] = index + 1

    def _check_still_classifies(self, x: Tensor) -> None:
        """Of clean samples x [N, …] that were classified: a NaN near them is found by an attack only if they still are.

        Raises:
            ValueError: none of them is; the model has changed on the way.
        """
        if len(x) and bool((nan := self.verify.label(x) < 0).all()):
            raise ValueError(
                f"the model returned NaN for {int(nan.sum())} of {len(x)} clean samples that it classified before"
            )

    def _nan_samples(self, where: Tensor) -> Tensor:
        """Those of ``where``, bool [N], at whose points the model returned NaN."""
        state = self.state
        return self.mine[(where & (state.finished >= 0) & (state.labels < 0))[self.mine]]

    def _batch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[samples].to(self.device), self.y[samples].to(self.device)

    def _pending(self, index: int) -> Tensor:
        """The samples that stage ``index`` has still to attack, in order."""
        open_here = self.state.robust & (self.state.finished == index)
        return self.mine[open_here[self.mine]]

    def _resumed_search(self, samples: Tensor) -> Search | None:
        if self.state.search is None:
            return None
        saved, search = self.state.search
        if not torch.equal(saved, samples):
            return None
        return Search(search.queries, search.best.to(self.device), search.margin.to(self.device))

    def _pause(self, name: str, samples: Tensor) -> Callable[[Search], None]:
        def pause(search: Search) -> None:
            self.state.search = (samples, search)
            self._account(name)
            self._save()

        return pause

    # Costs, progress, saving

    def _tick(self, passes: int) -> None:
        if self.progress is not None:
            self.progress.update(passes)

    def _account(self, name: str) -> None:
        """Book what was done since the last call on ``name``."""
        cost = self.state.costs.setdefault(name, Cost())
        for classifier in (self.search, self.verify):
            cost.forwards += classifier.forwards
            cost.backwards += classifier.backwards
            cost.broken_gradients += classifier.take_broken()
            classifier.forwards = classifier.backwards = 0
        now = time.perf_counter()
        cost.seconds += now - self.last_tick
        self.last_tick = now
        if self.progress is not None:
            done = self.progress.n
            index = int(self.state.finished[self.mine[self.state.robust[self.mine]]].min()) if self._standing() else 0
            self.progress.total = done + (self._passes_left(index) if self._standing() else 0)
            self.progress.set_description(f"{name}, {self._standing()} stand", refresh=False)

    def _standing(self) -> int:
        return int(self.state.robust[self.mine].sum())

    def _passes_left(self, index: int) -> int:
        """Passes that are still to be made if every sample survives."""
        costs = torch.tensor([sum(stage.attack.cost()) * len(stage.parts) for stage in self.stages])
        left = torch.cat([costs.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=costs.dtype)])
        standing = self.mine[self.state.robust[self.mine]]
        return int(left[self.state.finished[standing].clamp_min(0)].sum())

    def _save(self) -> None:
        if self.state_path is not None and time.monotonic() - self.last_save >= self.settings.save_every:
            self.state.save(self.state_path)
            self.last_save = time.monotonic()

    # The result

    def _gather(self) -> None:
        """Bring the shares of all ranks together on each."""
        if self.world == 1:
            return
        state = self.state
        fields = ("robust", "clean", "finished", "labels", "fallen_by", "adversarial")
        share = {name: getattr(state, name)[self.mine] for name in fields}
        shares: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(shares, (self.mine, share, state.costs, self.warnings))
        state.costs = {}
        for mine, part, costs, notes in shares:
            for name in fields:
                getattr(state, name)[mine] = part[name]
            for name, cost in costs.items():
                total = state.costs.setdefault(name, Cost())
                total.forwards += cost.forwards
                total.backwards += cost.backwards
                total.broken_gradients += cost.broken_gradients
                total.seconds = max(total.seconds, cost.seconds)
                total.unverified += cost.unverified
            self.warnings += [note for note in notes if note not in self.warnings]
        self.mine = torch.arange(len(self.x))

    def report(self) -> dict[str, Any]:
        state, count = self.state, len(self.x)

        def accuracy(hits: int) -> dict[str, Any]:
            return {"accuracy": hits / count, "interval": list(wilson(hits, count))}

        attacks: dict[str, Any] = {}
        standing, before_square = int(state.clean.sum()), None
        for index, stage in enumerate(self.stages):
            name = stage.attack.name
            if name == "square" and name not in attacks:
                before_square = standing
            standing -= int((state.fallen_by == index).sum())
            attacks[name] = {**accuracy(standing), **asdict(state.costs.get(name, Cost()))}
        if before_square is not None and len(self.attacks) > 1:
            self.warn(inspection.masking(before_square / count, attacks["square"]["accuracy"]))
        fallen = state.fallen_by >= 0
        nan = {"clean": self._nan_samples(~fallen), "attacked": self._nan_samples(fallen)}
        self.warn(inspection.nan_samples(nan["attacked"], "attacked"))
        clean, robust = accuracy(int(state.clean.sum())), accuracy(int(state.robust.sum()))
        return {
            "clean_accuracy": clean["accuracy"],
            "clean_interval": clean["interval"],
            "robust_accuracy": robust["accuracy"],
            "robust_interval": robust["interval"],
            "attacks": attacks,
            "samples": count,
            "nan_samples": {name: samples.tolist() for name, samples in nan.items()},
            "norm": self.settings.threat_model.norm,
            "eps": self.settings.eps,
            "version": self.settings.version,
            "seed": self.seed,
            "rng": self.settings.rng,
            "search_dtype": str(self.settings.search_dtype) if self.settings.search_dtype is not None else None,
            "compile": self.settings.compile,
            "seconds": sum(cost.seconds for cost in state.costs.values()),
            "warnings": list(self.warnings),
        }

    def say_result(self) -> None:
        report = self.settings.report
        largest = distance(self.state.adversarial, self.x, self.settings.threat_model.norm).max()
        low, high = report["robust_interval"]
        self.say(
            f"robust accuracy: {100 * report['robust_accuracy']:.2f} % "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f}); "
            f"largest {self.settings.norm} perturbation {float(largest):.5f}; {report['seconds']:.1f} s"
        )
