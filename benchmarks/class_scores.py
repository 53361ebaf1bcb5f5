"""The classes of a score network: told one at a time, some of them alone, or all at once by a student. Error and cost.

    python -m training.score --data digits --posterior-settings.classes embedding --out runs/teacher
    python -m training.score --data digits --posterior-settings.teacher runs/teacher/posterior.pt --out runs/student
    python -m benchmarks.class_scores --teacher runs/teacher/posterior.pt --others runs/student/posterior.pt

The reference is the teacher, asked for every class. Beside it: the teacher asked for its k most probable classes, and
other networks. At test images moved by uniform noise within Linf ``eps``: the total variation between their p(y|x') and
the reference's, the relative error of ∇ log p(y|x') for the label y, and the seconds for the class scores of a batch.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from scorematch.matching import losses_by_level
from scorematch.posteriors import ScoreNetwork
from training import data
from training.data import DataName, DataSettings
from training.engine import posteriors, scores
from training.settings import command_line
from training.settings.errors import run_program


@dataclass(frozen=True)
class ClassScoreSettings:
    """What to compare."""

    teacher: Path  # posterior.pt of training.score with --posterior-settings.classes embedding
    others: tuple[Path, ...] = ()  # posterior.pt of other score networks of the same data
    top_k: tuple[int, ...] = (1, 2, 3, 5)  # numbers of most probable classes
    data: DataName = "digits"  # data set
    data_root: Path | None = None  # folder with the files of CIFAR or SVHN; None is $SCOREMATCH_DATA
    eps: float = 0.15  # radius of the noise that moves the images
    points: int = 500  # test images
    batch: int = 64  # images of a timed batch
    rounds: int = 9  # timed batches of each, after one that is not counted
    threads: int = 1  # CPU threads
    out: Path | None = None  # JSON file to write


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        ClassScoreSettings,
        arguments,
        program="python -m benchmarks.class_scores",
        description="Compare ways to the scores of all classes: error and cost.",
    )
    counts = dict.fromkeys(("points", "batch", "rounds"), record.COUNT)
    device = record.check(settings, {**counts, "eps": record.LENGTH, "top_k": record.COUNTS})
    loaded = data.load(DataSettings(settings.data, root=settings.data_root))
    reference = posteriors.read(settings.teacher, loaded)[1]
    compared = {"teacher": reference}
    for k in settings.top_k:
        compared[f"teacher, {k} classes"] = posteriors.read(settings.teacher, loaded, top_k=k)[1]
    for path in settings.others:
        compared[str(path.parent.name)] = posteriors.read(path, loaded)[1]
    x, y = loaded.x_test[: settings.points], loaded.y_test[: settings.points]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    moved = (x + settings.eps * (2 * noise - 1)).clamp(loaded.lower, loaded.upper)
    exact = answers(reference, x, moved, y)
    seconds = times(compared, x[: settings.batch], y[: settings.batch], settings.rounds)
    lines = []
    for name, posterior in compared.items():
        found = answers(posterior, x, moved, y)
        held_out = losses_by_level(posterior.denoiser, loaded.x_validation, loaded.y_validation, scores.SIGMAS, seed=0)
        line = {
            "scores": name,
            "total_variation": round(float(0.5 * (found[0] - exact[0]).abs().sum(1).mean()), 4),
            "gradient_error": round(float((found[1] - exact[1]).norm() / exact[1].norm()), 3),
            "held_out_loss": {f"{sigma:g}": round(value, 4) for sigma, value in held_out.items()},
            "milliseconds": round(1e3 * seconds[name], 2),
        }
        lines.append(line)
        print(json.dumps(line), flush=True)
    record.write(settings.out, "class_scores", arguments, device, lines=lines)


def answers(posterior: ScoreNetwork, x: Tensor, moved: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """p(y|x') [N, L] and ∇ log p(y|x') [N, …] for labels y, at x' reached from x in one step."""
    trace = posterior.trace(x, y)
    trace.move(moved)
    of_label = torch.nn.functional.one_hot(y, posterior.num_classes).to(x.dtype)
    return trace.log_p.exp(), trace.pull_back(of_label, torch.zeros_like(x))


def times(compared: dict[str, ScoreNetwork], x: Tensor, y: Tensor, rounds: int) -> dict[str, float]:
    """The median seconds of the class scores of a batch; rounds of all of them follow each other."""
    measured: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(rounds + 1):
        for name, posterior in compared.items():
            classes = posterior.trace(x, y).log_p.topk(posterior.top_k, 1).indices if posterior.top_k else None
            begin = time.perf_counter()
            posterior.scores(x, classes)
            if number:
                measured[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in measured.items()}


if __name__ == "__main__":
    sys.exit(run_program(main))
