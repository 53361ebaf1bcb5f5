"""The typed configuration of a run: dataclass defaults, then a recipe, then the command line.

The defaults below are overlaid by the recipe of the data set (``recipes/<data>.toml``; for the user's own data
``recipes/own-KIND.toml``, where the shape of an input decides the kind), then by ``--recipe`` if one is given, then by
options. A key that no field has is an error.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from scorematch import ThreatModel
from scorematch.divergences import KINDS
from scorematch.objectives import alignment_of, default_of
from training import data as data_sets
from training.data import DataName, DataSettings, Format, ToyLabels
from training.data.smoothing import Spread
from training.engine.hardware import PrecisionWish, Switch
from training.engine.posteriors import settings_from
from training.settings import command_line, tables
from training.settings.errors import InputError, unknown_name
from training.settings.help_page import Layout
from training.settings.posterior import PosteriorSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Objective = Literal["standard", "gaussian", "pgd_at", "trades", "score_direct"]
Attack = Literal["pgd", "fgsm_rs", "n_fgsm"]
Posterior = Literal["score_network", "joint_energies", "kernel_density", "noise_conditional_classifier", "oracle"]
DataGradient = Literal["scores", "none", "noise"]
ClipForm = Literal["total", "robust", "threshold"]
AutoAttackVersion = Literal["none", "fast", "standard"]
EVALUATION_LOSSES = ("ce", "margin", *KINDS)
RECIPES = Path(__file__).parent.parent / "recipes"

# Own data: images, small ones and vectors have the recipes own-KIND.toml. The settings of a posterior are those tuned
# for this data set.
OwnKind = Literal["images", "small-images", "vectors"]
POSTERIOR_OF: dict[OwnKind, str] = {"images": "svhn", "small-images": "digits", "vectors": "digits"}
SMALL_GREY, SMALL = 32, 16  # height and width up to which images of one channel, and others, are small


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run. Lengths (eps, step_size) are in the units of the input: pixels in [0, 1]."""

    # what is minimised: clean loss, that under Gaussian noise, adversarial training, TRADES, or SCORE itself
    objective: Objective
    divergence: str = "kl"  # D(target || model): kl, se, l2, l1, linf, js, js_distance or l1_squared

    # Data and model
    data: DataName = "digits"  # digits, toy, cifar10, cifar100, svhn, folder (of images), or your own module:function
    limit: int = 0  # number of training points to keep, class-balanced on images; 0 keeps all
    toy_labels: ToyLabels = "oracle"  # targets of the surrogates on the toy: p_d(y|x), or the sampled labels
    data_root: Path | None = None  # folder of CIFAR's official files, or of images; None is $SCOREMATCH_DATA
    image_size: int | None = None  # folder: shorter side after resizing, then the centre is cut out; None: no resizing
    download: bool = False  # let torchvision download CIFAR into that folder where it is missing
    shift: int = 0  # augmentation: random shift of the training images by up to this many pixels; 0 turns it off
    flip: bool = False  # augmentation: mirror half of the training images, left to right
    cutmix: float = 0.0  # augmentation: share of the batches in which images get patches of others (CutMix); 0: none
    generated: tuple[Path, ...] = ()  # files of generated images mixed into each batch (.npz, see docs/data.md)
    original_share: float | None = None  # share of original images in a batch with generated ones; None is .3
    originals_only: bool = False  # train a recipe that has such a share without generated images
    # number of training images kept for validation; 0 keeps none. CIFAR, SVHN: the first ones, None is 1,024. folder:
    # the same share of each class, None is a tenth, or what DIR/validation holds
    validation_size: int | None = None
    model: str = "digits_cnn"  # classifier: a name of training.models, timm:NAME, or module:function of your own
    pretrained: bool = False  # timm:NAME: start from its trained weights, in timm's cache or downloaded

    # Threat model and the attack during training
    norm: Literal["linf", "l2", "l1"] = "linf"  # norm of the perturbation, over all features of a sample
    eps: float = 0.15  # radius of the perturbation, in input units
    step_size: float | None = None  # length of one step of PGD, in training and later, in input units; None is eps / 4
    attack: Attack = "pgd"  # attack during training; fgsm_rs and n_fgsm are one step of a length of their own
    # pgd_at: passes over each batch in free adversarial training, whose steps have length eps; 0 turns it off
    free_replays: int = 0
    steps: int = 10  # steps of PGD during training
    attack_start: Literal["uniform", "gaussian"] | None = None  # where that attack starts; None is the objective's own
    attack_mode: Literal["eval", "train", "frozen"] | None = None  # batch norm in it; None is the objective's own

    # Objective
    beta: float = 4.0  # TRADES: weight of the robust term
    sigma: tuple[float, ...] = (0.25,)  # gaussian: standard deviation of the noise, in input units; two: low and high
    gamma: float = 0.0  # gaussian: γ of Eqs. (36) and (37); 0 is plain augmentation, above 1 turns the alignment's sign
    alignment: float | None = None  # gaussian: σ²/(2(1-γ)), in squared input units, in the place of gamma
    final_sigma: float | None = None  # gaussian: σ at the end of training, σ²/(2(1-γ)) kept; None keeps σ
    antithetic: bool = False  # gaussian: every noise vector with both signs, one more pass
    clip: float = 0.0  # clipping threshold c; 0 turns clipping off
    clip_form: ClipForm = "total"  # what is clipped: relu(total - bound(c)), relu(robust term - bound(c) or - c)
    label_smoothing: float = 0.0  # probability that a target spreads over the classes
    label_smoothing_over: Spread = "all"  # among all classes (torch, the published code), or among the others alone
    awp: float = 0.0  # adversarial weight perturbation: its length relative to the norm of the weights; 0 turns it off
    awp_warmup: int = 0  # epochs before the first with adversarial weight perturbation
    # estimate of p_d(y|x') for score_direct (None is score_network), transport, soft_targets; oracle: where it is known
    posterior: Posterior | None = None
    posterior_from: Path | None = None  # posterior.pt of an earlier run, used instead of training one
    posterior_settings: PosteriorSettings = field(default_factory=PosteriorSettings)
    target_mix: float = 1.0  # score_direct: m of the target p(y|x)^(1-m) p(y|x')^m, how far it follows x'
    # score_direct: data gradient in its attack: as it is, left out, or replaced by noise of its length (a control)
    data_gradient: DataGradient = "scores"
    # trades with a posterior: how far the target q(x) moves with log p(y|x'); None is 1, with soft_targets 0
    transport: float | None = None
    soft_targets: bool = False  # all but score_direct: the posterior's p(y|x), x augmented, in the place of labels

    # Optimisation
    epochs: int = 40  # passes over the training data
    # batches of an epoch; None is one pass. With generated images: as many as the originals would fill by themselves
    steps_per_epoch: int | None = None
    batch_size: int = 64  # samples a step
    optimizer: Literal["sgd", "adam"] = "adam"  # both from torch
    fused: bool = False  # torch's fused kernel of the optimiser
    lr: float = 2e-3  # highest learning rate of the schedule
    momentum: float = 0.9  # of sgd; ignored by adam
    nesterov: bool = True  # Nesterov's form of that momentum
    weight_decay: float = 0.0  # L2 penalty of the parameters
    weight_decay_norms: bool = True  # those of normalisation layers too
    schedule: Literal["onecycle", "cosine", "multistep", "constant"] = "onecycle"  # learning rate over the steps
    schedule_by: Literal["step", "epoch"] = "step"  # epoch: the rate stays the same throughout an epoch
    warmup: float = 0.25  # onecycle: share of the steps during which the rate rises
    cycle_momentum: bool = False  # onecycle: momentum (adam: beta1) falls from .95 to .85 and rises again
    milestones: tuple[int, ...] = ()  # multistep: epochs after which the rate is multiplied by lr_decay
    lr_decay: float = 0.1  # multistep: factor at each milestone
    averaging: float = 0.0  # decay per step of the exponential average of weights that is evaluated; 0 turns it off
    averaging_warmup: float = 0.0  # share of the steps during which the average only follows the weights
    averaging_ramp: bool = False  # after these steps the decay is at most (1 + d) / (10 + d) in the d-th step
    averaging_buffers: Literal["average", "copy"] = "average"  # statistics of batch norm: averaged, or the model's own
    batchnorm_momentum: float | None = None  # weight of a new batch in running statistics; None is the model's own
    batchnorm_first: bool = False  # in the first step that weight is 1: the statistics start from the data

    # Speed: none of these changes what is computed, but for rounding. auto is what is fastest on the hardware at hand
    precision: PrecisionWish = "auto"  # of the network in training; losses and weights are float32
    channels_last: bool = False  # memory format of images and weights in training: faster convolutions
    compile: Switch = "auto"  # train with torch.compile(model): compiles for minutes, then saves memory traffic
    graph: Switch = "auto"  # on CUDA: the whole attack of a step as one CUDA graph
    fold: bool = False  # attacks in eval mode: batch norm folded into the convolution before it
    accumulate: int = 1  # parts that a batch is cut into, for less memory; batch norm and awp see one part at a time
    sync_batchnorm: bool = True  # under torchrun: batch norm over the samples of all processes

    # Validation and the final evaluation

    # weights of the final numbers: last, or best validation accuracy (robust; standard: clean)
    selection: Literal["best", "last"] = "best"
    validate_every: int = 1  # epochs between validations (clean and PGD); the last epoch is always validated
    validation_steps: int = 10  # PGD steps of a validation
    validation_losses: tuple[str, ...] = ("ce",)  # losses that it increases; a robust sample withstands all
    eval_steps: int = 40  # PGD steps of the final evaluation, per restart
    eval_restarts: int = 2  # random starts of the final evaluation, per loss
    eval_losses: tuple[str, ...] = ("ce", "margin")  # losses of the final PGD; a robust sample withstands all
    curve_points: int = 6  # perturbation sizes in (0, 2 eps] of the accuracy curve, up to all of the box; 0: none
    autoattack: AutoAttackVersion = "standard"  # AutoAttack at eps, on images: fast leaves FAB and Square out
    # the first so many test samples go through AutoAttack (of a function's data: at equal distances); 0 is all
    autoattack_samples: int = 0
    autoattack_compile: bool = False  # AutoAttack searches with torch.compile(model)

    # The run itself
    save_every: int = 1  # epochs between checkpoints; the last epoch and the best one so far always end with one
    save_minutes: float = 15.0  # minutes between checkpoints within an epoch
    keep_last: int = 0  # how many checkpoints of earlier epochs stay, as epoch-NNNN.pt
    seed: int = 0  # decides initialisation, data order, augmentation and attacks; never the split
    deterministic: bool = False  # refuse operations without a deterministic implementation (CPU runs are exact anyway)
    threads: int = 0  # CPU threads; 0 is all available
    device: str = "auto"  # torch device; auto is cuda where there is one
    out: Path | None = None  # folder of the run; None picks a fresh one under runs/
    resume: Path | None = None  # continue the run in this folder with its own settings
    recipe: str | None = None  # name in training/recipes or path of a TOML file, over the recipe of the data set
    dry_run: bool = False  # print the resolved settings and stop

    @property
    def data_settings(self) -> DataSettings:
        return DataSettings(
            self.data,
            self.limit,
            self.toy_labels,
            self.data_root,
            self.download,
            self.validation_size,
            self.image_size,
        )

    @property
    def transported(self) -> float:
        """How far the target of TRADES moves with the data."""
        if self.objective != "trades" or self.posterior is None:
            return 0.0
        return float(not self.soft_targets) if self.transport is None else self.transport

    @property
    def attack_steps(self) -> int:
        """Gradients of an attack: single-step attacks do not read ``steps``."""
        return self.steps if self.attack == "pgd" else 1

    @property
    def searches(self) -> bool:
        """Whether x' is searched by an attack in training."""
        return self.objective not in ("standard", "gaussian")

    @property
    def attack_mode_in_steps(self) -> str | None:
        """The mode of batch norm in the attack of a step; None without such an attack."""
        if not self.searches or self.free_replays:
            return None
        return self.attack_mode or default_of(self.objective, "attack_mode")

    @property
    def held_alignment(self) -> float | None:
        """gaussian: the coefficient σ² / (2 (1 − γ)) where γ follows σ; None where γ is fixed."""
        if self.alignment is None and self.final_sigma is not None:
            return alignment_of(self.sigma[0], self.gamma)
        return self.alignment

    def threat_model(self, lower: float, upper: float) -> ThreatModel:
        return ThreatModel(self.norm, self.eps, self.step_size, lower, upper)


LAYOUT = Layout(
    first=(
        "objective",
        "divergence",
        "posterior",
        "data",
        "model",
        "norm",
        "eps",
        "epochs",
        "seed",
        "recipe",
        "out",
        "resume",
    ),
    groups={
        "Data and model": "data",
        "Threat model, and the attack during training": "norm",
        "Objective": "beta",
        "Optimisation": "epochs",
        "Speed: auto is what is fastest here; nothing changes what is computed, but for rounding": "precision",
        "Validation, and the final evaluation": "selection",
        "The run itself": "save_every",
        "Posterior: the estimate of p_d(y|x'); None is what was tuned for the data set": "posterior_settings.sigma",
    },
)
# What a run may go on with otherwise: the same data, the same computation. Checkpoints refuse another kind of device.
MAY_MOVE = ("data_root", "threads", "device")
NOT_IN_RECIPES = ("out", "resume", "recipe", "dry_run", "download")

Check = tuple[Callable[[Any], bool], str]


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def or_none(check: Check) -> Check:
    """The same check of an option that may be left open."""
    allowed, description = check
    return (lambda v: v is None or allowed(v)), description


def different(allowed: Callable[[Any], bool], description: str) -> Check:
    """One or more values that are allowed, no two of them the same."""
    return (
        lambda v: len(v) > 0 and len(set(v)) == len(v) and all(map(allowed, v)),
        f"one or more different {description}",
    )


AT_LEAST_ONE: Check = (lambda v: v >= 1, "at least 1")
POSITIVE: Check = (_positive, "a finite number above 0")
NOT_NEGATIVE: Check = (lambda v: 0 <= v < math.inf, "a finite number of at least 0")
BELOW_ONE: Check = (lambda v: 0 <= v < 1, "0 up to but not including 1")
LOSSES: Check = (
    lambda v: len(v) > 0 and set(v) <= set(EVALUATION_LOSSES),
    f"one or more of {', '.join(EVALUATION_LOSSES)}",
)

RANGES: dict[str, Check] = {
    "divergence": (lambda v: v in KINDS, ", ".join(KINDS)),
    "limit": (lambda v: v >= 0, "0 (all) or a number of points"),
    "shift": (lambda v: 0 <= v <= 4, "0 to 4 pixels"),
    "cutmix": (lambda v: 0 <= v <= 1, "0 (off) to 1"),
    "original_share": (lambda v: v is None or 0 < v < 1, "between 0 and 1, exclusive"),
    "image_size": (lambda v: v is None or v >= 1, "at least 1 pixel"),
    "validation_size": (lambda v: v is None or v >= 0, "0 (none) or a number of images"),
    "steps_per_epoch": or_none(AT_LEAST_ONE),
    "eps": POSITIVE,
    "step_size": (lambda v: v is None or _positive(v), "a finite number above 0, or None for eps / 4"),
    "free_replays": (lambda v: v >= 0, "0 (off) or a number of passes"),
    "steps": AT_LEAST_ONE,
    "beta": NOT_NEGATIVE,
    "sigma": (
        lambda v: len(v) in (1, 2) and all(map(_positive, v)) and list(v) == sorted(v),
        "a finite number above 0, or two: low and high",
    ),
    "gamma": (lambda v: math.isfinite(v) and v != 1, "any finite number but 1"),
    "alignment": (lambda v: v is None or (math.isfinite(v) and v != 0), "any finite number but 0"),
    "final_sigma": or_none(POSITIVE),
    "clip": BELOW_ONE,
    "label_smoothing": BELOW_ONE,
    "target_mix": (lambda v: 0 <= v <= 1, "0 to 1"),
    "transport": or_none(NOT_NEGATIVE),
    "awp": (lambda v: 0 <= v < 1, "0 (off) up to but not including 1"),
    "awp_warmup": (lambda v: v >= 0, "0 or a number of epochs"),
    "epochs": AT_LEAST_ONE,
    "batch_size": AT_LEAST_ONE,
    "lr": POSITIVE,
    "momentum": BELOW_ONE,
    "weight_decay": NOT_NEGATIVE,
    "warmup": (lambda v: 0 < v < 1, "between 0 and 1, exclusive"),
    "milestones": (lambda v: all(m >= 1 for m in v) and list(v) == sorted(set(v)), "increasing epochs from 1"),
    "lr_decay": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "averaging": BELOW_ONE,
    "averaging_warmup": BELOW_ONE,
    "batchnorm_momentum": (lambda v: v is None or 0 < v <= 1, "above 0, at most 1, or None for the model's own"),
    "accumulate": AT_LEAST_ONE,
    "save_every": AT_LEAST_ONE,
    "save_minutes": POSITIVE,
    "keep_last": (lambda v: v >= 0, "0 or a number of checkpoints"),
    "validate_every": AT_LEAST_ONE,
    "validation_steps": AT_LEAST_ONE,
    "eval_steps": AT_LEAST_ONE,
    "eval_restarts": AT_LEAST_ONE,
    "validation_losses": LOSSES,
    "eval_losses": LOSSES,
    "curve_points": (lambda v: v >= 0 and v % 2 == 0, "0 or an even number, so that eps is one of the points"),
    "autoattack_samples": (lambda v: v >= 0, "0 (all) or a number of test samples"),
    "seed": (lambda v: 0 <= v < 2**32, "0 to 4294967295"),
    "threads": (lambda v: v >= 0, "0 (all) or a number of threads"),
}


def check_ranges(settings: object, ranges: dict[str, Check]) -> None:
    for name, (allowed, description) in ranges.items():
        value = getattr(settings, name)
        if not allowed(value):
            raise InputError(f"{name}: {value!r} is out of range, allowed: {description}")


def validate(settings: RunSettings) -> None:
    """Refuse values out of range, and combinations that mean nothing, before any work."""
    data_sets.check_name(settings.data)
    check_ranges(settings, RANGES)
    if settings.image_size is not None and settings.data != data_sets.FOLDER:
        raise InputError(f"image_size: {settings.image_size} on {settings.data}, allowed: on folder")
    if settings.schedule == "multistep" and not settings.milestones:
        raise InputError("milestones: none given, the multistep schedule needs at least one epoch")
    if settings.pretrained and not settings.model.startswith("timm:"):
        raise InputError(f"pretrained: True with model {settings.model}, allowed: with timm:NAME")
    _validate_optimisation(settings)
    _validate_training_attack(settings)
    _validate_posterior(settings)
    if settings.shift and settings.data == "toy":
        raise InputError("shift: the toy has no images to shift, allowed: 0")
    if settings.cutmix and settings.data == "toy":
        raise InputError(f"cutmix: {settings.cutmix:g} on the toy, which has no images to mix, allowed: 0")
    if settings.flip and settings.data == "toy":
        raise InputError("flip: the toy has no images to mirror, allowed: False")
    if settings.autoattack != "none" and settings.data == "toy":
        raise InputError(f"autoattack: {settings.autoattack!r} on the toy, which has no images, allowed: none")
    if settings.accumulate > settings.batch_size:
        raise InputError(f"accumulate: {settings.accumulate} parts, allowed: 1 to batch_size = {settings.batch_size}")
    _validate_images(settings)


def validate_machine(settings: RunSettings) -> None:
    """Refuse what this machine does not have. The settings of a run that is read may be those of another machine."""
    device = resolve_device(settings.device)
    if settings.graph == "on" and device.type != "cuda":
        raise InputError(f"graph: 'on' on {device}, allowed: auto or off, or a CUDA device")
    if settings.precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision: 'tf32' on {device}, allowed: auto, float32 or bfloat16, or a CUDA device")


def validate_for(settings: RunSettings, form: Format) -> None:
    """Refuse settings that the data do not allow; for the user's own data this is known only once they are read."""
    form.check_radius(settings.norm, settings.eps)
    if settings.step_size is not None:
        form.check_radius(settings.norm, settings.step_size, "step_size")
    if not data_sets.is_own(settings.data):
        return
    shape, name = list(form.input_shape), settings.data
    if len(shape) != 3:
        for option in ("shift", "flip", "cutmix", "generated"):
            if value := getattr(settings, option):
                raise InputError(
                    f"{option}: {value} on {name}, whose inputs {shape} are not images, allowed: on images"
                )
    if settings.autoattack != "none" and (len(shape) != 3 or not math.isfinite(form.upper - form.lower)):
        given = f"inputs {shape} from {form.lower:g} to {form.upper:g}"
        raise InputError(
            f"autoattack: {settings.autoattack!r} on {name}, which has {given}, allowed: none; it attacks images in "
            "a finite box"
        )
    in_box = (form.lower, form.upper) == (0.0, 1.0)
    if settings.generated and not in_box:
        given = f"values from {form.lower:g} to {form.upper:g}"
        raise InputError(f"generated: given on {name}, which has {given}, allowed: on images in [0, 1]")
    if form.soft and (settings.label_smoothing or settings.generated):
        option = "label_smoothing" if settings.label_smoothing else "generated"
        raise InputError(f"{option}: given on {name}, whose targets are its p_train, allowed: without p_train")
    if form.validation == 0 and settings.selection == "best":
        raise InputError(f"selection: 'best' on {name}, which has nothing to validate on, allowed: --selection last")


def own_kind(input_shape: Sequence[int]) -> OwnKind:
    """Which recipe suits data of this shape."""
    if len(input_shape) != 3:
        return "vectors"
    return "small-images" if max(input_shape[1:]) <= (SMALL_GREY if input_shape[0] == 1 else SMALL) else "images"


def resolved_posterior(settings: PosteriorSettings, data: DataName, form: data_sets.Format) -> PosteriorSettings:
    """The settings of a posterior, with those that are left open set to what was tuned for the data set.

    For the user's own data this is what was tuned for a data set of similar inputs; noise levels, which were tuned on
    images in [0, 1], are multiplied by the width of the box. A U-Net halves images twice; where their size does not
    allow this, plain convolutions take its place.
    """
    if not data_sets.is_own(data):
        return settings.resolved(data)
    kind = own_kind(form.input_shape)
    if kind == "images" and settings.network is None and any(size % 4 for size in form.input_shape[1:]):
        settings = dataclasses.replace(settings, network="conv")
    tuned = settings.resolved(POSTERIOR_OF[kind])
    open_levels = [name for name in ("sigma", "sigma_min", "sigma_max") if getattr(settings, name) is None]
    return dataclasses.replace(tuned, **{name: getattr(tuned, name) * form.width for name in open_levels})


def _validate_posterior(settings: RunSettings) -> None:
    """What asks a posterior, and what it does not go with."""
    objective, posterior = settings.objective, settings.posterior
    direct = objective == "score_direct"
    if posterior == "oracle" and settings.data != "toy" and ":" not in settings.data:
        known = "the toy, and a function's data that bring it (p_d)"
        raise InputError(f"posterior: 'oracle' on {settings.data}, allowed: where p_d(y|x) is known: {known}")
    for name in ("target_mix", "data_gradient"):
        if not direct and (value := getattr(settings, name)) != getattr(RunSettings, name):
            raise InputError(f"{name}: {value!r} with {objective}, allowed: with score_direct")
    if settings.target_mix != 1.0 and settings.posterior_settings.centering == "network":
        raise InputError(f"target_mix: {settings.target_mix!r} with centering 'network', allowed: 1, or 'posterior'")
    if settings.soft_targets and direct:
        raise InputError(
            "soft_targets: True with score_direct, whose targets are p_d(y|x'), allowed: with standard, gaussian, "
            "pgd_at and trades; --target-mix 0 leaves its target at clean x"
        )
    if settings.transport is not None and objective != "trades":
        raise InputError(f"transport: {settings.transport!r} with {objective}, allowed: with trades")
    if posterior is not None and not (direct or objective == "trades" or settings.soft_targets):
        raise InputError(
            f"posterior: {posterior!r} with {objective}, which asks none, allowed: with score_direct, trades, or "
            "--soft-targets"
        )
    if posterior is None and not direct:
        for name in ("soft_targets", "transport", "posterior_from"):
            if value := getattr(settings, name):
                raise InputError(f"{name}: {value} without a posterior, allowed: with --posterior NAME")
    if settings.cutmix and (direct or posterior is not None):
        raise InputError(
            f"cutmix: {settings.cutmix:g} with {objective} and a posterior, which is that of the images as they are, "
            "allowed: 0, or with standard, gaussian, pgd_at and trades without one"
        )
    if settings.label_smoothing and settings.soft_targets:
        raise InputError(f"label_smoothing: {settings.label_smoothing} with soft_targets, allowed: 0")


def _validate_images(settings: RunSettings) -> None:
    if settings.generated and settings.data == "toy":
        raise InputError("generated: given on the toy, which has no images, allowed: on data sets of images")
    if settings.generated and settings.originals_only:
        raise InputError(f"originals_only: True with generated = {settings.generated[0]}, allowed: one of the two")
    if settings.original_share is not None and not settings.generated and not settings.originals_only:
        raise InputError(
            f"generated: none given, but original_share is {settings.original_share:g}: the rest of each batch is for "
            "generated images; give --generated FILE (docs/data.md), or --originals-only to train without"
        )
    if settings.validation_size == 0 and settings.selection == "best":
        raise InputError(
            "selection: 'best' with validation_size 0, which leaves nothing to select on, allowed: --selection last"
        )


def _validate_optimisation(settings: RunSettings) -> None:
    if settings.cycle_momentum and settings.schedule != "onecycle":
        raise InputError(f"cycle_momentum: True with schedule {settings.schedule!r}, allowed: with onecycle")
    if settings.cycle_momentum and settings.optimizer == "sgd" and not settings.momentum:
        raise InputError("cycle_momentum: True with momentum 0, allowed: with a momentum above 0")
    if not settings.averaging and (settings.averaging_warmup or settings.averaging_ramp):
        name = "averaging_warmup" if settings.averaging_warmup else "averaging_ramp"
        raise InputError(f"{name}: {getattr(settings, name)} without averaging, allowed: with averaging above 0")
    if settings.batchnorm_first and settings.batchnorm_momentum is None:
        raise InputError("batchnorm_first: True without batchnorm_momentum, which holds from the second step on")
    if settings.alignment is not None and settings.gamma != 0:
        raise InputError(f"gamma: {settings.gamma:g} with alignment, which decides it, allowed: one of the two")
    if settings.final_sigma is not None and len(settings.sigma) > 1:
        raise InputError(f"final_sigma: {settings.final_sigma:g} with a range of sigma, allowed: with one sigma")
    if settings.awp and not settings.searches:
        raise InputError(
            f"awp: {settings.awp} with {settings.objective} training, allowed: with an adversarial objective"
        )
    if settings.awp_warmup and not settings.awp:
        raise InputError(f"awp_warmup: {settings.awp_warmup} without awp, allowed: with awp above 0")
    if settings.awp and settings.awp_warmup >= settings.epochs:
        raise InputError(
            f"awp_warmup: {settings.awp_warmup}, allowed: less than the {settings.epochs} epochs of the run"
        )
    if settings.label_smoothing and (settings.objective == "score_direct" or settings.data == "toy"):
        where = "score_direct, whose targets are p_d(y|x')" if settings.objective == "score_direct" else "the toy"
        raise InputError(f"label_smoothing: {settings.label_smoothing} with {where}, allowed: 0")


NOT_WITH_FREE = (
    ("attack", "pgd"),
    ("attack_start", None),
    ("attack_mode", None),
    ("clip", 0.0),
    ("awp", 0.0),
    ("accumulate", 1),
)


def _validate_training_attack(settings: RunSettings) -> None:
    if settings.attack != "pgd" and settings.attack_start is not None:
        raise InputError(
            f"attack_start: {settings.attack_start!r} with {settings.attack}, which has its own, allowed: with pgd"
        )
    if settings.norm == "l1" and (settings.attack != "pgd" or settings.free_replays):
        kind: str = "free_replays" if settings.free_replays else settings.attack
        raise InputError(f"norm: 'l1' with {kind}, allowed: with attack pgd and without free_replays")
    if settings.graph == "on" and (settings.free_replays or not settings.searches):
        what = "free_replays" if settings.free_replays else f"{settings.objective} training"
        raise InputError(f"graph: 'on' with {what}, which has no attack to record, allowed: auto or off")
    if not settings.free_replays:
        return
    if settings.objective != "pgd_at":
        raise InputError(f"free_replays: {settings.free_replays} with {settings.objective}, allowed: with pgd_at")
    for name, off in NOT_WITH_FREE:
        if (value := getattr(settings, name)) != off:
            raise InputError(f"{name}: {value!r} with free_replays, allowed: {off!r}")


def resolve_device(name: str) -> torch.device:
    """The torch device called ``name``, where ``auto`` is CUDA if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: {name!r} is unknown, allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name!r} is not there, {torch.cuda.device_count()} CUDA devices are visible")
    if device.type not in ("cpu", "cuda"):  # torch knows the names of devices that this machine or build does not have
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, ImportError):
            raise InputError(f"device: {name!r} cannot be used here, allowed: auto, cpu, cuda, cuda:N") from None
    return device


def resolve_threads(threads: int) -> int:
    """The number of CPU threads: ``threads``, or for 0 what the process may use."""
    return threads or torch.get_num_threads()


def resolve_jobs(jobs: int) -> int:
    """The number of processes side by side: ``jobs``, or for 0 as many as there are cores for this one."""
    return jobs or len(os.sched_getaffinity(0))


def parse(arguments: Sequence[str]) -> RunSettings:
    """The settings of a run from its command line. ``--resume DIR`` starts from DIR/config.toml and changes nothing."""
    resume = command_line.value_of(arguments, "resume")
    if resume is not None:
        return _resumed(Path(resume), arguments)
    root, size = command_line.value_of(arguments, "data-root"), command_line.value_of(arguments, "image-size")
    default = from_recipes(
        command_line.value_of(arguments, "data"),
        command_line.value_of(arguments, "recipe"),
        root=Path(root) if root else None,
        image_size=int(size) if size and size.isdecimal() else None,
    )
    if command_line.value_of(arguments, "posterior-from") is not None:  # the file says how it was fitted
        default = dataclasses.replace(default, posterior_settings=PosteriorSettings())
    settings = _parse(arguments, default)
    found = data_sets.root_from_anywhere(settings.data, settings.data_root)
    settings = dataclasses.replace(settings, data_root=found)
    validate(settings)
    validate_machine(settings)
    settings = with_posterior(settings, _named_of_posterior(arguments))
    if settings.data != data_sets.FOLDER:
        validate_for(settings, data_sets.format_of(settings.data_settings))
    return dataclasses.replace(  # a run can then be continued from another folder
        settings,
        posterior_from=None if settings.posterior_from is None else settings.posterior_from.absolute(),
        generated=tuple(path.absolute() for path in settings.generated),
    )


def _named_of_posterior(arguments: Sequence[str]) -> set[str]:
    """The settings of the posterior that options name, or the recipe that names the file of the posterior."""
    groups = (name.rpartition(".") for name in command_line.names(arguments))
    named = {own for group, _, own in groups if group == "posterior_settings"}
    recipe = command_line.value_of(arguments, "recipe")
    if recipe is not None and command_line.value_of(arguments, "posterior-from") is None:
        named |= read_recipe(recipe).get("posterior_settings", {}).keys()
    return named


def _parse(arguments: Sequence[str], default: RunSettings) -> RunSettings:
    return command_line.parse(
        RunSettings,
        arguments,
        program="python -m training.run",
        description="Train one classifier with one objective and measure its robustness.",
        default=default,
        layout=LAYOUT,
    )


def from_recipes(
    data: str | None, recipe: str | None, *, root: Path | None = None, image_size: int | None = None
) -> RunSettings:
    """The defaults for a data set, overlaid by a recipe; ``objective`` is missing unless the recipe names it.

    ``root`` and ``image_size`` say where a folder of images is, and how they are cut, where the recipe does not.
    """
    overlay = read_recipe(recipe) if recipe else {}
    name = data or overlay.get("data", "digits")
    if data_sets.is_own(name):
        source = DataSettings(
            name, root=root or overlay.get("data_root"), image_size=image_size or overlay.get("image_size")
        )
        form = data_sets.format_of(source)
        values = {**read_recipe(f"own-{own_kind(form.input_shape)}"), "data": name}
        lengths = [length for length in ("eps", "step_size") if length in values]
        values |= {length: values[length] * form.width for length in lengths}
    else:
        values = read_recipe(name) if name in data_sets.FORMATS else {}
    posterior = {**values.pop("posterior_settings", {}), **overlay.pop("posterior_settings", {})}
    values = {"objective": tyro.MISSING, **values, **overlay}
    return RunSettings(**values, posterior_settings=_construct(PosteriorSettings, posterior, "posterior_settings"))


def read_recipe(name: str) -> dict[str, Any]:
    """The typed values of a recipe: ``recipes/<name>.toml``, or a path."""
    path = RECIPES / f"{name}.toml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        raise unknown_name("recipe", name, [*sorted(p.stem for p in RECIPES.glob("*.toml")), "or the path of a file"])
    return typed_values(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error})") from None


def typed_values(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of :class:`RunSettings` in a table, the nested ``posterior_settings`` still a table."""
    values = tables.typed_table(table, RunSettings, where, exclude=NOT_IN_RECIPES)
    saved_before = "name" in table.get("posterior_settings", ()) and "soft_targets" not in table
    if saved_before and table.get("objective") != "score_direct":
        # Such a run asked no posterior, and named one all the same.
        values = {key: value for key, value in values.items() if key not in ("posterior", "posterior_from")}
    if "posterior_settings" in table:
        nested = f"{where}: posterior_settings"
        values["posterior_settings"] = tables.typed_table(table["posterior_settings"], PosteriorSettings, nested)
    return values


def from_table(table: dict[str, Any], where: str) -> RunSettings:
    """The settings that a run saved, in its config.toml or in a checkpoint."""
    # Runs from before these were settings do not name them.
    before = {"autoattack": "none", "originals_only": not table.get("generated")}
    values = {**before, **typed_values(table, where)}
    nested = _construct(PosteriorSettings, values.pop("posterior_settings", {}), f"{where}: posterior_settings")
    try:
        settings = RunSettings(**values, posterior_settings=nested)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None
    validate(settings)
    return settings


def _construct(settings: type[PosteriorSettings], values: dict[str, Any], where: str) -> PosteriorSettings:
    try:
        return settings(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None


def with_posterior(settings: RunSettings, named: Collection[str] = ()) -> RunSettings:
    """The settings with ``posterior_settings`` completed: its name is that of ``--posterior``.

    Values that are left open are those of the posterior that is given, or else those of the data set. Without
    ``--posterior`` score_direct takes a score network. Those that are ``named`` count as given, also as defaults.
    """
    if settings.posterior is None and settings.objective == "score_direct":
        settings = dataclasses.replace(settings, posterior="score_network")
    try:
        given = dataclasses.replace(settings.posterior_settings, name=settings.posterior or "score_network")
        if settings.posterior_from is not None and settings.resume is None:
            given = settings_from(settings.posterior_from, given, named)
        given = resolved_posterior(given, settings.data, data_sets.format_of(settings.data_settings))
    except (ValueError, TypeError) as error:
        raise InputError(f"posterior_settings: {error}") from None
    return dataclasses.replace(settings, posterior_settings=given)


def _resumed(folder: Path, arguments: Sequence[str]) -> RunSettings:
    """The settings of the run in ``folder``; options beside --resume must not contradict them."""
    path = folder / "config.toml"
    if not path.is_file():
        raise InputError(f"resume: {folder} holds no config.toml, expected the folder of an earlier run")
    table = read_toml(path)
    if "objective" not in table:
        raise InputError(f"resume: {folder} is no folder of training.run, its config.toml names no objective")
    saved = from_table(table, str(path))
    settings = _parse(arguments, saved)
    if settings.data_root is not None:
        settings = dataclasses.replace(settings, data_root=settings.data_root.absolute())
    for name, value in as_table(settings).items():
        if name not in MAY_MOVE and value != as_table(saved).get(name):
            raise InputError(f"{name}: {value!r} contradicts the run in {folder}, a resumed run keeps its settings")
    if settings.recipe is not None:
        raise InputError(f"recipe: {settings.recipe!r} with --resume, allowed: none, a resumed run keeps its settings")
    if settings.out is not None and settings.out.resolve() != folder.resolve():
        raise InputError(f"out: {settings.out} with --resume, allowed: {folder}, where a resumed run stays")
    settings = dataclasses.replace(with_posterior(settings), out=folder, resume=folder)
    validate(settings)
    validate_machine(settings)
    return settings


def as_table(settings: RunSettings) -> dict[str, Any]:
    """The settings as a TOML table. TOML has no null: fields that are None are left out."""
    return {name: value for name, value in tables.plain(settings).items() if name not in NOT_IN_RECIPES}
