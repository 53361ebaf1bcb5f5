"""A first look, in about a minute: ``python -m training.demo`` shows how direct SCORE differs from PGD-AT.

Both train the same small network on the one-dimensional toy of Fig. 1, where p_d(y|x) is known. An animation shows
p_θ(y=1|x) beside p_d(y=1|x), the ball around one point x, and the point x' that each objective finds worst in it.
"""

from __future__ import annotations

import re
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.animation import AbstractMovieWriter, FuncAnimation, HTMLWriter, PillowWriter
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from tqdm import tqdm

from scorematch import logit_divergence
from training.data import toy
from training.engine import checkpoint
from training.figures import toy_fits
from training.reports.plots import COLOURS, FAINT, INK, plt
from training.settings import command_line, config
from training.settings.errors import InputError, run_program

REACH = 6.0  # x that are shown
HIGHEST = 0.75  # probability that is shown
GRID = toy.Grid(points_per_eps=100)
FRAMES_PER_SECOND = 8
DPI = 80
EMBED_LIMIT = 1000  # MB of frames in the page, beyond which matplotlib would leave some out
STYLES: dict[toy_fits.Objective, tuple[str, str]] = {
    "madry": ("PGD-AT", "pgd_at"),
    "score": ("direct SCORE", "score_network"),
}
TARGETS = {"madry": "p_d at x, wherever x' is", "score": "p_d at x'"}


@dataclass(frozen=True)
class DemoSettings:
    """How long the two trainings are and where the animation goes."""

    out: Path = Path("runs/demo")  # folder of demo.html, which plays in a browser
    steps: int = 500  # of each training, on all training points
    frames: int = 50  # of the animation
    at: float = 0.0  # x in the middle of the ball that is shown
    seed: int = 0  # of the training points and the initialisation
    gif: bool = False  # write demo.gif, too
    open: bool = False  # show demo.html in the browser when it is done


RANGES: dict[str, config.Check] = {
    "steps": config.AT_LEAST_ONE,
    "frames": config.AT_LEAST_ONE,
    "at": (lambda v: abs(v) <= REACH - toy.EPS, f"from {toy.EPS - REACH:g} to {REACH - toy.EPS:g}, which is shown"),
    "seed": (lambda v: v >= 0, "at least 0"),
}


@dataclass(frozen=True)
class Frame:
    """One model at one step: p_θ(y=1|x) on the grid, the worst x' for its objective, and its R_SCORE in nats."""

    step: int
    probability: Tensor
    worst: float
    r_score: float


Films = dict[toy_fits.Objective, list[Frame]]


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        DemoSettings,
        arguments,
        program="python -m training.demo",
        description="Train PGD-AT and direct SCORE on a toy whose p_d(y|x) is known, and animate what they learn.",
        default=DemoSettings(),
    )
    config.check_ranges(settings, RANGES)
    checkpoint.make_folder(settings.out, "out")
    torch.set_num_threads(1)
    films: Films = {}
    with tqdm(total=2 * settings.steps, desc="training", unit="step") as progress:
        for objective in STYLES:
            films[objective] = film(objective, settings, progress)
    page = save(films, settings)
    for objective, frames in films.items():
        print(f"{STYLES[objective][0]:12}  R_SCORE {frames[-1].r_score:.4f} nats; its target is {TARGETS[objective]}")
    print("R_SCORE is how far p_θ is from p_d at the worst point of the ball, on average (KL). 0 is p_θ = p_d.")
    print(f"animation: {page}")
    if settings.open and not webbrowser.open(page.absolute().as_uri()):
        raise InputError(f"open: no browser was found; open {page} yourself")


def film(objective: toy_fits.Objective, settings: DemoSettings, progress: tqdm) -> list[Frame]:
    """Train with one objective and keep the model's curve at evenly spread steps, the first and the last among them."""
    count = min(settings.frames, settings.steps)
    kept = {round(step * settings.steps / count) for step in range(count + 1)}
    frames: list[Frame] = []

    def watch(step: int, model: nn.Module) -> None:
        if step:
            progress.update()
        if step in kept:
            frames.append(frame(objective, step, model, settings.at))

    fit = toy_fits.Fit(objective, steps=settings.steps, seed=settings.seed, points=settings.seed)
    toy_fits.train(fit, watch)
    return frames


@torch.no_grad()
def frame(objective: str, step: int, model: nn.Module, at: float) -> Frame:
    """What is shown of a model."""
    x = GRID.x
    log_q = toy.log_probabilities(model, x)
    ball = (x - at).abs() <= toy.EPS + 1e-9
    inside = x[ball]
    target = toy.log_joint(torch.full_like(inside, at) if objective == "madry" else inside).log_softmax(1)
    gaps = logit_divergence(log_q[ball], target, kind="kl")
    errors = toy.errors(model, "kl", GRID)
    return Frame(step, log_q[:, 1].exp(), inside[gaps.argmax()].item(), GRID.mean(errors.score).item())


def save(films: Films, settings: DemoSettings) -> Path:
    """Write demo.html, which is returned, and demo.gif where it is asked for."""
    count = len(films["madry"])
    page = settings.out / "demo.html"
    files: dict[Path, AbstractMovieWriter] = {
        page: HTMLWriter(fps=FRAMES_PER_SECOND, embed_frames=True, default_mode="once", embed_limit=EMBED_LIMIT)
    }
    if settings.gif:
        files[page.with_suffix(".gif")] = PillowWriter(fps=FRAMES_PER_SECOND)
    with tqdm(total=len(files) * count, desc="drawing", unit="frame") as progress:

        def drawn(number: int, total: int) -> None:
            progress.update()

        for path, writer in files.items():
            figure, draw = stage(films, settings.at)
            animation = FuncAnimation(figure, draw, frames=count, repeat=False)
            unfinished = path.with_name(f"unfinished-{path.name}")
            animation.save(str(unfinished), writer, dpi=DPI, progress_callback=drawn)
            plt.close(figure)
            unfinished.replace(path)
    checkpoint.write_atomically(page, HEAD + ICON_FONT.sub("", page.read_text(encoding="utf-8")) + WORDS)
    return page


# matplotlib's player takes the symbols of its buttons from the network; these are characters.
ICON_FONT = re.compile(r'<link rel="stylesheet"\s+href="https://[^"]*font-awesome[^"]*">')
SYMBOLS = {
    "minus": "−",
    "fast-backward": "|◀",
    "step-backward": "◂",
    "play": "▶",
    "pause": "❚❚",
    "step-forward": "▸",
    "fast-forward": "▶|",
    "plus": "+",
}
HEAD = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>PGD-AT and direct SCORE on a toy</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: {INK}; }}
img {{ max-width: 100%; }} button {{ min-width: 2.4rem; height: 2rem; font-size: 1rem; }}
.fa {{ font-style: normal; }} .fa-flip-horizontal {{ display: inline-block; transform: scaleX(-1); }}
{" ".join(f".fa-{name}::before {{ content: '{symbol}'; }}" for name, symbol in SYMBOLS.items())}
</style>
<h1>PGD-AT and direct SCORE on a toy</h1>
"""
WORDS = """
<p>Both networks learn p(y=1|x) from the same points. The grey line is the truth, p<sub>d</sub>. The grey band is the
ball around one point x. In it, each objective looks for the point x' where the network is worst, the dots, and pulls
the network towards its target, the dashed line.</p>
<p><b>PGD-AT</b> (left) asks the network for the probability that belongs to x, wherever x' is. So the network gets
flat, and p<sub>d</sub> is not its optimum. <b>Direct SCORE</b> (right) asks for the probability that belongs to x'.
Its optimum is p<sub>d</sub> itself.</p>
<p>R_SCORE is the distance from p<sub>d</sub> at the worst point of the ball, on average over the data: the KL
divergence, in nats. 0 means that the network is p<sub>d</sub>.</p>
</html>
"""


def stage(films: Films, at: float) -> tuple[Figure, Callable[[int], list[Artist]]]:
    """An empty figure, and the function that draws a frame on it."""
    figure, axes = plt.subplot_mosaic(
        [["madry", "score"], ["errors", "errors"]],
        figsize=(8.6, 6.0),
        height_ratios=(1.7, 1),
        layout="constrained",
    )
    x = GRID.x
    shown = x.abs() <= REACH
    p_d = toy.posterior(x)[:, 1]
    ball = (x - at).abs() <= toy.EPS + 1e-9
    moving: dict[tuple[str, str], Line2D] = {}
    for objective, (title, family) in STYLES.items():
        panel, colour = axes[objective], COLOURS[family]
        panel.axvspan(at - toy.EPS, at + toy.EPS, color="#f0f0f0", lw=0, label="ball around x")
        panel.axvline(at, color=FAINT, lw=1, zorder=0)
        panel.plot(x[shown], p_d[shown], color=FAINT, lw=4, label="p_d(y=1|x)")
        height = toy.posterior(torch.tensor([at], dtype=x.dtype))[0, 1]
        target = height.expand(int(ball.sum())) if objective == "madry" else p_d[ball]
        panel.plot(x[ball], target, color=INK, ls=(0, (3, 1.5)), lw=1.6, label=f"target: {TARGETS[objective]}")
        (moving[objective, "curve"],) = panel.plot([], [], color=colour, label="p_θ(y=1|x)")
        (moving[objective, "gap"],) = panel.plot([], [], color=colour, marker="o", ms=5, lw=1, label="worst x'")
        panel.set(title=title, xlabel="x", ylim=(-0.02, HIGHEST), xlim=(-REACH, REACH))
        panel.legend(loc="upper left", fontsize=8)
        frames = films[objective]
        axes["errors"].plot([f.step for f in frames], [f.r_score for f in frames], color=colour, alpha=0.25, lw=1.2)
        (moving[objective, "error"],) = axes["errors"].plot([], [], color=colour, label=title)
    axes["madry"].set_ylabel("probability of y = 1")
    axes["errors"].set(yscale="log", xlabel="training step", ylabel="R_SCORE, nats")
    decades = [10.0**power for power in range(-6, 2)]
    axes["errors"].set_yticks(decades, [f"{decade:g}" for decade in decades])
    errors = [f.r_score for frames in films.values() for f in frames]
    axes["errors"].set_ylim(0.7 * min(errors), 1.4 * max(errors))
    axes["errors"].minorticks_off()
    axes["errors"].legend(loc="upper right", fontsize=8)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once, not for each frame

    def draw(index: int) -> list[Artist]:
        for objective, frames in films.items():
            now = frames[index]
            moving[objective, "curve"].set_data(x[shown].numpy(), now.probability[shown].numpy())
            place = torch.tensor([now.worst], dtype=x.dtype)
            compared = torch.tensor([at], dtype=x.dtype) if objective == "madry" else place
            model = now.probability[(x - now.worst).abs().argmin()]
            heights = [toy.posterior(compared)[0, 1].item(), model.item()]
            moving[objective, "gap"].set_data([now.worst, now.worst], heights)
            so_far = frames[: index + 1]
            moving[objective, "error"].set_data([f.step for f in so_far], [f.r_score for f in so_far])
        return list(moving.values())

    return figure, draw


if __name__ == "__main__":
    sys.exit(run_program(main))
