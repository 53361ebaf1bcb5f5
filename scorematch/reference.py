"""The compiled operators in plain PyTorch: their specification. Only tests and benchmarks import this."""

import math

import torch
from torch import Tensor


def pgd_step(
    x: Tensor,  # [N, ...]
    grad: Tensor,  # [N, ...]
    x0: Tensor,  # [N, ...]
    *,
    norm: str,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    if norm == "linf":
        direction = torch.where(grad.isnan(), grad, grad.sign())
        moved = x + step_size * direction
        return torch.minimum(torch.maximum(moved, x0 - eps), x0 + eps).clamp(lower, upper)
    length = _per_sample_length(grad)
    moved = x + step_size * torch.where(length == 0, torch.zeros_like(grad), grad / length)
    offset = moved - x0
    distance = _per_sample_length(offset)
    return torch.where(distance > eps, x0 + offset * (eps / distance), moved).clamp(lower, upper)


def random_start(
    x: Tensor,  # [N, ...]
    noise: Tensor,  # [N, ...]
    *,
    norm: str,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
    radius: Tensor | None = None,  # [N]
) -> Tensor:
    if norm == "linf":
        return (x + eps * noise.clamp(-1, 1)).clamp(lower, upper)
    length = _per_sample_length(noise)
    direction = torch.where(length == 0, torch.zeros_like(noise), noise / length)
    distance = torch.ones_like(length) if radius is None else radius.reshape(length.shape)
    return (x + eps * distance * direction).clamp(lower, upper)


def _per_sample_length(v: Tensor) -> Tensor:
    """L2 norm of each sample, [N, 1, ...], also where squares over- or underflow."""
    if v.numel() == 0:
        return v.new_zeros(len(v), *[1] * (v.dim() - 1))
    rows = v.reshape(len(v), -1)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return (largest * (rows / largest).norm(dim=1, keepdim=True)).reshape(-1, *[1] * (v.dim() - 1))


def divergence(
    logits: Tensor,  # [N, L]
    target: Tensor,  # int64 [N] or probabilities [N, L]
    *,
    kind: str = "se",
    clip: float = 0.0,
) -> Tensor:  # [N]
    if target.dtype == torch.int64:
        target = torch.nn.functional.one_hot(target, logits.shape[1]).to(logits.dtype)
    log_p = torch.where(target > 0, target, torch.ones_like(target)).log()
    return torch.relu(_divergence(target, log_p, logits.log_softmax(1), kind) - clip)


def logit_divergence(
    logits: Tensor,  # [N, L]
    target_logits: Tensor,  # [N, L]
    *,
    kind: str = "se",
    clip: float = 0.0,
) -> Tensor:  # [N]
    log_p = target_logits.log_softmax(1)
    return torch.relu(_divergence(log_p.exp(), log_p, logits.log_softmax(1), kind) - clip)


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    q = log_q.exp()
    if kind == "kl":
        return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(1)
    if kind == "se":
        return ((p - q) ** 2).sum(1)
    if kind == "l2":
        return _sqrt(((p - q) ** 2).sum(1))
    if kind == "l1":
        return (p - q).abs().sum(1)
    if kind == "l1_squared":
        return (p - q).abs().sum(1) ** 2
    if kind == "linf":
        return (p - q).abs().max(1).values
    if kind in {"js", "js_distance"}:
        log_m = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
        from_p = torch.where(p > 0, p * (log_p - log_m), torch.zeros_like(p))
        from_q = torch.where(q > 0, q * (log_q - log_m), torch.zeros_like(q))
        js = (from_p + from_q).sum(1) / 2
        return js if kind == "js" else _sqrt(js)
    raise ValueError(f"unknown kind {kind!r}")


def _sqrt(v: Tensor) -> Tensor:
    """√ with derivative 0 at 0."""
    positive = v > 0
    return torch.where(positive | v.isnan(), torch.where(positive, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v))


def score_step(
    weights: Tensor,  # [N, L]
    scores: Tensor,  # [N, L, ...]
    grad: Tensor,  # [N, ...]
) -> Tensor:  # [N, ...]
    return grad + (weights.reshape(*weights.shape, *[1] * (scores.dim() - 2)) * scores).sum(1)


def score_line_integral(
    log_p: Tensor,  # [N, L]
    scores0: Tensor,  # [N, L, ...]
    scores1: Tensor,  # [N, L, ...]
    move: Tensor,  # [N, ...]
) -> Tensor:  # [N, L]
    integrand = move.unsqueeze(1) * (scores0 + scores1) / 2  # [N, L, ...]
    return (log_p + integrand.reshape(*log_p.shape, math.prod(move.shape[1:])).sum(2)).log_softmax(1)
