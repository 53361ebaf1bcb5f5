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
    return _into_ball_and_box(x + step_size * _ascent(grad, norm), x0, norm, eps, lower, upper)


def _ascent(grad: Tensor, norm: str) -> Tensor:
    """The direction in which a step of unit length in the norm raises the loss most."""
    if norm == "linf":
        return torch.where(grad.isnan(), grad, grad.sign())
    length = _per_sample_length(grad)
    return torch.where(length == 0, torch.zeros_like(grad), grad / length)


def _into_ball_and_box(moved: Tensor, x0: Tensor, norm: str, eps: float, lower: float, upper: float) -> Tensor:
    if norm == "linf":
        return torch.minimum(torch.maximum(moved, x0 - eps), x0 + eps).clamp(lower, upper)
    offset = moved - x0
    distance = _per_sample_length(offset)
    return torch.where(distance > eps, x0 + offset * (eps / distance), moved).clamp(lower, upper)


def apgd_step(
    x: Tensor,  # [N, ...], becomes the next point
    x_prev: Tensor,  # [N, ...], becomes the point that the step started from
    x0: Tensor,  # [N, ...]
    grad: Tensor,  # [N, ...], at x
    best_x: Tensor,  # [N, ...], becomes x where improved
    best_grad: Tensor,  # [N, ...], becomes grad where improved
    step_size: Tensor,  # [N]
    improved: Tensor,  # bool [N]
    restart: Tensor,  # bool [N]
    *,
    norm: str,
    eps: float,
    momentum: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    step_size, improved, restart = (_per_sample(v, x) for v in (step_size, improved, restart))
    best_x.copy_(torch.where(improved, x, best_x))
    best_grad.copy_(torch.where(improved, grad, best_grad))
    start = torch.where(restart, best_x, x)
    start_grad = torch.where(restart, best_grad, grad)
    z = _into_ball_and_box(start + step_size * _ascent(start_grad, norm), x0, norm, eps, lower, upper)
    moved = start + (z - start) * momentum + (start - x_prev) * (1 - momentum)
    x_prev.copy_(start)
    x.copy_(_into_ball_and_box(moved, x0, norm, eps, lower, upper))


def fab_step(
    x: Tensor,  # [N, ...]
    x0: Tensor,  # [N, ...]
    normal: Tensor,  # [N, ...], gradient of the difference at x
    difference: Tensor,  # [N]
    *,
    norm: str,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    rows, rows0, w = (t.reshape(len(x), math.prod(x.shape[1:])) for t in (x, x0, normal))  # [N, D]
    move = _to_hyperplane(rows, w, difference, norm, lower, upper)
    move0 = _to_hyperplane(rows0, w, difference + (w * (rows0 - rows)).sum(1), norm, lower, upper)
    distance, distance0 = (_lengths(v, norm).clamp_min(1e-8) for v in (move, move0))
    alpha = (distance / (distance + distance0)).clamp_max(alpha_max).unsqueeze(1)
    moved = (rows + overshoot * move) * (1 - alpha) + (rows0 + overshoot * move0) * alpha
    return moved.clamp(lower, upper).reshape(x.shape)


def l1_step(
    x: Tensor,  # [N, ...]
    grad: Tensor,  # [N, ...]
    x0: Tensor,  # [N, ...] in the box
    step_size: Tensor,  # [N]
    moving: Tensor,  # int64 [N]
    *,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Both the largest gradients and the projection are found by sorting."""
    v, v0, g = (t.reshape(len(x), math.prod(x.shape[1:])) for t in (x, x0, grad))  # [N, D]
    if v.shape[1] == 0:
        return x.clone()
    size = g.abs().nan_to_num(nan=0.0, posinf=math.inf)
    smallest = size.sort(1, descending=True).values.gather(1, (moving - 1).clamp(0, v.shape[1] - 1)[:, None])
    moves = ((size >= smallest) & (size > 0) & (moving > 0)[:, None]).to(v.dtype)
    moves = moves * (step_size[:, None] / moves.sum(1, keepdim=True).clamp_min(1))
    v = v + torch.where(moves > 0, g.sign() * moves, moves)
    change = v - v0
    length, bound = change.abs(), torch.where(change > 0, torch.full_like(v, upper), torch.full_like(v, lower))
    room = (bound - v0).abs()
    shorter = _l1_shortening(length, room, eps)
    kept = length - shorter
    nearest = torch.where(kept >= room, bound, v - change.sign() * shorter)
    return torch.where(kept <= 0, v0, nearest).reshape(x.shape)


def _l1_shortening(
    length: Tensor,  # [N, D]
    room: Tensor,  # [N, D]
    eps: float,
) -> Tensor:  # [N, 1]
    """The smallest t >= 0 with sum(min(max(length - t, 0), room)) <= eps.

    The sum is linear in t between the corners at which an element leaves the box or reaches 0. From the largest corner
    on downwards it grows from 0.
    """
    total = torch.minimum(length, room).sum(1, keepdim=True)
    corners, order = torch.cat([length, (length - room).clamp_min(0)], 1).sort(1, descending=True)
    slope = torch.where(order < length.shape[1], 1, -1).to(length).cumsum(1)  # below a corner
    grown = (slope[:, :-1] * (corners[:, :-1] - corners[:, 1:])).cumsum(1)
    grown = torch.cat([torch.zeros_like(total), grown], 1)  # [N, 2 D], the sum at each corner
    last = (grown < eps).sum(1, keepdim=True).clamp_min(1) - 1
    shorter = corners.gather(1, last) - (eps - grown.gather(1, last)) / slope.gather(1, last).clamp_min(1)
    return torch.where(total > eps, shorter.clamp_min(0), total - total)  # 0 or, for a row with NaN, NaN


def _to_hyperplane_in_l1(
    weight: Tensor,  # [N, D], |w|
    direction: Tensor,  # [N, D] in which an element moves, -1, 0 or 1
    room: Tensor,  # [N, D] up to the box
    c: Tensor,  # [N], <w, p> - b
) -> Tensor:  # [N, D]
    """The same in l1: the elements of the largest |w| go to the box, and the last as far as they must.

    Elements of the same |w| go together, each by the same share of its room.
    """
    weight, order = weight.sort(dim=1, descending=True)
    room = room.gather(1, order)
    gain = torch.nn.functional.pad((weight * room).cumsum(1), (1, 0))  # [N, D + 1], of the first k elements
    rising = (-weight).contiguous()
    first, end = (torch.searchsorted(rising, rising, right=right) for right in (False, True))  # of the same |w|
    before, after = gain.gather(1, first), gain.gather(1, end)
    missing = c.abs().unsqueeze(1) - before
    share = (missing / (after - before)).clamp(0, 1)
    # A gain that rounding swallows is no gain: such elements go to the box only where it has no point of the plane.
    share = torch.where(after > before, share, (missing > 0).to(share))
    moved = torch.where(weight > 0, share * room, torch.zeros_like(room))
    return direction * torch.zeros_like(moved).scatter(1, order, moved)


def _to_hyperplane(
    p: Tensor,  # [N, D] in the box
    w: Tensor,  # [N, D]
    c: Tensor,  # [N], <w, p> - b
    norm: str,
    lower: float,
    upper: float,
) -> Tensor:  # [N, D]
    """The shortest delta with <w, p + delta> = b and p + delta in the box, or the one to the corner nearest to it.

    Every element moves in the direction that lowers |c|, by min(t rate, room); sorted by the t at which they meet the
    box, the elements give the decrease of |c| as a piecewise linear function of t.
    """
    weight, direction = w.abs(), -c.sign().unsqueeze(1) * w.sign()
    room = torch.where(direction > 0, upper - p, p - lower)
    if norm == "l1":
        return _to_hyperplane_in_l1(weight, direction, room, c)
    rate = torch.ones_like(w) if norm == "linf" else weight
    meets = torch.where(weight > 0, room / rate, torch.zeros_like(w))  # [N, D], the t at which an element is at the box
    meets, order = meets.sort(dim=1)
    gain_at_box, gain_rate = ((weight * v).gather(1, order) for v in (room, rate))
    none = torch.zeros_like(c).unsqueeze(1)
    settled = torch.cat([none, gain_at_box.cumsum(1)], dim=1)  # [N, D + 1], gain of the first k elements, at the box
    slope = torch.cat([gain_rate.flip(1).cumsum(1).flip(1), none], dim=1)  # [N, D + 1], of the others
    gain = settled[:, 1:] + meets * slope[:, 1:]  # [N, D], when the k-th element meets the box
    k = (gain < c.abs().unsqueeze(1)).sum(1, keepdim=True)
    t = (c.abs().unsqueeze(1) - settled.gather(1, k)) / slope.gather(1, k)  # infinite if the box has no such point
    t = torch.where(slope.gather(1, k) > 0, t, torch.full_like(t, math.inf))
    return torch.where(direction == 0, torch.zeros_like(w), direction * torch.minimum(t * rate, room))


def _lengths(rows: Tensor, norm: str) -> Tensor:
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    return rows.norm(dim=1, p={"linf": math.inf, "l2": 2, "l1": 1}[norm])


def square_linf(
    best: Tensor,  # [N, C, H, W]
    x0: Tensor,  # [N, C, H, W]
    corner: Tensor,  # int64 [N, 2], first row and column of the window
    sign: Tensor,  # [N, C], 1 or -1
    *,
    side: int,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    candidate = best.clone()
    for n, (row, column) in enumerate(corner.tolist()):
        candidate[n, :, row : row + side, column : column + side] += 2 * eps * sign[n, :, None, None]
    return _into_ball_and_box(candidate, x0, "linf", eps, lower, upper)


def square_l2(
    best: Tensor,  # [N, C, H, W]
    x0: Tensor,  # [N, C, H, W]
    corner: Tensor,  # int64 [N, 4], first row and column of the window that gains, then of the one that loses
    sign: Tensor,  # [N, C], 1 or -1
    pattern: Tensor,  # [side, side]
    transpose: Tensor,  # bool [N]
    *,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    side, channels = len(pattern), best.shape[1]
    delta = best - x0
    for n, (row, column, row2, column2) in enumerate(corner.tolist()):
        gains = (slice(row, row + side), slice(column, column + side))
        loses = (slice(row2, row2 + side), slice(column2, column2 + side))
        spare = (eps**2 - delta[n].square().sum()).clamp_min(0) / channels
        bump = pattern.t() if transpose[n] else pattern
        for c in range(channels):
            plane = delta[n, c]  # [H, W], a view
            both = plane[gains].square().sum() + plane[loses].square().sum()
            overlap = torch.zeros_like(plane)
            overlap[gains] += 1
            overlap[loses] += 1
            both -= plane[overlap == 2].square().sum()
            eta = bump * sign[n, c] + plane[gains] / (1e-12 + plane[gains].norm())
            eta = eta / (1e-12 + eta.norm()) * (spare + both).sqrt()
            plane[loses] = 0
            plane[gains] = eta
    length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return (x0 + eps * delta / (1e-12 + length)).clamp(lower, upper)


def keyed_uniform(
    samples: Tensor,  # int64 [N]
    count: int,
    *,
    seed: int,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [N, count]
    """Philox4x32-10 of Salmon et al., SC 2011, on 32-bit words held in int64."""
    low = 0xFFFFFFFF
    blocks = torch.arange(-(-count // 4), device=samples.device)
    zeros = torch.zeros(len(samples), len(blocks), dtype=torch.int64, device=samples.device)
    counter = [zeros + blocks, zeros + samples.unsqueeze(1), zeros + (stream & low), zeros + (stream >> 32)]
    key = [seed & low, seed >> 32]
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]  # modulo 2^64
        counter = [
            (product1 >> 32 & low) ^ counter[1] ^ key[0],
            product1 & low,
            (product0 >> 32 & low) ^ counter[3] ^ key[1],
            product0 & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    words = torch.stack(counter, dim=2).reshape(len(samples), 4 * len(blocks))[:, :count]
    return (words >> 8).to(dtype) * 2.0**-24


def _per_sample(v: Tensor, x: Tensor) -> Tensor:
    """[N] as [N, 1, ...], to broadcast with x."""
    return v.reshape(-1, *[1] * (x.dim() - 1))


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
