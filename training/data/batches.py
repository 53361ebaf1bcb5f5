"""What each step of an epoch is trained on: a shuffled order, augmented, generated images mixed in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Generator, Tensor
from torch.nn import functional

from training.data import Data
from training.data.augmentation import augmented, cut_and_mixed
from training.data.generated import GeneratedImages, GeneratedStream
from training.data.smoothing import smoothed
from training.settings.config import RunSettings
from training.settings.errors import InputError

ORIGINAL_SHARE = 0.3  # of a batch with generated images


def originals_of_batch(settings: RunSettings) -> int:
    """How many original images a batch has."""
    share = (settings.original_share or ORIGINAL_SHARE) if settings.generated else 1.0
    return round(share * settings.batch_size)


def steps_of_epoch(settings: RunSettings, images: int) -> int:
    """The batches of an epoch over so many original images, of which none is seen twice.

    Raises:
        InputError: a batch with generated images has no original one, only such, or more than there are.
    """
    possible = one_pass = math.ceil(images / settings.batch_size)
    if settings.generated:
        originals = originals_of_batch(settings)
        if not 0 < originals < settings.batch_size or originals > images:
            share = settings.original_share or ORIGINAL_SHARE
            raise InputError(
                f"original_share: {share:g} of a batch of {settings.batch_size} is {originals} originals a step, "
                f"allowed: at least 1, fewer than a batch, up to the {images} there are"
            )
        possible = images // originals
    return min(settings.steps_per_epoch or one_pass, possible)


def fewer_steps(settings: RunSettings, steps: int) -> str:
    """The line that says that an epoch has fewer steps than asked for; empty where it has as many."""
    if settings.steps_per_epoch in (None, steps):
        return ""
    return f"steps_per_epoch: {settings.steps_per_epoch} is more than the training images fill, an epoch has {steps}"


class Batches:
    """The whole batches of a run; under torchrun every process makes the same ones and takes its share of them.

    With generated images the share ``original_share`` of a batch is original. An epoch has as many steps as without, as
    in the published pipeline, so it sees only that share of the original images.

    Args:
        settings: of the run.
        data: its training images on the device of the run.
        targets: int64 [N] labels, or probabilities [N, L].
        order: decides the order of the samples; its state at the start of an epoch decides that epoch.
        augmentation: randomness of shifts, mirrored and mixed images, on the device of the data.
    """

    def __init__(
        self, settings: RunSettings, data: Data, targets: Tensor, order: Generator, augmentation: Generator
    ) -> None:
        self.settings = settings
        self.x, self.targets = data.x_train, targets
        self.num_classes = data.num_classes
        self.border = data.lower if math.isfinite(data.lower) else 0.0  # black
        self.order, self.augmentation = order, augmentation
        self.format = torch.channels_last if settings.channels_last and self.x.dim() == 4 else torch.contiguous_format
        self.originals, self.steps = originals_of_batch(settings), steps_of_epoch(settings, len(self.x))
        self.stream: Prefetched | None = None
        if settings.generated:
            images = GeneratedImages(settings.generated, num_classes=data.num_classes, shape=data.input_shape)
            self.stream = Prefetched(GeneratedStream(images, settings.seed), self.x.device)

    def epoch(self, first: int = 0) -> Iterator[Tensor]:
        """The indices of the original samples of each step, from step ``first``; draws the order of the epoch."""
        order = torch.randperm(len(self.x), generator=self.order).to(self.x.device)
        for step in range(first, self.steps):
            yield order[step * self.originals : (step + 1) * self.originals]

    def batch(self, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Augmented images [n, …] and their targets, for the step number ``step`` of the whole run.

        Targets are labels int64 [n], or probabilities [n, L] where labels are smoothed, mixed or known as such.
        """
        x, targets = self.x[index], self.targets[index]
        if self.stream is not None:
            count = self.settings.batch_size - self.originals
            images, labels = self.stream.draw(step * count, count)
            x = torch.cat([x, images.permute(0, 3, 1, 2).to(x.dtype) / 255])
            targets = torch.cat([targets, labels])
        if self.settings.label_smoothing:
            settings = self.settings
            targets = smoothed(targets, self.num_classes, settings.label_smoothing, settings.label_smoothing_over)
        x = augmented(x, self.augmentation, shift=self.settings.shift, flip=self.settings.flip, border=self.border)
        if self.settings.cutmix:
            if targets.dim() == 1:
                targets = functional.one_hot(targets, self.num_classes).float()
            x, targets = cut_and_mixed(x, targets, self.settings.cutmix, self.augmentation)
        return x.contiguous(memory_format=self.format), targets


class Prefetched:
    """Generated images on the device of a run: while a step computes, those of the next one are read and sent.

    Args:
        stream: where they come from.
        device: where they go.
    """

    def __init__(self, stream: GeneratedStream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generated images")
        self._next: tuple[tuple[int, int], Future[tuple[Tensor, Tensor]]] | None = None

    def draw(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [count, H, W, C] and labels int64 [count] at these positions of the stream, on the device."""
        wanted, following = (position, count), (position + count, count)
        pending, self._next = self._next, None
        host = pending[1].result() if pending and pending[0] == wanted else self._read(*wanted)
        self._next = following, self._thread.submit(self._read, *following)
        images, labels = (values.to(self.device, non_blocking=True) for values in host)
        return images, labels

    def _read(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        images, labels = (sendable(values, self.device) for values in self.stream.draw(position, count))
        return images, labels


def sendable(values: Tensor, device: torch.device) -> Tensor:
    """``values`` in memory from which a copy to ``device`` need not be waited for."""
    return values.pin_memory() if device.type == "cuda" else values
