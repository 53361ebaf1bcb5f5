"""The plots of a report: each a matplotlib figure made from plain values.

Colour tells the objective (Okabe and Ito's palette, safe for colour-blind readers), dashes the divergence, and the
marker repeats the colour for grey prints. Hollow markers and dots in the line: with generated images.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

INK, FAINT = "#222222", "#b8b8b8"
COLOURS = {
    "standard": "#767676",
    "gaussian": "#8a5a2b",
    "pgd_at": "#0072b2",
    "trades": "#009e73",
    "score_network": "#d55e00",
    "kernel_density": "#e69f00",
    "noise_conditional_classifier": "#cc79a7",
    "joint_energies": "#7a3fa0",
    "oracle": "#56b4e9",
    "standard with a posterior": "#3f3f3f",
    "gaussian with a posterior": "#4d3013",
    "pgd_at with a posterior": "#00406b",
    "trades with a posterior": "#005a41",
}
MARKERS = {
    "standard": "x",
    "gaussian": "*",
    "pgd_at": "o",
    "trades": "s",
    "score_network": "^",
    "kernel_density": "D",
    "noise_conditional_classifier": "v",
    "joint_energies": "<",
    "oracle": "P",
    "standard with a posterior": "+",
    "gaussian with a posterior": "1",
    "pgd_at with a posterior": "p",
    "trades with a posterior": "h",
}
DASHES: dict[str, Any] = {
    "kl": "-",
    "se": "--",
    "l2": (0, (7, 2)),
    "l1": (0, (2, 1)),
    "linf": (0, (2, 4)),
    "js": (0, (6, 1.2, 2, 1.2)),
    "js_distance": (0, (6, 1.2, 2, 1.2, 2, 1.2)),
    "l1_squared": (0, (2, 1, 2, 4)),
}
DASHES_GENERATED: dict[str, Any] = {
    "kl": "-.",
    "se": (0, (5, 1, 1, 1, 1, 1)),
    "l2": (0, (7, 1, 1, 1, 1, 1, 1, 1)),
    "l1": (0, (2, 1, 1, 1)),
    "linf": (0, (2, 3, 1, 3)),
    "js": (0, (6, 1.2, 2, 1.2, 1, 1.2)),
    "js_distance": (0, (6, 1.2, 2, 1.2, 2, 1.2, 1, 1.2)),
    "l1_squared": (0, (2, 1, 2, 1, 1, 4)),
}

plt.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "svg.hashsalt": "scorematch",
        "savefig.bbox": "tight",
    }
)


class Series(NamedTuple):
    """One line with its band. ``family`` decides colour and marker, ``divergence`` and ``generated`` the dashes."""

    label: str
    family: str
    divergence: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    generated: bool = False

    @classmethod
    def of_points(cls, label: str, family: str, points: Sequence[Mapping[str, Any]], key: str) -> "Series":
        """A solid line of accuracies with intervals, ``acc`` and ``interval``, against what ``key`` holds."""
        low, high = zip(*(point["interval"] for point in points), strict=True)
        return cls(label, family, "kl", [p[key] for p in points], [p["acc"] for p in points], low, high)

    def draw(self, axes: Axes, *, marker: bool = True) -> None:
        colour = COLOURS.get(self.family, INK)
        axes.plot(
            self.x,
            self.mean,
            linestyle=(DASHES_GENERATED if self.generated else DASHES)[self.divergence],
            markerfacecolor="white" if self.generated else colour,
            color=colour,
            marker=MARKERS.get(self.family, ".") if marker or len(self.x) == 1 else None,
            markersize=5,
            label=self.label,
        )
        if self.low is not None and self.high is not None:
            axes.fill_between(self.x, self.low, self.high, color=colour, alpha=0.15, linewidth=0)


def accuracy_against_eps(
    series: Sequence[Series],
    *,
    norm: str,
    train_eps: float,
    unit: str,
    mark: str = "eps in training",
    split: str = "test",
) -> Figure:
    """One line for each series; ``mark`` is what ``train_eps`` is, ``split`` the samples that are attacked."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for line in series:
        line.draw(axes)
    axes.axvline(train_eps, color=FAINT, linewidth=1.2, zorder=0)
    axes.text(
        train_eps,
        1.01,
        mark,
        transform=axes.get_xaxis_transform(),
        ha="center",
        color="#707070",
        fontsize=8,
    )
    axes.set(
        xlabel=f"perturbation size eps ({norm.capitalize()}, {unit})",
        ylabel=f"accuracy under PGD (% of {split} samples)",
        ylim=(0, 102),
        xlim=(0, None),
    )
    if len(series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=6, numpoints=2)
    return figure


def certified_accuracy(series: Sequence[Series], *, largest: float) -> Figure:
    """Against the L2 radius; ``largest`` is what the number of noise vectors can certify at best."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for line in series:
        line.draw(axes, marker=False)
    axes.axvline(largest, color=FAINT, linewidth=1.2, zorder=0)
    axes.text(
        largest,
        1.01,
        "largest certifiable",
        transform=axes.get_xaxis_transform(),
        ha="right",
        color="#707070",
        fontsize=8,
    )
    axes.set(
        xlabel="certified radius (L2, input units)",
        ylabel="certified accuracy (% of samples)",
        ylim=(0, 102),
        xlim=(0, 1.02 * largest),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=6, numpoints=2)
    return figure


def training_curves(panels: Mapping[str, Sequence[Series]], *, log: Sequence[str] = ()) -> Figure:
    """One panel for each measure, against the epoch."""
    figure, grid = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False)
    for axes, (measure, series) in zip(grid[0], panels.items(), strict=True):
        for line in series:
            line.draw(axes, marker=False)
        axes.set(xlabel="epoch", ylabel=measure, yscale="log" if measure in log else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        epochs = [epoch for line in series for epoch in line.x]
        if len(set(epochs)) == 1:
            axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=6, numpoints=2)
    figure.tight_layout()
    return figure


def picture(axes: Axes, image: np.ndarray, box: tuple[float, float] = (0.0, 1.0)) -> None:
    """An image [C, H, W]: in colour where C is 3, else its first channel, dark where it is large.

    ``box`` are the smallest and the largest value; an end that is not finite is that of the image itself.
    """
    low, high = (
        end if math.isfinite(end) else float(own) for end, own in zip(box, (image.min(), image.max()), strict=True)
    )
    if len(image) == 3:
        axes.imshow(np.clip((image.transpose(1, 2, 0) - low) / (high - low), 0, 1), interpolation="nearest")
    else:
        axes.imshow(image[0], cmap="gray_r", vmin=low, vmax=high, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def shortened(text: str, figure: Figure, *, width: float, size: float) -> str:
    """``text`` of one line, with an ellipsis at its end where it is wider than ``width`` inches at ``size`` points."""
    renderer = cast(FigureCanvasAgg, figure.canvas).get_renderer()
    font = FontProperties(size=size)

    def fits(text: str) -> bool:
        return renderer.get_text_width_height_descent(text, font, ismath=False)[0] <= width * figure.dpi

    cut = (f"{text[:kept]}…" for kept in range(len(text) - 1, 0, -1))
    return next(filter(fits, (text, *cut)), "…")


def fooled(examples: Mapping[str, np.ndarray], names: Sequence[str], box: tuple[float, float]) -> Figure:
    """Samples that fool a model: clean, attacked, and the difference between them, with what the model says of both.

    ``examples`` as :func:`training.measures.fooled` returns them; ``names`` [L] of the classes.
    """
    count = len(examples["label"])
    width = 1.45  # inches of a column
    figure, grid = plt.subplots(3, count, figsize=(width * count, 5.2), squeeze=False)
    difference = examples["attacked"] - examples["clean"]
    reach = max(float(np.abs(difference).max()), 1e-12)
    for column in range(count):
        for row, (key, says) in enumerate((("clean", "before"), ("attacked", "after"))):
            probabilities = examples[says][column]
            best = int(probabilities.argmax())
            picture(grid[row, column], examples[key][column], box)
            name = shortened(" ".join(names[best].split()), figure, width=width - 0.25, size=9)
            grid[row, column].set_title(
                f"{name}\n{100 * probabilities[best]:.0f} %",
                fontsize=9,
                weight="normal",
                loc="center",
                parse_math=False,
            )
        change = difference[column]
        shown = change if len(change) == 3 else change[:1]
        picture(grid[2, column], shown, (-reach, reach))
    for row, label in enumerate(("clean", "attacked", "difference")):
        grid[row, 0].set_ylabel(label, fontsize=10)
    figure.tight_layout(h_pad=0.4)
    return figure


def posteriors_along_attack(paths: Mapping[str, Any], *, name: str, family: str) -> Figure:
    """For each sample its clean and attacked image, and below p(true class) of posterior and model against the step.

    ``paths`` as :func:`training.measures.posteriors_along_attack` returns them. Samples that are not images have no
    picture.
    """
    samples = len(paths["label"])
    low, high = paths.get("box", (0.0, 1.0))  # earlier versions did not write it
    box = (-math.inf if low is None else low, math.inf if high is None else high)  # JSON has no infinity
    images = np.ndim(paths["clean"]) == 4
    figure = plt.figure(figsize=(2.7 * samples, 4.0))
    rows = figure.add_gridspec(2, samples, height_ratios=(1, 1.5), hspace=0.45, wspace=0.25)
    for sample, label in enumerate(paths["label"]):
        pair = rows[0, sample].subgridspec(1, 2, wspace=0.08)
        for column, (title, key) in enumerate((("clean", "clean"), ("attacked", "final")) if images else ()):
            image = figure.add_subplot(pair[0, column])
            picture(image, np.asarray(paths[key][sample]), box)
            image.set_title(title, fontsize=9, weight="normal")
        axes = figure.add_subplot(rows[1, sample])
        steps = range(len(paths["model"]))
        for key, colour, dashes, shown in (
            ("posterior", COLOURS.get(family, INK), "-", f"target p(y|x'), {name}"),
            ("model", INK, "--", "model p_θ(y|x')"),
        ):
            axes.plot(steps, [row[sample][label] for row in paths[key]], dashes, color=colour, label=shown)
        axes.set(ylim=(-0.03, 1.03), xlabel="step of the attack")
        axes.set_title(f"class {label}", fontsize=9)
        if sample == 0:
            axes.set_ylabel("probability of the\ntrue class")
            handles, labels = axes.get_legend_handles_labels()
        else:
            axes.set_yticklabels([])
    figure.legend(handles, labels, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.1))
    return figure


def toy_posteriors(curves: Mapping[str, Mapping[str, Sequence[float]]], families: Mapping[str, str]) -> Figure:
    """Fig. 1: p_d(x, y) on the left, then p_θ(y=1|x) of each objective beside p_d(y=1|x)."""
    columns = min(3, 1 + len(curves))
    rows = -(-(1 + len(curves)) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.7 * columns, 2.9 * rows), squeeze=False)
    panels = list(grid.flat)
    first = next(iter(curves.values()))
    for key, colour, dashes, label in (
        ("joint_0", "#0072b2", "-", "y = 0"),
        ("joint_1", "#d55e00", "--", "y = 1"),
    ):
        panels[0].fill_between(first["x"], first[key], color=colour, alpha=0.15, linewidth=0)
        panels[0].plot(first["x"], first[key], dashes, color=colour, label=label)
    panels[0].set(title="data", xlabel="x", ylabel="density p_d(x, y)")
    panels[0].legend(loc="upper left")
    for axes, (name, curve) in zip(panels[1:], curves.items(), strict=False):
        axes.plot(curve["x"], curve["p_d"], color=FAINT, linewidth=4, label="p_d(y=1|x)")
        axes.plot(curve["x"], curve["p_theta"], color=COLOURS.get(families[name], INK), label="p_θ(y=1|x)")
        axes.set(title=name, xlabel="x", ylabel="probability of y = 1", ylim=(-0.02, 0.8))
        axes.legend(loc="upper left")
    for axes in panels[1 + len(curves) :]:
        axes.remove()
    figure.tight_layout()
    return figure


def rendered(figure: Figure, form: str) -> bytes:
    """The figure as a file of this form; it is closed."""
    return rendered_as(figure, (form,))[0]


def rendered_as(figure: Figure, forms: Sequence[str]) -> list[bytes]:
    """The figure as a file of each form, such as svg or png; it is closed."""
    files = []
    for form in forms:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=160, metadata={"Date": None} if form == "svg" else None)
        files.append(buffer.getvalue())
    plt.close(figure)
    return files


def as_image(figure: Figure, alt: str) -> str:
    """The figure as an HTML image that carries its own data."""
    data = base64.b64encode(rendered(figure, "svg")).decode()
    return f'<div class="wide"><img src="data:image/svg+xml;base64,{data}" alt="{alt}"></div>'
