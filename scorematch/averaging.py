"""The exponential moving average of the weights of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage(AveragedModel):
    """The exponential average of weights and buffers, updated by one multi-tensor operation and without waiting.

    torch's own update copies its count of updates to the device of the weights each time, which waits for the device;
    here the count stays on the CPU. Its state is that of :class:`torch.optim.swa_utils.AveragedModel`.

    Args:
        model: what is averaged; the first update copies it.
        decay: maps the number of an update, counted from 1, to its decay in [0, 1].
        average_buffers: whether floating-point buffers are averaged too. All other buffers are copied from the model.
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float], average_buffers: bool = False) -> None:
        super().__init__(model, use_buffers=average_buffers)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        count = int(self.n_averaged) + 1
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = list(model.parameters())
        copies: list[Tensor] = list(self.module.buffers())
        originals: list[Tensor] = list(model.buffers())
        if self.use_buffers:
            averages += [buffer for buffer in copies if buffer.is_floating_point()]
            values += [buffer for buffer in originals if buffer.is_floating_point()]
            copies = [buffer for buffer in copies if not buffer.is_floating_point()]
            originals = [buffer for buffer in originals if not buffer.is_floating_point()]
        if count == 1:
            torch._foreach_copy_(averages, values)
        else:
            get_ema_multi_avg_fn(self.decay(count))(averages, values, count)
        if copies:
            torch._foreach_copy_(copies, originals)
        self.n_averaged.fill_(count)
