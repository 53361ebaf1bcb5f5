"""Optimiser, learning-rate schedule and averaged weights, all from torch."""

from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.config import RunSettings


def build_optimizer(settings: RunSettings, model: nn.Module) -> optim.Optimizer:
    if settings.optimizer == "adam":
        return optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def build_schedule(settings: RunSettings, optimizer: optim.Optimizer, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
    """The learning rate as a function of the step; it is advanced once a step."""
    total = settings.epochs * steps_per_epoch
    if settings.schedule == "onecycle":
        # torch divides by zero where the rise would end at step 0: it lasts a step and a half at least.
        rise = max(settings.warmup, min(0.75, 1.5 / total))
        return lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=total, pct_start=rise, cycle_momentum=False)
    if settings.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, total)
    if settings.schedule == "multistep":
        steps = [epoch * steps_per_epoch for epoch in settings.milestones]
        return lr_scheduler.MultiStepLR(optimizer, steps, settings.lr_decay)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def build_average(settings: RunSettings, model: nn.Module) -> AveragedModel | None:
    """The exponential average of weights and buffers, or None where ``averaging`` is 0."""
    if not settings.averaging:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.averaging), use_buffers=True)
