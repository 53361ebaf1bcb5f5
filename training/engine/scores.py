"""The training of score networks and noise-conditional classifiers, with the same engine as that of classifiers.

Steps, losses and averages are the library's (:class:`scorematch.matching.Fitting`); checkpoints, signals, logs and
processes are the engine's. The same seed gives the weights that ``matching.fit_denoiser`` gives, to the bit.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scorematch.matching import Fit, Fitting, MatchingLoss, losses_by_level
from scorematch.matching.fit import Augment
from training.data import Data, check_record, spread
from training.engine import Course, Engine, checkpoint, distributed
from training.engine.hardware import Speed
from training.settings import tables
from training.settings.errors import InputError
from training.settings.posterior import PosteriorSettings

# Steps between two looks at held-out data, each of which is followed by a checkpoint: a twentieth of the training
INTERVAL, SHORTEST, LOOKS = 500, 50, 20
SIGMAS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)  # noise levels at which losses are measured, in widths of the box of images
HELD_OUT = 500  # points of the validation split in the held-out loss


def levels(width: float) -> tuple[float, ...]:
    """The noise levels at which losses are measured, in input units, for data whose box is so wide (Format.width)."""
    return tuple(sigma * width for sigma in SIGMAS)


@dataclass(frozen=True)
class Training:
    """What all networks of one posterior have in common."""

    x: Tensor  # [M, …] training inputs
    y: Tensor  # int64 [M]
    x_held_out: Tensor
    y_held_out: Tensor
    fit: Fit
    augment: Augment | None
    sigma: float | None  # noise level at which the held-out loss picks the weights; None takes the last ones
    seed: int
    random_layers: bool  # dropout, which draws from torch's global generator
    speed: Speed
    save_minutes: float
    about: dict[str, Any]  # saved as the settings
    width: float = 1.0  # of the box of images, see levels()
    data: Data | None = None  # what x and y are of, remembered by checkpoints


class ScoreTrainer(Engine):
    """Trains one network in a folder of its own.

    Under torchrun every process draws the whole batch and takes every ``world_size``-th sample of it.

    Args:
        name: shown beside the progress bar.
        network: what is trained, in place.
        loss: of batches; calls the network, its backbone perhaps in another precision.
        training: data, settings and speed.
        generator: of all randomness but dropout's.
        out: folder of checkpoint.pt, metrics.jsonl and tensorboard/.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        loss: MatchingLoss,
        training: Training,
        generator: Generator,
        out: Path,
    ) -> None:
        fit = training.fit
        interval = min(INTERVAL, fit.steps, max(SHORTEST, -(-fit.steps // LOOKS)))
        lr_hint = f"; try a smaller --posterior-settings.lr (now {fit.lr:g})"
        course = Course(
            name=name,
            epochs=-(-fit.steps // interval),
            steps=interval,
            total=fit.steps,
            save_minutes=training.save_minutes,
            lr_hint=lr_hint,
        )
        super().__init__(course, training.x.device, out)
        if fit.batch_size < self.world:
            raise InputError(
                f"posterior_settings.batch_size: {fit.batch_size} for {self.world} processes, allowed: at least as many"
            )
        self.training, self.generator = training, generator
        module: nn.Module = loss
        if self.world > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            module = DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)
        self.fitting = Fitting(network, module, fit, fused=training.speed.fused)
        self.lr = fit.lr

    def steps_from(self, first: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(first, self.course.steps_of(self.epoch)):
            yield self._step()

    def _step(self) -> dict[str, Tensor]:
        fitting, training = self.fitting, self.training
        self.lr = fitting.optimizer.param_groups[0]["lr"]
        if training.random_layers:
            distributed.seed_step(training.seed, self.steps_done)
        whole = fitting.draw(training.x, training.y, self.generator, training.augment)
        mine = whole.part(slice(self.rank, None, self.world))
        fitting.network.train()
        fitting.optimizer.zero_grad(set_to_none=True)
        losses: Tensor = fitting.loss(mine)
        # DistributedDataParallel takes the mean over the processes.
        (losses.mean() if self.world == 1 else losses.sum() * (self.world / (2 * len(whole.x)))).backward()
        fitting.update()
        count = torch.ones_like(losses[0]) * len(mine.x)
        return {"loss": losses.detach().mean() * count, "samples": count}

    def weights(self) -> list[Tensor]:
        return list(self.fitting.network.parameters())

    def epoch_metrics(self) -> dict[str, float]:
        return {"lr": self.lr, "weight_norm": float(torch.nn.utils.get_total_norm(self.weights()))}

    def validate(self) -> dict[str, float]:
        """The loss of the averaged network on held-out points, at each noise level with the same noise every time."""
        training = self.training
        few = spread(HELD_OUT, len(training.x_held_out)).to(self.device)
        x, y = training.x_held_out[few], training.y_held_out[few]
        own = set() if training.sigma is None else {training.sigma}
        sigmas = tuple(sorted({*levels(training.width), *own}))
        errors = losses_by_level(self.fitting.averaged(), x, y, sigmas, seed=training.seed) if len(x) else {}
        return {f"val_loss_{sigma:g}": value for sigma, value in errors.items()}

    def is_best(self, entry: dict[str, float]) -> bool:
        """By the held-out loss at the noise level at which the network will be read."""
        loss = None if self.training.sigma is None else entry.get(f"val_loss_{self.training.sigma:g}")
        if loss is None or not loss < self.best.get("loss", math.inf):
            return False
        self.best = {"loss": loss, "epoch": self.epoch}
        return True

    def state(self) -> dict[str, Any]:
        return {"fitting": self.fitting.state_dict(), "generator": self.generator.get_state(), "lr": self.lr}

    def load_state(self, saved: dict[str, Any]) -> None:
        self.fitting.load_state_dict(saved["fitting"])
        self.generator.set_state(saved["generator"].cpu())
        self.lr = saved["lr"]

    def description(self) -> dict[str, Any]:
        return {
            "settings": self.training.about,
            "network": self.fitting.averaged().state_dict(),
            "seed": self.training.seed,
            "data": self.record,
        }

    @functools.cached_property
    def record(self) -> dict[str, Any] | None:
        """What a checkpoint remembers of the data; made once, as it waits for the device."""
        return None if self.training.data is None else self.training.data.record()

    def check_saved(self, saved: dict[str, Any], path: Path) -> None:
        """Settings, seed and data have to be the same; checkpoints from before they held the last two do not say."""
        now = {**self.training.about, "seed": self.training.seed}
        known = {**saved["settings"], "seed": saved.get("seed", self.training.seed)}
        before = tables.plain(PosteriorSettings())  # what a setting is that there was not when it was saved
        names = sorted({*now, *known})
        changed = [name for name in names if known.get(name, before.get(name)) != now.get(name, before.get(name))]
        if changed:
            told = ", ".join(f"{name} {known.get(name)!r}, now {now.get(name)!r}" for name in changed)
            raise InputError(f"{path}: is of another training ({told}), allowed: another folder, or those settings")
        if self.training.data is not None:
            check_record(saved.get("data"), self.training.data, path, exact=True)


def train(trainer: ScoreTrainer) -> None:
    """Train to the last step, from the checkpoint in the trainer's folder where there is one, and take the weights."""
    trainer.out.mkdir(parents=True, exist_ok=True)
    if (trainer.out / "checkpoint.pt").exists():
        trainer.resume()
        if trainer.steps_done != trainer.fitting.steps:
            raise InputError(f"{trainer.out}: was trained by another version, which saved at other steps; train anew")
    trainer.fit()
    trainer.fitting.finish()
    if trainer.best:
        distributed.barrier()  # the first process has written it
        best = checkpoint.load(trainer.out / "best.pt", trainer.device)
        trainer.fitting.network.load_state_dict(best["network"])
