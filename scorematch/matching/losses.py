"""Score matching: how a network learns ∇ₓ log p(x).

==========================  ===================================================================  =====================
function                    minimised by                                                          source
==========================  ===================================================================  =====================
denoising                   s(x̃; σ, y) = ∇ log p_σ(x̃|y)                                           Vincent (2011)
sliced                      s(x) = ∇ log p(x)                                                     Song et al. (2019)
finite_difference           the same, without a second derivative                                 Pang et al. (2020)
denoising_likelihood        ∇ log p(y|x̃) + s(x̃) = ∇ log p_σ(x̃|y) for a classifier                Chao et al. (2022)
joint_energy                ∇ f_y(x̃) = ∇ log p_σ(x̃, y) for the logits f of a classifier          Grathwohl et al. (2020)
distillation                the denoiser of a teacher                                            Hinton et al. (2015)
==========================  ===================================================================  =====================

σ is a standard deviation everywhere (in the paper's section 4.3 and Appendix C it is a variance).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..inputs import (
    check_center,
    check_classes,
    check_instance,
    check_length,
    check_levels,
    check_like,
    check_real,
    handed,
    output_at,
    readable,
)
from ..networks.denoiser import Denoiser

Score = Callable[[Tensor], Tensor]


def denoising(
    denoiser: Denoiser, x: Tensor, y: Tensor, sigma: Tensor, noise: Tensor, conditions: Tensor | None = None
) -> Tensor:
    """Denoising score matching of the labelled and the unconditional head together.

    ½ λ(σ) (‖D_y(x̃) − x‖² + ‖D_∅(x̃) − x‖²) / features, x̃ = x + σ ω, with λ = (σ² + σ_data²) / (σ σ_data)², which
    gives every noise level the same weight at the start of training (Karras et al., 2022).

    Args:
        denoiser: the network.
        x: [N, …] clean inputs.
        y: int64 [N] labels.
        sigma: [N] noise levels, standard deviations in input units, > 0.
        noise: [N, …] standard Gaussian ω.
        conditions: [N, K] how x was augmented, for a backbone that is told.

    Returns:
        [N], dimensionless.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_instance("denoiser", denoiser, Denoiser)
    _check(x, sigma, noise, conditions, y, denoiser.num_classes)
    both = denoiser.denoise_pair(x + broadcast(sigma, x) * noise, sigma, y, conditions)
    return _weight(denoiser, sigma) * (both - x[:, None]).flatten(1).square().mean(1)


def distillation(
    student: Denoiser,
    teacher: Denoiser,
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    conditions: Tensor | None = None,
) -> Tensor:
    """All heads of a student against those of a teacher, at x̃ = x + σ ω: λ(σ) ‖D_student − D_teacher‖² / features.

    The mean over the heads, with the weight λ of :func:`denoising`. A class-conditional network that has to be asked
    once for each class thus becomes one that answers for all classes at once. Labels are not needed.

    Args:
        student: the network to train.
        teacher: a denoiser of as many classes; fixed.
        x: [N, …] clean inputs.
        sigma: [N] noise levels, > 0.
        noise: [N, …] ω.
        conditions: [N, K] how x was augmented, for backbones that are told.

    Returns:
        [N], dimensionless.

    Raises:
        TypeError, ValueError: the numbers of classes differ, or an argument is not what is said above.
    """
    check_instance("student", student, Denoiser)
    check_instance("teacher", teacher, Denoiser)
    _check(x, sigma, noise, conditions)
    if student.num_classes != teacher.num_classes:
        raise ValueError(f"the student has {student.num_classes} classes, the teacher {teacher.num_classes}")
    noisy = x + broadcast(sigma, x) * noise
    with torch.no_grad():
        wanted = teacher.denoise_all(noisy, sigma, conditions)
    error = student.denoise_all(noisy, sigma, conditions) - wanted
    return _weight(student, sigma) * error.flatten(1).square().mean(1)


def broadcast(sigma: Tensor, x: Tensor) -> Tensor:
    """σ [N] shaped to broadcast against x [N, …]."""
    return sigma.reshape(-1, *[1] * (x.dim() - 1))


def _check(
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    conditions: Tensor | None = None,
    y: Tensor | None = None,
    num_classes: int | None = None,
    name: str = "x",
) -> None:
    """Refuse a batch that does not fit; labels and levels are read on the CPU alone, so nothing waits for a device."""
    check_real(x, name)
    check_levels(sigma, x)
    check_like("sigma", sigma, x, x.shape[:1], name)
    check_like("noise", noise, x, other=name)
    if conditions is not None:
        check_real(conditions, "conditions")
        check_like("conditions", conditions, x, [len(x), conditions.shape[-1]], name)
    if num_classes is not None:
        check_classes(y, x, num_classes, values=readable(x))


def check_logits(logits: Tensor, y: Tensor, x: Tensor) -> None:
    """Refuse logits that are not [N, L] and labels that are none of the L classes, for x [N, …].

    Raises:
        TypeError, ValueError: as said; the message names them.
    """
    check_real(logits, "logits")
    if logits.dim() != 2 or len(logits) != len(x):
        raise ValueError(f"logits must be [N, L] for x {list(x.shape)}, got {list(logits.shape)}")
    check_classes(y, x, logits.shape[1], values=readable(x))


def _check_direction(score: Score, x: Tensor, projection: Tensor) -> None:
    if not callable(score):
        raise TypeError(f"score must map x [N, …] to scores [N, …], got {type(score).__name__}")
    check_real(x)
    check_like("projection", projection, x)


def _weight(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """λ(σ)."""
    return (sigma.square() + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data).square()


def sliced(score: Score, x: Tensor, projection: Tensor) -> Tensor:
    """Sliced score matching: vᵀ ∇(vᵀ s) + ½ (vᵀ s)² for each sample (Song et al., UAI 2019, Eq. 7).

    Args:
        score: maps x [N, …] to s(x) [N, …], each sample by itself.
        x: [N, …].
        projection: [N, …] v with E[v vᵀ] = I (Gaussian or Rademacher).

    Returns:
        [N]; equals ½ E‖s − ∇ log p‖² up to a constant of the data.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    _check_direction(score, x, projection)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = (score(handed(x)) * projection).flatten(1).sum(1)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (curvature * projection).flatten(1).sum(1) + 0.5 * slope.square()


def finite_difference(score: Score, x: Tensor, projection: Tensor, *, step: float) -> Tensor:
    """Sliced score matching with the derivative along v replaced by a central difference (Pang et al., NeurIPS 2020).

    With s± = s(x ± step · v): vᵀ (s₊ − s₋) / (2 step) + ⅛ (vᵀ (s₊ + s₋))², which differs from :func:`sliced` by
    O(step²) and needs no second backward pass.

    Args:
        score: maps x [N, …] to s(x) [N, …], each sample by itself.
        x: [N, …].
        projection: [N, …] v with E[v vᵀ] = I.
        step: length of the difference along v, in input units; > 0.

    Returns:
        [N].

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    _check_direction(score, x, projection)
    check_length("step", step)
    ahead = (score(x + step * projection) * projection).flatten(1).sum(1)
    behind = (score(x - step * projection) * projection).flatten(1).sum(1)
    return (ahead - behind) / (2 * step) + 0.125 * (ahead + behind).square()


def denoising_likelihood(
    classifier: nn.Module,
    unconditional: Tensor,
    x_noisy: Tensor,
    y: Tensor,
    sigma: Tensor,
    noise: Tensor,
    conditions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoising likelihood score matching (Chao et al., ICLR 2022, Eq. 11), beside the classifier's cross-entropy.

    ½ σ² ‖∇ log p(y|x̃) + s(x̃) − (−ω/σ)‖² / features, with s the (estimated) unconditional score, held fixed.

    Args:
        classifier: maps (x [N, …], sigma [N]) to logits [N, L].
        unconditional: [N, …] s(x̃), without a graph.
        x_noisy: [N, …] x̃ = x + σ ω.
        y: int64 [N] labels.
        sigma: [N] noise levels, > 0.
        noise: [N, …] ω.
        conditions: [N, K] how x was augmented, for a classifier that is told; ``unconditional`` is then the score given
            the same conditions.

    Returns:
        the matching loss [N] and the logits [N, L], both with a graph to the parameters.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_instance("classifier", classifier, nn.Module)
    _check(x_noisy, sigma, noise, conditions, name="x_noisy")
    check_like("unconditional", unconditional, x_noisy, other="x_noisy")
    with torch.enable_grad():
        x_noisy = x_noisy.detach().requires_grad_()
        logits = output_at(classifier, x_noisy, sigma, conditions)
        check_logits(logits, y, x_noisy)
        log_likelihood = -cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(log_likelihood, x_noisy, create_graph=True)
    residual = broadcast(sigma, gradient) * (gradient + unconditional) + noise
    return 0.5 * residual.flatten(1).square().mean(1), logits


def joint_energy(
    classifier: nn.Module,
    x_noisy: Tensor,
    y: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    center: Tensor | float,
    sigma_data: float,
    conditions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Conditional denoising score matching of a classifier whose logits are joint energies, log p_σ(x, y) + constant.

    ½ ‖σ (∇ₓ f_y(x̃) − (x̃ − c) / (σ² + σ_data²)) + ω‖² / features: the gradient of the logit of the label, plus the score
    of one Gaussian for all of the data, is to be the class score. That Gaussian is the same for all classes, so it
    cancels in the softmax. A classifier read as an energy is that of Grathwohl et al. (ICLR 2020); the loss is
    :func:`denoising` of Vincent (2011) with the score as a gradient.

    Args:
        classifier: maps (x [N, …], sigma [N]) to logits f [N, L].
        x_noisy: [N, …] x̃ = x + σ ω.
        y: int64 [N] labels.
        sigma: [N] noise levels, > 0.
        noise: [N, …] ω.
        center: c, the mean of the data.
        sigma_data: standard deviation of the data about it.
        conditions: [N, K] how x was augmented, for a classifier that is told.

    Returns:
        the matching loss [N] and the logits [N, L], both with a graph to the parameters.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the message names it.
    """
    check_instance("classifier", classifier, nn.Module)
    _check(x_noisy, sigma, noise, conditions, name="x_noisy")
    check_length("sigma_data", sigma_data)
    check_center(center, x_noisy)
    with torch.enable_grad():
        x_noisy = x_noisy.detach().requires_grad_()
        logits = output_at(classifier, x_noisy, sigma, conditions)
        check_logits(logits, y, x_noisy)
        energy = logits.gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(energy, x_noisy, create_graph=True)
    level = broadcast(sigma, gradient)
    base = (x_noisy.detach() - center) / (level.square() + sigma_data**2)
    residual = level * (gradient - base) + noise
    return 0.5 * residual.flatten(1).square().mean(1), logits
