"""Times every kernel beside eager PyTorch and torch.compile, in one run, and writes benchmarks/results/<device>.json.

    python -m benchmarks.kernels --threads 2 --rounds 60 --only pgd_step --no-compile --floor
    python -m benchmarks.kernels --compare OLD.json NEW.json

The variants of a case take turns in every round, in random order, so that whatever else the machine does meets all of
them; a ratio is the median of the rounds' ratios. Divergences are timed forward and backward, as attacks use them. A
"fixed" row is the same call on almost no data: what a call costs whatever its size.

``--floor`` adds what no implementation could be faster than: the bytes that a call has to read and write and the
operations that it has to do, counted from the definition of the operator, at the speeds at which the same number of
threads reads, copies, multiplies and exponentiates. Reading and copying take turns with the case itself, on as many
bytes; of all of them the lower decile counts, since other work on the machine only ever adds.

``--compare`` ends with status 1 if a case has become slower beyond the noise of both files.
"""

import itertools
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import scorematch
from benchmarks import floor, record
from benchmarks.floor import Run, Work, work
from scorematch import _extension, ops, reference
from training.engine import checkpoint
from training.settings import command_line
from training.settings.errors import InputError, StopError, run_program

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """One kernel at one size: ours, the same in eager PyTorch, and bounds to compare with."""

    name: str
    ours: Run
    eager: Run
    work: Work
    compiled: Callable[[], Run] | None = None  # compiles when called
    others: dict[str, Run] = field(default_factory=dict)


def eager_divergence(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """As one would write it; log_p may hold -inf only where the kind does not take logarithms of p."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    if kind == "se":
        return (p - q).square().sum(1)
    if kind == "l2":
        return (p - q).norm(dim=1)
    if kind == "l1":
        return (p - q).abs().sum(1)
    if kind == "l1_squared":
        return (p - q).abs().sum(1).square()
    if kind == "linf":
        return (p - q).abs().amax(1)
    log_m = ((p + q) / 2).log()
    js = (p * (log_p - log_m) + q * (log_q - log_m)).sum(1) / 2
    return js if kind == "js" else js.sqrt()


def eager_pgd_step_linf(x: Tensor, grad: Tensor, x0: Tensor, step: float, eps: float) -> Tensor:
    moved = x + step * grad.sign()
    return torch.minimum(torch.maximum(moved, x0 - eps), x0 + eps).clamp(0, 1)


def eager_pgd_step_l2(x: Tensor, grad: Tensor, x0: Tensor, step: float, eps: float) -> Tensor:
    norm = grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    offset = x + step * grad / norm - x0
    distance = offset.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x0 + offset * (eps / distance).clamp(max=1)).clamp(0, 1)


def eager_random_start_l2(x: Tensor, noise: Tensor, radius: Tensor, eps: float) -> Tensor:
    norm = noise.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x + eps * radius.view(-1, 1, 1, 1) * noise / norm).clamp(0, 1)


def eager_ball(x: Tensor, x0: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "linf":
        return torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
    offset = x - x0
    distance = offset.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x0 + offset * (eps / distance).clamp(max=1)).clamp(0, 1)


def eager_apgd_step(
    x: Tensor,
    x_prev: Tensor,
    x0: Tensor,
    grad: Tensor,
    best_x: Tensor,
    best_grad: Tensor,
    step_size: Tensor,
    improved: Tensor,
    restart: Tensor,
    norm: str,
    eps: float,
) -> None:
    improved, restart, step = (t.view(-1, 1, 1, 1) for t in (improved, restart, step_size))
    new_best_x, new_best_grad = torch.where(improved, x, best_x), torch.where(improved, grad, best_grad)
    start, g = torch.where(restart, new_best_x, x), torch.where(restart, new_best_grad, grad)
    length = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12
    z = eager_ball(start + step * (g.sign() if norm == "linf" else g / length), x0, norm, eps)
    moved = eager_ball(start + (z - start) * 0.75 + (start - x_prev) * 0.25, x0, norm, eps)
    for t, value in ((best_x, new_best_x), (best_grad, new_best_grad), (x_prev, start), (x, moved)):
        t.copy_(value)


def eager_to_hyperplane(p: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """By sorting the elements by when they meet the box [0, 1]; all [N, D], c [N, 1]."""
    weight, direction = w.abs(), -c.sign() * w.sign()
    rate = weight if norm == "l2" else torch.ones_like(w)
    room = torch.where(direction > 0, 1 - p, p)
    meets, order = (room / rate.clamp_min(1e-30)).sort(dim=1)
    settled = (weight * room).gather(1, order).cumsum(1)
    gain_rate = (weight * rate).gather(1, order)
    slope = gain_rate.sum(1, keepdim=True) - gain_rate.cumsum(1)
    k = (settled + meets * slope < c.abs()).sum(1, keepdim=True)
    before = (k - 1).clamp_min(0)
    first = k == 0
    t = (c.abs() - settled.gather(1, before).masked_fill(first, 0)) / torch.where(
        first, gain_rate.sum(1, keepdim=True), slope.gather(1, before)
    ).clamp_min(1e-30)
    return direction * torch.minimum(t * rate, room)


def eager_fab_step(x: Tensor, x0: Tensor, normal: Tensor, difference: Tensor, norm: str) -> Tensor:
    p, p0, w = x.flatten(1), x0.flatten(1), normal.flatten(1)
    c = difference.unsqueeze(1)
    both = eager_to_hyperplane(
        torch.cat([p, p0]), torch.cat([w, w]), torch.cat([c, c + (w * (p0 - p)).sum(1, keepdim=True)]), norm
    )
    length = both.norm(dim=1, p=math.inf if norm == "linf" else 2, keepdim=True).clamp_min(1e-8)
    (move, move0), (a, a0) = both.chunk(2), length.chunk(2)
    alpha = (a / (a + a0)).clamp(max=0.1)
    return ((p + 1.05 * move) * (1 - alpha) + (p0 + 1.05 * move0) * alpha).clamp(0, 1).view_as(x)


def window_mask(corner: Tensor, side: int, image: Tensor) -> Tensor:  # bool [N, 1, H, W]
    rows = torch.arange(image.shape[2], device=image.device).view(1, -1, 1) - corner[:, 0].view(-1, 1, 1)
    columns = torch.arange(image.shape[3], device=image.device).view(1, 1, -1) - corner[:, 1].view(-1, 1, 1)
    return ((rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)).unsqueeze(1)


def eager_square_linf(best: Tensor, x0: Tensor, corner: Tensor, sign: Tensor, side: int, eps: float) -> Tensor:
    move = 2 * eps * sign[:, :, None, None] * window_mask(corner, side, best)
    return eager_ball(best + move, x0, "linf", eps)


def eager_square_l2(
    best: Tensor, x0: Tensor, corner: Tensor, sign: Tensor, pattern: Tensor, transpose: Tensor, eps: float
) -> Tensor:
    """Every sample has windows of its own, hence masks, and indices for the pattern."""
    side, delta = len(pattern), best - x0
    gains, loses = window_mask(corner[:, :2], side, best), window_mask(corner[:, 2:], side, best)
    own = (delta * gains).square().sum((2, 3), keepdim=True)
    both = (delta * (gains | loses)).square().sum((2, 3), keepdim=True)
    spare = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / best.shape[1]
    rows = (torch.arange(best.shape[2], device=best.device) - corner[:, :1]).clamp(0, side - 1)
    columns = (torch.arange(best.shape[3], device=best.device) - corner[:, 1:2]).clamp(0, side - 1)
    bump = torch.where(
        transpose.view(-1, 1, 1),
        pattern[columns.unsqueeze(1), rows.unsqueeze(2)],
        pattern[rows.unsqueeze(2), columns.unsqueeze(1)],
    )
    eta = (bump.unsqueeze(1) * sign[:, :, None, None] + delta / (1e-12 + own.sqrt())) * gains
    eta = eta / (1e-12 + eta.square().sum((2, 3), keepdim=True).sqrt()) * (spare + both).sqrt()
    delta = torch.where(gains, eta, delta.masked_fill(loses, 0))
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x0 + eps * delta / (1e-12 + length)).clamp(0, 1)


def eager_score_step(weights: Tensor, scores: Tensor, grad: Tensor) -> Tensor:
    return grad + torch.einsum("nl,nld->nd", weights, scores)


def eager_score_line_integral(log_p: Tensor, scores0: Tensor, scores1: Tensor, move: Tensor) -> Tensor:
    return (log_p + torch.einsum("nld,nd->nl", scores0 + scores1, move) / 2).log_softmax(1)


def forward_backward(loss: Callable[..., Tensor], *arguments: Tensor) -> Run:
    wanted = [t for t in arguments if t.requires_grad]
    upstream = torch.ones(len(arguments[0]), device=arguments[0].device)

    def run() -> object:
        return torch.autograd.grad(loss(*arguments), wanted, upstream)

    return run


def threat_model_cases(device: str) -> list[Case]:
    shape = (128, 3, 32, 32)
    x0 = torch.rand(shape, device=device)
    x, grad = (x0 + 0.02 * torch.randn_like(x0)).clamp(0, 1), torch.randn(shape, device=device)
    noise, radius = torch.randn(shape, device=device), torch.rand(128, device=device)
    few = x[:1, :, :4, :4].contiguous()
    step, eps = 2 / 255, 8 / 255

    def case(
        name: str, ours: Callable[..., Tensor], eager: Callable[..., Tensor], operations: int, *arguments: Tensor
    ) -> Case:
        """So many operations an element; each argument is read once, a result like x written."""
        x = arguments[0]
        return Case(
            name,
            lambda: ours(*arguments),
            lambda: eager(*arguments),
            work(arguments, [x], operations * x.numel()),
            lambda: partial(torch.compile(eager), *arguments),
        )

    def linf(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        return scorematch.pgd_step(x, grad, x0, norm="linf", step_size=step, eps=eps)

    def l2(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        return scorematch.pgd_step(x, grad, x0, norm="l2", step_size=0.1, eps=0.5)

    def eager_linf(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        return eager_pgd_step_linf(x, grad, x0, step, eps)

    def eager_l2(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        return eager_pgd_step_l2(x, grad, x0, 0.1, 0.5)

    # sign, × step, + x; x0 ± eps, clip to both; clip to the box
    of_linf = 3 + 4 + 2
    # ‖grad‖: 2; + step grad - x0: 3; ‖…‖: 2; x0 + shrink …: 2; clip to the box: 2
    of_l2 = 2 + 3 + 2 + 2 + 2
    channels_last = [t.to(memory_format=torch.channels_last) for t in (x, grad, x0)]
    return [
        case("pgd_step linf [128,3,32,32]", linf, eager_linf, of_linf, x, grad, x0),
        case("pgd_step linf [128,3,32,32] channels_last", linf, eager_linf, of_linf, *channels_last),
        case("pgd_step linf fixed [1,3,4,4]", linf, eager_linf, of_linf, few, few, few),
        case("pgd_step l2 [128,3,32,32]", l2, eager_l2, of_l2, x, grad, x0),
        case(
            "random_start linf [128,3,32,32]",
            lambda x, noise: scorematch.random_start(x, noise, norm="linf", eps=eps),
            lambda x, noise: (x + eps * noise.clamp(-1, 1)).clamp(0, 1),
            2 + 2 + 2,  # clip the noise, × eps, + x, clip to the box
            x,
            noise,
        ),
        case(
            "random_start l2 [128,3,32,32]",
            lambda x, noise, radius: scorematch.random_start(x, noise, norm="l2", eps=0.5, radius=radius),
            lambda x, noise, radius: eager_random_start_l2(x, noise, radius, 0.5),
            2 + 2 + 2,  # ‖noise‖, × length, + x, clip to the box
            x,
            noise,
            radius,
        ),
    ]


def auto_attack_cases(device: str) -> list[Case]:
    shape = (128, 3, 32, 32)
    x0 = torch.rand(shape, device=device)
    x, x_prev, best_x = ((x0 + 0.02 * torch.randn_like(x0)).clamp(0, 1) for _ in range(3))
    grad, best_grad = torch.randn_like(x0), torch.randn_like(x0)
    step_size, difference = torch.rand(128, device=device) * 0.03, torch.randn(128, device=device)
    improved, restart = torch.rand(128, device=device) < 0.5, torch.rand(128, device=device) < 0.1
    apgd = (x, x_prev, x0, grad, best_x, best_grad, step_size, improved, restart)
    cases = []

    def case(
        name: str, ours: Callable[..., object], eager: Callable[..., object], of_call: Work, *arguments: Tensor
    ) -> None:
        def compiled() -> Run:
            return partial(torch.compile(eager, dynamic=False), *arguments)

        cases.append(Case(name, partial(ours, *arguments), partial(eager, *arguments), of_call, compiled))

    elements = x0.numel()
    # Start and gradient are each read from one of two places; the best ones are written where they have improved.
    written = [t[improved] for t in (best_x, best_grad)]
    # Two steps into ball and box, and the momentum between them: 6
    of_apgd = {
        "linf": 2 * (4 + 2) + 3 + 6,  # sign, × step, +
        "l2": 2 * (3 + 2 + 2) + 4 + 6,  # distance, shrink, clip to the box; ‖grad‖, × step, +
    }
    # <normal, x0 - x>: 3. For each of two points the room of every element: 2; whether it is used up: 2; the move: 2;
    # its length: 2. The mean of both points, overshot: 7, clipped to the box: 2
    of_fab = 3 + 2 * (2 + 2 + 2 + 2) + 7 + 2
    # |grad| beside a threshold: 2; step: 2; distance from x0: 2; beside a threshold: 3; + x0, clip to the box: 3
    of_l1 = 2 + 2 + 2 + 3 + 3
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5)):
        # In place: each variant goes on from where the last left the points, which costs the same.
        case(
            f"apgd_step {norm} [128,3,32,32]",
            partial(ops.apgd_step, norm=norm, eps=eps, momentum=0.75),
            partial(eager_apgd_step, norm=norm, eps=eps),
            work([x, grad, x_prev, x0], [x, x_prev, *written], of_apgd[norm] * elements),
            *apgd,
        )
        case(
            f"fab_step {norm} [128,3,32,32]",
            partial(ops.fab_step, norm=norm),
            partial(eager_fab_step, norm=norm),
            work([x, x0, grad], [x], of_fab * elements),
            best_x.clone(),
            x0,
            0.1 * grad,
            difference,
        )
    case(
        "fab_step l1 [128,3,32,32]",
        partial(ops.fab_step, norm="l1"),
        partial(reference.fab_step, norm="l1"),  # which sorts
        work([x, x0, grad], [x], of_fab * elements),
        best_x.clone(),
        x0,
        0.1 * grad,
        difference,
    )
    cases[-1].compiled = None
    fifth, long = torch.full((128,), 3072 // 5, device=device), torch.full((128,), 12.0, device=device)
    case(
        "l1_step [128,3,32,32]",
        partial(ops.l1_step, eps=12.0),
        partial(reference.l1_step, eps=12.0),
        work([x, grad, x0], [x], of_l1 * elements),
        best_x.clone(),
        grad,
        x0,
        long,
        fifth,
    )
    cases[-1].compiled = None
    case(
        "l1_project [128,3,32,32]",
        partial(ops.l1_project, eps=12.0),
        lambda x, x0: reference.l1_step(x, x, x0, 0 * long, 0 * fifth, eps=12.0),
        work([x, x0], [x], (of_l1 - 4) * elements),  # no step
        best_x.clone(),
        x0,
    )
    cases[-1].compiled = None
    shape, side = (250, 3, 32, 32), 10
    x0 = torch.rand(shape, device=device)
    best = (x0 + 0.02 * torch.randn_like(x0)).clamp(0, 1)
    corner = torch.randint(32 - side, (250, 4), device=device)
    sign = torch.randn(250, 3, device=device).sign()
    pattern, transpose = torch.rand(side, side, device=device), torch.rand(250, device=device) < 0.5
    images = (best, x0, corner[:, :2].contiguous(), sign)
    case(
        f"square_linf [250,3,32,32] side {side}",
        partial(ops.square_linf, side=side, eps=8 / 255),
        partial(eager_square_linf, side=side, eps=8 / 255),
        # x0 ± eps, clip to both, clip to the box; in the window also + move
        work([best, x0], [best], 6 * best.numel() + sign.numel() * side**2),
        *images,
    )
    case(
        f"square_l2 [250,3,32,32] side {side}",
        partial(ops.square_l2, eps=0.5),
        partial(eager_square_l2, eps=0.5),
        # ‖δ‖: 3; x0 + stretch δ: 3, clip to the box: 2; in the window that gains η: 7 and ‖η‖: 2, in both their ‖δ‖: 3
        work([best, x0], [best], 8 * best.numel() + 15 * sign.numel() * side**2),
        *(best, x0, corner, sign, pattern, transpose),
    )
    samples = torch.arange(128, device=device)
    for count in (3072, 5):
        case(
            f"keyed_uniform [128,{count}]",
            partial(ops.keyed_uniform, count=count, seed=1, stream=2),
            lambda samples, count=count: torch.rand(len(samples), count, device=samples.device),
            # For each four numbers ten rounds of 2 products, 4 exclusive ors and 2 additions; 3 to make a number
            Work(8 * len(samples), 4 * count * len(samples), len(samples) * (80 * math.ceil(count / 4) + 3 * count)),
            samples,
        )
    cases[-2].others["keyed in eager"] = partial(reference.keyed_uniform, samples, 3072, seed=1, stream=2)
    return cases


# Operations for a class, forward and backward. A softmax has its largest element: 1, the difference to it, the sum and
# the quotient: 3. Then the share of D, its sum, c_j = ∂D/∂log q_j, Σ c, c - q Σ c, and the product with what comes from
# above; a second gradient takes 4 more.
OF_SOFTMAX = 4
OF_DIVERGENCE = {"kl": 3, "se": 3, "l2": 3, "l1": 3, "l1_squared": 3, "linf": 3, "js": 9, "js_distance": 9}
OF_GRADIENT = 1 + 1 + 1 + 2 + 1


def work_of_divergence(kind: str, reads: list[Tensor], logits: Tensor, of_logits: bool) -> Work:
    """Reads what is given; writes the losses and a gradient, for target logits a second one."""
    distributions = 2 if of_logits else 1
    operations = distributions * (OF_SOFTMAX + OF_GRADIENT) + OF_DIVERGENCE[kind]
    logarithms = {"kl": 0, "js": 2, "js_distance": 2}.get(kind, 0)  # log q is a difference
    return work(
        reads,
        [logits[:, 0], *[logits] * distributions],
        operations * logits.numel(),
        (distributions + logarithms) * logits.numel(),
        backward=True,
    )


def divergence_cases(device: str) -> list[Case]:
    cases = []
    for rows, classes in ((512, 10), (512, 1000)):
        size = f"[{rows},{classes}]"
        logits = torch.randn(rows, classes, device=device, requires_grad=True)
        other_logits = torch.randn(rows, classes, device=device, requires_grad=True)
        labels = torch.randint(classes, (rows,), device=device)

        def compiled(loss: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], Run]:
            return lambda: forward_backward(torch.compile(loss, dynamic=False), *arguments)

        def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, reduction="none")

        cases.append(
            Case(
                f"divergence kl, labels {size}",
                forward_backward(lambda z, y: scorematch.divergence(z, y, kind="kl"), logits, labels),
                forward_backward(cross_entropy, logits, labels),
                work_of_divergence("kl", [logits, labels], logits, of_logits=False),
                compiled(cross_entropy, logits, labels),
            )
        )

        def se_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
            return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).square().sum(1)

        cases.append(
            Case(
                f"divergence se, labels {size}",
                forward_backward(lambda z, y: scorematch.divergence(z, y, kind="se"), logits, labels),
                forward_backward(se_of_labels, logits, labels),
                work_of_divergence("se", [logits, labels], logits, of_logits=False),
                compiled(se_of_labels, logits, labels),
            )
        )
        for kind in scorematch.ops.DIVERGENCES:

            def ours(z: Tensor, t: Tensor, kind: str = kind) -> Tensor:
                return scorematch.logit_divergence(z, t, kind=kind)

            def eager(z: Tensor, t: Tensor, kind: str = kind) -> Tensor:
                return eager_divergence(t.log_softmax(1), z.log_softmax(1), kind)

            cases.append(
                Case(
                    f"logit_divergence {kind} {size}",
                    forward_backward(ours, logits, other_logits),
                    forward_backward(eager, logits, other_logits),
                    work_of_divergence(kind, [logits, other_logits], logits, of_logits=True),
                    compiled(eager, logits, other_logits),
                )
            )
    z = torch.randn(2, 10, device=device, requires_grad=True)
    t = torch.randn(2, 10, device=device, requires_grad=True)
    cases.append(
        Case(
            "logit_divergence kl fixed [2,10]",
            forward_backward(lambda z, t: scorematch.logit_divergence(z, t, kind="kl"), z, t),
            forward_backward(lambda z, t: eager_divergence(t.log_softmax(1), z.log_softmax(1), "kl"), z, t),
            work_of_divergence("kl", [z, t], z, of_logits=True),
        )
    )
    return cases


def score_cases(device: str) -> list[Case]:
    samples, classes, features = 128, 10, 3072
    scores0, scores1 = torch.randn(2, samples, classes, features, device=device).unbind()
    scores0, scores1 = scores0.clone(), scores1.clone()
    weights, log_p = torch.randn(2, samples, classes, device=device).unbind()
    grad, move = torch.randn(2, samples, features, device=device).unbind()

    def case(
        name: str, ours: Callable[..., Tensor], eager: Callable[..., Tensor], of_call: Work, *arguments: Tensor
    ) -> Case:
        return Case(
            name,
            lambda: ours(*arguments),
            lambda: eager(*arguments),
            of_call,
            lambda: partial(torch.compile(eager), *arguments),
        )

    def of_step(weights: Tensor, scores: Tensor, grad: Tensor, turns: int = 1) -> Work:  # × weight, +
        return work([weights, scores, grad], [grad], 2 * scores.numel(), turns=turns)

    of_step_here = of_step(weights, scores0, grad)
    step = case(
        "score_step [128,10,3072]", scorematch.score_step, eager_score_step, of_step_here, weights, scores0, grad
    )
    as_matrix, as_row = weights.unsqueeze(1), grad.unsqueeze(1)
    step.others = {
        "baddbmm": lambda: torch.baddbmm(as_row, as_matrix, scores0),
        "read": scores0.sum,
    }
    # In a network's wake the scores lie in the cache; six turns of them do not, on most processors.
    turns = itertools.cycle([torch.randn_like(scores0) for _ in range(6)])
    from_memory = Case(
        "score_step [128,10,3072] from memory",
        lambda: scorematch.score_step(weights, next(turns), grad),
        lambda: eager_score_step(weights, next(turns), grad),
        of_step(weights, scores0, grad, turns=6),
        others={"baddbmm": lambda: torch.baddbmm(as_row, as_matrix, next(turns)), "read": lambda: next(turns).sum()},
    )
    integral = case(
        "score_line_integral [128,10,3072]",
        scorematch.score_line_integral,
        eager_score_line_integral,
        # s0 + s1, × move, +; a softmax of the classes
        work([log_p, scores0, scores1, move], [log_p], 3 * scores0.numel() + 4 * log_p.numel(), log_p.numel()),
        log_p,
        scores0,
        scores1,
        move,
    )
    integral.others = {"read": lambda: (scores0.sum(), scores1.sum())}
    few, few_grads = (t[:1, ..., :8].contiguous() for t in (scores0, grad))
    fixed = case(
        "score_step fixed [1,10,8]",
        scorematch.score_step,
        eager_score_step,
        of_step(weights[:1], few, few_grads),
        weights[:1],
        few,
        few_grads,
    )
    return [step, from_memory, integral, fixed]


def seconds(run: Run, calls: int, device: str) -> float:
    """Seconds a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def measure(
    case: Case, rounds: int, with_compile: bool, device: str, peak: floor.Peak | None = None
) -> dict[str, object]:
    """With `peak`, also the floor."""
    variants: dict[str, Run] = {"ours": case.ours, "eager": case.eager, **case.others}
    result: dict[str, object] = {"name": case.name}
    if with_compile and case.compiled is not None:
        torch._dynamo.reset()
        compiled = case.compiled()
        try:
            compiled()
            variants["compiled"] = compiled
        except Exception as error:  # Inductor's own: of torch 2.14.1 on the CPU, for apgd_step in L2
            result["compiled_failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{case.name}: torch.compile failed, {result['compiled_failed']}", flush=True)
    moved, probes = floor.probe_runs(case.work, device) if peak is not None else (0, {})
    runs = {**variants, **{f"probe {name}": run for name, run in probes.items()}}
    for run in runs.values():
        for _ in range(3):
            run()
    calls = max(1, min(50, int(2e-3 / seconds(case.ours, 3, device))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            for _ in range(case.work.turns):  # its data lie where they would lie in a loop of nothing else
                runs[name]()
            times[name].append(seconds(runs[name], calls, device))
    result["calls_a_round"] = calls
    for name in variants:
        result[name] = floor.spread(times[name])
        if name != "ours":
            ratios = [b / a for a, b in zip(times["ours"], times[name], strict=True)]
            result[f"{name}/ours"] = statistics.median(ratios)
            result[f"{name}/ours_interval"] = floor.interval_of_median(ratios)
    if peak is not None:
        undisturbed = {name: floor.lower_decile(values) for name, values in times.items()}
        found = floor.Probes(moved, **{"backward": 0.0, **{name: undisturbed[f"probe {name}"] for name in probes}})
        lowest = floor.floor_of(case.work, found, peak, floor.last_cache(device))
        result["floor"] = {**lowest, "ours/floor": undisturbed["ours"] * 1e6 / lowest["floor_us"]}
    return result


def compare(old: Path, new: Path) -> None:
    """Prints what has become slower.

    Raises:
        InputError: the files cannot be compared.
        StopError: a case has become slower.
    """
    try:
        records = [json.loads(path.read_text()) for path in (old, new)]
        lines = floor.regressions(*records)
    except (OSError, ValueError, KeyError, floor.Unusable) as error:
        raise InputError(f"compare: {old} and {new} cannot be compared: {error}") from None
    for name in floor.only_in_one(*records):
        print(f"only in one file: {name}")
    print("\n".join(lines) or f"no case is slower (by more than {floor.THRESHOLD} times and beyond the noise)")
    if lines:
        raise StopError(f"{len(lines)} of {len(records[1]['results'])} cases are slower")


def print_floor(result: dict[str, Any]) -> None:
    lowest, ours = result["floor"], result["ours"]["p10_us"]
    print(
        f"{result['name']:45}{lowest['bytes_read'] / 1e3:10.0f}{lowest['bytes_written'] / 1e3:10.0f}"
        f"{lowest['operations'] / 1e6:10.2f}{lowest['exponentials'] / 1e6:10.2f}{lowest['floor_us']:10.1f}{ours:10.1f}"
        f"{lowest['ours/floor']:10.2f}  {lowest['bound']}",
        flush=True,
    )


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to time."""

    device: str = "cpu"  # torch device; auto is cuda where there is one
    threads: int = 0  # CPU threads; 0 is all
    rounds: int = 60  # turns of each variant
    only: tuple[str, ...] = ()  # cases whose name contains one of these; their result is written with --out alone
    compile: bool = True  # beside torch.compile, too; its compilations take most of the time
    floor: bool = False  # also what no implementation could be faster than
    compare: tuple[Path, Path] | None = None  # do not measure, compare an old file that was written with a new one
    out: Path | None = None  # JSON file to write; None is benchmarks/results/DEVICE.json


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        BenchmarkSettings,
        arguments,
        program="python -m benchmarks.kernels",
        description="Time every kernel beside eager PyTorch and torch.compile.",
    )
    if settings.compare is not None:
        compare(*settings.compare)
        return
    device = record.check(settings, {"rounds": (lambda v: v >= 2, "at least 2")})
    out = settings.out
    if out is None and not settings.only:
        out = RESULTS / f"{device.type}.json"
        checkpoint.check_writable(out)
    torch.manual_seed(0)
    random.seed(0)

    suites = (threat_model_cases, auto_attack_cases, divergence_cases, score_cases)
    cases = [case for suite in suites for case in suite(device.type)]
    names = [case.name for case in cases]
    if settings.only:
        cases = [case for case in cases if any(part in case.name for part in settings.only)]
    if not cases:
        raise InputError(f"only: {' '.join(settings.only)} is in the name of no case, allowed: parts of {names}")
    columns = ["ours", "eager", "compiled", "baddbmm", "read"]
    peak, machine = None, {}
    if settings.floor:
        peak = floor.measure_peak(device.type, seconds)
        bandwidth = floor.measure_bandwidth(device.type, seconds, floor.larger_than_caches(device.type))
        machine = {"machine": {"peak": asdict(peak), "bandwidth": bandwidth}}
        print(f"{peak.operations / 1e9:.0f} G operations, {peak.exponentials / 1e9:.2f} G exponentials a second")
        for line in bandwidth:
            rates = [f"{name} {line[f'{name}_bytes_a_second'] / 1e9:.1f} GB/s" for name in ("sum", "triad")]
            print(f"arrays of {line['bytes'] / 2**20:.2f} MiB: {', '.join(rates)}")
    print(
        f"{'median µs a call':45}"
        + "".join(f"{name:>10}" for name in columns)
        + f"{'eager/ours':>12}{'compiled/ours':>15}"
    )
    about = {
        "rounds": settings.rounds,
        "python": platform.python_version(),
        "scorematch": scorematch.__version__,
        "build": _extension.build_info(),
        **machine,
    }
    results: list[dict[str, object]] = []
    for case in cases:
        result = measure(case, settings.rounds, settings.compile, device.type, peak)
        results.append(result)
        if settings.out is not None:  # what was measured so far is kept if the benchmark is stopped
            record.write(out, "kernels", arguments, device, **about, results=results)
        cells = [f"{result[name]['median_us']:10.1f}" if name in result else " " * 10 for name in columns]  # type: ignore[index]
        ratios = [result.get("eager/ours"), result.get("compiled/ours")]
        print(
            f"{case.name:45}"
            + "".join(cells)
            + "".join(f"{r:{w}.2f}" if r else "" for r, w in zip(ratios, (12, 15), strict=True)),
            flush=True,
        )

    if settings.floor:
        headings = ["kB read", "written", "M operat.", "M exponen.", "floor µs", "ours µs", "ratio"]
        print(f"\n{'floor':45}" + "".join(f"{name:>10}" for name in headings) + "  bound by")
        for result in results:
            print_floor(result)
    record.write(out, "kernels", arguments, device, **about, results=results)
    print(f"written to {out}" if out else "not written, as these are not all cases; --out FILE writes them")


if __name__ == "__main__":
    sys.exit(run_program(main))
