"""A B(x) of one's own: the L1 ball, for attacks and training (section 6 of the paper: SCORE with an arbitrary B(x)).

    python -m examples.l1_ball

What takes steps in a threat model, ``PGD``, ``pgd_at``, ``trades`` and ``score_direct``, accepts any class with the
methods of ``scorematch.Perturbations``: a random start, a step and a projection. This program trains a small network on
the 8×8 digits by PGD-AT within an L1 ball and says how it stands attacks there. (``ThreatModel("l1", eps)`` is built
in, with a projection that minds the range of the features; this one is written out to show how.)
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

import scorematch as sm
from training import data, models


@dataclass(frozen=True)
class L1Ball:
    """B(x) = {x' : ‖x' − x‖₁ ≤ eps, lower ≤ x' ≤ upper}.

    Args:
        eps: radius, the sum of absolute changes of all features; > 0.
        step_size: length of a step, in the same norm; > 0.
        share: of the features that a step moves, those with the largest gradients; in (0, 1].
        lower, upper: the range of a feature.
    """

    eps: float
    step_size: float
    share: float = 0.05
    lower: float = 0.0
    upper: float = 1.0

    def check_radius(self, features: int) -> None:
        """Every number of features will do."""

    def random_start(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Uniform in the ball of each x [N, …], then cut to the range."""
        flat = x.flatten(1)
        # d + 1 exponential variables divided by their sum; without the last one they are uniform in the simplex.
        size = (len(flat), flat.shape[1] + 1)
        exponential = torch.empty(size, dtype=x.dtype, device=x.device).exponential_(generator=generator)
        lengths = (exponential / exponential.sum(1, keepdim=True))[:, :-1]
        signs = torch.empty_like(flat).uniform_(-1, 1, generator=generator).sign()
        return (flat + self.eps * lengths * signs).clamp(self.lower, self.upper).reshape(x.shape)

    def step(self, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        """The same length along each of the features with the largest gradients, then back into B(x0)."""
        flat = grad.flatten(1)
        count = max(1, round(self.share * flat.shape[1]))
        largest = flat.abs().topk(count, dim=1).indices
        move = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign() * self.step_size / count)
        return self.project(x + move.reshape(x.shape), x0)

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """The nearest point of the ball (Duchi et al., ICML 2008), then cut to the range, which x0 lies in.

        The change of each feature is made shorter by the same λ ≥ 0, and becomes 0 where it is shorter than λ.
        """
        change = (x - x0).flatten(1)
        lengths = change.abs()
        descending = lengths.sort(dim=1, descending=True).values
        excess = descending.cumsum(1) - self.eps
        number = torch.arange(1, lengths.shape[1] + 1, dtype=x.dtype, device=x.device)
        kept = (descending * number > excess).sum(1, keepdim=True).clamp(min=1)
        shorter = (excess.gather(1, kept - 1) / kept).clamp(min=0)
        nearest = change.sign() * (lengths - shorter).clamp(min=0)
        return (x0 + nearest.reshape(x.shape)).clamp(self.lower, self.upper)


def train(ball: L1Ball, digits: data.Data, epochs: int, seed: int = 0) -> torch.nn.Module:
    """A small network, by PGD-AT with squared error within the ball."""
    torch.manual_seed(seed)
    model = models.build("digits_cnn", digits.input_shape, digits.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(digits.x_train)).split(64):
            x, y = digits.x_train[index], digits.y_train[index]
            outcome = sm.objectives.pgd_at(model, x, y, threat_model=ball, divergence="se", steps=10)
            optimizer.zero_grad()
            outcome.loss.mean().backward()
            optimizer.step()
    return model.eval()


def main(epochs: int = 10) -> None:
    """Train, attack, print."""
    torch.set_num_threads(1)
    digits = data.load(data.DataSettings("digits"))
    ball = L1Ball(eps=3.0, step_size=1.0)
    model = train(ball, digits, epochs)
    attacked = sm.PGD(ball, steps=40, restarts=2, losses=("ce", "margin"))(model, digits.x_test, digits.y_test)
    for name, x in (("clean", digits.x_test), (f"L1 {ball.eps:g}", attacked)):
        with torch.no_grad():
            right = (model(x).argmax(1) == digits.y_test).double().mean()
        print(f"{name}: {100 * right:.1f} %")


if __name__ == "__main__":
    main()
