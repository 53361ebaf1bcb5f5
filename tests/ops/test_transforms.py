"""Derivatives that do not go through ``backward``: torch.func, forward mode, and programs of torch.export.

The kernels give both gradients beside the loss. Whatever asks for a derivative must get them, or an error: not 0.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from scorematch import ops, reference

Function = Callable[[Tensor, Tensor], Tensor]


def functions(form: str, kind: str) -> tuple[Function, Function]:
    """The kernel and its reference, of logits and a target."""
    ours, theirs = (
        getattr(module, "logit_divergence" if form == "logits" else "divergence") for module in (ops, reference)
    )
    return (lambda z, t: ours(z, t, kind=kind)), (lambda z, t: theirs(z, t, kind=kind))


def arguments(form: str, *batch: int) -> tuple[Tensor, Tensor]:
    logits, other = torch.randn(*batch, 3, 4), torch.randn(*batch, 3, 4)
    return logits, {"labels": other.argmax(-1), "probabilities": other.softmax(-1), "logits": other}[form]


@pytest.fixture(params=["labels", "probabilities", "logits"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["kl", "se", "js_distance"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_forward_mode(form: str, kind: str) -> None:
    (logits, target), (function, expected) = arguments(form), functions(form, kind)
    direction, of_target = torch.randn(3, 4), torch.randn(3, 4) if form != "labels" else None
    _, tangent = torch.func.jvp(lambda z: function(z, target), (logits,), (direction,))
    _, known = torch.func.jvp(lambda z: expected(z, target), (logits,), (direction,))
    torch.testing.assert_close(tangent, known)
    jacobian = torch.func.jacfwd(lambda z: function(z, target))(logits)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda z: expected(z, target))(logits))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, direction)
        torch.testing.assert_close(forward_ad.unpack_dual(function(dual, target)).tangent, known)
    if of_target is not None:
        _, tangent = torch.func.jvp(function, (logits, target), (direction, of_target))
        _, known = torch.func.jvp(expected, (logits, target), (direction, of_target))
        torch.testing.assert_close(tangent, known)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_through_vmap(form: str, kind: str, shared: bool) -> None:
    """As an ensemble is trained; its members may share their targets."""
    logits, target = arguments(form, 2)
    if shared:
        target = target[0]
    function, expected = functions(form, kind)
    leaves = [t.requires_grad_() for t in (logits, target) if t.is_floating_point()]
    loss = torch.vmap(function, (0, None if shared else 0))(logits, target)
    known = torch.stack([expected(z, target if shared else target[i]) for i, z in enumerate(logits)])
    torch.testing.assert_close(loss, known)
    for ours, theirs in zip(
        torch.autograd.grad(loss.square().sum(), leaves), torch.autograd.grad(known.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_vmap_over_another_dimension_and_over_nothing() -> None:
    logits, target = torch.randn(3, 4, 2), torch.randint(4, (3,))
    loss = torch.vmap(lambda z: ops.divergence(z, target), in_dims=2)(logits)
    torch.testing.assert_close(loss, torch.stack([ops.divergence(z, target) for z in logits.unbind(2)]))
    assert torch.vmap(ops.divergence)(torch.randn(2, 0, 4), torch.rand(2, 0, 4)).shape == (2, 0)


def test_gradients_of_torch_func(form: str, kind: str) -> None:
    (logits, target), (function, expected) = arguments(form), functions(form, kind)
    gradient = torch.func.grad(lambda z: function(z, target).sum())(logits)
    known = torch.func.grad(lambda z: expected(z, target).sum())(logits)
    torch.testing.assert_close(gradient, known)
    of_samples = torch.vmap(torch.func.grad(lambda z, t: function(z[None], t[None]).sum()))(logits, target)
    torch.testing.assert_close(of_samples, known)


SECOND = {
    "reverse over reverse": lambda f: torch.func.grad(lambda z: torch.func.grad(f)(z).square().sum()),
    "forward over reverse": torch.func.hessian,
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "reverse over forward": lambda f: torch.func.grad(
        lambda z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[1].square()
    ),
}


@pytest.mark.parametrize("order", SECOND)
def test_second_derivatives_are_refused(order: str, form: str) -> None:
    (logits, target), (function, _) = arguments(form), functions(form, "kl")
    with pytest.raises(RuntimeError, match="differentiated once"):
        SECOND[order](lambda z: function(z, target).sum())(logits)


class Loss(nn.Module):
    """A network with its loss, as it is exported."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.network, (self.function, _) = nn.Linear(5, 4), functions(form, "kl")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.function(self.network(x), target).sum() + 0.1 * self.network.bias.sum()


@pytest.mark.parametrize("strict", [False, True])
def test_gradients_of_an_exported_program(form: str, strict: bool) -> None:
    module, x = Loss(form), torch.randn(3, 5)
    target = arguments(form)[1]
    program = torch.export.export(module, (x, target), strict=strict).module()
    program(x, target).backward()
    module(x, target).backward()
    found = dict(program.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad)


def test_gradients_of_the_bare_operator() -> None:
    logits, target = (t.requires_grad_() for t in arguments("logits"))
    operator = torch.ops.scorematch.logit_divergence.default
    loss, *_ = operator(logits, target, 0, 0.0, True, True)
    known = torch.autograd.grad(reference.logit_divergence(logits, target, kind="kl").sum(), (logits, target))
    for ours, theirs in zip(torch.autograd.grad(loss.sum(), (logits, target)), known, strict=True):
        torch.testing.assert_close(ours, theirs)
    loss, *_ = operator(logits, target, 0, 0.0, True, False)
    with pytest.raises(RuntimeError, match="logit_divergence was called without a gradient that is asked for now"):
        loss.sum().backward()


def test_second_derivatives_of_compiled_code_are_refused() -> None:
    torch._dynamo.reset()
    network, x = nn.Linear(5, 4), torch.randn(3, 5, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.divergence(network(x), torch.tensor([0, 1, 2]), kind="kl").sum(), backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()
