"""Optimiser, learning-rate schedule, averaged weights and the momentum of batch norm, all from torch."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import lr_scheduler

from scorematch.averaging import WeightAverage
from training.settings.config import RunSettings
from training.settings.errors import InputError

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(settings: RunSettings, model: nn.Module) -> optim.Optimizer:
    groups = parameter_groups(settings, model)
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.fused:
        common["fused"] = True
    if settings.optimizer == "adam":
        return optim.Adam(groups, **common)
    nesterov = settings.nesterov and settings.momentum > 0
    return optim.SGD(groups, momentum=settings.momentum, nesterov=nesterov, **common)


def parameter_groups(settings: RunSettings, model: nn.Module) -> list[dict[str, Any]]:
    """All parameters as one group, or those of normalisation layers as a second one without weight decay."""
    if settings.weight_decay_norms:
        return [{"params": list(model.parameters())}]
    of_norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    others = [p for p in model.parameters() if id(p) not in of_norms]
    norms = [p for p in model.parameters() if id(p) in of_norms]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class EpochSchedule:
    """A schedule of torch that is advanced once a step, and moves on after the last step of each epoch."""

    def __init__(self, schedule: lr_scheduler.LRScheduler, steps_per_epoch: int) -> None:
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.steps_per_epoch == 0:
            self.schedule.step()

    def get_last_lr(self) -> list[float | Tensor]:
        return self.schedule.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.schedule.load_state_dict(state["schedule"])


Schedule = lr_scheduler.LRScheduler | EpochSchedule


def build_schedule(settings: RunSettings, optimizer: optim.Optimizer, steps_per_epoch: int) -> Schedule:
    """The learning rate as a function of the step; it is advanced once a step."""
    if settings.schedule_by == "epoch":
        return EpochSchedule(_schedule(settings, optimizer, 1), steps_per_epoch)
    return _schedule(settings, optimizer, steps_per_epoch)


def _schedule(settings: RunSettings, optimizer: optim.Optimizer, moves_per_epoch: int) -> lr_scheduler.LRScheduler:
    total = settings.epochs * moves_per_epoch
    if settings.schedule == "onecycle" and total > 2:  # in fewer moves it would never reach its rate
        # torch divides by zero where the rise would end at step 0: it lasts a step and a half at least.
        rise = max(settings.warmup, min(0.75, 1.5 / total))
        return lr_scheduler.OneCycleLR(
            optimizer, settings.lr, total_steps=total, pct_start=rise, cycle_momentum=settings.cycle_momentum
        )
    if settings.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, total)
    if settings.schedule == "multistep":
        moves = [epoch * moves_per_epoch for epoch in settings.milestones]
        return lr_scheduler.MultiStepLR(optimizer, moves, settings.lr_decay)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def averaging_decay(settings: RunSettings, step: int, total_steps: int) -> float:
    """The decay of the average in step ``step``, counted from 1; 0 means that the average follows the weights."""
    since = step - settings.averaging_warmup * total_steps
    if since < 0:
        return 0.0
    return min(settings.averaging, (1 + since) / (10 + since)) if settings.averaging_ramp else settings.averaging


def build_average(settings: RunSettings, model: nn.Module, total_steps: int) -> WeightAverage | None:
    """The average of a run, or None where ``averaging`` is 0.

    ``total_steps``, of the whole run, is what ``averaging_warmup`` is a share of.
    """
    if not settings.averaging:
        return None
    decay = functools.partial(averaging_decay, settings, total_steps=total_steps)
    return WeightAverage(model, decay, settings.averaging_buffers == "average")


def batchnorm_momentum(settings: RunSettings, step: int) -> float | None:
    """The weight of a new batch in running statistics in step ``step`` of the run, from 0; None is the model's own."""
    return 1.0 if settings.batchnorm_first and step == 0 else settings.batchnorm_momentum


def set_batchnorm_momentum(model: nn.Module, value: float) -> None:
    """Set that weight in every batch norm of the model, which must have one."""
    layers = list(_batch_norms(model))
    if not layers:
        raise InputError(f"batchnorm_momentum: {value} for a model without batch norm, allowed: None")
    for layer in layers:
        layer.momentum = value


def _batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))
