"""How score networks and noise-conditional classifiers are trained, step by step.

:func:`fit_denoiser` and :func:`fit_classifier` are whole trainings. A program that also has to save states, to use
several processes or to measure takes the same steps itself, with a :class:`Fitting`::

    fitting = Fitting(denoiser, DenoisingLoss(denoiser), fit)
    for _ in range(fit.steps):
        fitting.step(fitting.draw(x, y, generator))
    fitting.finish()
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..averaging import WeightAverage
from ..inputs import check_count, check_finite, check_instance, check_labels, check_length, check_share, output_at
from ..modes import outside_inference_mode
from ..networks.denoiser import Denoiser
from ..noise import normal_like
from ..ops._checks import check_number
from .held_out import BestWeights, HeldOut
from .losses import broadcast, check_logits, denoising, denoising_likelihood, distillation, joint_energy

# Of a clean batch [N, …]: the augmented batch, and [N, K] what was done to it, or None where the network isn't told.
Augment = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor | None]]
Progress = Callable[[int, Tensor], None]  # after each step: steps done (from 1), loss of that step on the device


@dataclass(frozen=True)
class Fit:
    """How a score network or a noisy classifier is trained.

    Attributes:
        steps: optimiser steps, ≥ 1.
        batch_size: clean samples a step, ≥ 1; each is used with ω and with −ω, which removes the part of the noise
            in the gradient that is odd in ω.
        lr: peak learning rate of Adam, > 0.
        warm_up: share of the steps in which the learning rate rises to it, in [0, 1).
        schedule: ``"cosine"`` lets the learning rate fall to zero from the first step on, ``"constant"`` keeps it.
        noise: how noise levels are drawn. ``"log_uniform"``: ln σ uniform from ln sigma_min to ln sigma_max.
            ``"log_normal"``: ln σ normal (Karras et al., 2022, Table 1).
        sigma_min, sigma_max: range of noise levels, standard deviations in input units, > 0; only log_uniform draws
            from it.
        noise_mean, noise_deviation: mean and standard deviation of ln σ for log_normal, σ in input units. Published
            settings are for images in [−1, 1]; in [0, 1] the mean is lower by ln 2: −1.2 becomes −1.89.
        averaging: decay of the exponential moving average of the weights, in [0, 1); 0 turns it off. It begins after a
            quarter of the steps.
        half_life: the number of clean samples after which the share of a step in the average has halved, but at most
            5 % of the samples seen so far (Karras et al., 2022). It takes the place of ``averaging``; ≥ 0, and 0 leaves
            ``averaging`` as it is.
        weight_decay: of AdamW, ≥ 0.
        likelihood_weight: weight of denoising likelihood score matching beside cross-entropy (classifiers only), ≥ 0.

    Raises:
        TypeError, ValueError: a value is not what is said above; the message names it.
    """

    steps: int = 3000
    batch_size: int = 128
    lr: float = 1e-3
    warm_up: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    noise: Literal["log_uniform", "log_normal"] = "log_uniform"
    sigma_min: float = 0.05
    sigma_max: float = 1.0
    noise_mean: float = -1.2 - math.log(2)
    noise_deviation: float = 1.2
    averaging: float = 0.998
    half_life: float = 0.0
    weight_decay: float = 0.0
    likelihood_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("lr", "noise_deviation", "sigma_min", "sigma_max"):
            check_length(name, getattr(self, name))
        for name in ("warm_up", "averaging"):
            check_share(name, getattr(self, name))
        for name, allowed in (("schedule", ("cosine", "constant")), ("noise", ("log_uniform", "log_normal"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.sigma_min <= self.sigma_max:
            raise ValueError(f"0 < sigma_min ≤ sigma_max is needed, got {self.sigma_min} and {self.sigma_max}")
        check_number("noise_mean", self.noise_mean)
        if not math.isfinite(self.noise_mean):
            raise ValueError(f"noise_mean must be finite, got {self.noise_mean}")
        for name in ("weight_decay", "likelihood_weight"):
            check_length(name, getattr(self, name), zero=True)
        check_number("half_life", self.half_life)
        if not self.half_life >= 0.0:
            raise ValueError(f"half_life must not be negative, got {self.half_life}")

    def noise_levels(self, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """``count`` noise levels [count], of the dtype and on the device of ``like``."""
        if self.noise == "log_normal":
            normal = torch.empty(count, dtype=like.dtype, device=like.device).normal_(generator=generator)
            return (self.noise_mean + self.noise_deviation * normal).exp()
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        uniform = torch.rand(count, generator=generator, dtype=like.dtype, device=like.device)
        return (low + (high - low) * uniform).exp()

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step, from 0, as a share of the peak."""
        rise = min(1.0, (step + 1) / max(1, round(self.warm_up * self.steps)))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        return min(rise, fall)

    def decay(self, update: int) -> float:
        """The decay of the average in its update number ``update``, from 1."""
        if not self.half_life:
            return self.averaging
        half_life = min(self.half_life, 0.05 * update * self.batch_size)
        return 0.5 ** (self.batch_size / half_life)


class Batch(NamedTuple):
    """Clean samples and what is done to them; ``batch.part(slice)`` has some of them, for one of several processes."""

    x: Tensor  # [N, …]
    y: Tensor  # [N]
    sigma: Tensor  # [N]
    noise: Tensor  # [N, …]
    conditions: Tensor | None  # [N, K]

    def part(self, which: slice) -> Batch:
        return Batch(*(None if values is None else values[which] for values in self))  # type: ignore[arg-type]


class MatchingLoss(nn.Module, ABC):
    """A loss of a :class:`Batch` as a module: maps it to [2N], each sample with ω and with −ω."""

    def forward(self, batch: Batch) -> Tensor:
        twice = Batch(*(None if values is None else torch.cat([values, values]) for values in batch))  # type: ignore[arg-type]
        return self.loss(twice._replace(noise=torch.cat([batch.noise, -batch.noise])))

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss [N] of each sample."""


class DenoisingLoss(MatchingLoss):
    """:func:`scorematch.matching.denoising`."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        check_instance("denoiser", denoiser, Denoiser)
        self.denoiser = denoiser

    def loss(self, batch: Batch) -> Tensor:
        return denoising(self.denoiser, *batch)


class DistillationLoss(MatchingLoss):
    """:func:`scorematch.matching.distillation`; the teacher is fixed, and is not part of this module's state."""

    def __init__(self, denoiser: Denoiser, teacher: Denoiser) -> None:
        super().__init__()
        check_instance("denoiser", denoiser, Denoiser)
        check_instance("teacher", teacher, Denoiser)
        self.denoiser = denoiser
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple it is no submodule

    def loss(self, batch: Batch) -> Tensor:
        return distillation(self.denoiser, *self._teacher, batch.x, batch.sigma, batch.noise, batch.conditions)


class JointEnergy(NamedTuple):
    """How the gradients of a joint energy are matched beside its cross-entropy."""

    weight: float  # of the matching loss, > 0
    center: Tensor | float  # mean of the data
    sigma_data: float  # its standard deviation about the mean


class ClassificationLoss(MatchingLoss):
    """Cross-entropy on x + σω, if wanted with a second loss on the gradients of the network.

    Args:
        network: maps (x [N, …], sigma [N]) to logits [N, L]; where a batch says how x was augmented, it takes
            conditions [N, K] as well, and so does the backbone of ``denoiser``.
        weight: weight of :func:`scorematch.matching.denoising_likelihood`, ≥ 0.
        denoiser: supplies the unconditional score of that loss, fixed; needed where ``weight`` > 0.
        energy: the network is a joint energy, see :func:`scorematch.matching.joint_energy`.

    Raises:
        TypeError, ValueError: a weight without a denoiser, both losses on the gradients at once, or an argument that is
            not what is said above.
    """

    def __init__(
        self,
        network: nn.Module,
        weight: float = 0.0,
        denoiser: Denoiser | None = None,
        energy: JointEnergy | None = None,
    ) -> None:
        super().__init__()
        check_instance("network", network, nn.Module)
        check_length("weight", weight, zero=True)
        if denoiser is not None:
            check_instance("denoiser", denoiser, Denoiser)
        if energy is not None:
            check_instance("energy", energy, JointEnergy)
            check_length("energy.weight", energy.weight)
        if weight > 0.0 and energy is not None:
            raise ValueError(f"weight is {weight} and energy is given, allowed: one of them")
        if weight > 0.0 and denoiser is None:
            raise ValueError(
                f"denoiser must be given where the likelihood weight is above 0, got None with weight {weight}: it "
                "supplies the unconditional score"
            )
        self.network = network
        self.weight = weight
        self.energy = energy
        self._denoiser = (None if denoiser is None else denoiser.eval(),)  # in a tuple it is no submodule
        self._check_all: Callable[[int], None] | None = None

    def expect(self, x: Tensor, y: Tensor) -> None:
        """Check all labels y [M] of a training on x [M, …] as soon as a first batch says how many classes there are."""
        self._check_all = partial(check_labels, x, y)

    def loss(self, batch: Batch) -> Tensor:
        noisy = batch.x + broadcast(batch.sigma, batch.x) * batch.noise
        if self.energy is not None:
            matching, logits = joint_energy(
                self.network,
                noisy,
                batch.y,
                batch.sigma,
                batch.noise,
                center=self.energy.center,
                sigma_data=self.energy.sigma_data,
                conditions=batch.conditions,
            )
            return self._cross_entropy(logits, batch.y) + self.energy.weight * matching
        (denoiser,) = self._denoiser
        if denoiser is None or self.weight == 0.0:
            logits = output_at(self.network, noisy, batch.sigma, batch.conditions)
            check_logits(logits, batch.y, noisy)
            return self._cross_entropy(logits, batch.y)
        with torch.no_grad():
            unconditional = self._unconditional(denoiser, noisy, batch)
        matching, logits = denoising_likelihood(self.network, unconditional, noisy, *batch[1:])
        return self._cross_entropy(logits, batch.y) + self.weight * matching

    @staticmethod
    def _unconditional(denoiser: Denoiser, noisy: Tensor, batch: Batch) -> Tensor:
        if batch.conditions is None:
            return denoiser.score(noisy, batch.sigma)
        denoised = denoiser.denoise_pair(noisy, batch.sigma, batch.y, batch.conditions)[:, 1]
        return (denoised - noisy) / broadcast(batch.sigma, noisy).square()

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        if self._check_all is not None:
            self._check_all(logits.shape[1])
            self._check_all = None
        return cross_entropy(logits, y, reduction="none")


class Fitting:
    """A training under way: the network with its optimiser, learning rate and averaged weights.

    Args:
        network: the network, which is trained in place.
        loss: maps a :class:`Batch` to losses: a :class:`MatchingLoss` that calls the network, or a wrapper of one.
        fit: how to train.
        fused: whether the optimiser runs as one kernel.

    Raises:
        TypeError: an argument is not what is said above; the message names it.
        ValueError: the network has no parameter to train.
    """

    def __init__(self, network: nn.Module, loss: nn.Module, fit: Fit, *, fused: bool = False) -> None:
        check_instance("network", network, nn.Module)
        check_instance("loss", loss, nn.Module)
        check_instance("fit", fit, Fit)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(
                "network has no parameter that requires a gradient (a posterior keeps its network fixed; pass a copy: "
                "copy.deepcopy(network).requires_grad_())"
            )
        self.network, self.loss, self.fit = network, loss, fit
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=fit.lr, weight_decay=fit.weight_decay, fused=True if fused else None
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, fit.lr_factor)
        self.average: WeightAverage | None = None
        if fit.half_life or fit.averaging:
            self.average = WeightAverage(network, fit.decay)
        self.steps = 0  # taken

    def draw(self, x: Tensor, y: Tensor, generator: torch.Generator, augment: Augment | None = None) -> Batch:
        """Draw a batch from training inputs x [M, …] and labels y [M]; all of its randomness is the generator's."""
        index = torch.randint(len(x), (self.fit.batch_size,), generator=generator, device=x.device)
        batch, labels, conditions = x[index], y[index], None
        if augment is not None:
            batch, conditions = augment(batch, generator)
        sigma = self.fit.noise_levels(len(batch), generator, x)
        noise = normal_like(batch, generator)
        return Batch(batch, labels, sigma, noise, conditions)

    def step(self, batch: Batch) -> Tensor:
        """Take a step on a whole batch; return its mean loss, a scalar on the device of the network."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(batch).mean()
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Update the weights, the learning rate and the average, after a backward pass."""
        self.optimizer.step()
        torch.clear_autocast_cache()  # or autocast around the whole training would go on with the weights before it
        self.schedule.step()
        self.steps += 1
        # A constant decay begins when the learning rate falls, so that the average forgets the first weights.
        if self.average is not None and (self.fit.half_life or self.steps >= self.fit.steps // 4):
            self.average.update_parameters(self.network)

    def averaged(self) -> nn.Module:
        """The network with averaged weights; the network itself as long as there is no average."""
        if self.average is None or not int(self.average.n_averaged):
            return self.network
        return self.average.module

    def finish(self) -> None:
        """Give the network its averaged weights, and put it in eval mode."""
        averaged = self.averaged()
        if averaged is not self.network:
            self.network.load_state_dict(averaged.state_dict())
        self.network.eval()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps = state["steps"]


@outside_inference_mode
@torch.enable_grad()
def fit_denoiser(
    denoiser: Denoiser,
    x: Tensor,
    y: Tensor,
    fit: Fit,
    *,
    generator: torch.Generator,
    teacher: Denoiser | None = None,
    augment: Augment | None = None,
    held_out: HeldOut | None = None,
    progress: Progress | None = None,
) -> Denoiser:
    """Train a denoiser by :func:`scorematch.matching.denoising`, in place, and return it in eval mode.

    Args:
        denoiser: the network, with parameters that require gradients; gets the averaged weights of the last step, or of
            the best one by ``held_out``.
        x: [M, …] training inputs, on the device of the network.
        y: int64 [M] labels.
        fit: how to train.
        generator: all randomness of the training, on the device of x, but for dropout.
        teacher: train by :func:`scorematch.matching.distillation` from this denoiser instead.
        augment: applied to each clean batch, see :mod:`scorematch.augmentation`.
        held_out: data by which the best weights are picked; without it the last ones are taken.
        progress: called after each step with the steps done so far and the loss of the step, a scalar on the device;
            to read it waits for the device.

    Raises:
        TypeError, ValueError: an argument is not what is said above, a label is no class, the teacher has another
            number of classes, or no held-out loss was finite.
    """
    loss = DenoisingLoss(denoiser) if teacher is None else DistillationLoss(denoiser, teacher)
    classes = denoiser.num_classes if teacher is None else None  # a teacher stands in for the labels
    _run(Fitting(denoiser, loss, fit), x, y, generator, augment, held_out, progress, classes)
    return denoiser


@outside_inference_mode
@torch.enable_grad()
def fit_classifier(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    fit: Fit,
    *,
    generator: torch.Generator,
    denoiser: Denoiser | None = None,
    energy: JointEnergy | None = None,
    augment: Augment | None = None,
    held_out: HeldOut | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a noise-conditional classifier with cross-entropy on x + σω, in place; see :func:`fit_denoiser`.

    Args:
        network: maps (x [N, …], sigma [N]) to logits [N, L]; its parameters require gradients. With an ``augment`` that
            says what was done, it takes (x, sigma, conditions [N, K]) as well, and so does the backbone of
            ``denoiser``.
        denoiser: supplies the unconditional score of :func:`scorematch.matching.denoising_likelihood`; needed if
            ``fit.likelihood_weight`` > 0.
        energy: train the network as a joint energy, see :func:`scorematch.matching.joint_energy`.

    Raises:
        TypeError, ValueError: an argument is not what is said above, a label is no class (all of them are looked at
            before the first step), a likelihood weight is given without a denoiser or beside ``energy``, or no held-out
            loss was finite.
    """
    check_instance("fit", fit, Fit)
    loss = ClassificationLoss(network, fit.likelihood_weight, denoiser, energy)
    loss.expect(x, y)
    _run(Fitting(network, loss, fit), x, y, generator, augment, held_out, progress)
    return network


def _run(
    fitting: Fitting,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    augment: Augment | None,
    held_out: HeldOut | None,
    progress: Progress | None,
    num_classes: int | None = None,
) -> None:
    check_labels(x, y, num_classes)
    check_finite(x, "x")
    if len(x) == 0:
        raise ValueError(f"x must be [M, …] with at least one sample, got {list(x.shape)}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    for name, call in (("augment", augment), ("progress", progress)):
        if call is not None and not callable(call):
            raise TypeError(f"{name} must be a function, got {type(call).__name__}")
    steps = fitting.fit.steps
    best = None if held_out is None else BestWeights(held_out)
    interval = steps if held_out is None else held_out.interval or max(1, steps // 50)
    for step in range(1, steps + 1):
        loss = fitting.step(fitting.draw(x, y, generator, augment))
        if best is not None and (step % interval == 0 or step == steps):
            best.look(fitting.averaged(), step)
        if progress is not None:
            progress(step, loss)
        if best is not None and best.in_vain:
            break
    fitting.finish()
    if best is not None:
        best.restore(fitting.network)
