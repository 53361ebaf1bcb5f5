"""What a network has learned and what it has memorised: its loss on points that it was not trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..inputs import (
    check_count,
    check_finite,
    check_instance,
    check_labels,
    check_length,
    check_real,
    check_strided,
    output_at,
)
from ..model_state import as_found
from ..modes import outside_modes
from ..networks.denoiser import Denoiser
from ..noise import normal_like
from .losses import broadcast, check_logits, denoising


@dataclass(frozen=True)
class HeldOut:
    """Held-out data by which a training picks its weights.

    Attributes:
        x: [M, …] inputs that the network is not trained on, on its device.
        y: int64 [M] their labels.
        sigma: noise level at which the loss counts: that at which the network will be read; > 0.
        interval: steps between two looks; None takes a fiftieth of the training.
        patience: looks without a better loss after which the training stops; None goes on to the last step.
        repeats: noise vectors for each point, the same at every look; ≥ 1.
        seed: decides them.

    Raises:
        TypeError, ValueError: a value is not what is said above; the message names it.
    """

    x: Tensor
    y: Tensor
    sigma: float
    interval: int | None = None
    patience: int | None = None
    repeats: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check_data(self.x, self.y)
        check_length("sigma", self.sigma)
        for name in ("interval", "patience", "repeats"):
            value = getattr(self, name)
            if value is not None or name == "repeats":
                check_count(name, value)
        check_count("seed", self.seed, least=0)

    def loss(self, network: nn.Module) -> float:
        """The mean loss of a network at ``sigma``, see :func:`losses_by_level`."""
        (loss,) = losses_by_level(network, self.x, self.y, (self.sigma,), seed=self.seed, repeats=self.repeats).values()
        return loss


class BestWeights:
    """The weights with the lowest held-out loss so far, and the history of that loss.

    Args:
        held_out: by what weights are judged.

    Raises:
        TypeError: ``held_out`` is something else.

    Attributes:
        history: (step, loss) at every look.
        step: the step of the best weights; 0 before the first look.
        loss: the held-out loss of the best weights; infinite before the first look.
    """

    def __init__(self, held_out: HeldOut) -> None:
        check_instance("held_out", held_out, HeldOut)
        self.held_out = held_out
        self.history: list[tuple[int, float]] = []
        self.step = 0
        self.loss = float("inf")
        self._state: dict[str, Any] | None = None

    def look(self, network: nn.Module, step: int) -> None:
        """Judge the network as it is after ``step`` steps, and keep its weights if they are the best."""
        loss = self.held_out.loss(network)
        self.history.append((step, loss))
        if loss < self.loss:
            self.step, self.loss = step, loss
            self._state = copy.deepcopy(network.state_dict())

    @property
    def in_vain(self) -> bool:
        """Whether as many looks as the patience allows have brought nothing better."""
        looks = sum(step > self.step for step, _ in self.history)
        return self.held_out.patience is not None and looks >= self.held_out.patience

    def restore(self, network: nn.Module) -> None:
        """Give the network the best weights.

        Raises:
            ValueError: every loss was NaN or infinite.
        """
        if self._state is None:
            raise ValueError("no look at held-out data gave a finite loss; a smaller lr may help")
        network.load_state_dict(self._state)


@outside_modes
@torch.no_grad()
def fit_temperature(
    logits: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    noise: float = 0.0,
    repeats: int = 4,
    seed: int = 0,
    chunk: int = 250,
) -> float:
    """The temperature by which the logits of a classifier are best divided on held-out data.

    Minimises the cross-entropy at x + noise · ω (Guo et al., ICML 2017), which is convex in 1 / temperature; the answer
    lies between 0.05 and 20. It is computed outside of autocast.

    Args:
        logits: maps x [N, …] to logits [N, L]; log p(y|x) of a posterior will do.
        x: [M, …] held-out inputs.
        y: int64 [M] their labels.
        noise: standard deviation of the Gaussian noise at which it is fitted, in input units; ≥ 0.
        repeats: noise vectors for each point, ≥ 1.
        seed: decides them.
        chunk: points at a time, ≥ 1.

    Returns:
        The temperature.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or a logit is not finite.
    """
    if not callable(logits):
        raise TypeError(f"logits must map x [N, …] to logits [N, L], got {type(logits).__name__}")
    _check_data(x, y)
    check_length("noise", noise, zero=True)
    _check_counts(seed, repeats, chunk)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    omega = [normal_like(x, generator) for _ in range(repeats)]
    parts = [logits(part) for o in omega for part in (x + noise * o).split(chunk)]
    for part in parts:
        check_real(part, "what logits returns")
    values = torch.cat(parts).double()
    check_finite(values, "logits")
    check_logits(values[: len(x)], y, x)
    one_hot = torch.nn.functional.one_hot(y.repeat(repeats), values.shape[1])
    low, high = math.log(0.05), math.log(20.0)  # of 1 / temperature; the slope rises through zero
    for _ in range(50):
        middle = 0.5 * (low + high)
        slope = (values * ((values * math.exp(middle)).softmax(1) - one_hot)).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-0.5 * (low + high))


@torch.no_grad()
def losses_by_level(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    sigmas: tuple[float, ...],
    *,
    seed: int = 0,
    repeats: int = 1,
    chunk: int = 250,
) -> dict[float, float]:
    """The mean loss of a network at each noise level, in eval mode, with the same noise ω at each and in every call.

    The network is left as found, whatever the modes of its modules are.

    Of a :class:`scorematch.networks.Denoiser` the loss is :func:`scorematch.matching.denoising`; of any other network
    it is the cross-entropy at x + σω, in nats.

    Args:
        network: a denoiser, or a classifier of (x [N, …], sigma [N]).
        x: [M, …] inputs.
        y: int64 [M] labels.
        sigmas: the noise levels, standard deviations in input units.
        seed: of the noise.
        repeats: noise vectors for each point, ≥ 1.
        chunk: points at a time, ≥ 1.

    Returns:
        The mean loss for each noise level.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_instance("network", network, nn.Module)
    _check_data(x, y)
    if not isinstance(sigmas, Iterable):
        raise TypeError(f"sigmas must be a sequence of noise levels, got {type(sigmas).__name__}")
    sigmas = tuple(sigmas)
    for sigma in sigmas:
        check_length("each of sigmas", sigma)
    _check_counts(seed, repeats, chunk)
    means = {}
    with as_found(network):
        for sigma in sigmas:
            parts = []
            generator = torch.Generator(x.device).manual_seed(int(seed))
            for _ in range(repeats):
                noise = normal_like(x, generator)
                level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
                chunks = zip(*(tensor.split(chunk) for tensor in (x, y, level, noise)), strict=True)
                parts += [_loss(network, *part) for part in chunks]
            means[sigma] = torch.cat(parts).mean().item()
    return means


def _loss(network: nn.Module, x: Tensor, y: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    if isinstance(network, Denoiser):
        return denoising(network, x, y, sigma, noise)
    logits = output_at(network, x + broadcast(sigma, x) * noise, sigma)
    check_logits(logits, y, x)
    return cross_entropy(logits, y, reduction="none")


def _check_data(x: Tensor, y: Tensor) -> None:
    for name, t in (("x", x), ("y", y)):
        check_strided(t, name)
    counts = [t.shape[:1].numel() for t in (x, y)]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(f"x and y must have as many samples, at least one, got {counts[0]} and {counts[1]}")
    check_labels(x, y)
    check_finite(x, "x")


def _check_counts(seed: int, repeats: int, chunk: int) -> None:
    check_count("seed", seed, least=0)
    check_count("repeats", repeats)
    check_count("chunk", chunk)
