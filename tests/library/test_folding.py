"""Batch norm folded into convolutions: the same function, the model untouched."""

import copy
import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from scorematch.attacks.classifier import _same
from scorematch.folding import Folding


@fx.wrap
def positive(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Net(nn.Module):
    """Two pairs that fold; a convolution whose output goes two ways; a norm used twice; a convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.conv4, self.norm3 = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.conv5, self.norm5 = nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False)
        self.conv6, self.norm6, self.norm7 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        y = self.conv2(x)
        y = y + self.norm2(y)
        y = self.norm3(self.conv3(y)) + self.norm3(self.conv4(y))
        y = self.norm6(self.conv6(y)) + self.norm7(self.conv6(x))
        return self.norm5(self.conv5(y)).flatten(1)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.eval()


def test_pairs(net: Net) -> None:
    assert Folding(net).pairs == [(net.conv1, net.norm1), (net.conv5, net.norm5)]


def test_the_function_is_the_same_and_the_model_untouched(net: Net) -> None:
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(net.state_dict())
    folding = Folding(net)
    expected = net(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    calls = []
    with folding.applied():
        hook = net.norm1.register_forward_hook(lambda module, inputs, output: calls.append(output is inputs[0]))
        actual = net(x)
        hook.remove()
    assert calls == [True], "the batch norm was passed by"
    (given,) = torch.autograd.grad(actual.square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(net(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(net.conv1.weight, nn.Parameter)
    assert net.conv1.bias is None


def test_changed_weights_and_statistics_are_folded_anew(net: Net) -> None:
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    folding = Folding(net)
    with folding.applied(), torch.no_grad():
        first = net(x)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    net.train()(x)
    net.eval()
    with folding.applied(), torch.no_grad():
        second = net(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, net(x), rtol=1e-12, atol=1e-12)


def test_what_an_error_leaves(net: Net) -> None:
    folding = Folding(net)
    with pytest.raises(ValueError, match="within"), folding.applied():
        raise ValueError("within")
    assert isinstance(net.conv5.weight, nn.Parameter)
    assert "forward" not in vars(net.norm5)


def test_a_model_that_cannot_be_traced_has_no_pairs() -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    class Wrapped(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(positive(x))

    assert Folding(Branches()).pairs == []
    assert len(Folding(Wrapped()).pairs) == 2


def test_a_model_is_not_what_is_traced(net: Net) -> None:
    """A forward pass that keeps its values keeps none of the tracer's, and hooks see none of them."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.mean, self.log, self.kept = net, nn.Sequential(nn.Flatten()), 0.0, [], {}

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + x.mean()
            self.log.append(x)
            self.kept["x"] = x
            return self.head(self.body(x))

    model, seen = Remembering().eval(), []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    assert Folding(model).pairs == [(net.conv1, net.norm1), (net.conv5, net.norm5)]
    assert (model.mean, model.log, model.kept, seen) == (0.0, [], {}, [])
    net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert Folding(model).pairs == []
    assert seen == []


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weights_that_are_computed_are_left_alone(net: Net, normed: Callable[[nn.Module], nn.Module]) -> None:
    normed(net.conv1)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    expected = net(x)
    folding = Folding(net)
    assert folding.pairs == [(net.conv5, net.norm5)]
    with folding.applied():
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rounding_is_measured_by_the_largest_logit(scale):
    logits = scale * torch.tensor([[1.0, 1e-4, -0.5]])
    assert _same(logits + 5e-4 * scale, logits)
    assert not _same(logits + torch.tensor([0.0, 5e-3, 0.0]) * scale, logits)
    assert _same(torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, math.nan]]))
    assert not _same(torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, 0.0]]))


STARTED, GO = threading.Event(), threading.Event()


class Slow(nn.Module):
    """Tells when it is traced, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        STARTED.set()
        GO.wait()
        return self.norm(self.conv(x))


def test_other_threads_go_on_while_a_model_is_traced(net: Net) -> None:
    """torch.fx changes all modules of the process meanwhile."""
    STARTED.clear()
    GO.clear()
    called, got = nn.Module.__call__, nn.Module.__getattr__
    slow, x = Slow().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected, found = net(x), []
    threads = [threading.Thread(target=lambda model=model: found.append(Folding(model))) for model in (slow, net)]
    threads[0].start()
    STARTED.wait()
    threads[1].start()  # it waits for the first
    try:
        assert torch.equal(net(x), expected)
        assert isinstance(slow.conv.weight, nn.Parameter)
    finally:
        GO.set()
        for thread in threads:
            thread.join()
    assert sorted(len(folding.pairs) for folding in found) == [1, 2]
    assert (nn.Module.__call__, nn.Module.__getattr__) == (called, got)


def test_weights_in_another_place_fold_anew(net: Net) -> None:
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    folding = Folding(net)
    with folding.applied(), torch.no_grad():
        before = net(x)
    net.conv1.weight.data = 2 * net.conv1.weight.data
    with torch.no_grad():
        expected = net(x)
        with folding.applied():
            torch.testing.assert_close(net(x), expected)
    assert not torch.allclose(before, expected)


def test_a_norm_with_a_forward_of_its_own_is_left_alone(net: Net) -> None:
    net.norm5.forward = own = lambda x: 3 * x  # type: ignore[method-assign]
    folding = Folding(net)
    assert folding.pairs == [(net.conv1, net.norm1)]
    with folding.applied():
        pass
    assert net.norm5.forward is own
