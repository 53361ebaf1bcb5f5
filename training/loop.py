"""The training loop: one step after the other, a checkpoint after each epoch, and exact resumption from it."""

import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scorematch import objectives
from scorematch.objectives import Outcome
from scorematch.posteriors import Posterior
from training import checkpoint, measures, toy
from training.augmentation import augmented
from training.config import RunSettings, as_table
from training.data import Data
from training.errors import StopError
from training.optimisation import build_average, build_optimizer, build_schedule

# Each purpose draws from a generator of its own, so that a longer attack does not change the order of the data.
PURPOSES = ("order", "augmentation", "attack", "validation", "evaluation")
STEPS_BETWEEN_CHECKS = 20  # a check reads the loss and thereby waits for the device

StepObjective = Callable[[nn.Module, Tensor, Tensor, Generator], Outcome]


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> Generator:
    """A generator for one purpose of one run."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose)])
    return Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def bind_objective(settings: RunSettings, data: Data, posterior: Posterior | None) -> StepObjective:
    """The objective of a run as a function of (model, x, y, generator)."""
    if settings.objective == "standard":
        return lambda model, x, y, _: objectives.standard(model, x, y, divergence=settings.divergence)
    attack: dict[str, Any] = {
        "divergence": settings.divergence,
        "threat_model": settings.threat_model(data.lower, data.upper),
        "steps": settings.steps,
        "clip": settings.clip,
        "clip_form": settings.clip_form,
    }
    attack |= {k: v for k in ("start", "attack_mode") if (v := getattr(settings, k)) is not None}
    function: Callable[..., Outcome]
    if settings.objective == "pgd_at":
        function = functools.partial(objectives.pgd_at, **attack)
    elif settings.objective == "trades":
        function = functools.partial(objectives.trades, beta=settings.beta, **attack)
    else:
        assert posterior is not None
        function = functools.partial(objectives.score_direct, posterior=posterior, **attack)
    return lambda model, x, y, generator: function(model, x, y, generator=generator)


class Trainer:
    """All state of a run between two steps. ``fit`` trains to the last epoch; ``resume`` first goes back to one."""

    def __init__(
        self, settings: RunSettings, data: Data, model: nn.Module, posterior: Posterior | None, out: Path
    ) -> None:
        self.settings, self.data, self.model, self.out = settings, data, model, out
        self.objective = bind_objective(settings, data, posterior)
        # Estimated posteriors get labels: an anchor at p_d(y|x) would hand them the oracle.
        use_labels = data.p_train is None or settings.objective == "score_direct"
        self.targets: Tensor = data.y_train if use_labels else data.p_train  # type: ignore[assignment]
        self.steps_per_epoch = math.ceil(len(data.x_train) / settings.batch_size)
        self.optimizer = build_optimizer(settings, model)
        self.schedule = build_schedule(settings, self.optimizer, self.steps_per_epoch)
        self.average = build_average(settings, model)
        device = data.x_train.device
        self.generators = {
            "order": generator(settings.seed, "order"),
            "augmentation": generator(settings.seed, "augmentation", device),
            "attack": generator(settings.seed, "attack", device),
        }
        self.epoch = 0
        self.best: dict[str, float] = {}

    @property
    def network(self) -> nn.Module:
        """The classifier to evaluate."""
        return self.model if self.average is None else self.average.module

    def resume(self) -> None:
        """Go back to the last complete epoch, bit for bit."""
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

    def save(self) -> None:
        training = {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": {purpose: g.get_state() for purpose, g in self.generators.items()},
            "torch_rng": torch.get_rng_state(),
            "best": self.best,
        }
        self._write("checkpoint.pt", training=training)

    def _write(self, name: str, **rest: Any) -> None:
        settings = as_table(self.settings)
        checkpoint.save(self.out / name, epoch=self.epoch, settings=settings, network=self.network, **rest)

    def fit(self) -> None:
        log = checkpoint.MetricsLog(self.out / "metrics.jsonl", self.epoch)
        curves = SummaryWriter(self.out / "tensorboard", purge_step=self.epoch + 1)
        epochs = self.settings.epochs
        with tqdm(
            total=epochs * self.steps_per_epoch,
            initial=self.epoch * self.steps_per_epoch,
            desc=f"train {self.settings.objective}",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 30.0,
        ) as progress:
            while self.epoch < epochs:
                entry = self._epoch(progress)
                self.epoch += 1
                if self.epoch % self.settings.validate_every == 0 or self.epoch == epochs:
                    entry |= self._validate()
                    self._keep_best(entry)
                entry = {"epoch": self.epoch, **entry}
                log.append(entry)
                for name, value in entry.items():
                    curves.add_scalar(name, value, self.epoch)
                self.save()
                shown = {"epoch": f"{self.epoch}/{epochs}", "loss": f"{entry['loss']:.4f}"}
                if "val_pgd_acc" in entry:
                    shown["val_pgd"] = f"{entry['val_pgd_acc']:.1f} %"
                progress.set_postfix(shown, refresh=False)
        curves.close()

    def _epoch(self, progress: tqdm) -> dict[str, float]:
        """One pass over the training data; the means of its metrics over the samples."""
        begin = time.perf_counter()
        sums: dict[str, Tensor] = {}
        order = torch.randperm(len(self.data.x_train), generator=self.generators["order"])
        for step, index in enumerate(order.split(self.settings.batch_size)):
            for name, value in self._step(index.to(self.data.x_train.device)).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(index)
            progress.update()
            if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
                self._check(sums["loss"])
        self._check(sums["loss"])
        means = {name: (total / len(order)).item() for name, total in sums.items()}
        return {**means, "lr": float(self.schedule.get_last_lr()[0]), "seconds": time.perf_counter() - begin}

    def _step(self, index: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        x = augmented(
            self.data.x_train[index], self.generators["augmentation"], shift=settings.shift, flip=settings.flip
        )
        self.model.train()
        outcome = self.objective(self.model, x, self.targets[index], self.generators["attack"])
        loss = outcome.loss.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return {"loss": loss.detach(), **outcome.metrics}

    def _check(self, sum_of_losses: Tensor) -> None:
        """A sum is finite only if every loss in it was."""
        if not torch.isfinite(sum_of_losses):
            raise StopError(
                f"the loss is not finite in epoch {self.epoch + 1}; {self.out / 'checkpoint.pt'} keeps the last good "
                f"epoch ({self.epoch}); try a smaller --lr (now {self.settings.lr:g})"
            )

    def _validate(self) -> dict[str, float]:
        """Clean and robust accuracy on the validation split, per cent, always from the same random starts."""
        settings, data = self.settings, self.data
        x, y = data.x_validation, data.y_validation
        attack = measures.pgd(
            settings.threat_model(data.lower, data.upper), steps=settings.validation_steps, restarts=1, losses=("ce",)
        )
        start = generator(settings.seed, "validation", x.device)
        values = {
            "val_acc": measures.per_cent(measures.correct(self.network, x, y)),
            "val_pgd_acc": measures.per_cent(measures.robust(self.network, x, y, attack, start)),
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
