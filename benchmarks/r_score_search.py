"""How much of the worst case the search for R_SCORE finds that docs/direct-score.md uses.

    python -m benchmarks.r_score_search

One mixture of Gaussians in 16 dimensions with 10,000 labels, the students of the experiments, 600 test points. Beside
the search of the experiments two longer ones: of the same steps, and of steps of a twentieth of the radius, each from
twelve random points. The largest of all three counts as the worst case, which is itself a lower bound. Takes about a
quarter of an hour on one core.
"""

import torch
from torch import Generator, nn

from scorematch import consistency
from training.experiments import students
from training.experiments.estimators import Bench
from training.experiments.problems import gaussian_mixture

POINTS = 600
STUDENTS = ("standard:kl", "pgd_at:kl", "trades:kl:0.5", "trades:kl:0.25:soft energy_ensemble")
DIRECT = ("direct:kl oracle", "direct:kl energy_ensemble")


def main() -> None:
    torch.set_num_threads(1)
    problem, budget = gaussian_mixture(16, 10_000, 0), students.Budget()
    bench = Bench(problem, 0)
    posteriors = {"oracle": problem.oracle, "energy_ensemble": bench.estimated("energy_ensemble").posterior}
    x, y = problem.x_test[:POINTS], problem.y_test[:POINTS]
    short = problem.threat_model.replace(step_size=problem.threat_model.eps / 20)
    print(
        "| student | R_SCORE by the search of the experiments | by all three | share found |\n| --- | --- | --- | --- |"
    )
    for form in (*STUDENTS, *DIRECT):
        words, _, name = form.partition(" ")
        objective = students.objective_of(words, problem, posteriors.get(name), budget)
        model: nn.Module = students.train(problem, objective, 0, budget).last
        found = [
            consistency(model, problem.oracle, x, y, ball, steps=steps, restarts=restarts, generator=generator).r_score
            for ball, steps, restarts, generator in (
                (problem.threat_model, students.SEARCH_STEPS, 1, Generator().manual_seed(0)),
                (problem.threat_model, 60, 12, Generator().manual_seed(1)),
                (short, 150, 12, Generator().manual_seed(2)),
            )
        ]
        whole = torch.stack(found).amax(0).mean()
        print(f"| {form} | {found[0].mean():.4f} | {whole:.4f} | {found[0].mean() / whole:.3f} |", flush=True)


if __name__ == "__main__":
    main()
