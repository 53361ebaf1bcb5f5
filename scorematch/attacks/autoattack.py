"""AutoAttack (Croce & Hein, ICML 2020): a sample counts as robust if four attacks in turn cannot fool the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import clean_batch, joined
from ..model_state import as_found
from ..modes import outside_inference_mode
from ..threat_model import ThreatModel
from .apgd import APGD
from .classifier import Classifier, predicted
from .console import Console, Logger
from .curve import AccuracyCurve, ascending, at_radius, depends_on_radius
from .evaluation import Options, check_class_range, evaluate
from .evaluation_state import EvaluationState
from .fab import FAB
from .parts import Attack, run_alone
from .precision import full_precision
from .randomness import ATTACK_KEYS
from .report import result_line, table
from .settings import AttackSettings, refuse_unknown
from .sharing import Share, path_of_this_process
from .square import Square
from .targets import check_targets_fit

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1", "linf": "linf", "l2": "l2", "l1": "l1"}
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
    "custom": (),
}
RNGS = ("keyed", "reference")
ATTACKS = ("apgd", "apgd_targeted", "fab", "square")
# What is decided when one is made.
FIXED = ("norm", "eps", "epsilon", "lower", "upper", "threat_model", "version", "is_tf_model", "logger")
SETTINGS = (
    *("model", "seed", "verbose", "attacks_to_run", "device"),
    *("rng", "search_dtype", "compile", "save_every", "workers", "budget", "verdict_passes", "share_samples"),
    *ATTACKS,
)


class AutoAttack:
    """A drop-in for the official package's class: same signature, same attacks.

    Samples that the model gets wrong without an attack are not robust. Each attack runs on the samples that are still
    robust, always from the original x. A sample counts as fooled only if the model, in its own precision and without
    TF32, misclassifies the point that was found. The model is used in eval mode and left as found: mode, gradients,
    buffers.

    Three things differ from the official package. First, random numbers belong to a sample (``rng="keyed"``). So, up to
    rounding, verdicts depend neither on ``bs`` nor on the number of devices nor on which other samples are still
    robust. Second, a sample that was fooled is not attacked further, so the point returned is misclassified but not the
    one of highest loss. Third, the file at ``state_path`` resumes an interrupted evaluation where it was, with the same
    verdicts, even in the middle of an attack. With keyed numbers the search folds batch norm into convolutions, except
    for ``version="rand"``, ``verdict_passes`` above 1 and ``compile``; the check of what it finds does not.

    A sample counts as misclassified wherever the model returns NaN among its logits, clean or under attack, and is
    listed in the report. Where a gradient is NaN in some pixel, that pixel stays as it is.

    Args:
        model: maps x [N, …] to logits [N, L] of any floating-point type; a module, scripted ones included, or any
            callable (whose mode is then not changed).
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: radius, in units of the input (pixels in [0, 1] unless there is another box); in L1 a sum over all pixels
            and channels.
        seed: of the random numbers, from 0 to 2^63 − 1; a fraction is cut off. None draws one.
        verbose: print the accuracy after each attack, and progress where stderr is a terminal.
        attacks_to_run: for ``version="custom"``: names among apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square; or attacks
            of your own, such as an :class:`APGD` with a loss of your own, or anything with what :class:`Attack` names.
        version: ``"standard"`` (apgd-ce, apgd-t, fab-t, square), ``"plus"`` (six attacks, with restarts), ``"rand"``
            (apgd-ce and apgd-dlr with gradients averaged over 20 passes, for randomised models), ``"fast"`` (apgd-ce
            and apgd-t), or ``"custom"``: set ``attacks_to_run``. The attributes of ``apgd``, ``apgd_targeted``, ``fab``
            and ``square`` are those of :class:`APGD`, :class:`FAB`, :class:`Square`, and can be set for any version.
        is_tf_model: not supported, must be False.
        device: where to attack; None is the device of the model, or that of x. Or several, such as ``["cuda:0",
            "cuda:1"]``: the model is on the first and is copied to the others, and a worker on each attacks its share
            of the samples. Verdicts, points and state files are those of one device but for rounding.
        log_path: a file to which what is printed is appended.
        rng: ``"keyed"``, or ``"reference"``: the official package's stream of numbers, for comparisons with it.
        search_dtype: torch.bfloat16 or torch.float16 search under autocast; a success still counts only if the model
            in its own precision confirms it. Such a search may miss more, so take its result as an upper bound.
        compile: search with ``torch.compile(model)``, for a GPU or a wide network; a small one on a CPU gets slower.
        save_every: seconds between two writes of ``state_path``.
        budget: seconds that an evaluation may take; then it stops cleanly, and the same call with a ``state_path`` goes
            on. None is no limit. All samples are classified in any case.
        workers: threads that share the samples on a CPU, at least 1; they divide torch's threads among them and call
            the model at the same time. ``"auto"`` takes one for each of torch's threads, at most 8. It takes a single
            one where several might not be safe: on a GPU, for a callable that is not a module, for a module that is
            scripted, has hooks, sets an attribute or changes a buffer while it predicts, holds an object that may
            change unseen, is randomised or takes gradients, and for ``rng="reference"``, ``version="rand"``,
            ``verdict_passes`` above 1 and ``compile``.
        verdict_passes: for randomised models, the number of passes over which a point is judged, at least 1. It holds
            for clean points, for every step of a search that asks whether a point fools the model, and for the final
            check. The class of a point is that of the largest mean probability, as for a classifier that is smoothed by
            noise (Salman et al., NeurIPS 2019). Probabilities are averaged and not logits, since logits have no common
            scale: one pass with large logits would outvote the others. Square uses the margin of the logarithms of
            these means (in the paper on AutoAttack it averages 20 passes). FAB's steps follow one pass, and APGD's as
            many as its ``eot_iter`` says. Above 1, APGD and Square do not stop at the first point that fools the model,
            since chance may have decided there, but look for a clearer one. So they take as long for samples that they
            fool as for others. Successes of the search that the final check did not confirm are ``unverified`` in the
            report; if there are many, take more passes.
        lower, upper: the box: smallest and largest value that a feature may have, finite. For a model that takes
            normalised images do not widen the box, since eps then counts in other units for each channel: wrap it in
            :class:`scorematch.Normalised`.
        share_samples: where ``torch.distributed`` is initialised, whether its processes share out the samples. They
            must all make the same call, with the same samples; each attacks its share, and all return the whole result.
            False leaves the others alone, as the official package does: this process attacks all that it is given, so
            that the call may be made by one of them only, or with samples of its own.

    Attributes:
        report: of the last evaluation. It has ``robust_accuracy``, ``clean_accuracy`` and ``attacks``: for each attack
            in turn the accuracy after it, its 95 % interval (Wilson), its forward and backward passes (one for each
            sample) and its seconds. ``robust`` says of each sample whether it is robust. ``fallen_by`` says which
            attack fooled it; None if it is robust or was misclassified without an attack. ``nearest`` is the distance
            of the nearest misclassified point that was found for each sample: 0 if it was misclassified without an
            attack, above eps if only FAB found one, None if there is none. It is an upper bound of the distance to the
            decision boundary. ``complete`` is False if the budget was spent before the end. Then the robust accuracy is
            an upper bound, and ``pending`` of each attack says how many of the robust samples it has not yet attacked
            completely. ``nan_samples`` lists the samples at whose points the model returned NaN: ``clean``, and
            ``attacked`` for the points that attacks found.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.
        AttributeError: something is assigned that is not a setting, or is fixed: ``norm``, ``eps``, ``version``.
    """

    version: str

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: float | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str | Attack] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        log_path: str | Path | None = None,
        *,
        rng: str = "keyed",
        search_dtype: torch.dtype | None = None,
        compile: bool = False,
        save_every: float = 30.0,
        workers: int | str = "auto",
        budget: float | None = None,
        verdict_passes: int = 1,
        lower: float = 0.0,
        upper: float = 1.0,
        share_samples: bool = False,
    ) -> None:
        if is_tf_model:
            raise ValueError("is_tf_model: TensorFlow models are not supported, wrap the model in a PyTorch callable")
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if norm not in NORMS:
            raise ValueError(f"norm must be Linf, L2 or L1, got {norm!r}")
        if attacks_to_run and version in VERSIONS and version != "custom":
            raise ValueError(f'attacks_to_run is for version="custom", got version={version!r}')
        self.norm = norm
        self.is_tf_model = False
        self.threat_model = ThreatModel(NORMS[norm], eps, lower=lower, upper=upper)
        if not (math.isfinite(lower) and math.isfinite(upper)):
            raise ValueError(f"lower and upper must be finite, got {lower} and {upper}")
        self.logger = Logger(log_path)
        self._report: dict[str, Any] = {}
        self.model = model
        self.seed = seed
        self.verbose = verbose
        self.device = device
        self.rng = rng
        self.search_dtype = search_dtype
        self.compile = compile
        self.save_every = save_every
        self.workers = workers
        self.budget = budget
        self.verdict_passes = verdict_passes
        self.share_samples = share_samples
        self.apgd = APGD(self.threat_model)
        self.apgd_targeted = APGD(self.threat_model, loss="dlr-targeted")
        self.fab = FAB(self.threat_model, targeted=False)
        self.square = Square(self.threat_model)
        self._set_version(version, attacks_to_run)
        self._check_settings()

    def set_version(self, version: str = "standard") -> None:
        """Take the attacks of another version, with its restarts; other settings stay.

        Raises:
            ValueError: there is no such version.
        """
        self._set_version(version, ())

    def _set_version(self, version: str, attacks_to_run: Sequence[str | Attack]) -> None:
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
        object.__setattr__(self, "version", version)
        chosen = VERSIONS[version] or attacks_to_run
        self.attacks_to_run = chosen if isinstance(chosen, str) else list(chosen)
        in_l1 = self.threat_model.norm == "l1" and version in ("standard", "fast")  # as in the official package
        self.fab.n_restarts = 5 if version == "plus" else 1
        self.apgd.n_restarts = 5 if version == "plus" or in_l1 else 1
        self.apgd.eot_iter = 20 if version == "rand" else 1
        self.apgd_targeted.n_target_classes = 5 if in_l1 else 9
        self.apgd.use_largereps = self.apgd_targeted.use_largereps = in_l1

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and hasattr(self, name):
            raise AttributeError(f"{name} is fixed when an AutoAttack is made; make another one")
        if name not in FIXED and not name.startswith("_"):
            refuse_unknown(self, name, SETTINGS)
        super().__setattr__(name, value)
        if name in ATTACKS and isinstance(value, AttackSettings):
            value.belong_to(self)

    def _check_settings(self) -> None:
        """Raise ValueError or TypeError for what was given or assigned and is outside its range."""
        if isinstance(self.attacks_to_run, str):
            raise TypeError(f"attacks_to_run must be a list of attacks, got {self.attacks_to_run!r}")
        seed = self.seed
        if seed is not None and not (isinstance(seed, Real) and 0 <= seed < 2**63):
            raise ValueError(f"seed must be a number from 0 to 2^63 - 1, or None, got {seed!r}")
        if self.rng not in RNGS:
            raise ValueError(f"rng must be one of {', '.join(RNGS)}, got {self.rng!r}")
        if self.search_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"search_dtype must be None, torch.bfloat16 or torch.float16, got {self.search_dtype}")
        if not self.save_every >= 0:
            raise ValueError(f"save_every must be a number of seconds, at least 0, got {self.save_every}")
        workers = self.workers
        if workers != "auto" and not (isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1):
            raise ValueError(f'workers must be "auto" or a whole number of at least 1, got {workers!r}')
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget must be a positive number of seconds, or None, got {self.budget}")
        passes = self.verdict_passes
        if isinstance(passes, bool) or not isinstance(passes, Integral) or passes < 1:
            raise ValueError(f"verdict_passes must be a whole number of at least 1, got {passes!r}")
        if not isinstance(self.share_samples, bool):
            raise TypeError(f"share_samples must be True or False, got {self.share_samples!r}")
        several = isinstance(self.device, Sequence) and not isinstance(self.device, str)
        if several and not self.device:
            raise ValueError("device names no device; None is that of the model")
        if several and len(self.device) > 1 and workers != "auto":
            raise ValueError(f'workers must be "auto" with several devices, one for each, got {workers!r}')
        for name, kind in (("apgd", APGD), ("apgd_targeted", APGD), ("fab", FAB), ("square", Square)):
            attack = getattr(self, name)
            if not isinstance(attack, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(attack).__name__}")
            self._check_radius(name, attack)

    def _check_radius(self, name: str, attack: Attack) -> None:
        """Raise ValueError unless an attack searches within the ball and the box of the evaluation."""
        ours, own = self.threat_model, attack.threat_model
        if own.eps > ours.eps:
            raise ValueError(
                f"{name}.eps is {own.eps}, but the evaluation is of eps {ours.eps}: make an AutoAttack of the larger "
                "radius"
            )
        if (own.norm, own.lower, own.upper) != (ours.norm, ours.lower, ours.upper):
            raise ValueError(
                f"{name} must have norm {ours.norm} and box [{ours.lower}, {ours.upper}] as the evaluation, got "
                f"{own.norm} and [{own.lower}, {own.upper}]"
            )

    @property
    def eps(self) -> float:
        return self.threat_model.eps

    @property
    def lower(self) -> float:
        return self.threat_model.lower

    @property
    def upper(self) -> float:
        return self.threat_model.upper

    @property
    def epsilon(self) -> float:
        """What the official class calls ``eps``."""
        return self.threat_model.eps

    def get_seed(self) -> float:
        """The seed, or the time in seconds where there is none."""
        return time.time() if self.seed is None else self.seed

    def get_logits(self, x: Tensor) -> Tensor:
        """What the model, in the mode that it is in, returns for x [N, …]."""
        return self.model(x)

    @outside_inference_mode
    def perturb(self, attack: APGD | FAB | Square, x: Tensor, y: Tensor | None = None) -> Tensor:
        """All parts of one attack on a batch; ``adversary.apgd.perturb(x, y)`` does the same with its own attack.

        Args:
            attack: whose threat model holds.
            x: [N, …] inside the box.
            y: class indices [N]; None is what the model predicts.

        Returns:
            [N, …] on the device of the attack: a misclassified point of B(x), or x where none was found.
        """
        device = self._device(x)
        x = x.detach().to(device)
        if y is None:
            with as_found(self.model):
                y = Classifier(self.model, verdict_passes=self.verdict_passes).label(x.clone())
        return run_alone(attack, self.model, x, y.to(device), int(self.get_seed()), self.verdict_passes)

    @property
    def report(self) -> dict[str, Any]:
        return self._report

    def table(self, form: str = "markdown") -> str:
        """The last report as a table: accuracy after each attack with its interval, passes and seconds.

        Args:
            form: ``"markdown"``, or ``"latex"``: a tabular that needs no package.

        Raises:
            ValueError: there is no such form, or no report of :meth:`run_standard_evaluation`.
        """
        if "attacks" not in self._report:
            raise ValueError("table: run_standard_evaluation has made no report yet")
        return table(self._report, form)

    @outside_inference_mode
    def run_standard_evaluation(
        self,
        x_orig: Tensor | Iterable[tuple[Tensor, Tensor]],
        y_orig: Tensor | None = None,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Any:
        """Attack every sample until it is fooled or all attacks have been tried.

        Args:
            x_orig: [N, …] in the box, float32 or float64; images [N, C, H, W] for Square. Values that rounding put
                outside, by at most 1e-6 of the largest bound, are clamped. Or batches (x, y), such as a ``DataLoader``
                that keeps their order; ``y_orig`` is then left out, and all are read before the first attack.
            y_orig: class indices [N] or [N, 1], of any integer type.
            bs: samples at a time, at least 1; decides memory and speed, not the verdicts.
            return_labels: also return the predicted classes.
            state_path: file to resume from if it exists, and to write what was found so far, with any number of
                workers; missing folders are made. It must belong to the same model, judged by its tensors and, up to
                rounding, by its clean logits. Of several processes each has its own, with ``.rank…`` appended.

        Returns:
            The adversarial points [N, …] on the device of x_orig, the original where none was found; with
            ``return_labels`` also the class predicted at each, int64 [N], −1 where the model returned NaN.

        Raises:
            TypeError: x or y is not a tensor, or x_orig gives no batches of tensors.
            ValueError: x leaves the box, labels and shapes do not fit, there are no samples, or the model returns no
                logits or changes its input in place; the model returns NaN for every sample of the first batch or,
                later, for samples that it classified before; or the state is damaged or of another evaluation.
        """
        x_orig, y_orig = joined(x_orig, y_orig)
        state = self._evaluate(x_orig, y_orig, bs, state_path, self._attacks())
        return _returned(state, x_orig, y_orig, return_labels)

    @outside_inference_mode
    def run_standard_evaluation_individual(
        self,
        x_orig: Tensor | Iterable[tuple[Tensor, Tensor]],
        y_orig: Tensor | None = None,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> dict[str, Any]:
        """Every attack by itself on all samples that the model gets right.

        Args, Raises: as for :meth:`run_standard_evaluation`; each attack has a file of its own, with its name appended
        to that of ``state_path``.

        Returns:
            For each attack what :meth:`run_standard_evaluation` returns. ``report`` holds one report for each attack.
        """
        x_orig, y_orig = joined(x_orig, y_orig)
        results, reports = {}, {}
        attacks = self._attacks()
        self._check_input(x_orig, y_orig, bs, attacks)  # of all, before the first runs
        for attack in attacks:
            path = None if state_path is None else Path(f"{state_path}.{attack.name}")
            state = self._evaluate(x_orig, y_orig, bs, path, [attack])
            results[attack.name] = _returned(state, x_orig, y_orig, return_labels)
            reports[attack.name] = self.report
        self._report = reports
        return results

    @outside_inference_mode
    def accuracy_curve(
        self,
        x_orig: Tensor | Iterable[tuple[Tensor, Tensor]],
        y_orig: Tensor | None = None,
        *,
        radii: Iterable[float],
        bs: int = 250,
        state_path: str | Path | None = None,
    ) -> AccuracyCurve:
        """Robust accuracy at several radii, with less work than as many evaluations.

        The radii are attacked in ascending order with the settings of this object, whose own eps does not matter. A
        sample that was fooled is not attacked at larger radii. A point that FAB found beyond one radius counts at all
        radii that reach it. As FAB's path does not depend on eps, it runs only at the smallest radius, unless it has
        random restarts or verdicts take several passes. At each radius at least those samples are fooled that
        :meth:`run_standard_evaluation` finds there; there may be more, by points that were found at other radii.

        Args:
            x_orig, y_orig, bs: as for :meth:`run_standard_evaluation`.
            radii: at least one, in units of the input.
            state_path: to resume from, and to write; each radius has a file of its own, with ``.eps`` and the radius
                appended. Larger radii may be added later, smaller ones not.

        Returns:
            The curve. All radii share one ``budget``; radii that it does not reach are not ``complete``. ``report``
            then holds the report of each radius, by ``repr(radius)``.

        Raises:
            ValueError: as for :meth:`run_standard_evaluation`; or a radius is not positive and finite, or the radius of
                an attack cannot be changed: it has one of its own, or is an attack that was made elsewhere.
        """
        began = time.perf_counter()
        x_orig, y_orig = joined(x_orig, y_orig)
        sizes, attacks = ascending(radii), self._attacks()
        balls = [self.threat_model.replace(eps=radius) for radius in sizes]
        at_radius(attacks, balls[0], self.threat_model)
        x, y = self._check_input(x_orig, y_orig, bs, attacks, balls[-1])  # before the first radius is attacked
        console, reports = self._console(), []
        fell_at = torch.full((len(x),), torch.inf, dtype=torch.float64, device="cpu")
        state: EvaluationState | None = None
        for index, ball in enumerate(balls):
            # A search in low precision may have found points that the check did not confirm, and so forgot.
            if index and self.verdict_passes == 1 and self.search_dtype is None:
                attacks = [attack for attack in attacks if depends_on_radius(attack)]
            left = None if self.budget is None else max(self.budget - (time.perf_counter() - began), 1e-9)
            path = None if state_path is None else Path(f"{state_path}.eps{ball.eps!r}")
            options = replace(self._options(x, bs, path), threat_model=ball, smaller_radii=sizes[:index], budget=left)
            state, report = self._run(x, y, at_radius(attacks, ball, self.threat_model), options, console, state)
            reports.append(report)
            fell_at[~state.robust & fell_at.isinf()] = ball.eps
            if not report["complete"]:
                break
        assert state is not None
        self._report = {repr(radius): report for radius, report in zip(sizes, reports, strict=False)}
        nearest = torch.minimum(state.nearest, fell_at)
        return AccuracyCurve(self.threat_model.norm, sizes, nearest, state.adversarial.to(x.device), tuple(reports))

    @outside_inference_mode
    def clean_accuracy(
        self, x_orig: Tensor | Iterable[tuple[Tensor, Tensor]], y_orig: Tensor | None = None, bs: int = 250
    ) -> float:
        """Share of samples that the model gets right.

        Args, Raises: as for :meth:`run_standard_evaluation`.
        """
        x_orig, y_orig = self._check_input(*joined(x_orig, y_orig, ordered=False), bs)
        device = self._device(x_orig)
        hits = 0
        with as_found(self.model):
            classifier = Classifier(self.model, verdict_passes=self.verdict_passes)
            for x, y in zip(x_orig.split(int(bs)), y_orig.split(int(bs)), strict=True):
                with full_precision(device):
                    logits = classifier.logits(x.to(device, copy=True))
                check_class_range(y_orig, logits.shape[1])
                hits += int((predicted(logits) == y.to(device)).sum())
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
            "fab": replace(self.fab, targeted=False, target_classes=None),
            "fab-t": replace(self.fab, targeted=True, n_restarts=1),
            "square": self.square,
        }
        attacks: list[Attack] = []
        for entry in self.attacks_to_run:
            if isinstance(entry, str):
                if entry not in known:
                    raise ValueError(f"attacks_to_run: {entry!r} is none of {', '.join(known)}")
                attacks.append(known[entry])
            else:
                self._check_own(entry)
                attacks.append(entry)
            attacks[-1].check()
        names = [attack.name for attack in attacks]
        for entry, name in zip(self.attacks_to_run, names, strict=True):
            if not isinstance(entry, str) and names.count(name) > 1:
                raise ValueError(
                    f"attacks_to_run: two attacks are called {name!r}, which the report could not tell apart"
                )
        return attacks

    def _check_own(self, attack: Attack) -> None:
        """Raise TypeError or ValueError unless what was made elsewhere is an attack on the same ball."""
        if isinstance(attack, type) or not isinstance(attack, Attack):
            raise TypeError(
                f"attacks_to_run: {attack!r} is not an attack, expected one of {', '.join(ATTACK_KEYS)}, or an object "
                "with what scorematch.attacks.Attack names"
            )
        self._check_radius(f"attacks_to_run: {attack.name}", attack)

    def _device(self, x: Tensor) -> torch.device:
        return self._devices(x)[0]

    def _devices(self, x: Tensor) -> tuple[torch.device, ...]:
        if isinstance(self.device, Sequence) and not isinstance(self.device, str):
            return tuple(torch.device(device) for device in self.device)
        if self.device is not None:
            return (torch.device(self.device),)
        if isinstance(self.model, nn.Module) and (parameter := next(self.model.parameters(), None)) is not None:
            return (parameter.device,)
        return (x.device,)

    def _evaluate(
        self, x: Tensor, y: Tensor, bs: int, state_path: str | Path | None, attacks: list[Attack]
    ) -> EvaluationState:
        x, y = self._check_input(x, y, bs, attacks)
        options = self._options(x, bs, None if state_path is None else Path(state_path))
        state, self._report = self._run(x, y, attacks, options, self._console())
        return state

    def _console(self) -> Console:
        return Console(self.verbose, self.logger, speaks=self._share().rank == 0)

    def _share(self) -> Share:
        return Share.of_this_process() if self.share_samples else Share()

    def _options(self, x: Tensor, bs: int, state_path: Path | None) -> Options:
        options = Options(
            threat_model=self.threat_model,
            version=self.version,
            seed=None if self.seed is None else int(self.seed),
            rng=self.rng,
            search_dtype=self.search_dtype,
            compile=self.compile,
            save_every=self.save_every,
            batch_size=int(bs),
            devices=self._devices(x),
            workers=None if self.workers == "auto" else int(self.workers),
            state_path=path_of_this_process(state_path) if state_path is not None else None,
            verdict_passes=int(self.verdict_passes),
            budget=self.budget,
        )
        if options.workers not in (None, 1) and options.device.type != "cpu":
            raise ValueError(
                f"workers must be 1 on another device than the CPU, got {self.workers} on {options.device}"
            )
        return options

    def _run(
        self,
        x: Tensor,
        y: Tensor,
        attacks: list[Attack],
        options: Options,
        console: Console,
        before: EvaluationState | None = None,
    ) -> tuple[EvaluationState, dict[str, Any]]:
        # A file with tensors of a class of one's own could not be read again.
        x, y = (t.cpu().as_subclass(Tensor) for t in (x, y))
        state, report = evaluate(self.model, x, y, attacks, options, console, self._share(), before)
        console.say(result_line(report, state, x, self.threat_model.norm, self.norm))
        return state, report

    def _check_input(
        self, x: Tensor, y: Tensor, bs: int, attacks: Sequence[Attack] = (), ball: ThreatModel | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [N, …] in the box and y int64 [N]; the radius of ``ball``, or of the evaluation, must fit."""
        for name, tensor in (("x_orig", x), ("y_orig", y)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.is_meta or tensor.layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor with values, got {tensor.layout} on {tensor.device}")
        if x.dtype not in (torch.float32, torch.float64):
            hint = "; divide pixels in 0…255 by 255: x_orig.float() / 255" if x.dtype == torch.uint8 else ""
            box = f"[{self.lower:g}, {self.upper:g}]"
            raise ValueError(f"x_orig must be float32 or float64 in {box}, got {x.dtype}{hint}")
        if isinstance(bs, bool) or not isinstance(bs, Integral) or bs < 1:
            raise ValueError(f"bs must be a whole number, at least 1, got {bs!r}")
        if x.dim() == 0:
            raise ValueError(f"x_orig must be [N, …], got the single number {x.item():g}")
        if len(x) == 0:
            raise ValueError("x_orig is empty, nothing can be evaluated")
        x, y = clean_batch(x, y, ball or self.threat_model, ("x_orig", "y_orig"))
        for attack in attacks:
            check_targets_fit(attack, y)
            if attack.images_only and x.dim() != 4:
                raise ValueError(f"{attack.name} takes images [N, C, H, W], got x_orig of shape {list(x.shape)}")
        return x, y


def _returned(state: EvaluationState, x: Tensor, y: Tensor, with_labels: bool) -> Any:
    """What an evaluation of x and y returns, on their devices."""
    adversarial = state.adversarial.to(x.device)
    return (adversarial, state.labels.to(y.device)) if with_labels else adversarial
