"""A network as training calls it: in what precision, compiled or not."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scorematch.compilation import compiled
from scorematch.folding import Folding
from training.engine.hardware import Precision, Speed


class Forward(nn.Module):
    """Calls a network under autocast and returns its outputs in float32, whatever the arithmetic within.

    Weights, losses and gradients of the weights stay in float32; bfloat16 has its range of exponents, so that nothing
    needs to be scaled.

    Args:
        network: a classifier, from x [N, …] to logits [N, L], or a backbone with further inputs. Its own modes,
            parameters and buffers are what attacks borrow.
        precision: ``"float32"``, ``"tf32"`` (float32 with matrix products in TF32, on CUDA) or ``"bfloat16"``.
        compile: run it by ``torch.compile``.
        fold: fold batch norm into convolutions where the network is borrowed in eval mode, without gradients of the
            weights; a compiled network is left to the compiler.
    """

    def __init__(
        self, network: nn.Module, precision: Precision = "float32", compile: bool = False, fold: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.precision = precision
        self._call = compiled(network) if compile else network
        self._folding = Folding(network) if fold and not compile else None

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        if self._folding is None or self.network.training or self._takes_gradients():
            return self._outputs(x, *more)
        with self._folding.applied():
            return self._outputs(x, *more)

    @property
    def folds(self) -> bool:
        """Whether it folds a batch norm where it may."""
        return self._folding is not None and bool(self._folding.pairs)

    @property
    def folds_nothing(self) -> bool:
        """Whether folding was asked for, and of the batch norms that there are none can be folded."""
        norms = any(isinstance(module, _BatchNorm) for module in self.network.modules())
        return norms and self._folding is not None and not self.folds

    def _takes_gradients(self) -> bool:
        return any(parameter.requires_grad for parameter in self.network.parameters())

    def _outputs(self, *inputs: Tensor) -> Tensor:
        if self.precision == "bfloat16":
            # No weight is used twice in a pass, and a cast that is kept must not get into a recorded graph.
            with torch.autocast(inputs[0].device.type, torch.bfloat16, cache_enabled=False):
                return self._call(*inputs).float()
        return self._call(*inputs)


def forward_at(speed: Speed, network: nn.Module) -> Forward:
    """The network as ``speed`` says that it is called."""
    return Forward(network, speed.precision, speed.compile, speed.fold)
