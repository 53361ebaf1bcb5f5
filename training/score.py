"""Fit a posterior, a score network or another, sample from it and audit it: ``python -m training.score --data digits``.

    python -m training.score --data digits
    python -m training.score --data digits --posterior joint_energies --audit
    python -m training.score --recipe cifar10-edm --data-root FOLDER --out runs/score
    python -m training.score --resume runs/score
    python -m training.score --resume runs/score --audit
    python -m training.score --posterior-from runs/score_direct-seed0/posterior.pt --audit

Writes into its folder: config.toml, score-network/ and classifier/ (checkpoints, held-out losses and TensorBoard curves
of the trainings; of a mean of several below fold-0/ and so on), posterior.pt (for ``training.run`` and
``training.generate``) and, last of all, score.json. Of a score network also samples.png and samples.npz (the format of
generated data: ``image`` uint8, ``label``) or, on the toy, scores.png. ``torchrun`` shares the training out.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w
import torch
from torch import Tensor

from scorematch import ThreatModel, sampling
from scorematch.networks import Denoiser
from scorematch.posteriors import Posterior, ScoreNetwork
from training import data, generate
from training.data import Data, DataName, DataSettings
from training.engine import checkpoint, distributed, hardware, posteriors, scores
from training.engine.claims import OF_SCORES_FOLDER, claimed, refuse_left_over
from training.engine.hardware import PrecisionWish, Speed, Switch
from training.measures import judge, toy_scores
from training.reports import audit, score_network
from training.settings import command_line, config, tables, unused
from training.settings.errors import InputError, Interrupted, run_program
from training.settings.help_page import Layout
from training.settings.posterior import FITTED, PosteriorSettings

CHUNK = 500  # samples drawn at a time
AUDITED = 2000  # points of each split in the audit of the denoising loss
RECIPES = config.RECIPES / "scores"
SMALL = 256  # features of an image up to which the distance of pixels says which image is like another


@dataclass(frozen=True)
class ScoreSettings:
    """What to fit and how much to sample."""

    data: DataName = "digits"  # data set, as for training.run
    data_root: Path | None = None  # folder with the files of CIFAR or SVHN; None is $SCOREMATCH_DATA
    download: bool = False  # let torchvision download them into that folder where they are missing
    image_size: int | None = None  # folder: as for training.run
    validation_size: int | None = None  # held-out images of CIFAR, SVHN and folders; None as for training.run
    limit: int = 0  # number of training points to keep, class-balanced on images; 0 keeps all
    recipe: str | None = None  # file in training/recipes/scores, by its name without .toml, or a path
    # samples to draw, spread evenly over the classes; 0 draws none, None is 1000 from a score network
    samples: int | None = None
    # probability-flow ODE (Heun), or annealed Langevin dynamics; auto is heun for networks trained up to noise of ten
    # times the spread of the data, from which it starts, and langevin for others
    sampler: Literal["auto", "heun", "langevin"] = "auto"
    levels: int = 20  # noise levels of the sampler, falling geometrically
    steps_per_level: int = 10  # Langevin steps at each of them
    # choose how to read the trained networks by held-out likelihood, and say whether the best posterior is worth
    # following; writes audit.html, audit.json and chosen.toml
    audit: bool = False
    eps: float | None = None  # audit: radius of the attack in input units; None is that of the data set's recipe
    norm: Literal["linf", "l2", "l1"] | None = None  # audit: its norm; None is that of the data set's recipe
    # audit: .npy with label distributions [N, L] that people gave for the test points, such as CIFAR-10H
    human_labels: Path | None = None
    # audit: posterior.pt of training.run or of this program, instead of fitting one; its folder is where the files go
    posterior_from: Path | None = None
    judge_epochs: int | None = None  # epochs of the classifier that judges the samples; None depends on the data set
    # TorchScript module from uint8 [N, 3, H, W] to features [N, F]: the Fréchet distance is also measured in these
    feature_network: Path | None = None
    precision: PrecisionWish | None = None  # as in training.run; None is that of the data set's recipe
    compile: Switch = "auto"  # torch.compile; auto on CUDA for trainings long enough
    save_minutes: float = 15.0  # minutes between checkpoints, beside those at each look at held-out data
    deterministic: bool = False  # let torch use deterministic algorithms only
    seed: int = 0  # decides initialisation, batches, noise and samples
    threads: int = 0  # CPU threads; 0 is all available
    device: str = "auto"  # torch device; auto is cuda where there is one
    out: Path | None = None  # folder; None is runs/score-DATA-seedSEED, with the name of another posterior for score
    resume: Path | None = None  # go on in this folder, with its settings
    # estimate of p_d(y|x) to fit; a score network is the one that can be sampled
    posterior: Literal["score_network", "joint_energies", "noise_conditional_classifier"] = "score_network"
    posterior_settings: PosteriorSettings = field(default_factory=PosteriorSettings)

    @property
    def data_settings(self) -> DataSettings:
        return DataSettings(
            self.data,
            self.limit,
            root=self.data_root,
            download=self.download,
            validation_size=self.validation_size,
            image_size=self.image_size,
        )

    @property
    def draws(self) -> int:
        """How many samples."""
        if self.samples is None:
            return 1000 if self.posterior == "score_network" else 0
        return self.samples


LAYOUT = Layout(
    first=("data", "data_root", "recipe", "posterior", "limit", "samples", "audit", "seed", "out", "resume"),
    groups={
        "Data": "data",
        "Samples": "samples",
        "Audit": "audit",
        "How, and where to": "precision",
        "The posterior and its training; None is what was tuned for the data set": "posterior",
    },
)
NOT_SAVED = ("out", "resume", "recipe", "download", "audit", "eps", "norm", "human_labels", "posterior_from")
# A posterior.pt knows these.
OF_FILE = ("data", "limit", "image_size", "validation_size", "posterior", "posterior_settings")
RANGES: dict[str, config.Check] = {
    "samples": (lambda v: v is None or v == 0 or v >= 10, "0 (none), or at least 10"),
    "steps_per_level": config.AT_LEAST_ONE,
    "levels": (lambda v: v >= 2, "at least 2"),
    "eps": config.or_none(config.POSITIVE),
    "judge_epochs": config.or_none(config.AT_LEAST_ONE),
    "save_minutes": config.RANGES["save_minutes"],
    "limit": config.RANGES["limit"],
    "image_size": config.RANGES["image_size"],
    "validation_size": config.RANGES["validation_size"],
    "seed": config.RANGES["seed"],
    "threads": config.RANGES["threads"],
}


def main(arguments: list[str]) -> None:
    settings = parse(arguments)
    torch.set_num_threads(config.resolve_threads(settings.threads))
    if settings.deterministic:
        hardware.only_deterministic()
    device = distributed.device_of_this_process(config.resolve_device(settings.device))
    with distributed.processes(device):
        if distributed.rank() == 0:
            unused.print_notes(unused.unused_of_data(settings.data, arguments))
        run(settings, device)


def parse(arguments: Sequence[str]) -> ScoreSettings:
    """Defaults, then a recipe or the settings of the folder to resume or of the file to audit, then options."""
    folder = command_line.value_of(arguments, "resume")
    recipe = command_line.value_of(arguments, "recipe")
    file = command_line.value_of(arguments, "posterior-from")
    default = ScoreSettings()
    if file is not None:
        if folder is not None or recipe is not None:
            raise InputError(f"posterior_from: {file} with --{'resume' if folder else 'recipe'}, allowed: one of them")
        default = settings_of_file(Path(file))
    elif folder is not None:
        default = saved_settings(Path(folder) / "config.toml")
    elif recipe is not None:
        path = RECIPES / f"{recipe}.toml" if (RECIPES / f"{recipe}.toml").exists() else Path(recipe)
        if not path.is_file():
            names = sorted(found.stem for found in RECIPES.glob("*.toml"))
            raise InputError(f"recipe: {recipe!r} is unknown, allowed: {', '.join(names)}, or the path of a file")
        default = from_table(config.read_toml(path), str(path))
    settings = command_line.parse(
        ScoreSettings,
        arguments,
        program="python -m training.score",
        description="Fit a posterior of a data set, a score network or another, sample from it and audit it.",
        layout=LAYOUT,
        default=default,
    )
    if kept := folder or file:
        given, known = flat(as_table(settings)), flat(as_table(default))
        for name in sorted({*given, *known}):
            fixed = (folder is not None and name != "device") or name.partition(".")[0] in OF_FILE
            if fixed and given.get(name) != known.get(name):
                raise InputError(f"{name}: {given.get(name)!r} contradicts {kept}, whose training keeps its settings")
    if folder is not None:
        settings = dataclasses.replace(settings, out=Path(folder), resume=Path(folder))
    else:
        root = data.root_from_anywhere(settings.data, settings.data_root)
        settings = dataclasses.replace(settings, data_root=root)
    config.check_ranges(settings, RANGES)
    if file is not None:
        if not settings.audit:
            raise InputError("posterior_from: is for --audit, which is not given")
        for name in ("samples", "feature_network"):
            if value := getattr(settings, name):
                raise InputError(f"{name}: {value} with posterior_from, which is only audited, allowed: without")
        return settings
    try:
        named = dataclasses.replace(settings.posterior_settings, name=settings.posterior)
    except ValueError as error:
        raise InputError(f"posterior_settings: {error}") from None
    if settings.posterior == "score_network" and (folds := named.number_of_folds) > 1:
        raise InputError(f"posterior_settings.folds: {folds}, allowed: 1; training.run fits the mean of several")
    if settings.posterior != "score_network" and settings.draws:
        raise InputError(f"samples: {settings.draws} with {settings.posterior}, allowed: 0, or with score_network")
    return dataclasses.replace(settings, posterior_settings=named)


def saved_settings(path: Path) -> ScoreSettings:
    if not path.is_file():
        raise InputError(f"resume: {path.parent} holds no config.toml, expected the folder of an earlier call")
    table = config.read_toml(path)
    if "objective" in table:
        raise InputError(f"resume: {path.parent} is a folder of training.run, expected one of training.score")
    return from_table(table, str(path))


def settings_of_file(path: Path) -> ScoreSettings:
    """What a posterior.pt says of its data and of itself, and its folder of where the data are."""
    saved = checkpoint.load(path)["settings"]
    name = saved.get("name")
    if name not in FITTED:
        raise InputError(f"posterior_from: {path} holds a {name}, expected one of {', '.join(FITTED)}")
    if "data" not in saved:
        raise InputError(f"posterior_from: {path} does not say of which data it is, expected a file of this version")
    beside = path.parent / "config.toml"
    root = config.read_toml(beside).get("data_root") if beside.is_file() else None
    return ScoreSettings(
        data=saved["data"],
        data_root=None if root is None else Path(root),
        limit=saved.get("limit", 0),
        image_size=saved.get("image_size"),
        validation_size=saved.get("validation_size"),
        posterior=name,
        posterior_settings=posteriors.settings_from(path, PosteriorSettings(name)),
    )


def from_table(table: dict[str, Any], where: str) -> ScoreSettings:
    values = tables.typed_table(table, ScoreSettings, where, exclude=NOT_SAVED)
    nested = tables.typed_table(values.pop("posterior_settings", {}), PosteriorSettings, f"{where}: posterior_settings")
    try:
        return ScoreSettings(**values, posterior_settings=PosteriorSettings(**nested))
    except ValueError as error:
        raise InputError(f"{where}: posterior_settings: {error}") from None


def as_table(settings: ScoreSettings) -> dict[str, Any]:
    return {name: value for name, value in tables.plain(settings).items() if name not in NOT_SAVED}


def flat(table: dict[str, Any]) -> dict[str, Any]:
    """The values of a table, those of the posterior with their names on the command line."""
    nested = table.pop("posterior_settings")
    return {**table, **{f"posterior_settings.{name}": value for name, value in nested.items()}}


def run(settings: ScoreSettings, device: torch.device) -> None:
    if settings.precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision: 'tf32' on {device}, allowed: auto, float32 or bfloat16, or a CUDA device")
    load = functools.partial(data.load, settings.data_settings)
    loaded = (distributed.in_turns(load) if settings.download else load()).to(device)
    for name in ("eps", "norm", "human_labels"):
        if getattr(settings, name) is not None and not settings.audit:
            raise InputError(f"{name}: is for --audit, which is not given")
    if settings.audit and not len(loaded.x_validation):
        raise InputError(f"audit: {settings.data} has no validation points, by which it judges")
    if settings.audit:
        _threat_model(settings, loaded)  # refuses a radius before the training
    people = audit.read_people(settings.human_labels, loaded) if settings.human_labels else None
    if settings.posterior_from is not None:
        audit_file(settings, settings.posterior_from, loaded, people)
        return
    if len(loaded.input_shape) != 3 and settings.data != "toy":
        raise InputError(
            f"data: {settings.data} has inputs {list(loaded.input_shape)}, allowed: images, and the toy; training.run "
            "fits a posterior of others by itself"
        )
    if 0 < settings.draws < loaded.num_classes:
        raise InputError(f"samples: {settings.draws}, allowed: at least {loaded.num_classes}, one of each class")
    if settings.draws and settings.data != "toy" and not math.isfinite(loaded.upper - loaded.lower):
        raise InputError(
            f"samples: {settings.draws} of {settings.data}, whose values lie in [{loaded.lower:g}, {loaded.upper:g}], "
            "allowed: --samples 0, or data with finite bounds, which an image needs"
        )
    features = judge.load_features(settings.feature_network, loaded) if settings.feature_network else None
    resolved = config.resolved_posterior(settings.posterior_settings, settings.data, loaded.format)
    with ExitStack() as claims:
        out = distributed.by_first(lambda: prepare_folder(settings, claims))
        finished = (out / "score.json").exists()
        if finished and distributed.rank() == 0:
            print(f"{out} is finished already")
            print_result(checkpoint.read_json(out / "score.json"), out)
        if finished and not settings.audit:
            return
        speed = speed_of(settings, resolved, hardware.hardware_of(device))
        hardware.prepare(device, speed.precision, deterministic=settings.deterministic)
        try:
            posterior, seconds = trained(settings, resolved, loaded, speed, out)
            if distributed.rank() == 0:
                if not finished:
                    report(settings, resolved, loaded, posterior, features, seconds, out)
                if settings.audit:
                    audited(settings, resolved, loaded, posterior, people, out / "posterior.pt", out)
            distributed.barrier()
        except Interrupted as signal:
            resume = command_line.command("python", "-m", "training.score", "--resume", out)
            raise Interrupted(f"{signal}; continue with: {resume}") from None


def audit_file(settings: ScoreSettings, path: Path, loaded: Data, people: Tensor | None) -> None:
    """The audit of a posterior that has been fitted before."""
    data.check_record(checkpoint.load(path).get("data"), loaded, path, exact=True)
    device = loaded.x_train.device
    state = posteriors.state_from(path, settings.posterior_settings, loaded, device)
    posterior = posteriors.build(settings.posterior_settings, loaded, seed=0, device=device, state=state)
    out = settings.out or path.parent
    if distributed.rank() == 0:
        with claimed(out):
            audited(settings, settings.posterior_settings, loaded, posterior, people, path, out)


def prepare_folder(settings: ScoreSettings, claims: ExitStack) -> Path:
    """The folder of the training, claimed, with its config.toml. What is in it is continued only if asked for."""
    kind = "score" if settings.posterior == "score_network" else settings.posterior.replace("_", "-")
    usual = Path("runs") / f"{kind}-{data.slug(settings.data)}-seed{settings.seed}"
    out = settings.resume or settings.out or usual
    claims.enter_context(claimed(out))
    if settings.resume is not None:
        return out
    path, content = out / "config.toml", tomli_w.dumps(as_table(settings))
    if path.exists():
        if distributed.restarts() and path.read_text(encoding="utf-8") == content and not (out / "score.json").exists():
            return out
        raise InputError(
            f"out: {out} holds a posterior already, give {command_line.command('--resume', out)} or another folder"
        )
    refuse_left_over(out, OF_SCORES_FOLDER)
    checkpoint.write_atomically(path, content)
    return out


def speed_of(settings: ScoreSettings, resolved: PosteriorSettings, device: hardware.Hardware) -> Speed:
    """How the networks are called in their training."""
    recipe = config.from_recipes(settings.data, None, root=settings.data_root, image_size=settings.image_size)
    wish, steps = settings.precision or recipe.precision, resolved.steps or 0
    return Speed(
        precision=hardware.precision_of(wish, device),
        compile=hardware.compiles(settings.compile, device, steps),
        fused=device.kind == "cuda",
    )


def trained(
    settings: ScoreSettings, resolved: PosteriorSettings, loaded: Data, speed: Speed, out: Path
) -> tuple[Posterior, float]:
    """The posterior with its networks trained, saved as posterior.pt, and the seconds that this took."""
    about = posteriors.description(resolved, settings.data_settings)
    if distributed.rank() == 0:
        sizes = ", ".join(f"{count} {name}" for name, count in loaded.sizes.items())
        print(f"{settings.posterior.replace('_', ' ')} of {settings.data}: {sizes}; {speed}; folder {out}", flush=True)
    begin = time.perf_counter()
    try:
        posterior = posteriors.build(
            resolved,
            loaded,
            seed=settings.seed,
            device=loaded.x_train.device,
            folder=out,
            speed=speed,
            save_minutes=settings.save_minutes,
            about=about,
        )
    except ValueError as error:
        raise InputError(f"posterior_settings: {error}") from None
    if distributed.rank() == 0:
        checkpoint.save(
            out / "posterior.pt", epoch=0, settings=about, network=posterior.state_dict(), data=loaded.record()
        )
    return posterior, time.perf_counter() - begin


def _threat_model(settings: ScoreSettings, loaded: Data) -> ThreatModel:
    """What the audit attacks with."""
    recipe = config.from_recipes(settings.data, None, root=settings.data_root, image_size=settings.image_size)
    norm, eps = settings.norm or recipe.norm, settings.eps or recipe.eps
    loaded.format.check_radius(norm, eps)
    return ThreatModel(norm, eps, lower=loaded.lower, upper=loaded.upper)


def audited(
    settings: ScoreSettings,
    resolved: PosteriorSettings,
    loaded: Data,
    posterior: Posterior,
    people: Tensor | None,
    path: Path,
    out: Path,
) -> None:
    """The audit, printed, and how to train with what it chose out of posterior.pt."""
    threat_model = _threat_model(settings, loaded)
    print(f"audit under {threat_model.norm}, eps {threat_model.eps:g}")
    best, told = audit.write(posterior, resolved, loaded, threat_model, seed=settings.seed, out=out, people=people)
    print(told)
    print(f"{out / 'audit.html'} shows it, {out / 'chosen.toml'} has the best settings with their evidence")
    print(f"to train with them: {command_of(settings, resolved, loaded, best, path)}")


def command_of(
    settings: ScoreSettings, resolved: PosteriorSettings, loaded: Data, best: audit.Candidate, path: Path
) -> str:
    """The command of training.run that reads these networks as the audit chose, or else trains those that it chose."""
    chosen = best.settings
    words: list[str | Path] = ["python", "-m", "training.run", "--objective", "score_direct", "--data", settings.data]
    for name in ("data_root", "limit", "image_size", "validation_size", "norm", "eps"):
        if (value := getattr(settings, name)) not in (None, 0):
            words += [f"--{name.replace('_', '-')}", value if isinstance(value, Path) else str(value)]
    words += ["--posterior", chosen["posterior"]]
    if chosen["posterior"] == settings.posterior:
        words += ["--posterior-from", path]
        changes = {key: value for key, value in chosen["posterior_settings"].items() if value != getattr(resolved, key)}
    else:
        changes = audit.options_of(best, resolved, loaded)["posterior_settings"]
    for name, value in changes.items():
        if isinstance(getattr(PosteriorSettings, name), bool):  # a switch, by its default
            words.append(f"--posterior-settings.{'' if value else 'no-'}{name}")
        else:
            words += [f"--posterior-settings.{name}", *map(str, value if isinstance(value, list) else [value])]
    return command_line.command(*words)


def report(
    settings: ScoreSettings,
    resolved: PosteriorSettings,
    loaded: Data,
    posterior: Posterior,
    features: judge.Features | None,
    seconds: float,
    out: Path,
) -> None:
    """What the posterior has learned: score.json, and pictures of a score network."""
    loss = "denoising_error" if isinstance(posterior, ScoreNetwork) else "cross_entropy"
    result: dict[str, Any] = {
        "data": settings.data,
        "seed": settings.seed,
        "limit": settings.limit,
        "posterior_settings": tables.plain(resolved),
        "train_seconds": seconds,
        "split": loaded.sizes,
        loss: losses(posterior, resolved, loaded, settings.seed),
    }
    if isinstance(posterior, ScoreNetwork):
        result |= pictured(settings, resolved, loaded, posterior, features, out)
    checkpoint.write_json(out / "score.json", result)
    print_result(result, out)


def pictured(
    settings: ScoreSettings,
    resolved: PosteriorSettings,
    loaded: Data,
    posterior: ScoreNetwork,
    features: judge.Features | None,
    out: Path,
) -> dict[str, Any]:
    """The scores of the toy beside the true ones, or samples and what a classifier says of them."""
    if settings.data == "toy":
        score_network.scores_of_toy(posterior).savefig(out / "scores.png", dpi=150)
        return {"oracle": toy_scores.relative_errors(posterior.denoiser)}
    if not settings.draws:
        return {}
    sampler, options = sampler_of(settings, resolved, posterior.denoiser)
    x, y = draw(posterior.denoiser, loaded, settings.draws, sampler, options, settings.seed)
    network = judge.train(loaded, settings.judge_epochs, settings.seed)
    found = {"sampler": sampler, **judge.measure(network, x, y, loaded)}
    if features is not None:
        distances = judge.frechet_distances(features, x, loaded, settings.seed)
        found |= {f"feature_network_{name}": value for name, value in distances.items()}
    like = (lambda images: images.flatten(1)) if x[0].numel() <= SMALL else judge.features_of(network)
    np.savez_compressed(out / "samples.npz", image=score_network.pixels(x, loaded), label=y.cpu().numpy())
    score_network.samples_by_class(x, y, loaded, like).savefig(out / "samples.png", dpi=150)
    return {"samples": found}


def losses(posterior: Posterior, resolved: PosteriorSettings, loaded: Data, seed: int) -> list[dict[str, float]]:
    """Loss at each noise level on training and on held-out points: their gap is memorisation."""
    parts = list(posteriors.divided(resolved, loaded, loaded.x_train.device))
    few = [loaded.few(AUDITED, len(x)) for x, _, _ in parts]
    splits = {"train": [(x[index], y[index]) for (x, y, _), index in zip(parts, few, strict=True)]}
    if len(loaded.x_validation):
        index = loaded.few(AUDITED, len(loaded.x_validation))
        splits["validation"] = [(loaded.x_validation[index], loaded.y_validation[index])] * len(parts)
    sigmas = scores.levels(loaded.format.width)
    found = {
        name: posteriors.mean_losses(posterior, points, sigmas, seed=seed, repeats=1) for name, points in splits.items()
    }
    return [{"sigma": sigma, **{name: values[sigma] for name, values in found.items()}} for sigma in sigmas]


def sampler_of(settings: ScoreSettings, resolved: PosteriorSettings, denoiser: Denoiser) -> tuple[str, dict[str, Any]]:
    """The name of the sampler and its options."""
    high, low = resolved.sigma_max, resolved.sigma_min
    assert high is not None
    assert low is not None
    options: dict[str, Any] = {"sigmas": sampling.noise_levels(high, low, settings.levels)}
    name = generate.sampler_of(settings.sampler, denoiser, high)
    if name == "langevin":
        options["steps_per_level"] = settings.steps_per_level
    return name, options


def draw(
    denoiser: Denoiser, loaded: Data, samples: int, sampler: str, options: dict[str, Any], seed: int
) -> tuple[Tensor, Tensor]:
    """Class-conditional samples, clipped to the box."""
    device = loaded.x_train.device
    y = torch.arange(samples, device=device) % loaded.num_classes
    generator = torch.Generator(device).manual_seed(seed)
    function = sampling.heun if sampler == "heun" else sampling.annealed_langevin
    parts = [
        function(denoiser, (len(labels), *loaded.input_shape), class_labels=labels, generator=generator, **options)
        for labels in y.split(CHUNK)
    ]
    return torch.cat(parts).clamp(loaded.lower, loaded.upper), y


def print_result(result: dict[str, Any], out: Path) -> None:
    print(f"{'sigma':>8}{'loss, train':>14}{'validation':>12}")
    for row in result["denoising_error"] if "denoising_error" in result else result["cross_entropy"]:
        held_out = f"{row['validation']:>12.4f}" if "validation" in row else f"{'–':>12}"
        print(f"{row['sigma']:>8g}{row['train']:>14.4f}{held_out}")
    if "oracle" in result:
        print("relative mean squared error of the centred class scores, |x| < 4:")
        for row in result["oracle"]:
            print(
                f"  sigma {row['sigma']:g}: {100 * row['relative_error_data_weighted']:.2f} % over the data, "
                f"{100 * row['relative_error_uniform']:.2f} % over x uniformly"
            )
    if "samples" in result:
        print(judge.sentences(result["samples"]))
    print(f"trained in {result['train_seconds']:.0f} s, written to {out}")


if __name__ == "__main__":
    sys.exit(run_program(main))
