"""What every training shares: epochs of steps, checkpoints, signals, logs, and exact resumption.

A training derives from :class:`Engine` and says what a step is, what a validation measures and what its state is
(:class:`training.engine.loop.Trainer`). The engine calls it; it never looks inside.
"""

import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.engine import checkpoint, distributed
from training.engine.progress import progress_bar
from training.settings.errors import InputError, Interrupted, StopError, interrupts_deferred

STEPS_BETWEEN_CHECKS = 20  # a check reads loss and weights and thereby waits for the device
SETTLED = 5  # steps after which kernels have been chosen, networks compiled and graphs recorded
GIB = 2**30


@dataclass(frozen=True)
class Course:
    """How long a training lasts, and when it validates and saves."""

    name: str  # shown beside the progress bar
    epochs: int
    steps: int  # steps of an epoch
    total: int | None = None  # steps in all, where the last epoch is shorter
    validate_every: int = 1  # epochs between validations; the last epoch is always validated
    save_every: int = 1  # epochs between checkpoints; the last epoch and the best one so far always end with one
    save_minutes: float = 15.0  # minutes between checkpoints within an epoch
    keep_last: int = 0  # how many checkpoints of earlier epochs stay, as epoch-NNNN.pt
    lr_hint: str = ""  # ends the message about a loss or weights that are not finite

    @property
    def all_steps(self) -> int:
        return self.total or self.epochs * self.steps

    def steps_of(self, epoch: int) -> int:
        """Steps of an epoch, which is counted from 0."""
        return min(self.steps, self.all_steps - epoch * self.steps)


class Engine(ABC):
    """All state of a training between two steps. ``fit`` trains to the last epoch; ``resume`` first goes back to one.

    Under torchrun every process has an engine. They call the same methods in the same order; the first one writes files
    and prints.

    Args:
        course: how long, and when to save.
        device: where the training runs.
        out: folder of checkpoint.pt, best.pt, metrics.jsonl and tensorboard/.
    """

    def __init__(self, course: Course, device: torch.device, out: Path) -> None:
        self.course, self.device, self.out = course, device, out
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.epoch = 0  # complete ones
        self.step = 0  # of the epoch under way; all of them while it validates
        self.sums: dict[str, Tensor] = {}  # of each metric over the samples of that epoch
        self.seconds = 0.0  # spent on that epoch
        self.best: dict[str, float] = {}
        self._writer = checkpoint.Writer()
        self._pace = _Pace()
        self._signal: Callable[[], str | None] = lambda: None  # the name of one that waits
        self._saved_epoch = 0  # of the last checkpoint
        self._last_save = time.monotonic()

    # What a training says of itself.

    @abstractmethod
    def steps_from(self, first: int) -> Iterator[dict[str, Tensor]]:
        """Take the steps of an epoch from number ``first`` on, one each time the iterator is advanced.

        Yields the sums of the metrics of a step over its samples in this process, tensors on the device; ``loss`` and
        ``samples`` are among them.
        """

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """What is trained."""

    @abstractmethod
    def epoch_metrics(self) -> dict[str, float]:
        """What is known at the end of an epoch without looking at the data, such as the learning rate."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measures on the validation split, logged under their names."""

    @abstractmethod
    def is_best(self, entry: dict[str, float]) -> bool:
        """Whether the epoch with these logged values is the best so far; it then becomes best.pt."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that decides how the training goes on, in tensors and plain values."""

    @abstractmethod
    def load_state(self, saved: dict[str, Any]) -> None:
        """Go back to a :meth:`state`."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state: ``settings``, a table, and ``network``, a state dict."""

    @abstractmethod
    def check_saved(self, saved: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint, read from ``path``, that is of another training.

        Raises:
            InputError: as said.
        """

    # What the engine does with it.

    @property
    def steps_done(self) -> int:
        """Steps of the whole training before the one under way."""
        return min(self.epoch * self.course.steps, self.course.all_steps) + self.step

    def resume(self) -> None:
        """Go back to the last checkpoint, bit for bit.

        Raises:
            InputError: it is of another training.
        """
        path = self.out / "checkpoint.pt"
        # On the CPU, where Adam counts its steps: of a count on a GPU it would wait for the value in every step.
        state = checkpoint.load(path)
        self.check_saved(state, path)
        saved = state["training"]
        before, now = saved.get("device", self.device.type), self.device.type  # earlier versions did not save it
        if before != now:
            raise InputError(
                f"device: {now}, but {path} was saved on {before}, and random numbers go on only there, allowed: "
                f"--device {before}, or a new run"
            )
        try:
            self.load_state(saved)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: does not fit this run ({reason})") from None
        torch.set_rng_state(saved["torch_rng"].cpu())
        self.epoch, self.best = state["epoch"], saved["best"]
        # Checkpoints from before there were any within an epoch do not have these.
        self.step, sums, self.seconds = (saved.get(k, v) for k, v in (("step", 0), ("sums", {}), ("seconds", 0.0)))
        self.sums = {name: total.to(self.device) for name, total in sums.items()}
        self._saved_epoch = self.epoch
        if self._is_of_best() and self.rank == 0:
            best = self.out / "best.pt"
            if not best.exists() or checkpoint.load(best)["epoch"] != self.epoch:  # a kill came between the two files
                self._write("best.pt")
                self.written()

    def _is_of_best(self) -> bool:
        """Whether the weights are those of best.pt."""
        return self.step == 0 and self.epoch > 0 and self.best.get("epoch") == self.epoch

    def save(self) -> None:
        """Hand the state over to be written as checkpoint.pt; training may go on at once."""
        training = self.state() | {
            "torch_rng": torch.get_rng_state(),
            "device": self.device.type,
            "best": self.best,
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
        }
        self._write("checkpoint.pt", training=training)
        self._saved_epoch, self._last_save = self.epoch, time.monotonic()

    def _is_due(self) -> bool:
        """Whether the last checkpoint is as old as one may be."""
        return time.monotonic() - self._last_save >= 60 * self.course.save_minutes

    def _write(self, name: str, **rest: Any) -> None:
        """By the first process; all have the same weights."""
        if self.rank == 0:
            self._writer.save(self.out / name, epoch=self.epoch, **self.description(), **rest)

    def written(self) -> None:
        """Wait until every file that was handed over lies on the disk.

        Raises:
            StopError: one of them cannot be written.
        """
        self._writer.wait()

    def fit(self) -> None:
        """Train to the last epoch.

        SIGINT, SIGTERM and SIGHUP wait for the end of a step, or of a batch of a validation; then a checkpoint is
        written.

        Raises:
            Interrupted: there was such a signal.
            StopError: the loss or a weight is not finite, or a file cannot be written.
        """
        try:
            self._fit()
        finally:
            self.written()

    def _fit(self) -> None:
        log = checkpoint.MetricsLog(self.out / "metrics.jsonl", self.epoch) if self.rank == 0 else None
        course = self.course
        with (
            self._curves() as curves,
            interrupts_deferred() as self._signal,
            progress_bar(total=course.all_steps, initial=self.steps_done, desc=course.name, unit="step") as progress,
        ):
            while self.epoch < course.epochs:
                entry = self._epoch(progress)
                last = self.epoch + 1 == course.epochs
                if validates := (self.epoch + 1) % course.validate_every == 0 or last:
                    entry |= self.validate()
                self.epoch += 1
                self.step, self.sums, self.seconds = 0, {}, 0.0
                better = validates and self.is_best(entry)
                entry = {"epoch": self.epoch, **entry}
                if log is not None and curves is not None:
                    log.append(entry)
                    for name, value in entry.items():
                        curves.add_scalar(name, value, self.epoch)
                name_of_signal, due = self._agreed(self._signal(), self._is_due())
                if self.epoch % course.save_every == 0 or last or name_of_signal or due or better:
                    self.save()
                    # After the checkpoint, so that best.pt is never of a training that no checkpoint goes on with.
                    if better:
                        self._write("best.pt")
                    if self.rank == 0:
                        self._writer.keep_copy(self.out / "checkpoint.pt", self.epoch, course.keep_last)
                progress.set_postfix(self._shown(entry), refresh=False)
                if name_of_signal:
                    raise Interrupted(name_of_signal)

    def _curves(self) -> AbstractContextManager[SummaryWriter | None]:
        if self.rank != 0:
            return nullcontext()
        return SummaryWriter(self.out / "tensorboard", purge_step=self.epoch + 1)

    def _shown(self, entry: dict[str, float]) -> dict[str, str]:
        return {"epoch": f"{self.epoch}/{self.course.epochs}", "loss": f"{entry['loss']:.4f}"}

    def stop_if_asked(self) -> None:
        """For a validation to call between two batches: save and stop if a signal waits. It is then begun anew.

        Several processes go on, as they have different numbers of batches.

        Raises:
            Interrupted: a signal waits.
        """
        if self.world == 1 and (name_of_signal := self._signal()):
            self.save()
            raise Interrupted(name_of_signal)

    def _epoch(self, progress: tqdm) -> dict[str, float]:
        """One pass over the steps of an epoch, or what is left of it; the means of its metrics over the samples."""
        begin = time.perf_counter() - self.seconds
        for values in self.steps_from(self.step):
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
            self.step += 1
            self.seconds = time.perf_counter() - begin
            progress.update()
            if self.step % STEPS_BETWEEN_CHECKS == 0:
                self._check()
            report = self._pace.report(self, values["samples"])
            if report and self.rank == 0:
                progress.write(report)
            # Several processes see a signal, or the time pass, at different steps: then they have to agree. After the
            # last step, too, as the validation may take long.
            is_last = self.step == self.course.steps_of(self.epoch)
            if self.world == 1 or is_last or self.step % STEPS_BETWEEN_CHECKS == 0:
                name_of_signal, due = self._agreed(self._signal(), self._is_due())
                if name_of_signal or due:
                    self._check()
                    self.save()
                if name_of_signal:
                    raise Interrupted(name_of_signal)
            if is_last:
                break
        self._check()
        sums = {name: distributed.summed(total.clone()).item() for name, total in self.sums.items()}
        count = sums.pop("samples")
        means = {name: total / count for name, total in sums.items()}
        seconds = time.perf_counter() - begin
        return {
            **means,
            **self.epoch_metrics(),
            "seconds": seconds,
            "samples_per_second": count / seconds,
            "memory_gib": peak_memory(self.device),
        }

    def _agreed(self, signal: str | None, due: bool) -> tuple[str | None, bool]:
        if self.world == 1:
            return signal, due
        flags = torch.tensor([signal is not None, due], dtype=torch.int32, device=self.device)
        interrupted, saving = distributed.summed(flags).tolist()
        return (signal or "SIGTERM") if interrupted else None, bool(saving)

    def _check(self) -> None:
        """A sum is finite only if every loss in it was. The last step may have spoiled the weights all the same."""
        values = torch.stack([self.sums["loss"], torch.nn.utils.get_total_norm(self.weights())])
        loss, weights = distributed.summed(values).isfinite().tolist()
        if not (loss and weights):
            what = "weights are" if loss else "loss is"
            raise StopError(
                f"the {what} not finite in epoch {self.epoch + 1}; {self.out / 'checkpoint.pt'} keeps the last good "
                f"checkpoint (epoch {self._saved_epoch}){self.course.lr_hint}"
            )


class _Pace:
    """How fast the first steps of this process are, reported once."""

    def __init__(self) -> None:
        self.steps = 0
        self.begin = 0.0

    def report(self, engine: Engine, samples: Tensor) -> str:
        """To be called after each step with the number of its samples in this process; empty except after one step."""
        self.steps += 1
        if self.steps not in (SETTLED, SETTLED + STEPS_BETWEEN_CHECKS):
            return ""
        count = float(distributed.summed(samples.clone()))  # waits for the device
        now = time.perf_counter()
        if self.steps == SETTLED:
            self.begin = now
            return ""
        seconds = (now - self.begin) / STEPS_BETWEEN_CHECKS
        left = engine.course.all_steps - engine.steps_done
        return (
            f"{count / seconds:.0f} samples/s, {peak_memory(engine.device):.1f} GiB of memory, "
            f"{duration(left * seconds)} to the last step, validation not counted"
        )


def duration(seconds: float) -> str:
    """A number of seconds in words."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min"


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: on the GPU, or all of it where it runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
