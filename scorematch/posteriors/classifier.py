"""A classifier of noisy inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..inputs import check_count, check_instance, check_length, check_real, handed, output_at
from .base import PointwisePosterior, Trace, check_pull


class NoiseConditionalClassifier(PointwisePosterior):
    """log p_σ(y|x) read off a network that was trained with cross-entropy on x + σω.

    The optimum of that training is p_σ(y|x) exactly, and its gradient, the score of the class posterior, comes from
    automatic differentiation. Train the network with :func:`scorematch.matching.fit_classifier`, optionally with
    denoising likelihood score matching (Chao et al., ICLR 2022).

    Args:
        network: maps (x [N, …], sigma [N]) to logits [N, L]; fixed from now on: in eval mode, and its parameters
            require no gradients. To train it further, pass a copy.
        num_classes: L.
        sigma: the noise level p_σ at which it is read, in input units; > 0.
        temperature: divides the logits; 1 leaves the estimate as trained. Saved with the state, see
            :func:`scorematch.matching.fit_temperature`.

    Raises:
        TypeError, ValueError: an argument is not what is said above; in a call, the network does not take the two, or
            returns no logits of so many classes.
    """

    temperature: Tensor

    def __init__(self, network: nn.Module, *, num_classes: int, sigma: float, temperature: float = 1.0) -> None:
        super().__init__()
        check_instance("network", network, nn.Module)
        check_count("num_classes", num_classes)
        check_length("sigma", sigma)
        check_length("temperature", temperature)
        self.network = network.eval().requires_grad_(False)
        self.num_classes = num_classes
        self.sigma = sigma
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def train(self, mode: bool = True) -> NoiseConditionalClassifier:
        """A posterior is fixed: its network stays in eval mode."""
        del mode
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        check_real(x)
        logits = output_at(self.network, x, torch.full((len(x),), self.sigma, dtype=x.dtype, device=x.device))
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if given != [len(x), self.num_classes]:
            raise ValueError(f"network must return logits {[len(x), self.num_classes]} for num_classes, got {given}")
        return torch.log_softmax(logits / self.temperature.to(logits.dtype), 1)

    def _trace_at(self, x: Tensor) -> Trace:
        return _ClassifierTrace(self, x)


class _ClassifierTrace(Trace):
    _log_p: Tensor | None

    def __init__(self, posterior: NoiseConditionalClassifier, x: Tensor) -> None:
        self.posterior = posterior
        self.move(x)

    def move(self, x: Tensor) -> None:
        check_real(x)
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self._log_p = self.posterior(handed(self.x))
        self.log_p = self._log_p.detach()

    def pull_back(self, weights: Tensor, grad: Tensor) -> Tensor:
        check_pull(weights, grad, self)
        if self._log_p is None:
            self.move(self.x)
        assert self._log_p is not None
        # log_softmax centres the weights by itself: Σ_y p_y ∇ log p_y = 0.
        (data_gradient,) = torch.autograd.grad(self._log_p, self.x, weights)
        self._log_p = None  # its graph is gone; a compiled network cannot keep it
        return grad + data_gradient
