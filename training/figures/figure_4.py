"""Figs. 4 and 5: semantic gradients, the input gradients of a classifier whose logits are read as an energy.

With p_θ(x, y) = exp(f(x)[y]) / Z (Eqs. 40, 41; Grathwohl et al., ICLR 2020) a classifier has three gradients in x:
∇ log p(y|x), ∇ log p(x, y) = ∇ f(x)[y] and −∇ log p(x) = −∇ log Σ_y exp f(x)[y]. The channels of a pixel are summed,
and the tenth of the pixels with the largest absolute values is shown. The paper shows pictures alone; here the whole
gradients are also compared, by their cosine, with the same three of the data: those of a score network
(``score_from``), or of the kernel density of the training images, whose gradients are known in closed form.

Without a classifier given, a standard one and one of PGD-AT with KL are trained on the 8×8 digits, by ``training.run``
with its usual settings but 15 epochs. Claims, about these, for each of the three gradients and every seed:

- The robust model is closer to the data: the mean cosine over test images is larger than the standard model's, and the
  95 % interval (Student's t) of the paired difference lies above 0.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from scorematch.posteriors import KernelDensity, ScoreNetwork
from training import evaluate
from training import run as training_run
from training.data import Data, DataName, DataSettings, load
from training.engine import posteriors
from training.figures.claims import Claim, Result, interval
from training.measures.seeds import estimate
from training.reports.plots import picture, shortened
from training.settings.errors import InputError
from training.settings.posterior import PosteriorSettings

SHARE = 0.1  # of the pixels, shown
SHOWN = 6  # images
SEEDS = 3  # at most, of the classifiers that are trained
DENSITY_POINTS = 10_000  # training images of the kernel density, at most
KINDS = {"posterior": "∇ log p(y|x)", "joint": "∇ log p(x, y)", "marginal": "−∇ log p(x)"}
TRAINED = {"standard": ["--objective", "standard"], "robust": ["--objective", "pgd_at"]}
BRIEF = ["--epochs", "15", "--autoattack", "none", "--curve-points", "2", "--eval-steps", "10", "--eval-restarts", "1"]
QUICK = ["--epochs", "1", "--limit", "100", "--steps", "1", "--validation-steps", "1"]


@dataclass(frozen=True)
class Source:
    """Which classifier, as for training.evaluate; with neither ``run`` nor ``model_from`` two are trained."""

    run: Path | None = None
    model_from: str | None = None
    model: str | None = None
    data: DataName | None = None
    data_root: Path | None = None
    image_size: int | None = None

    @property
    def given(self) -> bool:
        """Whether a classifier is."""
        return self.run is not None or self.model_from is not None

    def read(self) -> evaluate.Subject:
        """The classifier with its data.

        Raises:
            InputError: it or its data cannot be read.
        """
        return evaluate.read_subject(
            evaluate.EvaluateSettings(
                run=self.run,
                model_from=self.model_from,
                model=self.model,
                data=self.data,
                data_root=self.data_root,
                image_size=self.image_size,
            ),
            torch.device("cpu"),
        )


def model_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The three gradients of a classifier, Eqs. (40) and (41).

    Args:
        model: maps [N, …] to logits [N, L], in eval mode.
        x: [N, …] inputs.
        y: int64 [N] labels, the y of the gradients.

    Returns:
        By the names of KINDS, each [N, …], in inverse input units.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
        (joint,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), point, retain_graph=True)
        (marginal,) = torch.autograd.grad(logits.logsumexp(1).sum(), point)
    return {"posterior": joint - marginal, "joint": joint, "marginal": -marginal}


def data_gradients(posterior: KernelDensity | ScoreNetwork, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The same three of the data: ∇ log p(x, y) is the class score s_y, ∇ log p(x) the mean of the class scores.

    Args:
        posterior: with the class scores of p_σ.
        x: [N, …] inputs.
        y: int64 [N] labels.

    Returns:
        As :func:`model_gradients`.
    """
    if isinstance(posterior, KernelDensity):
        log_p, scores = posterior.log_prob_and_scores(x)
    else:
        log_p, scores = posterior.clean_log_prob(x, y), posterior.scores(x)
    joint = scores[torch.arange(len(x)), y]
    if scores.shape[1] > log_p.shape[1]:  # an unconditional score of its own
        marginal = scores[:, -1]
    else:
        marginal = torch.einsum("nl,nl...->n...", log_p.exp(), scores)
    return {"posterior": joint - marginal, "joint": joint, "marginal": -marginal}


def strongest(gradient: Tensor, share: float = SHARE) -> Tensor:
    """The gradient summed over channels, 0 but for the pixels with the largest absolute values.

    Args:
        gradient: [N, C, H, W].
        share: of the pixels that stay, in (0, 1]; at least one does.

    Returns:
        [N, H, W].
    """
    total = gradient.sum(1)
    count = max(1, round(share * total[0].numel()))
    best = total.flatten(1).abs().topk(count, dim=1).indices
    kept = torch.zeros_like(total).flatten(1).scatter(1, best, 1.0)
    return total * kept.reshape(total.shape)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of the gradients a and b [N, …] of each image, [N] in [−1, 1]; 0 where one of them is 0."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def reference(data: Data, score_from: Path | None) -> tuple[str, KernelDensity | ScoreNetwork]:
    """What the gradients of the data are read from, and its name.

    Raises:
        InputError: the score network cannot be read, or is not of such data.
    """
    if score_from is not None:
        try:
            settings, network = posteriors.read(score_from, data)
        except InputError as error:
            raise InputError(f"score_from: {error}") from None
        return f"score network, σ = {settings.sigma:g}", network.eval()
    settings = PosteriorSettings(name="kernel_density").resolved(data.name)
    assert settings.sigma is not None
    x, y = data.x_train[:DENSITY_POINTS], data.y_train[:DENSITY_POINTS]
    density = KernelDensity(x, y, num_classes=data.num_classes, sigma=settings.sigma)
    return f"kernel density, σ = {settings.sigma:g}", density


def trained(seeds: tuple[int, ...], quick: bool) -> tuple[Data, dict[tuple[str, int], nn.Module]]:
    """The digits, and classifiers for them by title and seed."""
    found: dict[tuple[str, int], nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for title, options in TRAINED.items():
                out = Path(folder) / f"{title}-{seed}"
                arguments = [*options, "--seed", str(seed), "--out", str(out), *BRIEF, *(QUICK if quick else [])]
                with contextlib.redirect_stdout(io.StringIO()):  # its lines name a folder that is deleted soon
                    training_run.main(arguments)
                subject = Source(run=out).read()
                found[title, seed] = subject.model
    return subject.data, found


def make(source: Source, seeds: tuple[int, ...], *, score_from: Path | None, images: int, quick: bool) -> Result:
    """The figure.

    Args:
        source: the classifier; none given: two are trained for each seed.
        seeds: of these.
        score_from: posterior.pt with a score network; None takes a kernel density.
        images: the first so many test images are measured, at least SHOWN.
        quick: train for a few steps only, to see that it runs.

    Raises:
        InputError: something cannot be read, or the data are not images.
    """
    if source.given:
        subject = source.read()
        data, found = subject.data, {(Path(subject.name).parent.name or subject.name, 0): subject.model}
    else:
        reference(load(DataSettings("digits")), score_from)  # before anything is trained
        data, found = trained(seeds, quick)
    if len(data.input_shape) != 3:
        raise InputError(f"data: {data.name} has inputs {list(data.input_shape)}, allowed: images [C, H, W]")
    name, density = reference(data, score_from)
    x, y = data.x_test[:images], data.y_test[:images]
    of_data = data_gradients(density, x, y)
    gradients = {key: model_gradients(model, x, y) for key, model in found.items()}
    closeness = {
        key: {kind: cosines(values[kind], of_data[kind]) for kind in KINDS} for key, values in gradients.items()
    }
    means = {
        f"{title} seed {seed}": {kind: estimate(values.tolist())[:3] for kind, values in by.items()}
        for (title, seed), by in closeness.items()
    }
    # Each a mean with both ends of its 95 % interval over images.
    numbers = {"data": data.name, "images": len(x), "reference": name, "cosines": means}
    first = {title: values for (title, seed), values in reversed(gradients.items())}
    shown = dict(reversed(first.items())) | {name.split(",")[0]: of_data}
    claims = [] if source.given else compared(closeness)
    return Result(draw(x[:SHOWN], y[:SHOWN], shown, (data.lower, data.upper)), claims, numbers)


def compared(closeness: dict[tuple[str, int], dict[str, Tensor]]) -> list[Claim]:
    """The claims about the two that are trained."""
    claims = []
    for kind, symbol in KINDS.items():
        found, holds = [], True
        for seed in [seed for title, seed in closeness if title == "robust"]:
            robust, standard = closeness["robust", seed][kind], closeness["standard", seed][kind]
            difference = estimate((robust - standard).tolist())
            holds &= difference.low is not None and difference.low > 0
            found.append(
                f"seed {seed}: {robust.mean():.3f} against {standard.mean():.3f}, difference {interval(difference)}"
            )
        text = f"{symbol} of the robust model has a larger cosine with that of the data than the standard model's"
        claims.append(Claim(text, "; ".join(found), holds, "8×8 digits, PGD-AT KL against standard"))
    return claims


def draw(x: Tensor, y: Tensor, gradients: dict[str, dict[str, Tensor]], box: tuple[float, float]) -> plt.Figure:
    """A row for each image in ``box``: the image, then the three gradients of each model and of the data."""
    columns = 1 + len(KINDS) * len(gradients)
    figure, panels = plt.subplots(len(x), columns, figsize=(1.05 * columns, 1.02 * len(x) + 0.7), squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(visible=True, linewidth=0.5, color="#b8b8b8")
    for row, image in enumerate(x):
        picture(panels[row, 0], image.numpy(), box)
        panels[row, 0].set_ylabel(f"y = {int(y[row])}", fontsize=9)
    for block, (title, by_kind) in enumerate(gradients.items()):
        name = shortened(title, figure, width=0.95 * len(KINDS), size=9)
        for place, (kind, symbol) in enumerate(KINDS.items()):
            column = 1 + block * len(KINDS) + place
            kept = strongest(by_kind[kind][: len(x)])
            for row, values in enumerate(kept):
                limit = float(values.abs().max()) or 1.0
                panels[row, column].imshow(values.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
            heading = f"{name}\n{symbol}" if place == 1 else f"\n{symbol}"
            panels[0, column].set_title(heading, fontsize=9, weight="normal", loc="center", parse_math=False)
    panels[0, 0].set_title("\nimage", fontsize=9, weight="normal", loc="center")
    figure.tight_layout(w_pad=0.3, h_pad=0.3)
    return figure
