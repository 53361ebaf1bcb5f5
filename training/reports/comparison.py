"""The report of a comparison: report.html with everything inside it; for a README, table.md and the main plot."""

import html
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.data import FOLDER, FORMATS, slug
from training.engine import checkpoint
from training.reports import pages, plots
from training.reports.plots import Series

DISTILLATION_BELOW = 0.01  # data gradient / model gradient
POSTERIOR_NAMES = {
    "score_network": "score network",
    "kernel_density": "kernel density",
    "noise_conditional_classifier": "noise-conditional classifier",
    "joint_energies": "mean of joint energies",
    "oracle": "oracle",
}

CONDITIONS = {"autoattack_acc": "under AutoAttack", "pgd_acc": "under PGD", "clean_acc": "clean"}

Comparison = Mapping[str, Any]


def write(out: Path, comparison: Comparison, figures: Path | None = None) -> str:
    """Write the report into ``out`` (and the README's two files into ``figures``); returns the table as text."""
    table = markdown_table(comparison)
    name, figure = (
        ("posteriors", toy_figure(comparison)) if toy(comparison) else ("accuracy", accuracy_figure(comparison))
    )
    image = plots.rendered(figure, "png")
    checkpoint.write_atomically(out / "table.md", table + "\n")
    checkpoint.write_atomically(out / f"{name}.png", image)
    checkpoint.write_atomically(out / "report.html", page(comparison))
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(figures / f"{slug(comparison['data'])}-table.md", table + "\n")
        checkpoint.write_atomically(figures / f"{slug(comparison['data'])}-{name}.png", image)
    return table


def is_surrogate(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a comparison is adversarial training as published, without a posterior."""
    return entry["objective"] in ("pgd_at", "trades") and not entry.get("posterior")


def is_direct(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a comparison is direct SCORE."""
    return bool(entry["objective"] == "score_direct")


def toy(comparison: Comparison) -> bool:
    return comparison["data"] == "toy"


def seeds_of_rows(comparison: Comparison) -> list[int]:
    """How many seeds each objective has; fewer than the others where runs failed."""
    return [len(runs) for runs in comparison["runs"].values()]


def threads(comparison: Comparison) -> list[int]:
    """The numbers of CPU threads that runs had; times of runs that differ in it are not comparable."""
    return sorted({run["threads"] for runs in comparison["runs"].values() for run in runs})


def interval(estimate: Mapping[str, Any] | None, form: str = ".1f", factor: float = 1.0) -> str:
    """``mean ± half width`` of an estimate over seeds."""
    if estimate is None:
        return "–"
    mean = format(factor * estimate["mean"], form)
    if estimate["low"] is None:
        return mean
    return f"{mean} ± {format(factor * (estimate['high'] - estimate['low']) / 2, form)}"


def difference(estimate: Mapping[str, Any] | None) -> str:
    return interval(estimate, "+.1f").replace("± +", "± ")


def table_rows(comparison: Comparison) -> list[list[str]]:
    """The header and one row for each objective."""
    on_toy = toy(comparison)
    eps = f"{comparison['norm']} {comparison['eps']:g}"
    header = ["objective", "clean, %", f"PGD, {eps}, %"]
    gaps = ["difference from the best surrogate, PGD", "the same, AutoAttack"]
    header += ["R_Standard, nat", "R_SCORE, nat", "R_Madry, nat"] if on_toy else ["AutoAttack, %", *gaps]
    header += ["calibration error, points", "data / model gradient, %", "step signs changed, %", "training, s"]
    rows = [header]
    paired, seeds = comparison["paired"], seeds_of_rows(comparison)
    timed = len(threads(comparison)) == 1
    if differ := len(set(seeds)) > 1:
        header.insert(1, "seeds")
    for (name, entry), count in zip(comparison["aggregate"].items(), seeds, strict=True):
        row = [entry["label"], interval(entry["clean_acc"]), interval(entry["pgd_acc"])]
        if on_toy:
            errors = {"r_standard": ".5f", "r_score": ".5f", "r_madry": ".4f"}
            row += [interval(entry.get(name), form) for name, form in errors.items()]
        else:
            differences = paired.get("differences", {}).get(name, {})
            gaps = [difference(differences.get(measure)) for measure in ("pgd_acc", "autoattack_acc")]
            best = name == paired.get("against")
            row += [interval(entry.get("autoattack_acc")), *(["(the best surrogate)", "–"] if best else gaps)]
        row += [
            interval(entry.get("calibration_error"), ".1f"),
            interval(entry.get("data_gradient_ratio"), ".1f", 100),
            interval(entry.get("sign_change_share"), ".1f", 100),
        ]
        seconds = entry["train_seconds"]["mean"] + entry["posterior_seconds"]["mean"]
        row.append(f"{seconds:.0f}" if timed else "–")
        if differ:
            row.insert(1, str(count))
        rows.append(row)
    return rows


def markdown_table(comparison: Comparison) -> str:
    rows = table_rows(comparison)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def accuracy_figure(comparison: Comparison) -> Figure:
    series = []
    for entry in comparison["aggregate"].values():
        curve = entry["curve"]
        banded = all(point["low"] is not None for point in curve)
        series.append(
            Series(
                entry["label"],
                entry["family"],
                entry["divergence"],
                [point["eps"] for point in curve],
                [point["mean"] for point in curve],
                [max(point["low"], 0) for point in curve] if banded else None,
                [min(point["high"], 100) for point in curve] if banded else None,
                entry.get("generated", False),
            )
        )
    known = comparison["data"] in (*FORMATS, FOLDER)  # images; a function may return anything
    unit = "pixel values in [0, 1]" if known else "input units"
    return plots.accuracy_against_eps(series, norm=comparison["norm"], train_eps=comparison["eps"], unit=unit)


def training_series(comparison: Comparison, key: str) -> list[Series]:
    """The mean over seeds of one key of metrics.jsonl, for each objective that logs it."""
    series = []
    for name, runs in comparison["runs"].items():
        entry = comparison["aggregate"][name]
        logs = [checkpoint.read_metrics(Path(run["folder"]) / "metrics.jsonl") for run in runs]
        kept = [[line for line in log if key in line] for log in logs]
        if kept and kept[0]:
            epochs = [line["epoch"] for line in kept[0]]
            values = [[math.nan if line[key] is None else line[key] for line in log] for log in kept]
            columns = zip(*values, strict=True)
            means = [sum(column) / len(column) for column in columns]
            generated = entry.get("generated", False)
            series.append(
                Series(entry["label"], entry["family"], entry["divergence"], epochs, means, generated=generated)
            )
    return series


def page(comparison: Comparison) -> str:
    """The whole report as one HTML page without references to anything outside it."""
    any_run = next(iter(comparison["runs"].values()))[0]
    title = f"Direct SCORE and its surrogates on the {comparison['data']}"
    sections = [
        f"<h1>{title}</h1>",
        f"<p class='lead'>{_headline(comparison)}</p>",
        "<h2>Results</h2>",
        pages.table(table_rows(comparison)),
        f"<p class='note'>{_how_many(comparison)} on {any_run['split']['test']:,} test samples."
        f"{_ensemble(comparison)}{_times(comparison)}</p>",
        *failed_section(comparison),
        *(toy_section(comparison) if toy(comparison) else accuracy_section(comparison)),
        "<h2>Training</h2>",
        training_section(comparison),
        *path_sections(comparison),
        *gradient_section(comparison),
        *setting_section(comparison),
    ]
    return pages.page(title, sections)


def _how_many(comparison: Comparison) -> str:
    seeds = seeds_of_rows(comparison)
    if max(seeds) == 1:
        return "One seed, so there is no interval,"
    count, best = f"{max(seeds)} seeds", ""
    if min(seeds) < max(seeds):
        count = f"{min(seeds)} to {max(seeds)} seeds, as the column says,"
        common = ", ".join(map(str, comparison["paired"].get("seeds", [])))
        best = f", over the seeds that all have ({common or 'none'})"
    condition = CONDITIONS[comparison["paired"].get("measure", "pgd_acc")]
    return (
        f"Means over {count} ± half the width of Student's 95 % interval over seeds, which covers the randomness "
        "of training, not that of the test set; differences are paired by seed; the best is the one with the highest "
        f"mean {condition} on these very samples{best}, and the intervals of this table do not allow for that choice;"
    )


def failed_section(comparison: Comparison) -> list[str]:
    """The runs whose numbers are missing, with their logs."""
    failed = comparison["failed"]
    if not failed:
        return []
    names = [f"{run['objective']} with seed {run['seed']} ({run['log']})" for run in failed]
    count = f"{len(failed)} of {len(failed) + sum(seeds_of_rows(comparison))} runs failed"
    return [f"<p class='note'>{count}, and nothing here has their numbers: {html.escape(', '.join(names))}.</p>"]


def _ensemble(comparison: Comparison) -> str:
    """What the column of AutoAttack is about."""
    runs = [run for runs in comparison["runs"].values() for run in runs if run.get("autoattack_acc") is not None]
    kinds = sorted({f"{run['autoattack_version']}, {run['autoattack_samples']:,} test samples" for run in runs})
    return f" AutoAttack: {' or '.join(kinds)}." if kinds else ""


def _times(comparison: Comparison) -> str:
    """Why there are no times, where there are none."""
    counts = threads(comparison)
    if len(counts) == 1:
        return ""
    return f" Runs had {' and '.join(map(str, counts))} CPU threads, so their times are not comparable."


def _headline(comparison: Comparison) -> str:
    aggregate = comparison["aggregate"].values()
    direct, surrogates = ([entry for entry in aggregate if belongs(entry)] for belongs in (is_direct, is_surrogate))
    if toy(comparison) and direct and surrogates:
        found = [*direct, *surrogates]
        shown = (f"{interval(entry.get('r_score'), '.5f')} nat with {entry['label']}" for entry in found)
        return f"R_SCORE after training: {', '.join(shown)}."
    if not (judged := comparison["paired"].get("verdict")):
        counts = {"objective": len(aggregate), "seed": max(seeds_of_rows(comparison))}
        return ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items()) + "."
    names = (judged["direct"], judged["surrogate"])
    best, other = (comparison["aggregate"][name]["label"] for name in names)
    ours, theirs = (judged["accuracies"][name] for name in names)
    lead = judged["measure"]
    rest = "; ".join(
        f"{condition}, {interval(ours[key])} % and {interval(theirs[key])} %"
        for key, condition in CONDITIONS.items()
        if key != lead and key in ours and key in theirs
    )
    return _verdict(comparison, judged) + (
        f"The best direct objective ({best}) keeps {interval(ours[lead])} % {CONDITIONS[lead]} at eps "
        f"{comparison['eps']:g} and the best surrogate ({other}) {interval(theirs[lead])} %; {rest}."
    )


def _verdict(comparison: Comparison, judged: Mapping[str, Any]) -> str:
    """Who is ahead under the strongest attack, the best direct objective or the best surrogate, if seeds can tell."""
    gap, (ours, theirs) = judged["difference"], judged["of"]
    shown = f"{difference(gap)} points {CONDITIONS[judged['measure']]}, paired by seed"
    if len(judged["seeds"]) < len(comparison["seeds"]):
        shown += f", over the seeds that both have ({', '.join(map(str, judged['seeds']))})"
    if abs(gap["mean"]) < judged["one_sample"]:
        shown += ", less than one test sample"
    choice = ""
    if ours * theirs > 1:
        allows = "" if gap["low"] is None else ", and the 95 % interval allows for that choice"
        counts = f"{ours} direct objective{'s' * (ours > 1)} and {theirs} surrogate{'s' * (theirs > 1)}"
        choice = f"Both are the best of their kind here, among {counts}{allows}. "
    if len(judged["seeds"]) == 1:
        return f"One seed cannot tell direct SCORE and its surrogates apart ({shown}). {choice}"
    told = {
        "direct": f"Direct SCORE is ahead of its best surrogate ({shown}). ",
        "surrogate": f"The best surrogate is ahead of direct SCORE ({shown}). ",
        None: f"These seeds do not tell direct SCORE and its best surrogate apart ({shown}). ",
    }
    return told[judged["ahead"]] + choice


def _attack(comparison: Comparison) -> str:
    settings = next(iter(comparison["settings"].values()))
    losses = " and ".join({"ce": "cross-entropy", "margin": "margin"}.get(x, x) for x in settings["eval_losses"])
    return (
        f"PGD with {settings['eval_steps']} steps, the losses {losses}, {settings['eval_restarts']} random starts for "
        "each; a sample counts only if it withstands all of them."
    )


def toy_figure(comparison: Comparison) -> Figure:
    curves, families = {}, {}
    for name, runs in comparison["runs"].items():
        entry = comparison["aggregate"][name]
        curves[entry["label"]] = checkpoint.read_json(Path(runs[0]["folder"]) / "toy.json")
        families[entry["label"]] = entry["family"]
    return plots.toy_posteriors(curves, families)


def toy_section(comparison: Comparison) -> list[str]:
    return [
        "<h2>What the models learn</h2>",
        plots.as_image(toy_figure(comparison), "p_theta beside p_d for each objective"),
        "<p class='note'>As Fig. 1 of Pang et al. (2022): the data, and the first seed of each objective. Minimising "
        "R_Madry flattens p_θ; minimising R_SCORE brings it to p_d. Accuracy tells nothing here: p_d(y=1|x) is below "
        "one half everywhere, so the best classifier always says 0.</p>",
    ]


def accuracy_section(comparison: Comparison) -> list[str]:
    bands = " Bands are 95 % intervals over seeds." if max(seeds_of_rows(comparison)) > 1 else ""
    return [
        "<h2>Accuracy against perturbation size</h2>",
        plots.as_image(accuracy_figure(comparison), "accuracy under PGD against perturbation size"),
        f"<p class='note'>{_attack(comparison)}{bands}</p>",
    ]


def training_section(comparison: Comparison) -> str:
    measures = {"val_pgd_acc": "validation accuracy under PGD (%)", "val_acc": "validation accuracy, clean (%)"}
    log = []
    if toy(comparison):
        measures = {"r_score": "R_SCORE (nat)", "r_madry": "R_Madry (nat)"}
        log = ["R_SCORE (nat)"]
    panels = {title: training_series(comparison, key) for key, title in measures.items()}
    panels = {title: series for title, series in panels.items() if series}
    image = plots.as_image(plots.training_curves(panels, log=log), "training curves") if panels else ""
    return image + "<p class='note'>Means over seeds.</p>"


def path_sections(comparison: Comparison) -> list[str]:
    sections = []
    for name, runs in comparison["runs"].items():
        entry = comparison["aggregate"][name]
        path = Path(runs[0]["folder"]) / "paths.json"
        if entry["objective"] == "score_direct" and path.exists():
            shown = POSTERIOR_NAMES.get(entry["family"], entry["family"])
            figure = plots.posteriors_along_attack(checkpoint.read_json(path), name=shown, family=entry["family"])
            sections += [f"<h3>{html.escape(shown)}</h3>", plots.as_image(figure, f"target posteriors, {shown}")]
    if not sections:
        return []
    return [*pages.ALONG_ATTACK, *sections]


def gradient_section(comparison: Comparison) -> list[str]:
    items = []
    for entry in comparison["aggregate"].values():
        ratio = entry.get("data_gradient_ratio")
        if ratio is None:
            continue
        shown = f"‖data gradient‖ / ‖model gradient‖ is {interval(ratio, '.2f', 100)} %"
        if entry.get("sign_change_share"):
            shown += f", and it changes {interval(entry['sign_change_share'], '.2f', 100)} % of the step signs"
        verdict = (
            " Distillation: the data gradient changes almost nothing." if ratio["mean"] < DISTILLATION_BELOW else ""
        )
        items.append(f"<li><b>{html.escape(entry['label'])}</b>: {shown}.{verdict}</li>")
    audits = [
        [
            entry["label"],
            interval(entry["posterior_clean_acc"]) if "posterior_clean_acc" in entry else "the labels",
            interval(entry["posterior_robust_acc"]),
        ]
        for entry in comparison["aggregate"].values()
        if "posterior_robust_acc" in entry
    ]
    if not items:
        return []
    section = [
        "<h2>How much of the attack comes from the data</h2>",
        "<p>In direct SCORE, and in TRADES with a target that the data move, the attack ascends the model's gradient "
        "plus that of log p(y|x') (means over the last epoch).</p>",
        f"<ul>{''.join(items)}</ul>",
    ]
    if audits:
        header = ["posterior of", "accuracy, clean, %", "accuracy under an attack on itself, %"]
        section += [
            "<p>The posteriors as classifiers by themselves: a model at zero loss of direct SCORE would have these "
            "accuracies. They are not bounds: a trained model can be below or above them.</p>",
            pages.table([header, *audits]),
        ]
    return section


def setting_section(comparison: Comparison) -> list[str]:
    any_run = next(iter(comparison["runs"].values()))[0]
    counts = " or ".join(map(str, threads(comparison)))
    facts = [
        ["command", comparison["command"]],
        ["data split", ", ".join(f"{key} {value}" for key, value in any_run["split"].items())],
        ["weights", "best validation accuracy, robust (standard: clean)" if any_run["selection"] == "best" else "last"],
        ["torch, scorematch", f"{any_run['torch']}, {any_run['scorematch']}"],
        ["commit", any_run["commit"] or "unknown"],
        ["machine", f"{platform.machine()}, {any_run['device']}; CPU threads of a run: {counts}"],
        ["wall time of the last call", f"{comparison['wall_seconds']:.0f} s"],
    ]
    every = list(comparison["settings"].values())
    common = {
        k: v for k, v in every[0].items() if k not in ("seed", "threads") and all(other.get(k) == v for other in every)
    }
    return [
        "<h2>Configuration</h2>",
        pages.table([["", ""], *facts], "facts"),
        pages.folded(
            "settings common to all runs", "\n".join(f"{key} = {json.dumps(value)}" for key, value in common.items())
        ),
        pages.folded("commands (the last seed)", "\n".join(comparison["commands"].values())),
    ]
