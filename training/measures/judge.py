"""Are generated images of their class, and how far is their distribution from that of the training images?

A classifier, the judge, is trained on validation and test images alone, which no score network is trained on. It says
which class each sample shows. The Fréchet distance between Gaussians fitted to its features of samples and of training
images compares the two distributions (Heusel et al., NeurIPS 2017, who take the features of an Inception network).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import measures, models
from training.data import Data
from training.data.augmentation import augmented
from training.engine.progress import progress_bar
from training.settings.errors import InputError

Features = Callable[[Tensor], Tensor]  # images [N, C, H, W] in the box of the data to [N, F]

CHUNK = 250  # images at a time
TRAINING_IMAGES = 10_000  # of them are shown to the judge, for comparison
SMALL = 16  # rows and columns of images for which the small network and no augmentation do


def train(loaded: Data, epochs: int | None, seed: int) -> nn.Module:
    """The judge of a data set, in eval mode. ``epochs`` None: 40 on small images, 20 on others.

    It mirrors the images of CIFAR alone: of other data nobody has said that left and right do not matter.
    """
    x, y = torch.cat([loaded.x_validation, loaded.x_test]), torch.cat([loaded.y_validation, loaded.y_test])
    small = max(loaded.input_shape[1:]) <= SMALL
    name = "digits_cnn" if small else "preact-resnet-18" if x.is_cuda else "wrn-10-2"
    torch.manual_seed(seed)
    model = models.build(name, loaded.input_shape, loaded.num_classes, loaded.statistics).to(x.device)
    epochs, size = epochs or (40 if small else 20), 64
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    flip = loaded.name in ("cifar10", "cifar100")
    steps = epochs * math.ceil(len(x) / size)
    schedule = None if small else torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    moves = torch.Generator(x.device).manual_seed(seed)
    with progress_bar(total=steps, desc="judge", unit="step") as progress:
        for _ in range(epochs):
            for index in torch.randperm(len(x), generator=generator).split(size):
                index = index.to(x.device)
                images = x[index] if small else augmented(x[index], moves, shift=4, flip=flip)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), y[index]).backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                progress.update()
    return model.eval()


def measure(judge: nn.Module, x: Tensor, y: Tensor, loaded: Data) -> dict[str, float]:
    """What the judge says about samples x [N, …] of classes y [N], and about training images for comparison."""
    few = loaded.few(TRAINING_IMAGES, len(loaded.x_train))
    return {
        "count": float(len(x)),
        "recognised": measures.per_cent(measures.correct(judge, x, y)),
        "training_images_recognised": measures.per_cent(
            measures.correct(judge, loaded.x_train[few], loaded.y_train[few])
        ),
        **frechet_distances(features_of(judge), x, loaded, 0),
    }


def frechet_distances(features: Features, x: Tensor, loaded: Data, seed: int) -> dict[str, float]:
    """The Fréchet distances of samples x [N, …], and of as many training images, to all other training images.

    A small number of images always has some distance, so the second figure is there to compare with. At most half of
    the training images are drawn, and as many samples, so that both figures have the same bias.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(loaded.x_train), generator=generator).to(x.device)
    count = min(len(x), len(order) // 2)
    of_training = features(loaded.x_train)
    drawn, others = of_training[order[:count]], of_training[order[count:]]
    return {
        "frechet": frechet(features(x[:count]), others),
        "frechet_of_training_images": frechet(drawn, others),
        "frechet_count": float(count),
    }


def frechet(first: Tensor, second: Tensor) -> float:
    """‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½) of features [N, F] and [M, F], in float64."""
    means, covariances = [], []
    for features in (first.double(), second.double()):
        means.append(features.mean(0))
        covariances.append(torch.atleast_2d(features.T.cov()))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C₁ C₂ has the eigenvalues of the symmetric C₁^½ C₂ C₁^½
    eigenvalues = torch.linalg.eigvalsh(root @ covariances[1] @ root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    return float(distance)


def features_of(judge: nn.Module) -> Features:
    """The features that the last linear layer of a classifier sees."""
    last = [module for module in judge.modules() if isinstance(module, nn.Linear)][-1]

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        try:
            for chunk in x.split(CHUNK):
                judge(chunk)
        finally:
            handle.remove()
        return torch.cat(seen)

    return features


def load_features(path: Path, loaded: Data) -> Features:
    """The features of a TorchScript module that takes images uint8 [N, 3, H, W], as published Inception networks do.

    Args:
        path: the module.
        loaded: says which box the images lie in.

    Raises:
        InputError: there is no such file, or the module does not give [N, F].
    """
    if not path.is_file():
        raise InputError(f"feature_network: {path}: no such file, expected a TorchScript module")
    try:
        network: Any = torch.jit.load(str(path), map_location=loaded.x_train.device).eval()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"feature_network: {path} cannot be read ({reason}), expected a TorchScript module") from None

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        images = (255 * (x - loaded.lower) / (loaded.upper - loaded.lower)).round().byte().expand(-1, 3, -1, -1)
        found = torch.cat([network(chunk) for chunk in images.split(CHUNK)])
        if found.dim() != 2:
            raise InputError(f"feature_network: {path} gives {list(found.shape)} for {list(x.shape)}, expected [N, F]")
        return found

    return features


def sentences(samples: dict[str, Any]) -> str:
    """The measures of samples, to be read."""
    lines = [
        f"{samples['recognised']:.1f} % of {samples['count']:.0f} samples ({samples['sampler']}) are recognised by a "
        f"held-out classifier ({samples['training_images_recognised']:.1f} % of the training images are)",
        f"Fréchet distance of {samples['frechet_count']:.0f} samples to training images, in its features: "
        f"{samples['frechet']:.2f}; of as many training images: {samples['frechet_of_training_images']:.2f}",
    ]
    if "feature_network_frechet" in samples:
        lines.append(
            f"the same in the features of the given network: {samples['feature_network_frechet']:.2f}; "
            f"{samples['feature_network_frechet_of_training_images']:.2f}"
        )
    return "\n".join(lines)
