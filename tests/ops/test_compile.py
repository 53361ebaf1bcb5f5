"""Every operator under torch.compile(fullgraph=True), forward and backward, in one graph each way."""

import pytest
import torch
from torch import Tensor

from scorematch import ops


def every_operator(x: Tensor, x0: Tensor, weight: Tensor, log_p: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    start = ops.random_start(x, x0 - 0.5, norm="linf", eps=0.2)
    logits = start.flatten(1) @ weight
    model_gradient, c = 2 * x, log_p.softmax(1)
    direction = ops.score_step(c.detach(), scores, model_gradient)
    x = ops.pgd_step(x, direction, x0, norm="linf", step_size=0.1, eps=0.3)
    x = ops.pgd_step(x, direction, x0, norm="l2", step_size=0.1, eps=0.3)
    moved = ops.score_line_integral(log_p, scores, scores, x - x0)
    loss = ops.logit_divergence(logits, log_p, kind="js") + ops.divergence(logits, labels, kind="kl", clip=0.1)
    return loss + ops.divergence(logits, log_p.softmax(1), kind="l1") + ops.logit_divergence(logits, moved, kind="kl")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_operator_in_one_graph(backend, device):
    torch._dynamo.reset()
    x0 = torch.rand(6, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
    x = (x0 + 0.1 * torch.randn_like(x0)).clamp(0, 1)
    weight = torch.randn(48, 10, device=device, requires_grad=True)
    log_p = torch.randn(6, 10, device=device).log_softmax(1).requires_grad_()
    labels, scores = torch.randint(10, (6,), device=device), torch.randn(6, 10, 3, 4, 4, device=device)
    arguments = (x, x0, weight, log_p, labels, scores)

    def run(function):
        loss = function(*arguments)
        return loss, *torch.autograd.grad(loss, (weight, log_p), torch.linspace(1, 2, 6, device=device))

    compiled = torch.compile(every_operator, fullgraph=True, backend=backend)
    for actual, expected in zip(run(compiled), run(every_operator), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def every_attack_operator(x0: Tensor, grad: Tensor, samples: Tensor) -> tuple[Tensor, ...]:
    uniform = ops.keyed_uniform(samples, 6, seed=3, stream=2**40)
    corner, sign, flags = (4 * uniform[:, :4]).long(), (uniform[:, :3] - 0.5).sign(), uniform[:, 0] < 0.5
    x = ops.square_linf(x0, x0, corner[:, :2], sign, side=2, eps=0.1)
    x = ops.square_l2(x, x0, corner, sign, torch.ones_like(x0[0, 0, :2, :2]), flags, eps=0.7)
    x = ops.fab_step(x, x0, grad, uniform[:, 1], norm="linf")
    x = ops.fab_step(x, x0, grad, uniform[:, 2], norm="l2")
    x = ops.fab_step(x, x0, grad, uniform[:, 2], norm="l1")
    x = ops.l1_step(x, grad, x0, uniform[:, 3], samples + 3, eps=2.0)
    x = ops.l1_project(x, x0, eps=1.0)
    x_prev, best_x, best_grad = x0.clone(), x.clone(), grad.clone()
    for norm in ("linf", "l2"):
        ops.apgd_step(
            x, x_prev, x0, grad, best_x, best_grad, uniform[:, 3], flags, ~flags, norm=norm, eps=0.4, momentum=0.75
        )
    return x, x_prev, best_x, best_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_attack_operator_in_one_graph(backend, device):
    torch._dynamo.reset()
    x0 = torch.rand(6, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    grad, samples = torch.randn_like(x0), torch.arange(6, device=device)
    compiled = torch.compile(every_attack_operator, fullgraph=True, backend=backend)
    expected = every_attack_operator(x0, grad, samples)
    torch.testing.assert_close(compiled(x0, grad, samples), expected, rtol=1e-5, atol=1e-6)


def test_dynamic_shapes(device):
    torch._dynamo.reset()

    def loss(logits: Tensor, target: Tensor, eps: float) -> Tensor:
        near = ops.pgd_step(logits, logits, logits, norm="l2", step_size=eps, eps=eps, lower=-9.0, upper=9.0)
        return ops.logit_divergence(near + logits, target, kind="kl")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, classes, eps in ((4, 10, 0.1), (7, 10, 0.2), (5, 12, 0.3)):
        logits = torch.randn(rows, classes, device=device, requires_grad=True)
        target = torch.randn(rows, classes, device=device)
        torch.testing.assert_close(compiled(logits, target, eps), loss(logits, target, eps))


def test_bad_input_is_refused_while_compiling(device):
    torch._dynamo.reset()
    compiled = torch.compile(ops.logit_divergence, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"target_logits has shape \[5, 11\] but logits has shape \[5, 12\]"):
        compiled(torch.randn(5, 12, device=device), torch.randn(5, 11, device=device))
