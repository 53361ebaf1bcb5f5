"""Data posteriors for the programs: built and trained, or rebuilt from a saved state."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scorematch import audit as scorematch_audit
from scorematch import augmentation
from scorematch.matching import (
    ClassificationLoss,
    DenoisingLoss,
    DistillationLoss,
    Fit,
    JointEnergy,
    MatchingLoss,
    fit_temperature,
    losses_by_level,
)
from scorematch.matching.fit import Augment
from scorematch.networks import ConvBackbone, Denoiser, EmbeddedDenoiser, MLPBackbone, UNetBackbone
from scorematch.networks.denoiser import ScaledModule
from scorematch.posteriors import Ensemble, KernelDensity, NoiseConditionalClassifier, Posterior, ScoreNetwork
from scorematch.posteriors.base import PointwisePosterior
from scorematch.threat_model import ThreatModel
from training.data import Data, DataSettings, Format, check_record
from training.engine import checkpoint, scores
from training.engine.forward import Forward
from training.engine.hardware import Speed
from training.settings import tables
from training.settings.errors import InputError
from training.settings.posterior import COMMON, READING, PosteriorSettings

FOLD_SEEDS = 7919  # between the seeds of two folds


class DataLike(Protocol):
    """The part of :class:`training.data.Data` that a posterior is estimated from."""

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def format(self) -> Format: ...
    @property
    def p_d(self) -> Posterior | None: ...
    @property
    def x_train(self) -> Tensor: ...
    @property
    def y_train(self) -> Tensor: ...
    @property
    def x_validation(self) -> Tensor: ...
    @property
    def y_validation(self) -> Tensor: ...


def build(
    settings: PosteriorSettings,
    data: DataLike,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    state: dict[str, Tensor] | None = None,
    folder: Path | None = None,
    speed: Speed | None = None,
    save_minutes: float = 15.0,
    about: dict[str, Any] | None = None,
) -> Posterior:
    """A data posterior estimated from the training set.

    Args:
        settings: which one, and its hyper-parameters.
        data: the data set; its training part is learned from, its validation part shows how well.
        seed: decides initialisation, batches and noise.
        device: where the posterior lives and is trained.
        state: ``state_dict()`` of a posterior that was built with the same settings: nothing is trained then.
        folder: where trainings save, ``score-network`` and ``classifier`` below it; one that was interrupted goes on.
        speed: how networks are called in training; None is in float32.
        save_minutes: minutes between checkpoints, beside those at each look at held-out data.
        about: what checkpoints hold as their settings.

    Raises:
        ValueError: the settings do not fit the data, or the state does not fit both.
        InputError: a teacher cannot be read.
        Interrupted: a signal came; the state is saved.
    """
    settings = settings.resolved(data.name)
    if settings.name == "oracle":
        if data.p_d is None:
            raise ValueError(f"posterior: 'oracle' on {data.name}, whose p_d(y|x) is not known")
        posterior: Posterior = data.p_d
    else:
        if state is None and folder is None:
            raise ValueError("folder: none given, a posterior that is trained saves into one")
        members = []
        for fold, part in enumerate(divided(settings, data, device)):
            builder = _Builder(settings, data, *part, seed + FOLD_SEEDS * fold)
            if state is None and folder is not None:
                place, which = folder, ""
                if settings.number_of_folds > 1:
                    place, which = folder / f"fold-{fold}", f", fold {fold + 1} of {settings.number_of_folds}"
                builder.trains = _Trains(place, which, speed or Speed(), save_minutes, about or {})
            members.append(getattr(builder, settings.name)())
        posterior = mean_of(members)
    posterior = posterior.to(device)
    if state is not None:
        own = posterior.state_dict()
        anchors = {name: own[name] for name in own if _of_anchor(name)}
        if anchors and not any(map(_of_anchor, state)):
            if settings.anchor != "kernel_density":  # which alone needs no training
                raise ValueError(f"the saved posterior has no {settings.anchor} for an anchor")
            state = {**anchors, **state}
        try:
            posterior.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the saved posterior does not fit: {' '.join(str(error).split())[:200]}") from None
    return posterior


def _of_anchor(name: str) -> bool:
    """Whether it names a tensor of the anchor, in the state of a score network or of the mean of several."""
    return ".anchor." in f".{name}"


Part = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


def divided(settings: PosteriorSettings, data: DataLike, device: torch.device | str) -> Iterator[Part]:
    """For each member of the posterior the points and labels that it learns from, and those that are held out.

    Args:
        settings: their ``folds`` say how many members there are; one has the validation points held out.
        data: the data set.
        device: where the points are to be.
    """
    x, y = data.x_train.to(device), data.y_train.to(device)
    if settings.number_of_folds == 1:
        yield x, y, (data.x_validation.to(device), data.y_validation.to(device))
        return
    fold_of = folds_of(y, settings.number_of_folds)
    for fold in range(settings.number_of_folds):
        out = fold_of == fold
        yield x[~out], y[~out], (x[out], y[out])


def folds_of(y: Tensor, folds: int) -> Tensor:
    """Which fold each sample is in, int64 [N]: each class is dealt out to all folds, in an order that is random once.

    Args:
        y: int64 [N].
        folds: how many there are.

    Raises:
        ValueError: a fold would be empty, or leave a class without a sample.
    """
    fewest = int(y.unique(return_counts=True)[1].min())
    if folds > len(y) or fewest < 2:
        raise ValueError(
            f"folds: {folds} for {len(y)} samples, {fewest} of the smallest class, allowed: at most as many folds as "
            "samples, and at least 2 samples of each class"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    dealt = order[y[order].argsort(stable=True)]
    fold_of = torch.empty_like(y)
    fold_of[dealt] = torch.arange(len(y), device=y.device) % folds
    return fold_of


def subset(y: Tensor, count: int, seed: int) -> Tensor:
    """The indices of ``count`` random samples, among which is one of each class, as a kernel density needs.

    Args:
        y: int64 [N].
        count: of the samples; below the number of classes some are missing all the same.
        seed: decides which.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    labels = y.cpu()[order]
    first = torch.zeros(len(y), dtype=torch.bool)
    for label in labels.unique():
        first[(labels == label).nonzero()[0]] = True
    # As a rule these are the first in the order; of a rare class the first may come later.
    kept = first.logical_not().byte().argsort(stable=True)[:count].sort().values
    return order[kept].to(y.device)


def settings_from(path: Path, given: PosteriorSettings, named: Collection[str] = ()) -> PosteriorSettings:
    """The settings of the posterior in a posterior.pt; those given replace them where they say how it is read.

    Args:
        path: the file.
        given: settings; what differs from the defaults counts as given.
        named: those that count though they may be the defaults; a None that only leaves a value open does not.

    Raises:
        InputError: the file cannot be read, holds a posterior of another name, or was fitted with other settings.
    """
    known = _saved_settings(checkpoint.load(path), path)
    if known.name != given.name:
        raise InputError(f"posterior_from: {path} holds a {known.name}, expected {given.name}")
    may_change = READING if known.name == "score_network" else ("sigma",)
    changes = {}
    for field in dataclasses.fields(given):
        value, old = getattr(given, field.name), getattr(known, field.name)
        left_open = value is None and field.name in COMMON
        if value == old or left_open or (value == field.default and field.name not in named):
            continue
        if field.name not in may_change or (field.name == "anchor" and value == "classifier"):
            raise InputError(
                f"posterior_settings.{field.name}: {value!r}, but {path} was fitted with {old!r}, leave it out"
            )
        changes[field.name] = value
    return dataclasses.replace(known, **changes)


def _saved_settings(saved: dict[str, Any], path: Path) -> PosteriorSettings:
    names = {field.name for field in dataclasses.fields(PosteriorSettings)}
    table = {name: value for name, value in saved["settings"].items() if name in names}
    return PosteriorSettings(**tables.typed_table(table, PosteriorSettings, str(path)))


def state_from(
    path: Path, settings: PosteriorSettings, data: DataLike, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The state of the posterior in a posterior.pt, to be read as ``settings``, of :func:`settings_from`, say.

    At another σ a classifier gets a new temperature, and other anchors are made again.

    Raises:
        InputError: it does not fit the data.
    """
    saved = checkpoint.load(path, device)
    state: dict[str, Tensor] = saved["network"]
    try:
        settings, known = settings.resolved(data.name), _saved_settings(saved, path).resolved(data.name)
        moved = (settings.anchor, settings.sigma) != (known.anchor, known.sigma)
        if settings.name == "score_network" and moved and settings.anchor != "classifier":
            state = {name: value for name, value in state.items() if not _of_anchor(name)}
        posterior = build(settings, data, seed=0, device=device, state=state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its network does not fit {data.name} ({reason})") from None
    if moved and settings.temperature:
        state = {**state, **_temperatures(posterior, divided(settings, data, device))}
    return state


def _temperatures(posterior: Posterior, divided: Iterable[Part]) -> dict[str, Tensor]:
    """The temperatures of its classifiers at the σ at which it is read, chosen on what each has not seen."""
    members, found = members_of(posterior), {}
    for number, (member, (_, _, held_out)) in enumerate(zip(members, divided, strict=True)):
        name = f"members.{number}." if len(members) > 1 else ""
        if isinstance(member, ScoreNetwork):
            member, name = member.anchor, f"{name}anchor."
        if isinstance(member, NoiseConditionalClassifier) and len(held_out[0]):
            fitted = classifier_at(member.network, member.sigma, member.num_classes, held_out, temperature=True)
            found[f"{name}temperature"] = fitted.temperature
    return found


def classifier_at(
    network: nn.Module, sigma: float, num_classes: int, held_out: tuple[Tensor, Tensor], *, temperature: bool
) -> NoiseConditionalClassifier:
    """A network read at a noise level, with the temperature that makes held-out labels most likely at that level.

    Args:
        network: maps (x [N, …], sigma [N]) to logits [N, L].
        sigma: the noise level, in input units.
        num_classes: L.
        held_out: points [N, …] and labels [N] that the network has not seen; without any the temperature is 1.
        temperature: False leaves it at 1.
    """
    plain = NoiseConditionalClassifier(network, num_classes=num_classes, sigma=sigma)
    if not temperature or not len(held_out[0]):
        return plain
    found = fit_temperature(plain.log_prob, *held_out, repeats=1)
    return NoiseConditionalClassifier(network, num_classes=num_classes, sigma=sigma, temperature=found)


def score_network_at(
    denoiser: Denoiser, sigma: float, anchor: PointwisePosterior | None, settings: PosteriorSettings
) -> ScoreNetwork:
    """A denoiser read at a noise level and from an anchor, and in everything else as the settings say."""
    return ScoreNetwork(
        denoiser,
        sigma=sigma,
        anchor=anchor,
        smoothing=settings.smoothing or 0.1,
        centering=settings.centering,
        nodes=settings.nodes,
        linear=settings.linear,
        top_k=settings.top_k,
    )


def description(settings: PosteriorSettings, source: DataSettings) -> dict[str, Any]:
    """What a posterior.pt says of itself, and of the data that :func:`check_source` compares later."""
    sizes = {"image_size": source.image_size, "validation_size": source.validation_size}
    given = {name: value for name, value in sizes.items() if value is not None}
    return {**tables.plain(settings), "data": source.name, "limit": source.limit, **given}


def check_source(path: Path, saved: dict[str, Any], data: Data, about: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a posterior.pt of other data; files from before these were recorded do not say.

    Args:
        path: the file.
        saved: what is in it.
        data: the data set as it is now.
        about: its name, its limit and its validation size, as a program was given them.
        prefix: before the message on one of these.

    Raises:
        InputError: as said.
    """
    for name in ("data", "limit", "validation_size"):
        value, expected = saved["settings"].get(name), about.get(name)
        if value not in (None, expected):
            raise InputError(f"{prefix}{path} is of {name} {value!r}, expected {expected!r} as in this run")
    check_record(saved.get("data"), data, path, exact=True)  # it may know what is test data here


def read(
    path: Path, data: DataLike, device: torch.device | str = "cpu", **changes: Any
) -> tuple[PosteriorSettings, ScoreNetwork]:
    """The score network in a posterior.pt, with its settings.

    Args:
        path: written by ``training.score`` or ``training.run``.
        data: the data set that it was trained on.
        device: where it goes.
        changes: settings to replace, out of those that do not change the network.

    Raises:
        InputError: there is no score network in the file, or it does not fit the data.
    """
    saved = checkpoint.load(path, device)
    try:
        settings = dataclasses.replace(_saved_settings(saved, path), **changes).resolved(data.name)
        folds = settings.number_of_folds
        if settings.name != "score_network" or folds > 1:
            what = settings.name if folds == 1 else f"mean of {folds} of {settings.name}"
            raise InputError(f"{path} holds a {what}, expected a score_network")
        posterior = build(settings, data, seed=0, device=device, state=saved["network"])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: its network does not fit {data.name} ({error})") from None
    assert isinstance(posterior, ScoreNetwork)
    return settings, posterior


def mean_of(members: Sequence[Any]) -> Posterior:
    """The mean of several posteriors, or the only one itself."""
    return members[0] if len(members) == 1 else Ensemble(members)


def members_of(posterior: Posterior) -> list[Any]:
    """Those of a mean, or the posterior itself."""
    return list(posterior.members) if isinstance(posterior, Ensemble) else [posterior]


def mean_losses(
    posterior: Posterior,
    points: Sequence[tuple[Tensor, Tensor]],
    sigmas: tuple[float, ...],
    *,
    seed: int,
    repeats: int,
) -> dict[float, float]:
    """The loss of its networks by noise level, their mean: of a score network denoising, of others cross-entropy.

    Args:
        posterior: a score network, a classifier, or the mean of several.
        points: x [N, …] and y [N] for each member.
        sigmas: the noise levels, in input units.
        seed: decides the noise, the same for all members.
        repeats: noise vectors for each point.
    """
    values = []
    for member, (x, y) in zip(members_of(posterior), points, strict=True):
        network = member.denoiser if isinstance(member, ScoreNetwork) else member.network
        values.append(losses_by_level(network, x, y, sigmas, seed=seed, repeats=repeats))
    return {sigma: sum(found[sigma] for found in values) / len(values) for sigma in sigmas}


def at_speed(posterior: Posterior, speed: Speed) -> Posterior:
    """The same posterior with its networks called as ``speed`` says; it shares their weights."""
    if isinstance(posterior, Ensemble):
        return Ensemble([at_speed(member, speed) for member in posterior.members])  # type: ignore[arg-type]
    fast = copy.copy(posterior)
    fast._modules = dict(posterior._modules)
    if isinstance(fast, ScoreNetwork):
        fast.denoiser = fast.denoiser.with_backbone(_called(fast.denoiser.backbone, speed))
        if isinstance(fast.anchor, NoiseConditionalClassifier):
            fast.anchor = at_speed(fast.anchor, speed)  # type: ignore[assignment]
    elif isinstance(fast, NoiseConditionalClassifier) and isinstance(fast.network, ScaledClassifier):
        fast.network = fast.network.with_backbone(_called(fast.network.backbone, speed))
    return fast


def anchored_at_labels(posterior: Posterior) -> bool:
    """Whether the posterior is given the labels of the clean points, so that it is right there by construction."""
    if isinstance(posterior, Ensemble):
        return any(anchored_at_labels(member) for member in posterior.members)  # type: ignore[arg-type]
    return isinstance(posterior, ScoreNetwork) and posterior.anchor is None


def _called(backbone: nn.Module, speed: Speed) -> nn.Module:
    return Forward(backbone, speed.precision, speed.compile)


def audit(
    posterior: Posterior, x: Tensor, y: Tensor, threat_model: ThreatModel, *, steps: int, seed: int
) -> dict[str, float]:
    """Accuracy of the posterior itself, clean and under its own adaptive attack, per cent."""
    generator = torch.Generator(x.device).manual_seed(seed)
    clean, robust = scorematch_audit.robust_accuracy(posterior, x, y, threat_model, steps=steps, generator=generator)
    return {"posterior_clean_acc": 100.0 * clean, "posterior_robust_acc": 100.0 * robust}


class ScaledClassifier(ScaledModule):
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

    def with_backbone(self, backbone: nn.Module) -> ScaledClassifier:
        """This classifier with another backbone, and everything else shared with it."""
        other = copy.copy(self)
        other._modules = {**self._modules, "backbone": backbone}
        return other


@dataclass(frozen=True)
class _Trains:
    """How the networks of a posterior are trained."""

    folder: Path
    which: str  # of several posteriors, shown beside the progress bar
    speed: Speed
    save_minutes: float
    about: dict[str, Any]


class _Builder:
    """Builds and trains the networks of one data set; a method for each posterior, called by its name."""

    trains: _Trains | None = None  # None leaves the networks as they are initialised

    def __init__(
        self,
        settings: PosteriorSettings,
        data: DataLike,
        x: Tensor,
        y: Tensor,
        held_out: tuple[Tensor, Tensor],
        seed: int,
    ) -> None:
        self.settings, self.data, self.x, self.y, self.held_out = settings, data, x, y, held_out
        self.num_classes, self.seed = data.num_classes, seed
        self.shape = tuple(x.shape[1:])
        self.center = x.mean(0) if x.dim() == 2 else x.mean()
        self.sigma_data = float((x - self.center).square().mean().sqrt())
        if len(self.shape) != 3 and (settings.mirror or settings.augment):
            name = "mirror" if settings.mirror else "augment"
            raise ValueError(f"{name}: {getattr(settings, name)} for inputs {list(self.shape)}, allowed: on images")

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
        index = subset(self.y, keep, self.seed)
        return KernelDensity(self.x[index], self.y[index], num_classes=self.num_classes, sigma=self.sigma)

    def score_network(self) -> ScoreNetwork:
        s = self.settings
        if s.top_k is not None and s.top_k > self.num_classes:
            raise ValueError(f"top_k: {s.top_k}, allowed: 1 to {self.num_classes}, the number of classes")
        denoiser = self.denoiser()
        anchor: PointwisePosterior | None = None
        if s.anchor == "classifier":
            anchor = self.noise_conditional_classifier()
        elif s.anchor == "kernel_density":
            anchor = self.kernel_density()
        return score_network_at(denoiser, self.sigma, anchor, s)

    def noise_conditional_classifier(self) -> NoiseConditionalClassifier:
        self._seed(1)
        network = ScaledClassifier(self._backbone(self.num_classes, pooled=True), self.center, self.sigma_data)
        network = network.to(self.x.device)
        if self.trains is not None:
            weight, speed = self.settings.likelihood_weight, self.trains.speed
            if weight or self.settings.energy_weight:
                speed = dataclasses.replace(speed, compile=False)  # which has no gradient of a gradient
            called = network.with_backbone(_called(network.backbone, speed))
            energy = None
            if self.settings.energy_weight:
                energy = JointEnergy(self.settings.energy_weight, self.center, self.sigma_data)
            loss = ClassificationLoss(called, weight, self.denoiser() if weight else None, energy)
            # It is not told how images were augmented, so it would learn the density of augmented images.
            self._train("classifier", network, loss, 1, self._mirror())
        fits = self.trains is not None and self.settings.temperature
        return classifier_at(network, self.sigma, self.num_classes, self.held_out, temperature=fits)

    def joint_energies(self) -> NoiseConditionalClassifier:
        """One of those whose mean is taken; ``energy_weight`` makes it a joint energy."""
        return self.noise_conditional_classifier()

    def denoiser(self) -> Denoiser:
        """The score network of the data set."""
        self._seed(0)
        channels, s = self.x.shape[1], self.settings
        told = augmentation.NonLeaking.conditions if s.augment else 0
        common: dict[str, Any] = {
            "num_classes": self.num_classes,
            "sigma_data": self.sigma_data,
            "center": self.center,
        }
        if s.classes == "embedding":
            backbone = self._backbone(channels, pooled=False, conditions=self.num_classes + told)
            denoiser: Denoiser = EmbeddedDenoiser(backbone, augmentations=told, **common)
        else:
            backbone = self._backbone((self.num_classes + 1) * channels, pooled=False, conditions=told)
            denoiser = Denoiser(backbone, **common)
        denoiser = denoiser.to(self.x.device)
        if self.trains is not None:
            called = denoiser.with_backbone(_called(denoiser.backbone, self.trains.speed))
            loss: MatchingLoss = DenoisingLoss(called)
            if s.teacher is not None:
                loss = DistillationLoss(called, self._teacher(s.teacher, told))
            mirror = s.mirror is True
            augment = augmentation.NonLeaking(s.augment, mirrored=mirror) if s.augment else self._mirror()
            self._train("score-network", denoiser, loss, 0, augment)
        return denoiser

    def _mirror(self) -> Augment | None:
        return augmentation.mirror if self.settings.mirror else None

    def _train(self, name: str, network: nn.Module, loss: MatchingLoss, purpose: int, augment: Augment | None) -> None:
        assert self.trains is not None
        training = scores.Training(
            self.x,
            self.y,
            *self.held_out,
            fit=self.fit,
            augment=augment,
            sigma=self.sigma if self.settings.weights == "best" else None,
            seed=self.seed,
            random_layers=self.settings.dropout > 0,
            speed=self.trains.speed,
            save_minutes=self.trains.save_minutes,
            about=self.trains.about,
            width=self.data.format.width,
            data=self.data if isinstance(self.data, Data) else None,
        )
        generator = torch.Generator(self.x.device).manual_seed(1_000_003 * purpose + self.seed)
        title, place = name.replace("-", " ") + self.trains.which, self.trains.folder / name
        scores.train(scores.ScoreTrainer(title, network, loss, training, generator, place))

    def _teacher(self, path: Path, told: int) -> Denoiser:
        """The score network in a posterior.pt of the same data."""
        assert self.trains is not None
        assert isinstance(self.data, Data)
        try:
            saved = checkpoint.load(path)
            check_source(path, saved, self.data, self.trains.about or saved["settings"])  # those of a program, if any
            settings, posterior = read(path, self.data, self.x.device)
        except InputError as error:
            raise InputError(f"posterior_settings.teacher: {path} is not a teacher for this data ({error})") from None
        if told and not settings.augment:
            raise InputError(
                f"posterior_settings.augment: the teacher in {path} is not told of augmentation, allowed: 0"
            )
        return posterior.denoiser

    def _backbone(self, outputs: int, *, pooled: bool, conditions: int = 0) -> nn.Module:
        s = self.settings
        kind, width, depth = s.network, s.width, s.depth
        assert width is not None
        assert depth is not None
        more: dict[str, Any] = {"width": width, "dropout": s.dropout, "conditions": conditions}
        if kind == "mlp":
            features = 1 if pooled else self.x[0].numel() // self.x.shape[1]
            return MLPBackbone(self.shape, outputs * features, depth=depth, **more)
        if len(self.shape) != 3:
            raise ValueError(f"network: {kind!r} takes images [C, H, W], the data is {list(self.shape)}; allowed: mlp")
        shrinks = s.patch if kind == "conv" else 2 ** (len(s.multipliers) - 1)
        if any(size % shrinks for size in self.shape[1:]):
            name = "patch" if kind == "conv" else "multipliers"
            size = f"{self.shape[1]}x{self.shape[2]}"
            raise ValueError(f"{name}: {getattr(s, name)} for images of {size}, which {shrinks} must divide")
        if kind == "conv":
            return ConvBackbone(self.shape[0], outputs, depth=depth, pooled=pooled, patch=s.patch, **more)
        return UNetBackbone(self.shape[0], outputs, multipliers=s.multipliers, pooled=pooled, **more)

    def _seed(self, purpose: int) -> None:
        torch.manual_seed(1_000_003 * purpose + self.seed)
