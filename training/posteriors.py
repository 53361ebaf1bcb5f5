"""Data posteriors for the programs: settings, training on the way, rebuilding from a saved state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from scorematch import audit as scorematch_audit
from scorematch.matching import Fit, fit_classifier, fit_denoiser
from scorematch.networks import ConvBackbone, Denoiser, MLPBackbone, UNetBackbone
from scorematch.posteriors import KernelDensity, NoiseConditionalClassifier, Posterior, ScoreNetwork
from scorematch.posteriors.base import PointwisePosterior
from scorematch.threat_model import ThreatModel
from training import toy

POSTERIORS = ("score_network", "kernel_density", "noise_conditional_classifier", "oracle")


class DataLike(Protocol):
    """The part of :class:`training.data.Data` that a posterior is estimated from."""

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def x_train(self) -> Tensor: ...
    @property
    def y_train(self) -> Tensor: ...


@dataclass(frozen=True)
class PosteriorSettings:
    """How p_d(y|x') is estimated. None takes the value that was tuned for the data set on validation data."""

    name: tyro.conf.Suppress[str] = "score_network"  # what --posterior says
    sigma: float | None = None  # noise level of p_σ, a standard deviation in input units
    # score_network: what says log p(y|x) at the clean point
    anchor: Literal["label", "classifier", "kernel_density"] | None = None
    smoothing: float | None = None  # score_network: probability that a label anchor spreads over the other classes
    centering: Literal["posterior", "network"] = "posterior"  # score_network: how the unconditional score is removed
    nodes: int = 1  # score_network: trapezoid segments of the path integral in each step
    network: Literal["mlp", "conv", "unet"] | None = None  # backbone of the score network and of the classifier
    width: int | None = None  # hidden features or channels of that backbone
    depth: int | None = None  # residual blocks of that backbone (mlp and conv)
    steps: int | None = None  # optimiser steps of its training
    batch_size: int | None = None  # clean samples a step of its training
    lr: float | None = None  # peak learning rate of its training
    sigma_min: float | None = None  # smallest noise level of its training, in input units
    sigma_max: float | None = None  # largest noise level of its training, in input units
    likelihood_weight: float = 0.0  # classifier: weight of denoising likelihood score matching; 0 turns it off
    max_points: int | None = None  # kernel_density: training points kept (a random subset); None keeps all

    def __post_init__(self) -> None:
        if self.name not in POSTERIORS:
            raise ValueError(f"posterior: unknown name {self.name!r}, allowed: {', '.join(POSTERIORS)}")
        for field in ("sigma", "lr", "sigma_min", "sigma_max"):
            value = getattr(self, field)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{field}: {value!r} is out of range, allowed: a finite number above 0")
        for field in ("nodes", "width", "depth", "steps", "batch_size", "max_points"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {value!r} is out of range, allowed: at least 1")
        if self.smoothing is not None and not 0.0 < self.smoothing < 1.0:
            raise ValueError(f"smoothing: {self.smoothing!r} is out of range, allowed: between 0 and 1, exclusive")
        if not 0.0 <= self.likelihood_weight < float("inf"):
            raise ValueError(f"likelihood_weight: {self.likelihood_weight!r} is out of range, allowed: at least 0")

    def resolved(self, data_name: str) -> PosteriorSettings:
        """The same with every None that the data set has a tuned value for replaced by that value."""
        tuned = {**COMMON, **TUNED.get(data_name, {}).get("any", {}), **TUNED.get(data_name, {}).get(self.name, {})}
        missing = {field: value for field, value in tuned.items() if getattr(self, field) is None}
        return dataclasses.replace(self, **missing)


COMMON: dict[str, Any] = {
    "sigma": 0.3,
    "anchor": "label",
    "smoothing": 0.1,
    "network": "unet",
    "width": 64,
    "depth": 4,
    "steps": 20_000,
    "batch_size": 128,
    "lr": 1e-3,
    "sigma_min": 0.05,
    "sigma_max": 1.0,
}

# Not tuned. A range of noise wide enough for sampling, so that one network serves the posterior and training.generate.
CIFAR: dict[str, dict[str, Any]] = {
    "any": {"sigma": 0.1, "width": 64, "steps": 50_000, "lr": 5e-4, "sigma_min": 0.01, "sigma_max": 10.0},
    "score_network": {"anchor": "classifier"},
}

# Tuned on validation data, but for CIFAR and SVHN; docs/results.md says how.
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "svhn": CIFAR,
    "digits": {
        "any": {"network": "mlp", "width": 256, "depth": 3, "steps": 2000, "batch_size": 64, "lr": 2e-3},
        "score_network": {"sigma": 0.4, "anchor": "kernel_density"},
        "kernel_density": {"sigma": 0.4},
        "noise_conditional_classifier": {"sigma": 0.2},
    },
    "toy": {
        "any": {
            "sigma": 0.15,
            "anchor": "classifier",
            "network": "mlp",
            "width": 64,
            "depth": 2,
            "steps": 2000,
            "batch_size": 1024,
            "lr": 1e-2,
            "sigma_min": 0.08,
            "sigma_max": 1.0,
        },
        "kernel_density": {"max_points": 2000},
    },
}


def build(
    settings: PosteriorSettings,
    data: DataLike,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    progress: bool = True,
    state: dict[str, Tensor] | None = None,
) -> Posterior:
    """A data posterior estimated from the training set.

    Args:
        settings: which one, and its hyper-parameters.
        data: the data set; only its training part is read.
        seed: decides initialisation, batches and noise.
        device: where the posterior lives and is trained.
        progress: show a progress bar on stderr.
        state: ``state_dict()`` of a posterior that was built with the same settings: nothing is trained then.

    Raises:
        ValueError: the settings do not fit the data.
    """
    settings = settings.resolved(data.name)
    x, y = data.x_train.to(device), data.y_train.to(device)
    builder = _Builder(settings, x, y, data.num_classes, seed, progress, train=state is None)
    if settings.name == "oracle":
        if data.name != "toy":
            raise ValueError(f"posterior: 'oracle' on {data.name}, allowed: p_d(y|x) is known on the toy only")
        posterior: Posterior = toy.oracle()
    else:
        posterior = getattr(builder, settings.name)()
    posterior = posterior.to(device)
    if state is not None:
        posterior.load_state_dict(state)
    return posterior


def audit(
    posterior: Posterior, x: Tensor, y: Tensor, threat_model: ThreatModel, *, steps: int, seed: int
) -> dict[str, float]:
    """Accuracy of the posterior itself, clean and under its own adaptive attack, per cent."""
    generator = torch.Generator(x.device).manual_seed(seed)
    clean, robust = scorematch_audit.robust_accuracy(posterior, x, y, threat_model, steps=steps, generator=generator)
    return {"posterior_clean_acc": 100.0 * clean, "posterior_robust_acc": 100.0 * robust}


class _ScaledClassifier(nn.Module):
    """A backbone as a noise-conditional classifier: inputs at unit scale, σ as ln(σ)/4 (Karras et al., 2022)."""

    center: Tensor

    def __init__(self, backbone: nn.Module, center: Tensor, sigma_data: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.sigma_data = sigma_data
        self.register_buffer("center", center)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        scale = (sigma.square() + self.sigma_data**2).rsqrt().reshape(-1, *[1] * (x.dim() - 1))
        logits: Tensor = self.backbone((x - self.center) * scale, sigma.log() / 4)
        return logits


class _Builder:
    """Builds and trains the networks of one data set; a method for each posterior, called by its name."""

    def __init__(
        self,
        settings: PosteriorSettings,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        seed: int,
        progress: bool,
        *,
        train: bool,
    ) -> None:
        self.settings, self.x, self.y = settings, x, y
        self.num_classes, self.seed, self.progress, self.train = num_classes, seed, progress, train
        self.shape = tuple(x.shape[1:])
        self.center = x.mean(0) if x.dim() == 2 else x.mean()
        self.sigma_data = float((x - self.center).square().mean().sqrt())

    @property
    def fit(self) -> Fit:
        values = {field.name: getattr(self.settings, field.name, None) for field in dataclasses.fields(Fit)}
        return Fit(**{name: value for name, value in values.items() if value is not None})

    @property
    def sigma(self) -> float:
        assert self.settings.sigma is not None
        return self.settings.sigma

    def kernel_density(self) -> KernelDensity:
        keep = self.settings.max_points
        if keep is None or keep >= len(self.x):
            return KernelDensity(self.x, self.y, num_classes=self.num_classes, sigma=self.sigma)
        generator = torch.Generator().manual_seed(self.seed)
        index = torch.randperm(len(self.x), generator=generator)[:keep].to(self.x.device)
        return KernelDensity(self.x[index], self.y[index], num_classes=self.num_classes, sigma=self.sigma)

    def score_network(self) -> ScoreNetwork:
        s = self.settings
        denoiser = self.denoiser()
        anchor: PointwisePosterior | None = None
        if s.anchor == "classifier":
            anchor = self.noise_conditional_classifier()
        elif s.anchor == "kernel_density":
            anchor = self.kernel_density()
        return ScoreNetwork(
            denoiser,
            sigma=self.sigma,
            anchor=anchor,
            smoothing=s.smoothing or 0.1,
            centering=s.centering,
            nodes=s.nodes,
        )

    def noise_conditional_classifier(self) -> NoiseConditionalClassifier:
        self._seed(1)
        network = _ScaledClassifier(self._backbone(self.num_classes, pooled=True), self.center, self.sigma_data)
        network = network.to(self.x.device)
        if self.train:
            denoiser = self.denoiser() if self.settings.likelihood_weight else None
            with self._bar("noise-conditional classifier") as step:
                fit_classifier(
                    network, self.x, self.y, self.fit, generator=self._generator(1), denoiser=denoiser, progress=step
                )
        return NoiseConditionalClassifier(network, num_classes=self.num_classes, sigma=self.sigma)

    def denoiser(self) -> Denoiser:
        """The score network of the data set."""
        self._seed(0)
        channels = self.x.shape[1]
        backbone = self._backbone((self.num_classes + 1) * channels, pooled=False)
        denoiser = Denoiser(backbone, num_classes=self.num_classes, sigma_data=self.sigma_data, center=self.center).to(
            self.x.device
        )
        if self.train:
            with self._bar("score network") as step:
                fit_denoiser(denoiser, self.x, self.y, self.fit, generator=self._generator(0), progress=step)
        return denoiser

    def _backbone(self, outputs: int, *, pooled: bool) -> nn.Module:
        kind, width, depth = self.settings.network, self.settings.width, self.settings.depth
        assert width is not None
        assert depth is not None
        if kind == "mlp":
            features = 1 if pooled else self.x[0].numel() // self.x.shape[1]
            return MLPBackbone(self.shape, outputs * features, width=width, depth=depth)
        if len(self.shape) != 3:
            raise ValueError(f"network: {kind!r} takes images [C, H, W], the data is {list(self.shape)}; allowed: mlp")
        if kind == "conv":
            return ConvBackbone(self.shape[0], outputs, width=width, depth=depth, pooled=pooled)
        return UNetBackbone(self.shape[0], outputs, width=width, pooled=pooled)

    def _seed(self, purpose: int) -> None:
        torch.manual_seed(1_000_003 * purpose + self.seed)

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator(self.x.device).manual_seed(1_000_003 * purpose + self.seed)

    def _bar(self, name: str) -> _Bar:
        return _Bar(name, self.fit.steps, self.progress)


class _Bar:
    """A progress bar over the steps of a training, as the callback that it asks for."""

    def __init__(self, name: str, steps: int, shown: bool) -> None:
        self.bar = tqdm(total=steps, desc=name, unit="step", disable=not shown, mininterval=1.0)

    def __enter__(self) -> Callable[[int, float], None]:
        return self._update

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def _update(self, step: int, loss: float) -> None:
        self.bar.update()
        if step % 50 == 0:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
