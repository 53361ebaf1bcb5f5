"""A denoiser D(x; σ, y) of all classes at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..inputs import (
    check_center,
    check_classes,
    check_count,
    check_instance,
    check_length,
    check_levels,
    check_real,
    check_share,
    readable,
)


class ScaledModule(nn.Module):
    """A module whose state holds ``sigma_data``, the scale of the data that it was trained on.

    The state has it exactly, whatever dtype the module is cast to. A state from before it did leaves it as it is.
    """

    sigma_data: float  # no buffer, so that nothing waits for a device to read it

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.sigma_data, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.sigma_data = float(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Denoiser(ScaledModule):
    """Preconditioned denoiser with one head for each class and an unconditional head.

    D_y(x; σ) estimates E[clean x | noisy x, y]; the score of p_σ is (D_y − x) / σ² (Vincent, 2011). The
    preconditioning is that of Karras et al. (NeurIPS 2022), Table 1: D = c_skip x + c_out F(c_in x; c_noise), which
    keeps inputs, outputs and targets of the backbone F at unit scale for every σ. All heads come from one evaluation
    of F, since direct SCORE needs the scores of all classes at each point of an attack.

    Args:
        backbone: maps (x [N, …], c_noise [N]) to [N, H · C, …], where x is [N, C, …] and H = num_classes + 1: the
            heads in the order of the classes, the unconditional one last. In training a backbone may be told how x was
            augmented, by a third argument [N, K].
        num_classes: L.
        center: mean of the data, a number or a tensor that broadcasts against x; subtracted before and added after.
        sigma_data: standard deviation of the data about ``center``, in input units; > 0. Both are part of the state.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it. What the backbone gives is
            looked at in each call.
    """

    center: Tensor

    def __init__(
        self, backbone: nn.Module, *, num_classes: int, sigma_data: float, center: Tensor | float = 0.0
    ) -> None:
        super().__init__()
        check_instance("backbone", backbone, nn.Module)
        check_count("num_classes", num_classes, least=2)
        check_length("sigma_data", sigma_data)
        check_center(center)
        self.backbone = backbone
        self.num_classes = num_classes
        self.sigma_data = float(sigma_data)
        own = torch.as_tensor(center, dtype=torch.get_default_dtype()).detach()
        self.register_buffer("center", own.clone(memory_format=torch.contiguous_format))

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """D(x; σ, y) [N, …] for x [N, …], σ a number or [N], labels int64 [N]; None is the unconditional head."""
        heads = self.denoise_all(x, sigma)
        if class_labels is None:
            return heads[:, -1]
        self._check_labels(class_labels, x)
        return heads[torch.arange(len(x), device=x.device), class_labels]

    def denoise_all(self, x: Tensor, sigma: Tensor | float, conditions: Tensor | None = None) -> Tensor:
        """All heads, [N, L + 1, …]: D_1 … D_L, then the unconditional one."""
        scaled, level = self._scaled(x, sigma)
        return self._denoised(level, self._heads(scaled, level, conditions))

    def denoise_pair(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """D_y and D_∅, [N, 2, …], for labels int64 [N]: what a training asks for."""
        heads = self.denoise_all(x, sigma, conditions)
        self._check_labels(class_labels, x)
        return torch.stack([heads[torch.arange(len(x), device=x.device), class_labels], heads[:, -1]], 1)

    def all_scores(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Scores of all heads at x, [N, L + 1, …]: ∇ₓ log p_σ(x|y) for each class, then ∇ₓ log p_σ(x)."""
        scaled, level = self._scaled(x, sigma)
        return self._scores(level, self._heads(scaled, level))

    def class_scores(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """∇ₓ log p_σ(x|y) of every class at x, [N, L, …], contiguous."""
        scaled, level = self._scaled(x, sigma)
        return self._scores(level, self._heads(scaled, level)[:, : self.num_classes])

    def score(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """∇ₓ log p_σ(x|y) [N, …] for labels int64 [N], or ∇ₓ log p_σ(x) without labels."""
        scores = self.all_scores(x, sigma)
        if class_labels is None:
            return scores[:, -1]
        self._check_labels(class_labels, x)
        return scores[torch.arange(len(x), device=x.device), class_labels]

    def with_backbone(self, backbone: nn.Module) -> Denoiser:
        """This denoiser with another backbone, such as a compiled one, and everything else shared with it."""
        other = copy.copy(self)
        other._modules = {**self._modules, "backbone": backbone}
        return other

    def _check_labels(self, class_labels: Tensor, x: Tensor) -> None:
        """Refuse labels that are no classes: the last head, which −1 would ask for, is the unconditional one."""
        check_classes(class_labels, x, self.num_classes, "class_labels", values=readable(x))

    def _heads(self, scaled: Tensor, level: _Level, conditions: Tensor | None = None) -> Tensor:
        """F of every head, [N, L + 1, …], at inputs of unit scale."""
        more = () if conditions is None else (conditions,)
        return _split(self.backbone(scaled, level.noise, *more), scaled, self.num_classes + 1)

    def _scaled(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, _Level]:
        """The input of the backbone, and what its output is put together with."""
        check_real(x)
        check_levels(sigma, x, numbers=True)
        # A tensor made of a number by as_tensor would be copied to a GPU, and waited for.
        noise = sigma.to(x) if isinstance(sigma, Tensor) else x.new_full((1,), sigma)
        noise = noise.expand(len(x))
        sigma_ = noise.reshape(-1, *[1] * (x.dim() - 1))
        total = (sigma_.square() + self.sigma_data**2).sqrt()
        centred = x - self.center.to(x.dtype)
        return centred / total, _Level(centred, sigma_, total, noise.log() / 4)

    def _denoised(self, level: _Level, output: Tensor) -> Tensor:
        """D [N, H, …] of F [N, H, …]."""
        skip, scale = (self.sigma_data / level.total).square(), level.sigma * self.sigma_data / level.total
        return (skip * level.centred + self.center.to(output.dtype))[:, None] + scale[:, None] * output

    def _scores(self, level: _Level, output: Tensor) -> Tensor:
        """(D − x) / σ² [N, H, …] of F [N, H, …]."""
        # with the preconditioning multiplied out, t² = σ² + σ_data²: −(x − c) / t² + F σ_data / (σ t)
        base = -level.centred / level.total.square()
        return torch.addcmul(base[:, None], (self.sigma_data / (level.sigma * level.total))[:, None], output)


class _Level(NamedTuple):
    """A batch at its noise levels."""

    centred: Tensor  # [N, …] x − center
    sigma: Tensor  # σ, shaped to broadcast against x
    total: Tensor  # √(σ² + σ_data²), the same
    noise: Tensor  # [N] c_noise = ln(σ) / 4


class EmbeddedDenoiser(Denoiser):
    """A denoiser whose backbone is told the class, and is evaluated once for each class that is wanted.

    This is the usual class-conditional network. All of its capacity serves one class at a time; where all classes are
    needed, that costs L + 1 evaluations. Use it for sampling, or as the teacher of a :class:`Denoiser`
    (:func:`scorematch.matching.distillation`).

    Args:
        backbone: maps (x [N, C, …], c_noise [N], conditions [N, L + K]) to [N, C, …]. The first L conditions are the
            one-hot class, all zero for none; the others say how x was augmented, zero for not at all.
        num_classes: L.
        augmentations: K.
        center, sigma_data: as in :class:`Denoiser`.
        chunk: evaluations at a time where several classes are asked for, ≥ 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        sigma_data: float,
        center: Tensor | float = 0.0,
        augmentations: int = 0,
        chunk: int = 512,
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, sigma_data=sigma_data, center=center)
        check_count("augmentations", augmentations, least=0)
        check_count("chunk", chunk)
        self.augmentations = augmentations
        self.chunk = int(chunk)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        scaled, level = self._scaled(x, sigma)
        if class_labels is not None:
            self._check_labels(class_labels, x)
        return self._denoised(level, self._head(scaled, level, class_labels)[:, None])[:, 0]

    def denoise_pair(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        scaled, level = self._scaled(x, sigma)
        self._check_labels(class_labels, x)
        twice = _Level(*(torch.cat([part, part]) for part in level))
        labels = torch.cat([class_labels, torch.full_like(class_labels, self.num_classes)])
        more = None if conditions is None else torch.cat([conditions, conditions])
        both = self._head(torch.cat([scaled, scaled]), twice, labels, more)
        return self._denoised(level, torch.stack(both.chunk(2), 1))

    def score(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        scaled, level = self._scaled(x, sigma)
        if class_labels is not None:
            self._check_labels(class_labels, x)
        return self._scores(level, self._head(scaled, level, class_labels)[:, None])[:, 0]

    def class_scores(self, x: Tensor, sigma: Tensor | float, classes: Tensor | None = None) -> Tensor:
        """∇ₓ log p_σ(x|y) of every class at x, [N, L, …].

        With ``classes`` int64 [N, K], only these are evaluated, in K + 1 evaluations of the backbone; all others get
        the unconditional score.
        """
        if classes is None:
            return super().class_scores(x, sigma)
        scaled, level = self._scaled(x, sigma)
        asked = torch.cat([classes, torch.full_like(classes[:, :1], self.num_classes)], 1)
        scores = self._scores(level, self._asked(scaled, level, asked))
        result = scores[:, -1:].repeat(1, self.num_classes, *[1] * (x.dim() - 1))
        return result.scatter_(1, _like_images(classes, scores), scores[:, :-1])

    def _heads(self, scaled: Tensor, level: _Level, conditions: Tensor | None = None) -> Tensor:
        every = torch.arange(self.num_classes + 1, device=scaled.device).expand(len(scaled), -1)
        return self._asked(scaled, level, every, conditions)

    def _asked(self, scaled: Tensor, level: _Level, labels: Tensor, conditions: Tensor | None = None) -> Tensor:
        """F of the heads ``labels`` [N, H] of each sample, [N, H, …]."""
        heads = labels.shape[1]
        images = scaled.repeat_interleave(heads, 0)
        noise = level.noise.repeat_interleave(heads)
        more = None if conditions is None else conditions.repeat_interleave(heads, 0)
        told = self._told(labels.flatten(), images, more)
        parts = zip(*(part.split(self.chunk) for part in (images, noise, told)), strict=True)
        outputs = [_split(self.backbone(*part), part[0])[:, 0] for part in parts]
        return torch.cat(outputs).reshape(len(scaled), heads, *scaled.shape[1:])

    def _head(
        self, scaled: Tensor, level: _Level, class_labels: Tensor | None, conditions: Tensor | None = None
    ) -> Tensor:
        """F of one head for each sample, [N, …]; label L is the unconditional one."""
        if class_labels is None:
            class_labels = scaled.new_full((len(scaled),), self.num_classes, dtype=torch.int64)
        return _split(self.backbone(scaled, level.noise, self._told(class_labels, scaled, conditions)), scaled)[:, 0]

    def _told(self, labels: Tensor, like: Tensor, conditions: Tensor | None) -> Tensor:
        """What the backbone is told [N, L + K]."""
        classes = (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).to(like.dtype)
        if conditions is None:
            conditions = like.new_zeros(len(like), self.augmentations)
        return torch.cat([classes, conditions], 1)


def _split(output: Any, x: Tensor, heads: int = 1) -> Tensor:
    """What a backbone gave for x [N, C, …], as [N, H, C, …].

    Raises:
        TypeError, ValueError: it is no tensor, or has not so many values.
    """
    wanted = [len(x), heads * x.shape[1], *x.shape[2:]]
    if not isinstance(output, Tensor):
        raise TypeError(f"backbone must give a tensor {wanted}, got {type(output).__name__}")
    if output.numel() != heads * x.numel():
        several = f" with num_classes + 1 = {heads} heads" if heads > 1 else ""
        raise ValueError(
            f"backbone must give {wanted}{several} for x {list(x.shape)}, or as many values a sample in another shape, "
            f"got {list(output.shape)}"
        )
    return output.reshape(len(x), heads, *x.shape[1:])


def _like_images(classes: Tensor, images: Tensor) -> Tensor:
    """An index [N, K] as one into images [N, H, …]."""
    shape = images.shape[2:]
    return classes.reshape(*classes.shape, *[1] * len(shape)).expand(-1, -1, *shape)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of c_noise [N] at fixed, log-spaced frequencies, then a linear layer: [N, width].

    With ``conditions`` K, a linear function of conditions [N, K] is added.
    """

    frequencies: Tensor

    def __init__(self, width: int, count: int = 8, conditions: int = 0) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(count) * 0.5)
        self.linear = nn.Linear(2 * count + 1, width)
        self.conditions = nn.Linear(conditions, width, bias=False) if conditions else None

    def forward(self, noise: Tensor, conditions: Tensor | None = None) -> Tensor:
        phase = noise[:, None] * self.frequencies.to(noise.dtype)
        embedding: Tensor = self.linear(torch.cat([noise[:, None], phase.sin(), phase.cos()], 1))
        count = 0 if self.conditions is None else self.conditions.in_features
        if conditions is not None and list(conditions.shape) != [len(noise), count]:
            raise ValueError(f"conditions must be [N, K] = [{len(noise)}, {count}], got {list(conditions.shape)}")
        if self.conditions is None or conditions is None:
            return embedding
        return embedding + self.conditions(conditions)


def check_backbone(*, dropout: float, conditions: int, depth: int = 0, **counts: int) -> None:
    """Refuse what no backbone is made with; ``counts`` are whole numbers, at least 1.

    Raises:
        TypeError, ValueError: as said; the message names the argument.
    """
    check_share("dropout", dropout)
    check_count("conditions", conditions, least=0)
    check_count("depth", depth, least=0)
    for name, value in counts.items():
        check_count(name, value)


def feature_count(shape: Sequence[int]) -> int:
    """Number of features of one sample of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count
