"""One evaluation by AutoAttack: from the clean samples through all stages to the report."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model_state import borrowed
from ..threat_model import ThreatModel
from . import inspection
from .accounting import Ledger
from .classifier import (
    Classifier,
    cache_chunk,
    channels_last_works,
    folding_that_works,
    full_precision,
)
from .console import Console
from .evaluation_state import EvaluationState
from .identity import Fingerprint, check_model, identity_of
from .parts import Attack, Batch, Search
from .randomness import KeyedNoise, Noise, ReferenceNoise
from .report import doubts_of, nan_samples, report_of, stage_line
from .schedule import Stage, passes_left, stages_of
from .sharing import Share


@dataclass(frozen=True)
class Options:
    """How to evaluate; see :class:`scorematch.AutoAttack`.

    Attributes:
        batch_size: samples at a time.
        device: where to attack.
        state_path: file of this process to resume from and to write, or None.
    """

    threat_model: ThreatModel
    version: str
    seed: int | None
    rng: str
    search_dtype: torch.dtype | None
    compile: bool
    save_every: float
    batch_size: int
    device: torch.device
    state_path: Path | None


def evaluate(
    model: Any,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack],
    options: Options,
    console: Console,
    share: Share,
) -> tuple[EvaluationState, dict[str, Any]]:
    """Attack every sample until it falls or all attacks are through.

    Args:
        x: [N, …] in the box, on the CPU.
        y: int64 [N], on the CPU.

    Returns:
        The state at the end, of the samples of all processes, and the report.
    """
    started = time.perf_counter()
    mine = share.samples(len(x))
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            if getattr(model, "training", False):  # a frozen script has no mode
                console.warn("the model is in training mode; it is evaluated in eval mode")
            stack.enter_context(borrowed(model, "eval"))
        stack.enter_context(inspection.unchanged_buffers(model, console.warn))
        first_x, first_y = (t[: options.batch_size].to(options.device) for t in (x, y))
        logits = Classifier(model).logits(first_x)
        inspection.no_classifier(logits)
        classes = logits.shape[1]
        _check_labels(y, classes)
        for doubt in inspection.doubts(model, first_x, first_y, logits, attacks, options.version):
            console.warn(doubt)
        state = _begin(model, x, y, attacks, options, console, share)
        stages = stages_of(attacks, classes, options.rng)
        engine = _Engine(model, x, y, stages, state, options, console, mine, started)
        try:
            engine.run()
        except BaseException:
            if options.state_path is not None:
                state.save(options.state_path)
            raise
        finally:
            console.end_progress()
    if options.state_path is not None:
        state.save(options.state_path)
    share.gather(state, console.warnings)
    report = report_of(state, stages)
    for doubt in doubts_of(report, state):
        console.warn(doubt)
    report |= {
        "norm": options.threat_model.norm,
        "eps": options.threat_model.eps,
        "version": options.version,
        "seed": state.settings["seed"],
        "rng": options.rng,
        "search_dtype": str(options.search_dtype) if options.search_dtype is not None else None,
        "compile": options.compile,
        "warnings": list(console.warnings),
    }
    return state, report


def _check_labels(y: Tensor, classes: int) -> None:
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise ValueError(
            f"y_orig must lie in 0 … {classes - 1}, as the model has {classes} classes, got {low} … {high}"
        )


def _begin(
    model: Any,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[Attack],
    options: Options,
    console: Console,
    share: Share,
) -> EvaluationState:
    """The state in the file, or a new one."""
    path = options.state_path
    identity = {
        "norm": options.threat_model.norm,
        "eps": options.threat_model.eps,
        **identity_of(model, x, y, attacks),
        "rng": options.rng,
        "batch size": options.batch_size if options.rng == "reference" else None,
        "search_dtype": str(options.search_dtype),
        "compile": options.compile,
        "share of the samples": str(share),
    }
    if path is not None and path.exists():
        if options.seed is not None:
            identity["seed"] = options.seed
        state = EvaluationState.load(path, identity, x)
        check_model(path, state.fingerprint, model, x, options.device)
        mine = share.samples(len(x))
        standing, begun = int(state.robust[mine].sum()), int((state.finished[mine] > 0).sum())
        console.say(f"resumed from {path}: {standing} samples stand, {begun} were attacked")
    else:
        seed = options.seed if options.seed is not None else share.agreed(secrets.randbits(31))
        state = EvaluationState.new({**identity, "seed": seed}, x, y)
        if path is not None:
            state.fingerprint = Fingerprint.take(model, x, options.device)
            state.save(path)  # a path that cannot be written shows now
    console.say(
        f"AutoAttack {options.version}: {', '.join(attack.name for attack in attacks)}; {options.threat_model.norm}, "
        f"eps {options.threat_model.eps:g}; {len(x)} samples; seed {state.settings['seed']}, rng {options.rng}"
    )
    return state


class _Engine:
    """Takes the samples of this process through all stages.

    Args:
        model: in eval mode.
        state: where each sample stands; written to.
        mine: int64, the samples of this process.
        started: ``time.perf_counter()`` when the evaluation began.
    """

    def __init__(
        self,
        model: Any,
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
        few = x[:2].to(options.device)
        chunk = None if options.compile else cache_chunk(model, few)
        self.search = Classifier(
            torch.compile(model, dynamic=True) if options.compile else model,
            options.search_dtype,
            console.advance,
            chunk,
            channels_last_works(model, few),
        )
        self.verify = Classifier(model, None, console.advance, chunk)
        # Rounding decides some steps of an attack: what is compared with the official package computes as it does.
        # A randomised model may take another path than the one that was traced.
        folds = options.rng == "keyed" and options.version != "rand" and not options.compile
        self.folding = folding_that_works(model, few) if folds else None
        self.ledger = Ledger(state.costs, (self.search, self.verify), started)
        self.last_save = time.monotonic()

    def run(self) -> None:
        self._classify_clean_samples()
        self.console.start_progress(passes_left(self.stages, self._finished()))
        for index, stage in enumerate(self.stages):
            name = stage.attack.name
            self._book(name)
            for samples in self._pending(index).split(self.options.batch_size):
                self._attack_batch(index, stage, samples)
                self._book(name)
                self._save()
            last = index + 1 == len(self.stages) or self.stages[index + 1].attack.name != name
            if last and len(self.mine):
                self.console.say(stage_line(self.state, index, name, self.mine))

    def _classify_clean_samples(self) -> None:
        state = self.state
        self.ledger.book("clean")
        for samples in self._pending(-1).split(self.options.batch_size):
            x, y = self._batch(samples)
            with full_precision():
                labels = self.verify.label(x)
            state.labels[samples] = labels.cpu()
            state.clean[samples] = state.robust[samples] = (labels == y).cpu()
            state.finished[samples] = 0
            self._save()
        self.ledger.book("clean")
        correct, count = int(state.clean[self.mine].sum()), len(self.mine)
        if count:
            self.console.say(f"clean accuracy: {100 * correct / count:.2f} %")
        nan = nan_samples(state)["clean"]
        self.console.warn(inspection.nan_samples(nan[torch.isin(nan, self.mine)], "clean"))

    def _attack_batch(self, index: int, stage: Stage, samples: Tensor) -> None:
        state = self.state
        x, y = self._batch(samples)
        device, name = self.options.device, stage.attack.name
        found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=device)
        noise: Noise | None = ReferenceNoise(self.seed) if self.options.rng == "reference" else None
        for part in stage.parts:
            rows = (~fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            attacked = samples[rows.cpu()]
            with self.folding.applied() if self.folding is not None else nullcontext():
                batch = Batch(
                    x[rows],
                    y[rows],
                    attacked.to(device),
                    part,
                    noise or KeyedNoise(self.seed, name, part),
                    self._resumed_search(attacked),
                    self._pause(name, attacked),
                )
                points, wrong = stage.attack.run_part(self.search, batch)
            state.search = None
            with full_precision():
                labels = self.verify.label(points)
            confirmed = labels != y[rows]
            confirmed &= wrong  # FAB's points beyond eps are misclassified and do not count
            state.costs[name].unverified += int((wrong & ~confirmed).sum())
            self._check_still_classifies(x[rows[confirmed & (labels < 0)]])
            found[rows[confirmed]], fooled[rows[confirmed]] = points[confirmed], True
            state.labels[attacked[confirmed.cpu()]] = labels[confirmed].cpu()
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

    def _batch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[samples].to(self.options.device), self.y[samples].to(self.options.device)

    def _pending(self, index: int) -> Tensor:
        """The samples that stage ``index`` has still to attack, in order."""
        open_here = self.state.robust & (self.state.finished == index)
        return self.mine[open_here[self.mine]]

    def _finished(self) -> Tensor:
        """How many stages each sample of this process that stands is through with."""
        return self.state.finished[self.mine[self.state.robust[self.mine]]]

    def _resumed_search(self, samples: Tensor) -> Search | None:
        if self.state.search is None:
            return None
        saved, search = self.state.search
        if not torch.equal(saved, samples):
            return None
        device = self.options.device
        return Search(search.queries, search.best.to(device), search.margin.to(device))

    def _pause(self, name: str, samples: Tensor) -> Callable[[Search], None]:
        def pause(search: Search) -> None:
            self.state.search = (samples, search)
            self._book(name)
            self._save()

        return pause

    def _book(self, name: str) -> None:
        self.ledger.book(name)
        finished = self._finished()
        self.console.expect(passes_left(self.stages, finished), f"{name}, {len(finished)} stand")

    def _save(self) -> None:
        path = self.options.state_path
        if path is not None and time.monotonic() - self.last_save >= self.options.save_every:
            self.state.save(path)
            self.last_save = time.monotonic()
