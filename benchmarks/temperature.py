"""What a temperature fitted on held-out labels does to the KL of a posterior, where p_d is known.

    python -m benchmarks.temperature

Mixtures of Gaussians in 16 dimensions, one network each, read at σ = 0.5; KL(p_d ‖ posterior) at random points of the
ball, in nats. Takes about three minutes on one core.
"""

import torch
from torch import Generator

from scorematch import audit
from scorematch.matching import fit_temperature
from scorematch.posteriors import NoiseConditionalClassifier
from training.experiments.estimators import Bench
from training.experiments.problems import gaussian_mixture

SIGMA = 0.5


def main() -> None:
    torch.set_num_threads(1)
    print("| labels | seed | network | temperature | KL without | KL with |\n| --- | --- | --- | --- | --- | --- |")
    for count in (2000, 10_000):
        for seed in range(3):
            problem = gaussian_mixture(16, count, seed)
            bench = Bench(problem, seed)
            x, y = problem.x_test, problem.y_test
            moved = problem.threat_model.random_start(x, Generator().manual_seed(0))
            for kind in ("classifier", "energy"):
                network, held_out = bench.network(kind, 0), bench.held_out(0)
                plain = NoiseConditionalClassifier(network, num_classes=3, sigma=SIGMA)
                temperature = fit_temperature(plain.log_prob, *held_out, noise=problem.reach)
                sharpened = NoiseConditionalClassifier(network, num_classes=3, sigma=SIGMA, temperature=temperature)
                errors = [
                    audit.kl_error(posterior, problem.oracle, x, y, moved).mean().item()
                    for posterior in (plain, sharpened)
                ]
                print(
                    f"| {count:,} | {seed} | {kind} | {temperature:.3f} | {errors[0]:.4f} | {errors[1]:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
