"""Train the score network of a data set, sample from it and audit it: ``python -m training.score --data digits``.

Writes into its folder: posterior.pt (for ``training.run`` and ``training.generate``), score.json, samples.png and
samples.npz (the format of generated data: ``image`` uint8, ``label``) or, on the toy, scores.png.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from scorematch import matching, sampling
from scorematch.networks import Denoiser
from scorematch.posteriors import ScoreNetwork
from training import checkpoint, command_line, config, data, measures, models, posteriors, toy
from training.data import Data, DataName, DataSettings
from training.errors import InputError, run_program
from training.posteriors import PosteriorSettings

SIGMAS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)  # noise levels of the audit, in input units
CHUNK = 1000  # samples drawn, or distances computed, at a time
ROWS = 20  # classes shown in samples.png
AUDITED = 2000  # points of each split in the audit of the denoising loss and of the distances


@dataclass(frozen=True)
class ScoreSettings:
    """What to train and how much to sample."""

    data: DataName = "digits"  # data set
    data_root: Path | None = None  # folder with the files of CIFAR or SVHN; None is $SCOREMATCH_DATA
    download: bool = False  # let torchvision download them into that folder where they are missing
    image_size: int | None = None  # folder: as for training.run
    limit: int = 0  # number of training points to keep, class-balanced on images; 0 keeps all
    samples: int = 1000  # samples to draw, spread evenly over the classes
    steps_per_level: int = 10  # Langevin steps at each of the noise levels
    levels: int = 20  # noise levels of the sampler, falling geometrically
    judge_epochs: int = 40  # training of the classifier that is to recognise the samples
    seed: int = 0  # decides initialisation, batches, noise and samples
    threads: int = 0  # CPU threads; 0 is all available
    device: str = "auto"  # torch device; auto is cuda where there is one
    out: Path | None = None  # folder; None is runs/score-DATA-seedSEED
    posterior_settings: PosteriorSettings = field(default_factory=PosteriorSettings)


RANGES: dict[str, config.Check] = {
    "samples": (lambda v: v >= 10, "at least 10"),
    "steps_per_level": (lambda v: v >= 1, "at least 1"),
    "levels": (lambda v: v >= 2, "at least 2"),
    "judge_epochs": (lambda v: v >= 1, "at least 1"),
    "limit": config.RANGES["limit"],
    "image_size": config.RANGES["image_size"],
    "seed": config.RANGES["seed"],
    "threads": config.RANGES["threads"],
}


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        ScoreSettings,
        arguments,
        program="python -m training.score",
        description="Train the score network of a data set, sample from it and audit it.",
        default=ScoreSettings(),
    )
    config.check_ranges(settings, RANGES)
    if settings.posterior_settings.name != "score_network":
        raise InputError(f"posterior_settings.name: {settings.posterior_settings.name!r}, allowed: score_network")
    device = config.resolve_device(settings.device)
    torch.set_num_threads(config.resolve_threads(settings.threads))
    source = DataSettings(
        settings.data,
        settings.limit,
        root=settings.data_root,
        download=settings.download,
        image_size=settings.image_size,
    )
    loaded = data.load(source).to(device)
    if len(loaded.input_shape) != 3 and settings.data != "toy":
        raise InputError(
            f"data: {settings.data} has inputs {list(loaded.input_shape)}, allowed: images, and the toy; training.run "
            "trains a score network of others by itself"
        )
    if settings.samples < loaded.num_classes:
        raise InputError(f"samples: {settings.samples}, allowed: at least {loaded.num_classes}, one of each class")
    out = settings.out or Path("runs") / f"score-{data.slug(settings.data)}-seed{settings.seed}"
    if (out / "score.json").exists():
        raise InputError(f"out: {out} holds a score network already, give another folder")
    out.mkdir(parents=True, exist_ok=True)

    begin = time.perf_counter()
    resolved = config.resolved_posterior(settings.posterior_settings, settings.data, loaded.input_shape)
    try:
        posterior = posteriors.build(resolved, loaded, seed=settings.seed, device=device)
    except ValueError as error:
        raise InputError(f"posterior_settings: {error}") from None
    assert isinstance(posterior, ScoreNetwork)
    result: dict[str, Any] = {
        "data": settings.data,
        "seed": settings.seed,
        "limit": settings.limit,
        "posterior_settings": config.plain(resolved),
        "train_seconds": time.perf_counter() - begin,
        "split": loaded.sizes,
        "denoising_error": denoising_errors(posterior.denoiser, loaded, settings.seed),
    }
    saved = {**config.plain(resolved), "data": settings.data, "limit": settings.limit}
    if settings.image_size is not None:
        saved["image_size"] = settings.image_size
    checkpoint.save(out / "posterior.pt", epoch=0, settings=saved, network=posterior.state_dict(), data=loaded.record())
    if settings.data == "toy":
        result["oracle"] = toy_errors(posterior.denoiser)
        plot_toy(posterior).savefig(out / "scores.png", dpi=150)
    else:
        x, y = draw(posterior.denoiser, loaded, settings)
        result["samples"] = recognise(x, y, loaded, settings)
        save_samples(x, y, loaded, out)
    checkpoint.write_json(out / "score.json", result)
    print_result(result, out)


@torch.no_grad()
def denoising_errors(denoiser: Denoiser, loaded: Data, seed: int) -> list[dict[str, float]]:
    """Denoising loss at each noise level on training and on held-out points: their gap is memorisation."""
    generator = torch.Generator(loaded.x_train.device).manual_seed(seed)
    rows = []
    for sigma in SIGMAS:
        row = {"sigma": sigma}
        for part in ("train", "validation"):
            x, y = getattr(loaded, f"x_{part}")[:AUDITED], getattr(loaded, f"y_{part}")[:AUDITED]
            noise = torch.empty_like(x).normal_(generator=generator)
            level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
            chunks = zip(*(tensor.split(CHUNK // 4) for tensor in (x, y, level, noise)), strict=True)
            row[part] = torch.cat([matching.denoising(denoiser, *chunk) for chunk in chunks]).mean().item()
        rows.append(row)
    return rows


def draw(denoiser: Denoiser, loaded: Data, settings: ScoreSettings) -> tuple[Tensor, Tensor]:
    """Class-conditional samples by annealed Langevin dynamics, clipped to the box."""
    device = loaded.x_train.device
    y = torch.arange(settings.samples, device=device) % loaded.num_classes
    resolved = config.resolved_posterior(settings.posterior_settings, settings.data, loaded.input_shape)
    assert resolved.sigma_min is not None
    assert resolved.sigma_max is not None
    generator = torch.Generator(device).manual_seed(settings.seed)
    parts = [
        sampling.annealed_langevin(
            denoiser,
            (len(labels), *loaded.input_shape),
            sigmas=sampling.noise_levels(resolved.sigma_max, resolved.sigma_min, settings.levels),
            class_labels=labels,
            steps_per_level=settings.steps_per_level,
            generator=generator,
        )
        for labels in y.split(CHUNK)
    ]
    return torch.cat(parts).clamp(loaded.lower, loaded.upper), y


def recognise(x: Tensor, y: Tensor, loaded: Data, settings: ScoreSettings) -> dict[str, float]:
    """Are the samples of their class, and are they new?

    A classifier that is trained on validation and test images alone, which the score network has not seen, names the
    samples, and the training images for comparison. The distance of each sample to its nearest training image is set
    beside that of the held-out images: copies would be much nearer.
    """
    held_out = torch.cat([loaded.x_validation, loaded.x_test]), torch.cat([loaded.y_validation, loaded.y_test])
    judge = train_recogniser(*held_out, loaded, settings)
    nearest, real = (nearest_distance(points, loaded.x_train) for points in (x, held_out[0][:AUDITED]))
    return {
        "recognised": measures.per_cent(measures.correct(judge, x, y)),
        "training_images_recognised": measures.per_cent(measures.correct(judge, loaded.x_train, loaded.y_train)),
        "count": float(len(x)),
        "nearest_training_distance_median": nearest.median().item(),
        "held_out_nearest_distance_median": real.median().item(),
        "share_nearer_than_any_held_out": (nearest < real.min()).double().mean().item(),
    }


def train_recogniser(x: Tensor, y: Tensor, loaded: Data, settings: ScoreSettings) -> nn.Module:
    torch.manual_seed(settings.seed)
    model = models.build("digits_cnn", loaded.input_shape, loaded.num_classes).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.judge_epochs):
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval()


def nearest_distance(x: Tensor, points: Tensor) -> Tensor:
    """Euclidean distance of each x [N, …] to the nearest of ``points`` [M, …], [N]."""
    chunks = x.flatten(1).split(CHUNK)
    return torch.cat([torch.cdist(chunk, points.flatten(1)).amin(dim=1) for chunk in chunks])


def pixels(x: Tensor, loaded: Data) -> np.ndarray:
    """x [N, C, H, W] as uint8 [N, H, W, C]."""
    scaled = 255 * (x - loaded.lower) / (loaded.upper - loaded.lower)
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_samples(x: Tensor, y: Tensor, loaded: Data, out: Path) -> None:
    """samples.npz, and a grid with one row a class beside the nearest training image of its first sample."""
    images = pixels(x, loaded)
    np.savez_compressed(out / "samples.npz", image=images, label=y.cpu().numpy())
    columns, rows = min(12, len(x) // loaded.num_classes), min(ROWS, loaded.num_classes)
    figure = Figure(figsize=(0.55 * (columns + 1.6), 0.55 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns + 1, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for label in range(rows):
        chosen = x[y == label][:columns]
        closest = torch.cdist(chosen[:1].flatten(1), loaded.x_train.flatten(1)).argmin()
        shown = pixels(torch.cat([chosen, loaded.x_train[closest][None]]), loaded)
        for column, image in enumerate(shown):
            axis = axes[label][column]
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)  # the colour map is for images of one channel
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor("#0072b2" if column == columns else "#dddddd")
        axes[label][0].set_ylabel(str(label), rotation=0, labelpad=10, va="center")
    figure.suptitle("Samples by class; last column (blue): nearest training image of the first", fontsize=10)
    figure.savefig(out / "samples.png", dpi=150)


def toy_errors(denoiser: Denoiser, reach: float = 4.0) -> list[dict[str, float]]:
    """Relative mean squared error of the learned ∇ log p(y|x) to the oracle's ∇ log p_d(y|x) on |x| < reach.

    The learned scores are centred by the estimator's own posterior, never the oracle's: log p_σ(y|x) is integrated from
    the learned scores themselves, up to one constant for each class, which the class frequencies of the data fix. Means
    are over p_d(x, y), and over x uniformly with p_d(y|x).
    """
    device = denoiser.center.device
    x = torch.linspace(-reach, reach, 801, device=device)[:, None]
    oracle = toy.oracle().to(device)
    log_p, scores = oracle.log_prob_and_scores(x)
    p = log_p.exp()
    truth = scores[..., 0] - (p * scores[..., 0]).sum(1, keepdim=True)
    density = oracle.log_joint(x).logsumexp(1).exp()[:, None]
    rows = []
    for sigma in (0.1, 0.15, 0.2):
        learned_p, learned = own_posterior(denoiser, x, sigma)
        centred = learned - (learned_p * learned).sum(1, keepdim=True)
        row = {"sigma": sigma}
        for name, weight in (("data_weighted", p * density), ("uniform", p)):
            error = (weight * (centred - truth).square()).sum() / (weight * truth.square()).sum()
            row[f"relative_error_{name}"] = error.item()
        rows.append(row)
    return rows


@torch.no_grad()
def own_posterior(denoiser: Denoiser, x: Tensor, sigma: float, reach: float = 14.0) -> tuple[Tensor, Tensor]:
    """p_σ(y|x) [G, L] that the class scores of a one-dimensional denoiser themselves imply, and these scores [G, L].

    log p(x|y) is the cumulative integral of the score, normalised on [−reach, reach]; the priors are those of the toy.
    """
    grid = torch.linspace(-reach, reach, 5601, device=x.device)[:, None]
    scores = denoiser.class_scores(grid, sigma)[..., 0].double()
    log_density = torch.cumulative_trapezoid(scores, grid.double(), dim=0)
    log_density = torch.cat([torch.zeros_like(log_density[:1]), log_density])
    log_density = log_density - torch.logsumexp(log_density, 0, keepdim=True)
    log_joint = log_density + torch.tensor(toy.PRIORS, dtype=torch.float64, device=x.device).log()
    index = torch.searchsorted(grid[:, 0], x[:, 0]).clamp(max=len(grid) - 1)
    return log_joint.softmax(1)[index].float(), denoiser.class_scores(x, sigma)[..., 0]


def plot_toy(posterior: ScoreNetwork) -> Figure:
    """The learned class scores beside the oracle's."""
    x = torch.linspace(-6, 6, 481)[:, None]
    truth = toy.oracle().smoothed(posterior.sigma).log_prob_and_scores(x)[1][..., 0]
    learned = posterior.denoiser.class_scores(x, posterior.sigma)[..., 0].detach()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for label, color in enumerate(("#0072b2", "#d55e00")):
        axis.plot(x[:, 0], truth[:, label], color=color, lw=5, alpha=0.25, label=f"class {label}, exact")
        axis.plot(x[:, 0], learned[:, label], color=color, lw=1.2, label=f"class {label}, learned")
    axis.set(xlabel="x", ylabel=f"class score of p_σ, σ = {posterior.sigma:g}", xlim=(-6, 6))
    axis.legend(frameon=False)
    return figure


def print_result(result: dict[str, Any], out: Path) -> None:
    print(f"{'sigma':>8}{'loss, train':>14}{'validation':>12}")
    for row in result["denoising_error"]:
        print(f"{row['sigma']:>8g}{row['train']:>14.4f}{row['validation']:>12.4f}")
    if "oracle" in result:
        print("relative mean squared error of the centred class scores, |x| < 4:")
        for row in result["oracle"]:
            print(
                f"  sigma {row['sigma']:g}: {100 * row['relative_error_data_weighted']:.2f} % over the data, "
                f"{100 * row['relative_error_uniform']:.2f} % over x uniformly"
            )
    if "samples" in result:
        s = result["samples"]
        print(
            f"{s['recognised']:.1f} % of {s['count']:.0f} samples are recognised by a held-out classifier "
            f"({s['training_images_recognised']:.1f} % of the training images are); nearest training image at "
            f"{s['nearest_training_distance_median']:.2f}, of held-out images "
            f"{s['held_out_nearest_distance_median']:.2f}"
        )
    print(f"trained in {result['train_seconds']:.0f} s, written to {out}")


if __name__ == "__main__":
    sys.exit(run_program(main))
