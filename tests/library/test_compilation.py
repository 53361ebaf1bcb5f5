"""torch gives up after eight versions of one piece of code, and training needs more."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from scorematch.compilation import compiled


def test_every_way_to_call_a_network_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modes, five batches, and gradients or none."""
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    call = compiled(network, dynamic=False)
    for training in (True, False):
        network.train(training)
        for size in range(2, 7):
            for of_x in (True, False):
                call(torch.ones(size, 2, requires_grad=of_x))
    assert counter.frame_count == 20


def test_the_limit_of_an_earlier_torch_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_2_11(model: nn.Module, *, dynamic: bool | None = None) -> tuple:
        return model, dynamic, torch._dynamo.config.recompile_limit

    monkeypatch.setattr(torch, "compile", of_2_11)
    model = nn.Linear(1, 1)
    with torch._dynamo.config.patch(recompile_limit=8):
        assert compiled(model, dynamic=True) == (model, True, 128)
    with torch._dynamo.config.patch(recompile_limit=500):
        assert compiled(model) == (model, None, 500)
