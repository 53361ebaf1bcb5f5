"""The report of one run: report.html, made from what the run has left in its folder."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scorematch import intervals
from training.data import npy, toy
from training.engine import checkpoint
from training.reports import pages, plots
from training.reports.plots import Series
from training.settings import command_line

EXAMPLES = "fooled.npz"
TITLES = {
    "standard": "Standard training",
    "gaussian": "Training under Gaussian noise",
    "pgd_at": "PGD-AT",
    "trades": "TRADES",
    "score_direct": "Direct SCORE",
}
# Keys of metrics.jsonl, a panel each.
PANELS = {
    "loss": "training loss",
    "val_acc": "validation accuracy, clean (%)",
    "val_pgd_acc": "validation accuracy under PGD (%)",
    "r_score": "R_SCORE (nat)",
    "r_madry": "R_Madry (nat)",
}


def write(out: Path) -> None:
    """Write OUT/report.html from the finished run in ``out``."""
    checkpoint.write_atomically(out / "report.html", page(out))


def page(out: Path) -> str:
    summary = checkpoint.read_json(out / "summary.json")
    title = f"{TITLES[summary['objective']]} on {summary['data']}"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='lead'>{html.escape(conclusion(summary))}</p>",
        "<h2>Results</h2>",
        pages.table([["measure", "value"], *rows(summary)], "facts"),
        *robustness_section(out, summary),
        *fooled_section(out, summary),
        *toy_section(out, summary),
        "<h2>Training</h2>",
        training_image(out, summary),
        *posterior_section(out, summary),
        "<h2>Cost</h2>",
        pages.table([["", ""], *costs(summary)], "facts"),
        "<h2>Configuration</h2>",
        pages.folded("config.toml: all settings of the run", (out / "config.toml").read_text(encoding="utf-8")),
        pages.folded("commands to go on with", commands(out, summary)),
    ]
    return pages.page(title, sections)


def conclusion(summary: Mapping[str, Any]) -> str:
    """The run in a sentence or two."""
    attack = f"{summary['norm'].capitalize()} perturbations of up to {summary['eps']:g}"
    text = f"The model is right on {summary['clean_acc']:.1f} % of {summary['split']['test']:,} test samples"
    if summary["autoattack_acc"] is None:
        return f"{text}, and on {summary['pgd_acc']:.1f} % under PGD, which searches {attack}."
    text += (
        f", and on {summary['autoattack_acc']:.1f} % of {summary['autoattack_samples']:,} under AutoAttack "
        f"({summary['autoattack_version']}), which searches {attack}."
    )
    gap = summary["pgd_acc"] - summary["autoattack_acc"]
    if summary["autoattack_samples"] == summary["split"]["test"] and gap > 5:
        text += f" PGD alone finds it right on {gap:.1f} points more: PGD is too weak for this model."
    return text


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """What was measured: a name and a value each."""

    def accuracy(key: str) -> str:
        low, high = summary[f"{key}_interval"]
        return f"{summary[f'{key}_acc']:.1f} %  (95 % interval {low:.1f} to {high:.1f})"

    found = [
        ["clean accuracy", accuracy("clean")],
        [f"PGD accuracy, {summary['norm']} {summary['eps']:g}", accuracy("pgd")],
    ]
    if summary["autoattack_acc"] is not None:
        shown = f"{accuracy('autoattack')}, {summary['autoattack_samples']} samples"
        found.append([f"AutoAttack accuracy, {summary['autoattack_version']}", shown])
    if summary.get("calibration_error") is not None:  # earlier versions did not measure it
        shown = f"{summary['calibration_error']:.1f} points"
        if "calibration_error_by_chance" in summary:
            shown += f" ({summary['calibration_error_by_chance']:.1f} are expected by chance)"
        found.append(["expected calibration error, clean", f"{shown}; −log p of the label {summary['nll']:.3f} nats"])
    if "disagrees" in summary:  # by a search, which finds lower bounds
        found += [
            ["KL(p_d, model)", nats(summary["kl"])],
            ["R_SCORE, at least", nats(summary["r_score"])],
            ["samples with another class than p_d's in the ball, at least", f"{summary['disagrees']:.1f} %"],
        ]
    else:
        errors = {"r_standard": "R_Standard", "r_score": "R_SCORE", "r_madry": "R_Madry"}
        exact = f" (exact, up to a grid with steps of eps / {toy.Grid().points_per_eps})"
        found += [[name, nats(summary[key]) + exact] for key, name in errors.items() if key in summary]
    shares = {
        "data_gradient_ratio": "data gradient / model gradient",
        "sign_change_share": "signs of steps that the data gradient changes",
    }
    found += [[name, f"{100 * summary[key]:.2f} %"] for key, name in shares.items() if summary[key] is not None]
    if "posterior_robust_acc" in summary:
        clean = summary["posterior_clean_acc"]
        shown = "anchored at the labels" if clean is None else f"{clean:.1f} % clean"
        shown += f", {summary['posterior_robust_acc']:.1f} % under an attack on itself"
        if "posterior_samples" in summary:
            shown += f" ({summary['posterior_samples']} samples)"
        found.append(["the posterior's own accuracy", shown])
    found.append(["weights of epoch", f"{summary['selected_epoch']} of {summary['epochs']}"])
    return found


def nats(value: float | None) -> str:
    """A length in nats; None is one that JSON has no word for."""
    return "not finite" if value is None else f"{value:.5f} nat"


def costs(summary: Mapping[str, Any]) -> list[list[str]]:
    found = [
        ["posterior", f"{summary['posterior_seconds']:.0f} s"],
        ["training", f"{summary['train_seconds']:.0f} s, {summary['steps']:,} steps"],
        ["evaluation", f"{summary['eval_seconds']:.0f} s"],
    ]
    if (report := summary.get("autoattack")) is not None:
        found.append(["AutoAttack, part of the evaluation", f"{report['seconds']:.0f} s"])
    found += [
        [
            "device",
            f"{summary['device']}; processes: {summary['processes']}, CPU threads of each: {summary['threads']}",
        ],
        ["network", summary["speed"]],
        ["torch, scorematch", f"{summary['torch']}, {summary['scorematch']}"],
        ["commit", (summary["commit"] or "unknown")[:12]],
    ]
    return found


def _line(summary: Mapping[str, Any], x: list[float], values: list[float], **bands: list[float]) -> Series:
    family = summary["posterior"] if summary["objective"] == "score_direct" else summary["objective"]
    label = TITLES[summary["objective"]]
    return Series(label, family, summary["divergence"], x, values, bands.get("low"), bands.get("high"))


def robustness_section(out: Path, summary: Mapping[str, Any]) -> list[str]:
    curve = checkpoint.read_json(out / "curve.json", list)
    count = summary["split"]["test"]
    ends = [intervals.wilson(round(point["acc"] * count / 100), count) for point in curve]
    line = _line(
        summary,
        [point["eps"] for point in curve],
        [point["acc"] for point in curve],
        low=[100 * low for low, _ in ends],
        high=[100 * high for _, high in ends],
    )
    figure = plots.accuracy_against_eps([line], norm=summary["norm"], train_eps=summary["eps"], unit="input units")
    return [
        "<h2>Accuracy against perturbation size</h2>",
        plots.as_image(figure, "accuracy under PGD against perturbation size"),
        "<p class='note'>Under PGD; the band is the 95 % interval over the test samples. A curve that stays far above "
        "zero at large perturbations is a sign of masked gradients: "
        "<code>python -m training.evaluate --attack obfuscation</code> checks that.</p>",
    ]


def fooled_section(out: Path, summary: Mapping[str, Any]) -> list[str]:
    if not (out / EXAMPLES).exists():
        return []
    examples = npy.read_archive(out / EXAMPLES)
    names = [str(name) for name in examples.pop("names")]
    box = tuple(float(end) for end in examples.pop("box"))
    image = plots.as_image(plots.fooled(examples, names, (box[0], box[1])), "clean and attacked samples")
    return [
        "<h2>What fools it</h2>",
        image,
        f"<p class='note'>The first test samples that are classified correctly and that PGD fools at eps "
        f"{summary['eps']:g}, with the model's class and its probability. Differences are scaled alike, to the "
        "largest of them.</p>",
    ]


def toy_section(out: Path, summary: Mapping[str, Any]) -> list[str]:
    if not (out / "toy.json").exists():
        return []
    label, family = TITLES[summary["objective"]], summary["posterior"] or summary["objective"]
    figure = plots.toy_posteriors({label: checkpoint.read_json(out / "toy.json")}, {label: family})
    return ["<h2>What it learns</h2>", plots.as_image(figure, "p_theta beside p_d")]


def training_image(out: Path, summary: Mapping[str, Any]) -> str:
    log = checkpoint.read_metrics(out / "metrics.jsonl")
    panels = {}
    for key, title in PANELS.items():
        kept = [line for line in log if line.get(key) is not None]
        if kept:
            panels[title] = [_line(summary, [line["epoch"] for line in kept], [line[key] for line in kept])]
    return plots.as_image(plots.training_curves(panels), "training curves")


def posterior_section(out: Path, summary: Mapping[str, Any]) -> list[str]:
    if not (out / "paths.json").exists() or summary["objective"] != "score_direct":
        return []
    name = summary["posterior"].replace("_", " ")
    figure = plots.posteriors_along_attack(
        checkpoint.read_json(out / "paths.json"), name=name, family=summary["posterior"]
    )
    return [
        *pages.ALONG_ATTACK,
        plots.as_image(figure, f"target posteriors, {name}"),
    ]


def commands(out: Path, summary: Mapping[str, Any]) -> str:
    evaluate = command_line.command("python", "-m", "training.evaluate", "--run", out)
    lines = [f"{evaluate} --attack obfuscation --plot curve.png"]
    if summary["autoattack_acc"] is None or summary["autoattack_version"] != "standard":
        lines.append(f"{evaluate} --attack autoattack")
    lines.append(f"{evaluate} --attack clean --export weights.pt")
    return "\n".join(lines)
