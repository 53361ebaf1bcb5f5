"""Make generated training images with a trained score network: ``python -m training.generate``.

    python -m training.score --data cifar10 --data-root FOLDER --device cuda
    python -m training.generate --posterior-from runs/score-cifar10-seed0/posterior.pt --data-root FOLDER \
        --count 1000000 --out cifar10-1m.npz
    python -m training.run --data cifar10 --generated cifar10-1m.npz …

Images are drawn by the probability-flow ODE (Heun) or by annealed Langevin dynamics, as many of each class, in a
shuffled order. The batches are kept in a folder beside the file until all are there; the same command goes on after an
interruption, to the same bytes.
"""

import functools
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scorematch import sampling
from scorematch.networks import Denoiser
from training import data
from training.data import DataName, DataSettings, generated
from training.engine import checkpoint, posteriors
from training.engine.claims import claimed
from training.engine.progress import progress_bar
from training.settings import command_line, config
from training.settings.errors import InputError, Interrupted, StopError, run_program


@dataclass(frozen=True)
class GenerateSettings:
    """What makes the images, and how many."""

    out: Path  # .npz to write; until it is complete its batches lie beside it, in OUT.parts
    posterior_from: Path | None = None  # posterior.pt of training.score or training.run, with a score network
    run: Path | None = None  # folder of training.score or training.run, instead of its posterior.pt
    data: DataName | None = None  # data set of the score network, where neither file nor folder says it
    # folder with the files of CIFAR or SVHN, or of --data folder; None is the run's, or $SCOREMATCH_DATA
    data_root: Path | None = None
    image_size: int | None = None  # of --data folder, where neither file nor folder says it
    limit: int | None = None  # training points that the score network saw, where neither file nor folder says it
    count: int = 50_000  # images to make
    batch_size: int = 500  # images at a time; decides memory and, with the seed, the images
    # probability-flow ODE, or annealed Langevin dynamics; auto is heun for networks trained up to noise of ten times
    # the spread of the data, from which it starts, and langevin for others
    sampler: Literal["auto", "heun", "langevin"] = "auto"
    levels: int = 32  # noise levels of the sampler, falling geometrically; each costs heun two passes of the network
    steps_per_level: int = 10  # langevin: steps, and passes of the network, at each noise level
    sigma_max: float | None = None  # highest noise level, in input units; None is that of the training
    sigma_min: float | None = None  # lowest noise level, in input units; None is that of the training
    seed: int = 0  # decides labels and images
    threads: int = 0  # CPU threads; 0 is all available
    device: str = "auto"  # torch device; auto is cuda where there is one; another kind gives other random numbers


RANGES: dict[str, config.Check] = {
    "limit": (lambda v: v is None or v >= 0, "0 (all) or a number of points"),
    "image_size": config.RANGES["image_size"],
    "count": config.AT_LEAST_ONE,
    "batch_size": config.AT_LEAST_ONE,
    "levels": (lambda v: v >= 2, "at least 2"),
    "steps_per_level": config.AT_LEAST_ONE,
    "sigma_max": config.or_none(config.POSITIVE),
    "sigma_min": config.or_none(config.POSITIVE),
    "seed": config.RANGES["seed"],
    "threads": config.RANGES["threads"],
}


@dataclass(frozen=True)
class Generator:
    """A score network and what decides its images."""

    denoiser: Denoiser
    shape: tuple[int, ...]  # [C, H, W] of one image
    draw: Callable[..., Tensor]  # sampler(denoiser, shape, class_labels=…, generator=…)
    count: int
    batch: int
    seed: int

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch)

    def labels(self, number: int) -> np.ndarray:
        """The labels int64 [n] of a batch; over all batches the numbers of the classes differ by at most one."""
        positions = np.arange(number * self.batch, min(self.count, (number + 1) * self.batch))
        order = generated.Permutation(self.count, self.seed)
        return order(positions) % self.denoiser.num_classes

    def images(self, number: int) -> np.ndarray:
        """The images uint8 [n, H, W, C] of a batch, a function of the seed and the number alone."""
        device = self.denoiser.center.device
        labels = torch.from_numpy(self.labels(number)).to(device)
        state = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
        x = self.draw(
            self.denoiser,
            (len(labels), *self.shape),
            class_labels=labels,
            generator=torch.Generator(device).manual_seed(int(state[0]) >> 1),
        )
        return _pixels(x)


def _pixels(x: Tensor) -> np.ndarray:
    """x [n, C, H, W] in [0, 1], clipped, as uint8 [n, H, W, C]."""
    if not torch.isfinite(x).all():
        raise StopError("the score network gave values that are not finite; train it longer, or with a smaller lr")
    return (255 * x.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        GenerateSettings,
        arguments,
        program="python -m training.generate",
        description="Make generated training images with a trained score network.",
    )
    config.check_ranges(settings, RANGES)
    generated.check_free(settings.out)
    torch.set_num_threads(config.resolve_threads(settings.threads))
    device = config.resolve_device(settings.device)
    path = posterior_path(settings)
    generator, sampler = load(settings, path, device)
    identity = {
        "posterior": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sampler": sampler,
        "count": settings.count,
        "batch": settings.batch_size,
        "seed": settings.seed,
        "device": device.type,
    }
    parts = settings.out.with_name(f"{settings.out.name}.parts")
    with claimed(parts):
        describe_parts(parts, identity)
        begin = time.perf_counter()
        try:
            made = make(generator, parts)
        except Interrupted as signal:
            done = sum(part_path(parts, number).exists() for number in range(generator.batches))
            raise Interrupted(
                f"{signal}, {done} of {generator.batches} batches are in {parts}; the same command goes on"
            ) from None
        seconds = time.perf_counter() - begin
        join(generator, parts, settings.out)
        shutil.rmtree(parts)
    print_result(generator, settings.out, made, seconds)


def posterior_path(settings: GenerateSettings) -> Path:
    if (settings.posterior_from is None) == (settings.run is None):
        given = "both" if settings.run else "neither"
        raise InputError(f"posterior_from, run: {given} given, expected one of them")
    if settings.run is None:
        return settings.posterior_from or Path()
    expected = "of training.score, or of a run with a score network"
    if not settings.run.is_dir():
        raise InputError(f"run: {settings.run} is not a folder, expected that {expected}")
    path = settings.run / "posterior.pt"
    if not path.is_file():
        raise InputError(f"run: {settings.run} holds no posterior.pt, expected the folder {expected}")
    return path


def load(settings: GenerateSettings, path: Path, device: torch.device) -> tuple[Generator, dict[str, Any]]:
    """The score network in ``path`` with the data set that it was trained on, and what describes its sampler."""
    saved = checkpoint.load(path)
    kind = saved["settings"].get("name")
    if kind != "score_network":
        raise InputError(f"posterior_from: {path} holds a {kind}, expected a score_network")
    source = _data_settings(settings, path, saved["settings"])
    loaded = data.load(source)
    if len(loaded.input_shape) != 3:
        raise InputError(f"data: {source.name} has no images but inputs {list(loaded.input_shape)}, expected images")
    if (loaded.lower, loaded.upper) != (0.0, 1.0):
        given = f"{source.name} has values from {loaded.lower:g} to {loaded.upper:g}"
        raise InputError(f"data: {given}, allowed: images in [0, 1], which a file of pixels can hold")
    data.check_record(saved.get("data"), loaded, path)
    if settings.count < loaded.num_classes:
        raise InputError(f"count: {settings.count}, allowed: at least {loaded.num_classes}, one of each class")
    trained, posterior = posteriors.read(path, loaded, device)
    try:
        high, low = settings.sigma_max or trained.sigma_max, settings.sigma_min or trained.sigma_min
        sigmas = sampling.noise_levels(high or 0.0, low or 0.0, settings.levels)
    except ValueError as error:
        raise InputError(f"sigma_min, sigma_max: {error}") from None
    options: dict[str, Any] = {"sigmas": sigmas}
    sampler = sampler_of(settings.sampler, posterior.denoiser, sigmas[0])
    if sampler == "langevin":
        options["steps_per_level"] = settings.steps_per_level
    function = sampling.heun if sampler == "heun" else sampling.annealed_langevin
    draw = functools.partial(function, **options)
    generator = Generator(
        posterior.denoiser, loaded.input_shape, draw, settings.count, settings.batch_size, settings.seed
    )
    return generator, {"name": sampler, **options}


def sampler_of(wish: str, denoiser: Denoiser, sigma_max: float) -> str:
    """The sampler for a wish: ``auto`` is ``heun`` if the highest level is ten times the spread of the data or more.

    The ODE starts from pure noise, so the highest noise level must be far larger than the data.
    """
    if wish != "auto":
        return wish
    return "heun" if sigma_max >= 10 * denoiser.sigma_data else "langevin"


def _data_settings(settings: GenerateSettings, path: Path, saved: dict[str, Any]) -> DataSettings:
    """The training set of the score network: what its file says, or the run beside it; options must not contradict."""
    beside = path.parent / "config.toml"
    known = {**(config.read_toml(beside) if beside.is_file() else {}), **saved}
    for option in ("data", "limit", "image_size"):
        given = getattr(settings, option)
        if given is not None and option in known and known[option] != given:
            raise InputError(f"{option}: {given}, but {path} was trained with {known[option]}")
    name = known.get("data", settings.data)
    if name is None:
        raise InputError(f"data: none given, and {path} does not say what it was trained on; expected --data NAME")
    if name not in data.NAMES and not data.is_own(name):
        allowed = ", ".join([*data.NAMES, "module:function"])
        raise InputError(f"data: {name!r} in {path} is unknown, allowed: {allowed}")
    root = settings.data_root or (Path(known["data_root"]) if "data_root" in known else None)
    size = known.get("image_size", settings.image_size)
    return DataSettings(
        name,
        known.get("limit", settings.limit or 0),
        root=root,
        validation_size=known.get("validation_size"),
        image_size=size,
    )


def describe_parts(parts: Path, identity: dict[str, Any]) -> None:
    """Write down which images the folder holds batches of. If that is written already, it must be the same.

    Raises:
        InputError: the folder holds batches of other images.
    """
    description = parts / "settings.json"
    if description.exists():
        given = checkpoint.read_json(description)
        changed = [key for key in identity if given.get(key) != identity[key]]
        if changed:
            raise InputError(
                f"out: {parts} holds batches with another {', '.join(changed)}; remove it, or give another out"
            )
    else:
        checkpoint.write_json(description, identity)


def part_path(parts: Path, number: int) -> Path:
    return parts / f"{number:07d}.npz"


def make(generator: Generator, parts: Path) -> int:
    """Make the batches that are missing; the number of images made."""
    missing = [number for number in range(generator.batches) if not part_path(parts, number).exists()]
    made = 0
    with progress_bar(
        total=generator.count,
        initial=generator.count - sum(len(generator.labels(number)) for number in missing),
        desc="generate",
        unit="image",
    ) as progress:
        for number in missing:
            labels = generator.labels(number)
            generated.save(part_path(parts, number), generator.images(number), labels)
            made += len(labels)
            progress.update(len(labels))
    return made


def join(generator: Generator, parts: Path, out: Path) -> None:
    """All batches as one file."""
    labels = np.concatenate([generator.labels(number) for number in range(generator.batches)])

    def images() -> Iterator[np.ndarray]:
        for number in range(generator.batches):
            yield generated.read(part_path(parts, number))[0]

    channels, *size = generator.shape
    generated.write(out, (generator.count, *size, channels), images(), labels)


def print_result(generator: Generator, out: Path, made: int, seconds: float) -> None:
    per_class = generator.count / generator.denoiser.num_classes
    print(f"  images          {generator.count}, {per_class:g} of each of {generator.denoiser.num_classes} classes")
    print(f"  made in         {seconds:.0f} s, {made / max(seconds, 1e-9):.1f} images/s" if made else "  made before")
    print(f"  file            {out}, {out.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    sys.exit(run_program(main))
