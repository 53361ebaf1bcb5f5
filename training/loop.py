"""The training loop: one step after the other, checkpoints, and exact resumption from them."""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scorematch import objectives
from scorematch.free import FreeAttack
from scorematch.graphs import AttackGraphs
from scorematch.objectives import Outcome, first_iterate
from scorematch.posteriors import Posterior
from scorematch.weight_perturbation import WeightPerturbation
from training import checkpoint, distributed, measures, toy
from training.batches import Batches
from training.config import RunSettings, as_table
from training.data import Data
from training.errors import InputError, Interrupted, StopError, interrupts_deferred
from training.forward import Forward, set_tf32
from training.optimisation import (
    batchnorm_momentum,
    build_average,
    build_optimizer,
    build_schedule,
    set_batchnorm_momentum,
)

# Each purpose draws from a generator of its own, so that a longer attack does not change the order of the data.
PURPOSES = ("order", "augmentation", "attack", "validation", "evaluation")
STEPS_BETWEEN_CHECKS = 20  # a check reads the loss and thereby waits for the device

StepObjective = Callable[[nn.Module, Tensor, Tensor, Tensor | None, WeightPerturbation | None], Outcome]


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> Generator:
    """A generator for one purpose of one run."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose)])
    return Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def bind_objective(
    settings: RunSettings, data: Data, posterior: Posterior | None, graphs: AttackGraphs | None = None
) -> StepObjective:
    """The objective of a run as a function of (model, x, y, first iterate of the attack, weight perturbation)."""
    if settings.objective == "standard":
        return lambda model, x, y, start, weights: objectives.standard(model, x, y, divergence=settings.divergence)
    attack: dict[str, Any] = {
        "divergence": settings.divergence,
        "threat_model": settings.threat_model(data.lower, data.upper),
        "attack": settings.attack,
        "steps": settings.steps,
        "clip": settings.clip,
        "clip_form": settings.clip_form,
        "graphs": graphs,
    }
    if settings.attack_mode is not None:
        attack["attack_mode"] = settings.attack_mode
    function: Callable[..., Outcome]
    if settings.objective == "pgd_at":
        function = functools.partial(objectives.pgd_at, **attack)
    elif settings.objective == "trades":
        function = functools.partial(objectives.trades, beta=settings.beta, **attack)
    else:
        assert posterior is not None
        function = functools.partial(objectives.score_direct, posterior=posterior, **attack)
    return lambda model, x, y, start, weights: function(model, x, y, start=start, weights=weights)


def add_metrics(sums: dict[str, Tensor], outcome: Outcome) -> None:
    """Add the loss, the metrics and the number of the samples of an outcome."""
    values = {"loss": outcome.loss.detach().mean(), **outcome.metrics, "samples": torch.ones_like(outcome.loss[0])}
    for name, value in values.items():
        sums[name] = sums.get(name, torch.zeros_like(value.detach())) + value.detach() * len(outcome.loss)


class LossOfStep(nn.Module):
    """An objective as a module: DistributedDataParallel then sees one forward and one backward pass a step, and the
    passes of the attack, which runs inside without parameter gradients, synchronise nothing."""

    def __init__(self, model: nn.Module, objective: StepObjective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Tensor, y: Tensor, start: Tensor | None, weights: WeightPerturbation | None) -> Outcome:
        return self.objective(self.model, x, y, start, weights)


class Trainer:
    """All state of a run between two steps. ``fit`` trains to the last epoch; ``resume`` first goes back to one.

    Under torchrun each process has a Trainer. All make the same batches and random starts, and take every
    ``world_size``-th sample of them: what is computed does not depend, but for rounding, on the number of processes.
    """

    def __init__(
        self, settings: RunSettings, data: Data, model: nn.Module, posterior: Posterior | None, out: Path
    ) -> None:
        self.settings, self.data, self.out = settings, data, out
        self.rank, self.world = distributed.rank(), distributed.world_size()
        device = data.x_train.device
        set_tf32(settings.precision)
        if settings.channels_last and len(data.input_shape) == 3:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        if self.world > 1 and settings.sync_batchnorm:
            self.model = distributed.synchronise_batchnorm(model)
        self.generators = {
            "order": generator(settings.seed, "order"),
            "augmentation": generator(settings.seed, "augmentation", device),
            "attack": generator(settings.seed, "attack", device),
        }
        # Estimated posteriors get labels: an anchor at p_d(y|x) would hand them the oracle.
        use_labels = data.p_train is None or settings.objective == "score_direct"
        targets: Tensor = data.y_train if use_labels else data.p_train  # type: ignore[assignment]
        self.batches = Batches(settings, data, targets, self.generators["order"], self.generators["augmentation"])
        self.steps_per_epoch = self.batches.steps
        self._check_shares()

        self.threat_model = settings.threat_model(data.lower, data.upper)
        self.forward = Forward(self.model, settings.precision, settings.compile, settings.fold)
        self.start = settings.attack_start or objectives.default_of(settings.objective, "start")
        attack_mode = settings.attack_mode or objectives.default_of(settings.objective, "attack_mode")
        if settings.graph and self.world > 1 and settings.sync_batchnorm and attack_mode != "eval":
            raise InputError(
                f"graph: True in {self.world} processes, whose attack in {attack_mode} mode synchronises batch norm, "
                "allowed: with --no-sync-batchnorm or --attack-mode eval"
            )
        graphs = AttackGraphs() if settings.graph else None
        self.loss_of_step: nn.Module = LossOfStep(self.forward, bind_objective(settings, data, posterior, graphs))
        if self.world > 1:
            self.loss_of_step = DistributedDataParallel(
                self.loss_of_step, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self.optimizer = build_optimizer(settings, self.model)
        self.free: FreeAttack | None = None
        if settings.free_replays:
            if self.world > 1:
                raise InputError(f"free_replays: {settings.free_replays} in {self.world} processes, allowed: in one")
            self.free = FreeAttack(self.threat_model, settings.free_replays, settings.divergence)
        updates = self.steps_per_epoch * (settings.free_replays or 1)
        self.schedule = build_schedule(settings, self.optimizer, updates)
        self.average = build_average(settings, self.model, settings.epochs * updates)
        self.epoch = 0  # complete ones
        self.step = 0  # of the epoch under way
        self.sums: dict[str, Tensor] = {}  # of each metric over the samples of that epoch
        self.seconds = 0.0  # spent on that epoch
        self.start_of_epoch = self.generators["order"].get_state()
        self.best: dict[str, float] = {}

    def _check_shares(self) -> None:
        """Every process needs a sample of every part of every batch."""
        total, size = len(self.data.x_train), self.settings.batch_size
        parts = self.world * self.settings.accumulate
        smallest = size if self.settings.generated else total % size or size
        if smallest < parts and parts > 1:
            raise InputError(
                f"batch_size: {size} of {total} samples leaves a batch of {smallest} for {self.world} processes with "
                f"{self.settings.accumulate} parts each, allowed: at least one sample each"
            )

    @property
    def network(self) -> nn.Module:
        """The classifier to evaluate."""
        return self.model if self.average is None else self.average.module

    def resume(self) -> None:
        """Go back to the last checkpoint, bit for bit."""
        path = self.out / "checkpoint.pt"
        state = checkpoint.load(path, self.data.x_train.device)
        saved = state["training"]
        checkpoint.load_weights(self.network, state, path)
        self.model.load_state_dict(saved["model"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        for purpose, generator_state in saved["generators"].items():
            self.generators[purpose].set_state(generator_state.cpu())
        torch.set_rng_state(saved["torch_rng"].cpu())
        self.epoch, self.best = state["epoch"], saved["best"]
        # Checkpoints from before there were any within an epoch do not have these.
        self.step, self.sums, self.seconds = (saved.get(k, v) for k, v in (("step", 0), ("sums", {}), ("seconds", 0.0)))
        if self.free is not None:
            self.free.load_state_dict(saved["free"])
        self.start_of_epoch = saved.get("start_of_epoch", saved["generators"]["order"]).cpu()

    def save(self) -> None:
        training = {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": {purpose: g.get_state() for purpose, g in self.generators.items()},
            "torch_rng": torch.get_rng_state(),
            "best": self.best,
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
            "start_of_epoch": self.start_of_epoch,
            "free": None if self.free is None else self.free.state_dict(),
        }
        self._write("checkpoint.pt", training=training)

    def _write(self, name: str, **rest: Any) -> None:
        """By the first process; all have the same weights."""
        if self.rank == 0:
            settings = as_table(self.settings)
            checkpoint.save(self.out / name, epoch=self.epoch, settings=settings, network=self.network, **rest)

    def fit(self) -> None:
        """Train to the last epoch.

        SIGINT and SIGTERM wait for the end of a step; then a checkpoint is written.

        Raises:
            Interrupted: there was such a signal.
            StopError: the loss is not finite.
        """
        log = checkpoint.MetricsLog(self.out / "metrics.jsonl", self.epoch) if self.rank == 0 else None
        curves = SummaryWriter(self.out / "tensorboard", purge_step=self.epoch + 1) if self.rank == 0 else None
        epochs = self.settings.epochs
        with (
            interrupts_deferred() as signal,
            tqdm(
                total=epochs * self.steps_per_epoch,
                initial=self.epoch * self.steps_per_epoch + self.step,
                desc=f"train {self.settings.objective}",
                unit="step",
                mininterval=0.1 if sys.stderr.isatty() else 30.0,
                disable=self.rank != 0,
            ) as progress,
        ):
            while self.epoch < epochs:
                entry = self._epoch(progress, signal)
                self.epoch += 1
                self.step, self.sums, self.seconds = 0, {}, 0.0
                self.start_of_epoch = self.generators["order"].get_state()
                if self.epoch % self.settings.validate_every == 0 or self.epoch == epochs:
                    entry |= self._validate()
                    self._keep_best(entry)
                entry = {"epoch": self.epoch, **entry}
                if log is not None and curves is not None:
                    log.append(entry)
                    for name, value in entry.items():
                        curves.add_scalar(name, value, self.epoch)
                self.save()
                if self.rank == 0:
                    checkpoint.keep_copy(self.out / "checkpoint.pt", self.epoch, self.settings.keep_last)
                shown = {"epoch": f"{self.epoch}/{epochs}", "loss": f"{entry['loss']:.4f}"}
                if "val_pgd_acc" in entry:
                    shown["val_pgd"] = f"{entry['val_pgd_acc']:.1f} %"
                progress.set_postfix(shown, refresh=False)
                if name_of_signal := self._agreed(signal(), due=False)[0]:
                    raise Interrupted(name_of_signal)
        if curves is not None:
            curves.close()

    def _epoch(self, progress: tqdm, signal: Callable[[], str | None]) -> dict[str, float]:
        """One pass over the training data, or what is left of it; the means of its metrics over the samples."""
        begin = time.perf_counter() - self.seconds
        last_save = time.monotonic()
        if self.step:
            self.generators["order"].set_state(self.start_of_epoch)
        for index in self.batches.epoch(self.step):
            for name, value in self._step(index).items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
            self.step += 1
            self.seconds = time.perf_counter() - begin
            progress.update()
            if self.step % STEPS_BETWEEN_CHECKS == 0:
                self._check()
            if self.step == self.steps_per_epoch:
                break
            # Several processes see a signal, or the time pass, at different steps: then they have to agree.
            if self.world == 1 or self.step % STEPS_BETWEEN_CHECKS == 0:
                due = time.monotonic() - last_save >= 60 * self.settings.save_minutes
                name_of_signal, due = self._agreed(signal(), due)
                if name_of_signal or due:
                    self._check()
                    self.save()
                    last_save = time.monotonic()
                if name_of_signal:
                    raise Interrupted(name_of_signal)
        self._check()
        sums = {name: distributed.summed(total.clone()).item() for name, total in self.sums.items()}
        count = sums.pop("samples")
        means = {name: total / count for name, total in sums.items()}
        return {**means, "lr": float(self.schedule.get_last_lr()[0]), "seconds": time.perf_counter() - begin}

    def _agreed(self, signal: str | None, due: bool) -> tuple[str | None, bool]:
        if self.world == 1:
            return signal, due
        flags = torch.tensor([signal is not None, due], dtype=torch.int32, device=self.data.x_train.device)
        interrupted, saving = distributed.summed(flags).tolist()
        return (signal or "SIGTERM") if interrupted else None, bool(saving)

    def _step(self, index: Tensor) -> dict[str, Tensor]:
        """One step on the samples ``index`` (and the generated ones that belong to it); the sums of its metrics."""
        settings = self.settings
        step = self.epoch * self.steps_per_epoch + self.step
        x, targets = self.batches.batch(index, step)
        self.model.train()
        self._set_batchnorm(step)
        if self.free is not None:
            return self._replays(self.free, x, targets)
        start = None
        if settings.objective != "standard":
            assert self.start is not None
            start = first_iterate(x, self.threat_model, self.start, self.generators["attack"], settings.attack)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part in range(settings.accumulate):
            share = slice(self.rank * settings.accumulate + part, None, self.world * settings.accumulate)
            mine = None if start is None else self._dense(start[share])
            with self._perturbation() as weights:
                if isinstance(self.loss_of_step, DistributedDataParallel):
                    self.loss_of_step.require_backward_grad_sync = part == settings.accumulate - 1
                outcome: Outcome = self.loss_of_step(self._dense(x[share]), targets[share], mine, weights)
                # DistributedDataParallel takes the mean over the processes.
                whole = len(outcome.loss) == len(x)
                (outcome.loss.mean() if whole else outcome.loss.sum() * (self.world / len(x))).backward()
            add_metrics(sums, outcome)
        self._update()
        return sums

    def _replays(self, free: FreeAttack, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Free adversarial training: a minibatch several times in a row, each time an update."""
        sums: dict[str, Tensor] = {}
        for _ in range(free.replays):
            outcome = free.step(self.forward, x, targets)
            self.optimizer.zero_grad(set_to_none=True)
            outcome.loss.mean().backward()
            self._update()
            add_metrics(sums, outcome)
        return sums

    def _update(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _set_batchnorm(self, step: int) -> None:
        momentum = batchnorm_momentum(self.settings, step)
        if momentum is not None:
            set_batchnorm_momentum(self.model, momentum)

    def _perturbation(self) -> AbstractContextManager[WeightPerturbation | None]:
        if not self.settings.awp or self.epoch < self.settings.awp_warmup:
            return nullcontext()

        def reduce(gradients: Sequence[Tensor]) -> None:
            for gradient in gradients:
                distributed.summed(gradient)

        return WeightPerturbation(self.model, self.settings.awp, reduce=reduce)

    def _dense(self, values: Tensor) -> Tensor:
        return values.contiguous(memory_format=self.batches.format) if values.dim() == 4 else values.contiguous()

    def _check(self) -> None:
        """A sum is finite only if every loss in it was."""
        total = distributed.summed(self.sums["loss"].clone())
        if not torch.isfinite(total):
            raise StopError(
                f"the loss is not finite in epoch {self.epoch + 1}; {self.out / 'checkpoint.pt'} keeps the last good "
                f"checkpoint (epoch {self.epoch}); try a smaller --lr (now {self.settings.lr:g})"
            )

    def _validate(self) -> dict[str, float]:
        """Clean and robust accuracy on the validation split, per cent, always from the same random starts."""
        settings, data = self.settings, self.data
        x, y = data.x_validation, data.y_validation
        attack = measures.pgd(
            self.threat_model, steps=settings.validation_steps, restarts=1, losses=settings.validation_losses
        )
        start = generator(settings.seed, "validation", x.device)

        def robust(x: Tensor, y: Tensor) -> Tensor:
            return measures.robust(self.network, x, y, attack, start)

        values = {
            "val_acc": measures.per_cent(measures.correct(self.network, x, y)),
            "val_pgd_acc": measures.per_cent(measures.shared(robust, x, y)),
        }
        return values | (toy.robust_errors(self.network) if data.name == "toy" else {})

    def _keep_best(self, entry: dict[str, float]) -> None:
        """best.pt: highest robust validation accuracy, then highest clean one, then the later epoch.

        Standard training is ranked by clean accuracy first: its robust accuracy is highest before it has learned much.
        """
        order = ("val_acc", "val_pgd_acc") if self.settings.objective == "standard" else ("val_pgd_acc", "val_acc")
        if [entry[key] for key in order] >= [self.best.get(key, -1.0) for key in order]:
            self.best = {"epoch": self.epoch, **{key: entry[key] for key in order}}
            self._write("best.pt")
