"""One evaluation by AutoAttack: from the clean samples through all stages to the report."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compilation import compiled
from ..model_state import borrowed, check_whole, unchanged_buffers
from ..threat_model import ThreatModel
from . import inspection
from .accounting import Ledger
from .classifier import (
    Classifier,
    cache_chunk,
    channels_last_works,
    check_unwritten,
    folded_copy,
)
from .console import Console
from .evaluation_state import EvaluationState
from .fab import distance
from .identity import Fingerprint, check_model, identity_of
from .parts import Attack, Batch, Search
from .precision import full_precision
from .randomness import KeyedNoise, ReferenceNoise
from .report import doubts_of, nan_samples, report_of, stage_line
from .schedule import Stage, batch_size, dealt_out, passes_left, stages_of
from .sharing import Share
from .targets import check_targets_fit
from .workers import Team, automatic, copies


@dataclass(frozen=True)
class Options:
    """How to evaluate; see :class:`scorematch.AutoAttack`.

    Attributes:
        batch_size: samples at a time.
        devices: where to attack; several have a worker each.
        workers: threads that share out the samples of this process; None chooses.
        state_path: file of this process to resume from and to write, or None.
        smaller_radii: at which the same samples were attacked before.
        budget: seconds after which the attacks stop, or None.
    """

    threat_model: ThreatModel
    version: str
    seed: int | None
    rng: str
    search_dtype: torch.dtype | None
    compile: bool
    save_every: float
    batch_size: int
    devices: tuple[torch.device, ...]
    workers: int | None
    state_path: Path | None
    verdict_passes: int = 1
    budget: float | None = None
    smaller_radii: tuple[float, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model is that was given."""
        return self.devices[0]


class OutOfTime(BaseException):
    """Raised within the model's passes once the budget of seconds is spent."""


def evaluate(
    model: Any,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack],
    options: Options,
    console: Console,
    share: Share,
    before: EvaluationState | None = None,
) -> tuple[EvaluationState, dict[str, Any]]:
    """Attack every sample until it is fooled or all attacks have been tried.

    Args:
        x: [N, …] in the box, on the CPU.
        y: int64 [N], on the CPU.
        before: the state at a smaller radius, whose verdicts are taken over.

    Returns:
        The state at the end, of the samples of all processes, and the report.
    """
    started = time.perf_counter()
    mine = share.samples(len(x))
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            check_whole(model)
            was_training = getattr(model, "training", False)  # a frozen script has no mode
            stack.enter_context(borrowed(model, "eval"))
            if was_training and not model.training:
                console.warn("the model is in training mode; it is evaluated in eval mode")
        stack.enter_context(unchanged_buffers(model, console.warn))
        first_x, first_y = (t[: options.batch_size].to(options.device, copy=True) for t in (x, y))
        logits = Classifier(model).logits(first_x)
        check_unwritten(first_x, model)
        inspection.no_classifier(logits)
        classes = logits.shape[1]
        check_class_range(y, classes)
        for attack in attacks:
            check_targets_fit(attack, y, classes)
        doubts = inspection.doubts(model, first_x, first_y, logits, attacks, options.version, options.verdict_passes)
        for doubt in doubts.values():
            console.warn(doubt)
        state = _begin(model, x, y, attacks, options, console, share, before)
        stages = stages_of(attacks, classes, options.rng)
        stations = []
        for device, copied in zip(options.devices, copies(model, options.devices), strict=True):
            searched = stack.enter_context(_searched(copied, first_x.to(device), options))
            stations.append(_Station(device, searched, copied))
        if len(stations) == 1:
            stations *= _workers(model, first_x, options, doubts)
        engine = _Engine(stations, x, y, stages, state, options, console, mine, started)
        finished, searches = state.finished.clone(), dict(state.searches)
        try:
            engine.run()
        except OutOfTime:
            console.say(f"stopped: the budget of {options.budget:g} s is spent")
            paused = any(state.searches.get(number) is not found for number, found in searches.items())
            if torch.equal(finished, state.finished) and not paused and len(searches) == len(state.searches):
                console.warn(
                    f"no batch came to its end within the budget of {options.budget:g} s, so the same call would begin "
                    "it anew; give a larger budget or a smaller bs"
                )
        finally:
            console.end_progress()
            if options.state_path is not None:  # before what was borrowed is given back, which may fail
                state.save(options.state_path)
    share.gather(state, console.warnings)
    report = report_of(state, stages)
    for doubt in doubts_of(report, state):
        console.warn(doubt)
    report |= {
        "norm": options.threat_model.norm,
        "eps": options.threat_model.eps,
        "box": [options.threat_model.lower, options.threat_model.upper],
        "version": options.version,
        "seed": state.settings["seed"],
        "rng": options.rng,
        "search_dtype": str(options.search_dtype) if options.search_dtype is not None else None,
        "compile": options.compile,
        "verdict_passes": options.verdict_passes,
        "budget": options.budget,
        "warnings": list(console.warnings),
    }
    return state, report


def seconds_since(started: float) -> float:
    return time.perf_counter() - started


def check_class_range(y: Tensor, classes: int) -> None:
    """Raise ValueError unless labels y int64 [N], N ≥ 1, are those of so many classes."""
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise ValueError(
            f"y_orig must lie in 0 … {classes - 1}, as the model has {classes} classes, got {low} … {high}"
        )


def _workers(model: Any, x: Tensor, options: Options, doubts: Mapping[str, str | None]) -> int:
    """How many threads share out the samples; x [N, …] are some of them, on the device."""
    if options.workers is not None:
        return options.workers
    alone = options.rng == "reference" or _for_randomised(options) or options.compile
    if alone or doubts.get("randomised") or doubts.get("dynamic"):
        return 1
    return automatic(model, x[:2])


def _for_randomised(options: Options) -> bool:
    return options.version == "rand" or options.verdict_passes > 1


@contextmanager
def _searched(model: Any, x: Tensor, options: Options) -> Iterator[Any]:
    """The model to search with.

    Rounding decides some steps of an attack: what is compared with the official package computes as it does. And a
    randomised model may take another path than the one that was traced for folding.
    """
    if options.compile:
        yield compiled(model, dynamic=True)
    elif options.rng == "reference" or _for_randomised(options):
        yield model
    else:
        with folded_copy(model, x[:2]) as folded:
            yield model if folded is None else folded


def _begin(
    model: Any,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack],
    options: Options,
    console: Console,
    share: Share,
    before: EvaluationState | None,
) -> EvaluationState:
    """The state in the file, or a new one, or what the state at a smaller radius says."""
    path = options.state_path
    identity = {
        "norm": options.threat_model.norm,
        "eps": options.threat_model.eps,
        "box": [options.threat_model.lower, options.threat_model.upper],
        **identity_of(model, x, y, attacks),
        "rng": options.rng,
        "batch size": options.batch_size if options.rng == "reference" else None,
        "search_dtype": str(options.search_dtype),
        "compile": options.compile,
        "verdict_passes": options.verdict_passes,
        "smaller radii": list(options.smaller_radii),
    }
    share.check_alike(identity)
    identity["share of the samples"] = str(share)
    kept = None
    if path is not None and path.exists():
        wanted = {} if options.seed is None else {"seed": options.seed}
        kept = EvaluationState.load(path, {**identity, **wanted}, x)
        check_model(path, kept.fingerprint, model, x, options.device)
    seed = share.agreed_seed(kept.settings["seed"] if kept is not None else None, _new_seed(options, before))
    if kept is not None:
        state = kept
        mine = share.samples(len(x))
        standing, begun = int(state.robust[mine].sum()), int((state.finished[mine] > 0).sum())
        console.say(f"resumed from {path}: {standing} samples are still robust, {begun} were attacked")
    else:
        settings = {**identity, "seed": seed}
        if before is not None:
            state = before.at_larger_radius(options.threat_model.eps)
            state.settings = settings
        else:
            state = EvaluationState.new(settings, x, y)
        if path is not None:
            state.fingerprint = Fingerprint.take(model, x, options.device)
            state.save(path)  # a path that cannot be written shows now
    console.say(
        f"AutoAttack {options.version}: {', '.join(attack.name for attack in attacks)}; {options.threat_model.norm}, "
        f"eps {options.threat_model.eps:g}; {len(x)} samples; seed {state.settings['seed']}, rng {options.rng}"
    )
    processes = Share.of_this_process().world
    if processes > share.world:
        console.say(f"this is one of {processes} processes, alone with its samples; share_samples=True shares them out")
    return state


def _new_seed(options: Options, before: EvaluationState | None) -> int:
    if before is not None:
        return before.settings["seed"]
    return options.seed if options.seed is not None else secrets.randbits(31)


@dataclass(frozen=True)
class _Job:
    """What a worker does without a break: one stage on some samples.

    Attributes:
        number: of the job within its stage.
        samples: int64 [N], in the numbering of the data set.
        search: how far an interrupted run of these samples has come.
    """

    number: int
    samples: Tensor
    search: Search | None = None


@dataclass(frozen=True)
class _Found:
    """Misclassified points [N, …] and the classes predicted there, int64 [N], of samples, int64 [N]; on the CPU."""

    samples: Tensor
    points: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Models:
    """The model as one worker calls it, to search and to confirm what was found."""

    search: Classifier
    verify: Classifier


@dataclass(frozen=True, eq=False)
class _Station:
    """Where a worker computes: the model, in eval mode, on a device.

    Attributes:
        searched: what to search with: the same, compiled, or folded.
    """

    device: torch.device
    searched: Any
    model: Any


class _Engine:
    """Takes the samples of this process through all stages.

    Workers write to the state and to the accounts only in :meth:`_commit` and :meth:`_pause`, one at a time.

    Args:
        stations: one for each worker; several may share one.
        state: where each sample stands; written to.
        mine: int64, the samples of this process.
        started: ``time.perf_counter()`` when the evaluation began.
    """

    def __init__(
        self,
        stations: Sequence[_Station],
        x: Tensor,
        y: Tensor,
        stages: Sequence[Stage],
        state: EvaluationState,
        options: Options,
        console: Console,
        mine: Tensor,
        started: float,
    ) -> None:
        self.x, self.y, self.mine = x, y, mine
        self.stages, self.state, self.options, self.console = stages, state, options, console
        self.seed = state.settings["seed"]
        self.team = Team(len(stations), {station.device.type for station in stations})
        self.stations = stations
        self.models = self._models(x[:2])
        self.ledger = Ledger(state.costs, started)
        self.last_save = time.monotonic()
        self._started = started
        self._attacking = False
        self._lock = threading.Lock()

    def _models(self, few: Tensor) -> list[_Models]:
        """Of each worker; ``few`` samples [N, …] show how the model is best called."""
        options, threads = self.options, max(torch.get_num_threads() // len(self.stations), 1)
        passes, arranged = options.verdict_passes, {}
        for station in dict.fromkeys(self.stations):
            x = few.to(station.device)
            chunk = None if options.compile else cache_chunk(station.model, x, threads)
            arranged[station] = chunk, channels_last_works(station.model, x)
        models = []
        for station in self.stations:
            chunk, last = arranged[station]
            search = Classifier(station.searched, options.search_dtype, self._passed, chunk, last, passes)
            models.append(_Models(search, Classifier(station.model, None, self._passed, chunk, verdict_passes=passes)))
        return models

    def run(self) -> None:
        self.ledger.book("clean", self._classifiers())
        self.team.run(self._jobs(-1), self._classify)
        self._say_clean_accuracy()
        self._attacking = True
        self.console.start_progress(self._passes_left(self._finished()))
        for index, stage in enumerate(self.stages):
            name = stage.attack.name
            self._book(name)
            try:
                self.team.run(self._jobs(index), partial(self._attack, index))
            except OutOfTime:  # the report is of this call, the batch that was given up included
                self._book(name)
                raise
            self._book(name)
            last = index + 1 == len(self.stages) or self.stages[index + 1].attack.name != name
            if last and len(self.mine):
                self.console.say(stage_line(self.state, index, name, self.mine))

    def _jobs(self, index: int) -> list[_Job]:
        """The samples that stage ``index`` has still to attack, dealt out to jobs of similar size."""
        pending = self.mine[(self.state.robust & (self.state.finished == index))[self.mine]]
        if self.options.rng == "reference":  # its numbers belong to the batch
            return [_Job(number, samples) for number, samples in enumerate(pending.split(self.options.batch_size))]
        if len(pending) == 0:  # searches that are left are of a later stage
            return []
        paused = list(self.state.searches.values())
        fresh = pending[~torch.isin(pending, torch.cat([pending[:0], *(some for some, _ in paused)]))]
        size = batch_size(len(pending), self.options.batch_size, self.team.count)
        jobs: list[_Job] = []
        self.state.searches = {}
        groups: list[tuple[Tensor, Search | None]] = [*paused, *([(fresh, None)] if len(fresh) else [])]
        if len(groups) >= self.team.count:  # what was dealt out once is not cut into ever smaller batches
            size = self.options.batch_size if paused else size
        for samples, search in groups:
            for rows in dealt_out(len(samples), size):
                job = _Job(len(jobs), samples[rows], search.of(rows) if search is not None else None)
                jobs.append(job)
                if job.search is not None:
                    self.state.searches[job.number] = (job.samples, job.search)
        return jobs

    def _classify(self, worker: int, job: _Job) -> None:
        models, samples = self.models[worker], job.samples
        x, y = self._batch(samples, worker)
        with full_precision(x.device):
            labels = models.verify.label(x)
        with self._lock:
            self.state.labels[samples] = labels.cpu()
            self.state.clean[samples] = self.state.robust[samples] = (labels == y).cpu()
            self.state.nearest[samples[(labels != y).cpu()]] = 0.0
            self.state.finished[samples] = 0
            self.ledger.book("clean", [models.verify])
            self._save()

    def _say_clean_accuracy(self) -> None:
        state = self.state
        correct, count = int(state.clean[self.mine].sum()), len(self.mine)
        if count:
            self.console.say(f"clean accuracy: {100 * correct / count:.2f} %")
        nan = nan_samples(state)["clean"]
        self.console.warn(inspection.nan_samples(nan[torch.isin(nan, self.mine)], "clean"))

    def _attack(self, index: int, worker: int, job: _Job) -> None:
        stage, models, samples = self.stages[index], self.models[worker], job.samples
        x, y = self._batch(samples, worker)
        device, name = x.device, stage.attack.name
        found, fooled, labels = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=device), y.clone()
        further = []
        stream = ReferenceNoise(self.seed) if self.options.rng == "reference" else None
        unverified = 0
        for part in stage.parts:
            rows = (~fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            batch = Batch(
                x[rows],
                y[rows],
                samples[rows.cpu()].to(device),
                part,
                stream or KeyedNoise(self.seed, name, part),
                job.search.to(device) if job.search is not None else None,
                partial(self._pause, name, worker, job) if stream is None else None,
            )
            points, wrong = stage.attack.run_part(models.search, batch)
            self._check_points(name, points, wrong, batch)
            with full_precision(device):
                given = models.verify.label(points)
            confirmed = given != y[rows]
            confirmed &= wrong  # FAB's points beyond eps are misclassified and do not count
            unverified += int((wrong & ~confirmed).sum())
            self._check_still_classifies(models.verify, x[rows[confirmed & (given < 0)]])
            found[rows[confirmed]], fooled[rows[confirmed]] = points[confirmed], True
            labels[rows[confirmed]] = given[confirmed]
            missed = ~wrong & (given != y[rows]) & (given >= 0)
            further.append(_Found(samples[rows[missed].cpu()], points[missed].cpu(), given[missed].cpu()))
        within = _Found(samples[fooled.cpu()], found[fooled].cpu(), labels[fooled].cpu())
        self._commit(index, worker, job, within, further, unverified)

    def _commit(
        self, index: int, worker: int, job: _Job, within: _Found, further: Sequence[_Found], unverified: int
    ) -> None:
        """Take in what a job has found within eps, and points that do not count."""
        state, name, fallen = self.state, self.stages[index].attack.name, within.samples
        with self._lock:
            lengths = self._distances(within)
            for beyond in further:
                self._remember(beyond)
            state.adversarial[fallen] = within.points
            state.labels[fallen] = within.labels
            state.nearest[fallen] = lengths
            state.fallen_by[fallen] = index
            state.robust[fallen] = False  # last: Ctrl-C in between leaves the samples to be attacked again
            state.finished[job.samples] = index + 1
            state.searches.pop(job.number, None)
            state.costs[name].unverified += unverified
            self._book(name, worker)
            self._save()

    def _remember(self, found: _Found) -> None:
        """Keep misclassified points beyond eps that are nearer than those before."""
        state, length = self.state, self._distances(found)
        nearer = (length > self.options.threat_model.eps) & (length < state.nearest[found.samples])
        samples = found.samples[nearer]
        state.nearest[samples] = length[nearer]
        state.beyond[samples] = found.points[nearer]
        state.beyond_labels[samples] = found.labels[nearer]

    def _distances(self, found: _Found) -> Tensor:
        """How far the points are from their samples, float64 [N]."""
        return distance(found.points.double(), self.x[found.samples].double(), self.options.threat_model.norm)

    def _check_points(self, name: str, points: Tensor, wrong: Tensor, batch: Batch) -> None:
        """An attack, which may be the user's, must return points like x, and those that it counts inside B(x)."""
        ball, x = self.options.threat_model, batch.x
        if (
            points.shape != x.shape
            or points.dtype != x.dtype
            or wrong.shape != x.shape[:1]
            or wrong.dtype != torch.bool
        ):
            raise ValueError(
                f"{name} must return points {x.dtype} {list(x.shape)} and bool [{len(x)}], got {points.dtype} "
                f"{list(points.shape)} and {wrong.dtype} {list(wrong.shape)}"
            )
        counted = points[wrong]
        if not len(counted):
            return
        farthest = float(distance(counted.double(), x[wrong].double(), ball.norm).max())
        low, high = (float(bound) for bound in torch.aminmax(counted))
        largest = max(abs(low), abs(high), float(x[wrong].abs().max()))
        features = x[0].numel()
        rounding = torch.finfo(x.dtype).eps * largest * {"linf": 1, "l2": features**0.5, "l1": features}[ball.norm]
        slack = 1e-3 * ball.eps + rounding  # less than a mistake
        inside = farthest <= ball.eps + slack and low >= ball.lower - slack and high <= ball.upper + slack
        if not inside:  # NaN is not
            raise ValueError(
                f"{name} counts a point that is not allowed: up to {farthest:g} away from its sample in {ball.norm}, "
                f"allowed {ball.eps:g}; values in [{low:g}, {high:g}], allowed [{ball.lower:g}, {ball.upper:g}]"
            )

    def _pause(self, name: str, worker: int, job: _Job, search: Search) -> None:
        """Remember how far a run has come; it goes on to write to the tensors of ``search``."""
        with self._lock:
            self.state.searches[job.number] = (job.samples, search.clone())
            self._book(name, worker)
            self._save()

    def _check_still_classifies(self, verify: Classifier, x: Tensor) -> None:
        """Of clean samples x [N, …] that were classified: a NaN near them is found by an attack only if they still are.

        Raises:
            ValueError: none of them is; the model has changed on the way.
        """
        if len(x) and bool((nan := verify.label(x) < 0).all()):
            raise ValueError(
                f"the model returned NaN for {int(nan.sum())} of {len(x)} clean samples that it classified before"
            )

    def _batch(self, samples: Tensor, worker: int) -> tuple[Tensor, Tensor]:
        device = self.stations[worker].device
        return self.x[samples].to(device), self.y[samples].to(device)

    def _finished(self) -> Tensor:
        """How many stages each sample of this process that is still robust has behind it."""
        return self.state.finished[self.mine[self.state.robust[self.mine]]]

    def _passes_left(self, finished: Tensor) -> int:
        return passes_left(self.stages, finished, self.options.verdict_passes)

    def _classifiers(self, worker: int | None = None) -> list[Classifier]:
        models = self.models if worker is None else [self.models[worker]]
        return [classifier for pair in models for classifier in (pair.search, pair.verify)]

    def _passed(self, samples: int) -> None:
        self.console.advance(samples)
        self.team.check()
        budget = self.options.budget
        if budget is not None and self._attacking and seconds_since(self._started) >= budget:
            raise OutOfTime

    def _book(self, name: str, worker: int | None = None) -> None:
        """Book what a worker has done; without one, of all, while none is at work."""
        self.ledger.book(name, self._classifiers(worker))
        finished = self._finished()
        self.console.expect(self._passes_left(finished), f"{name}, {len(finished)} robust")

    def _save(self) -> None:
        path = self.options.state_path
        if path is not None and time.monotonic() - self.last_save >= self.options.save_every:
            self.state.save(path)
            self.last_save = time.monotonic()
