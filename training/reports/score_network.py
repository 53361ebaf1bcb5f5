"""What a score network has learned, in pictures: samples by class, and the class scores of the toy."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from scorematch.posteriors import ScoreNetwork
from training.data import Data, toy
from training.measures.judge import Features

ROWS = 20  # classes shown


def pixels(x: Tensor, loaded: Data) -> np.ndarray:
    """x [N, C, H, W] as uint8 [N, H, W, C]."""
    scaled = 255 * (x - loaded.lower) / (loaded.upper - loaded.lower)
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def samples_by_class(x: Tensor, y: Tensor, loaded: Data, like: Features) -> Figure:
    """Samples x [N, C, H, W] of classes y, a row a class, beside the training image most like its first sample.

    Images are compared by the distance of their ``like``.
    """
    columns, rows = min(12, len(x) // loaded.num_classes), min(ROWS, loaded.num_classes)
    figure = Figure(figsize=(0.55 * (columns + 1.6), 0.55 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns + 1, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    of_training = like(loaded.x_train)
    for label in range(rows):
        chosen = x[y == label][:columns]
        closest = torch.cdist(like(chosen[:1]), of_training).argmin()
        shown = pixels(torch.cat([chosen, loaded.x_train[closest][None]]), loaded)
        for column, image in enumerate(shown):
            axis = axes[label][column]
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)  # the colour map is for images of one channel
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor("#0072b2" if column == columns else "#dddddd")
        axes[label][0].set_ylabel(str(label), rotation=0, labelpad=10, va="center")
    figure.suptitle("Samples by class; last column (blue): the training image most like the first", fontsize=10)
    return figure


def scores_of_toy(posterior: ScoreNetwork) -> Figure:
    """The learned class scores beside the oracle's."""
    device = posterior.denoiser.center.device
    x = torch.linspace(-6, 6, 481, device=device)[:, None]
    oracle = toy.oracle().to(device).smoothed(posterior.sigma)
    truth = oracle.log_prob_and_scores(x)[1][..., 0].cpu()
    learned = posterior.denoiser.class_scores(x, posterior.sigma)[..., 0].detach().cpu()
    x = x.cpu()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for label, color in enumerate(("#0072b2", "#d55e00")):
        axis.plot(x[:, 0], truth[:, label], color=color, lw=5, alpha=0.25, label=f"class {label}, exact")
        axis.plot(x[:, 0], learned[:, label], color=color, lw=1.2, label=f"class {label}, learned")
    axis.set(xlabel="x", ylabel=f"class score of p_σ, σ = {posterior.sigma:g}", xlim=(-6, 6))
    axis.legend(frameon=False)
    return figure
